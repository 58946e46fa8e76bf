"""The QEMU driver on a scripted QMP server: what it asks for, and how it counts."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from scripted_qmp import CUT, HANG, MIB, Refuse, ScriptedQmp, cpu, serving, virtio_mem

from guestd.broker.hypervisor.base import Vm
from guestd.broker.hypervisor.qemu import QemuVm
from guestd.broker.hypervisor.qmp_link import LinkTiming
from guestd.model.errors import HypervisorError, OutcomeUnknown
from guestd.model.vm import VmStatus

BOOT = 512 * MIB
QUICK = LinkTiming(answer_seconds=0.5, retry_min_seconds=0.01, retry_max_seconds=0.05)
OURS = "/machine/peripheral/guestd-cpu-"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ScriptedQmp]:
    async with serving(tmp_path / "qmp") as server:
        yield server


@pytest.fixture
def changes() -> list[float]:
    return []


@pytest.fixture
async def driver(server: ScriptedQmp, changes: list[float]) -> AsyncIterator[Vm]:
    driver = QemuVm(server.path, QUICK, unplug_repeat_seconds=0.2)
    await driver.open(lambda: changes.append(asyncio.get_running_loop().time()))
    await asyncio.sleep(0.02)
    changes.clear()
    yield driver
    await driver.close()


def plugged(server: ScriptedQmp, *cores: int) -> None:
    """CPU 0 from boot, and these of ours."""
    paths = {0: "/machine/unattached/device[0]"} | {core: f"{OURS}{core}" for core in cores}
    server.answers["query-hotpluggable-cpus"] = [cpu(core, paths.get(core)) for core in (3, 2, 1, 0)]


def balloon(server: ScriptedQmp, actual: int) -> None:
    server.answers["query-balloon"] = {"actual": actual}


async def test_cpus_go_to_the_lowest_free_slots_with_their_properties(server: ScriptedQmp, driver: Vm) -> None:
    plugged(server, 2)
    await driver.request_vcpus(4)
    props = {"socket-id": 0, "thread-id": 0, "driver": "fake-cpu"}
    assert server.changes() == [
        ("device_add", {**props, "core-id": 1, "id": "guestd-cpu-1"}),
        ("device_add", {**props, "core-id": 3, "id": "guestd-cpu-3"}),
    ]


async def test_the_highest_cpus_go_first_and_boot_cpus_never(server: ScriptedQmp, driver: Vm) -> None:
    plugged(server, 1, 2, 3)
    await driver.request_vcpus(3)
    assert server.changes() == [("device_del", {"id": "guestd-cpu-3"})]
    for gone in (3, 2, 1):  # one at a time
        plugged(server, *range(1, gone))
        await driver.request_vcpus(0)
    assert server.changes()[1:] == [("device_del", {"id": f"guestd-cpu-{i}"}) for i in (2, 1)]


async def test_a_removal_that_waits_for_the_guest_is_not_hammered(server: ScriptedQmp, driver: Vm) -> None:
    plugged(server, 1)
    for _ in range(20):
        await driver.request_vcpus(1)
    assert len(server.changes()) == 1
    await asyncio.sleep(0.21)
    await driver.request_vcpus(1)
    assert len(server.changes()) == 2


async def test_a_cpu_that_left_and_came_back_is_removed_at_once(server: ScriptedQmp, driver: Vm) -> None:
    plugged(server, 1)
    await driver.request_vcpus(1)
    server.emit("DEVICE_DELETED", device="guestd-cpu-1", path="/x")
    await driver.observe()
    await driver.request_vcpus(1)
    assert len(server.changes()) == 2


@pytest.mark.parametrize(
    "answer",
    [
        Refuse("Device guestd-cpu-1 is already in the process of unplug"),
        Refuse("Device 'guestd-cpu-1' not found", "DeviceNotFound"),
    ],
)
async def test_a_removal_that_is_under_way_or_done_is_a_success(
    server: ScriptedQmp, driver: Vm, answer: Refuse
) -> None:
    plugged(server, 1)
    server.answers["device_del"] = answer
    await driver.request_vcpus(1)
    assert [command for command, _ in server.changes()] == ["device_del"], "asked for once, and taken for an answer"


async def test_memory_above_boot_is_virtio_mem_in_whole_blocks(server: ScriptedQmp, driver: Vm) -> None:
    await driver.request_memory(BOOT + 7 * MIB)
    resize = {"path": "/machine/peripheral/vm0", "property": "requested-size", "value": 6 * MIB}
    assert server.changes() == [("qom-set", resize)]


async def test_memory_below_boot_is_the_balloon(server: ScriptedQmp, driver: Vm) -> None:
    balloon(server, BOOT)
    server.answers["query-memory-devices"] = [virtio_mem(size=64 * MIB, requested=64 * MIB)]
    await driver.request_memory(257 * MIB)
    resize = {"path": "/machine/peripheral/vm0", "property": "requested-size", "value": 0}
    assert server.changes() == [("qom-set", resize), ("balloon", {"value": 256 * MIB})]
    await driver.request_memory(1)
    assert server.changes()[-1] == ("balloon", {"value": 128 * MIB})
    await driver.request_memory(BOOT)
    assert server.changes()[-1] == ("balloon", {"value": BOOT})


async def test_what_is_set_already_is_not_set_again(server: ScriptedQmp, driver: Vm) -> None:
    server.answers["query-memory-devices"] = [virtio_mem(requested=64 * MIB)]
    await driver.request_memory(BOOT + 64 * MIB)
    assert server.changes() == []


async def test_several_devices_are_filled_in_the_order_of_their_ids(server: ScriptedQmp, driver: Vm) -> None:
    server.answers["query-memory-devices"] = [
        virtio_mem(maximum=128 * MIB, name="b"),
        virtio_mem(maximum=64 * MIB, name="a"),
    ]
    await driver.request_memory(BOOT + 100 * MIB)
    assert [args["value"] for _, args in server.changes()] == [64 * MIB, 36 * MIB]
    assert (await driver.observe()).memory_max_bytes == BOOT + 192 * MIB


async def test_held_and_plugged(server: ScriptedQmp, driver: Vm) -> None:
    balloon(server, 500 * MIB)
    for size, requested, held in ((0, 64, 564), (64, 0, 564), (32, 64, 564)):
        server.answers["query-memory-devices"] = [virtio_mem(size * MIB, requested * MIB)]
        state = await driver.observe()
        assert state.memory_held_bytes == held * MIB
        assert state.memory_plugged_bytes == (500 + size) * MIB


async def test_settling_asks_for_nothing_more(server: ScriptedQmp, driver: Vm) -> None:
    balloon(server, 300 * MIB)
    server.answers["query-memory-devices"] = [virtio_mem(size=64 * MIB, requested=0)]
    await driver.settle_memory()
    assert [args["value"] for _, args in server.changes()] == [64 * MIB, 300 * MIB]


async def test_after_a_reset_the_balloon_counts_only_when_it_reports_again(server: ScriptedQmp, driver: Vm) -> None:
    balloon(server, 256 * MIB)
    assert (await driver.observe()).memory_held_bytes == 256 * MIB
    server.emit("RESET", seconds=10, guest=True)
    await driver.observe()
    state = await driver.observe()
    assert (state.memory_held_bytes, state.resets) == (BOOT, 1)
    server.emit("BALLOON_CHANGE", seconds=9, actual=1)  # from before, delivered late
    await driver.observe()
    assert (await driver.observe()).memory_held_bytes == BOOT
    server.emit("BALLOON_CHANGE", seconds=11, actual=1)
    await driver.observe()
    assert (await driver.observe()).memory_held_bytes == 256 * MIB


@pytest.mark.parametrize("status", ["paused", "inmigrate", "shutdown", "guest-panicked", "internal-error", "new"])
async def test_a_vm_that_does_not_run_is_frozen(server: ScriptedQmp, driver: Vm, status: str) -> None:
    server.answers["query-status"] = {"status": status}
    state = await driver.observe()
    assert (state.status, state.memory_held_bytes) == (VmStatus.FROZEN, BOOT)


async def test_a_migrating_vm_is_frozen(server: ScriptedQmp, driver: Vm) -> None:
    server.answers["query-migrate"] = {"status": "active"}
    assert (await driver.observe()).status is VmStatus.FROZEN


@pytest.mark.parametrize("command", ["query-status", "query-hotpluggable-cpus", "query-balloon"])
async def test_nonsense_is_named(server: ScriptedQmp, driver: Vm, command: str) -> None:
    server.answers[command] = 7
    with pytest.raises(HypervisorError, match=f"unexpected answer to {command}"):
        await driver.observe()


async def test_a_balloon_error_of_another_kind_is_not_taken_for_none(server: ScriptedQmp, driver: Vm) -> None:
    server.answers["query-balloon"] = Refuse("on fire")
    with pytest.raises(HypervisorError, match="on fire"):
        await driver.observe()


@pytest.mark.parametrize("answer", [HANG, CUT])
async def test_a_lost_answer_is_an_unknown_outcome_and_heals(
    server: ScriptedQmp, driver: Vm, changes: list[float], answer: object
) -> None:
    server.answers["qom-set"] = answer
    with pytest.raises(OutcomeUnknown):
        await driver.request_memory(BOOT + 64 * MIB)
    del server.answers["qom-set"]
    await asyncio.sleep(0.2)
    assert (await driver.observe()).status is VmStatus.RUNNING
    assert changes


async def test_without_a_connection_observing_is_no_error(server: ScriptedQmp, driver: Vm) -> None:
    await server.stop()
    assert (await driver.observe()).status is VmStatus.UNREACHABLE


async def test_a_burst_of_events_is_one_change(server: ScriptedQmp, driver: Vm, changes: list[float]) -> None:
    for _ in range(200):
        server.emit("ACPI_DEVICE_OST")
    server.emit("RTC_CHANGE")
    server.emit(None)
    await asyncio.sleep(0.1)
    assert 1 <= len(changes) <= 5


async def test_events_of_no_interest_change_nothing(server: ScriptedQmp, driver: Vm, changes: list[float]) -> None:
    server.emit("RTC_CHANGE", offset=1)
    await asyncio.sleep(0.05)
    assert changes == []
