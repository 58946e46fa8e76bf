"""The QEMU driver on a VM with DIMM slots: what it adds, what it has removed, and what it counts."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from dimm_qmp import DIMM_BYTES, DimmQmp, serving_dimms
from scripted_qmp import CUT, MIB, Refuse

from guestd.broker.hypervisor import dimms
from guestd.broker.hypervisor.base import Vm
from guestd.broker.hypervisor.qemu import QemuVm
from guestd.broker.hypervisor.qmp_link import LinkTiming
from guestd.model.errors import HypervisorError, OutcomeUnknown

BOOT = 512 * MIB
QUICK = LinkTiming(answer_seconds=0.5, retry_min_seconds=0.01, retry_max_seconds=0.05)
ALL = BOOT + 3 * DIMM_BYTES


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[DimmQmp]:
    async with serving_dimms(tmp_path / "qmp") as server:
        yield server


@pytest.fixture
def changes() -> list[None]:
    return []


@pytest.fixture
async def driver(server: DimmQmp, changes: list[None]) -> AsyncIterator[Vm]:
    driver = QemuVm(server.path, QUICK)
    await driver.open(lambda: changes.append(None))
    yield driver
    await driver.close()


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(400):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("not within 2 s")


async def test_such_a_vm_is_described(server: DimmQmp, driver: Vm) -> None:
    state = await driver.observe()
    assert (state.boot_memory_bytes, state.memory_min_bytes, state.memory_max_bytes) == (BOOT, BOOT, ALL)
    assert (state.memory_held_bytes, state.memory_plugged_bytes, state.memory_unit_bytes) == (BOOT, BOOT, DIMM_BYTES)


@pytest.mark.parametrize(("shared", "kind"), [(True, "memory-backend-memfd"), (False, "memory-backend-ram")])
async def test_growing_adds_dimms_on_memory_like_the_vms_own(
    server: DimmQmp, driver: Vm, shared: bool, kind: str
) -> None:
    server.backends["ram0"]["share"] = shared
    await driver.request_memory(BOOT + 2 * DIMM_BYTES + 5)
    added = [
        [
            ("object-add", {"qom-type": kind, "id": f"guestd-mem-{n}", "size": DIMM_BYTES, "share": shared}),
            ("device_add", {"driver": "pc-dimm", "id": f"guestd-dimm-{n}", "memdev": f"guestd-mem-{n}"}),
        ]
        for n in (0, 1)
    ]
    assert [one for one in server.changes() if one[0] != "qom-get"] == [*added[0], *added[1]]
    state = await driver.observe()
    assert state.memory_held_bytes == state.memory_plugged_bytes == BOOT + 2 * DIMM_BYTES
    before = len(server.changes())
    await driver.request_memory(BOOT + 2 * DIMM_BYTES)
    assert {name for name, _ in server.changes()[before:]} == {"qom-get"}
    with pytest.raises(HypervisorError, match="can have 2 GiB at most"):
        await driver.request_memory(ALL + DIMM_BYTES)


async def test_a_refused_dimm_leaves_no_memory_behind(server: DimmQmp, driver: Vm) -> None:
    server.answers["device_add"] = Refuse("a used vhost backend has no free memory slots left")
    with pytest.raises(HypervisorError, match="no free memory slots left"):
        await driver.request_memory(ALL)
    assert list(server.backends) == ["ram0"]
    assert (await driver.observe()).memory_held_bytes == BOOT


async def test_shrinking_goes_on_by_itself_one_by_one_and_ends_the_memory_behind(server: DimmQmp, driver: Vm) -> None:
    await driver.request_memory(ALL)
    await driver.request_memory(BOOT + DIMM_BYTES)
    assert server.removals() == ["guestd-dimm-2"]
    assert (await driver.observe()).memory_held_bytes == ALL
    server.leave("guestd-dimm-2")
    await until(lambda: len(server.removals()) == 2)
    assert list(server.backends) == ["ram0", "guestd-mem-0", "guestd-mem-1"]
    assert (await driver.observe()).memory_held_bytes == BOOT + 2 * DIMM_BYTES
    server.leave("guestd-dimm-1")
    await until(lambda: list(server.backends) == ["ram0", "guestd-mem-0"])
    await asyncio.sleep(0.05)
    assert server.removals() == ["guestd-dimm-2", "guestd-dimm-1"]
    assert (await driver.observe()).memory_held_bytes == BOOT + DIMM_BYTES


async def test_memory_is_held_until_the_backend_has_ended_and_then_it_is_told(
    server: DimmQmp, driver: Vm, changes: list[None]
) -> None:
    await driver.request_memory(ALL)
    await driver.request_memory(ALL - DIMM_BYTES)
    server.answers["object-del"] = Refuse("in use")
    server.leave("guestd-dimm-2")
    await asyncio.sleep(0.05)
    state = await driver.observe()
    assert (state.memory_held_bytes, state.memory_plugged_bytes) == (ALL, ALL - DIMM_BYTES)
    del server.answers["object-del"]
    changes.clear()
    await driver.observe()
    await until(lambda: "guestd-mem-2" not in server.backends)
    await until(lambda: bool(changes))
    assert (await driver.observe()).memory_held_bytes == ALL - DIMM_BYTES


@pytest.mark.parametrize("how", ["ost", "events", "command"])
async def test_one_that_the_guest_keeps_is_left_alone_and_the_next_is_tried(
    server: DimmQmp, driver: Vm, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    await driver.request_memory(ALL)
    if how == "command":
        server.answers["device_del"] = Refuse("Device 'guestd-dimm-2' does not support hotplugging")
    await driver.request_memory(ALL - DIMM_BYTES)
    if how == "ost":
        server.keep("guestd-dimm-2")
    elif how == "events":
        server.emit("MEM_UNPLUG_ERROR", device="guestd-dimm-2", msg="busy")
        server.emit("DEVICE_UNPLUG_GUEST_ERROR", device="guestd-dimm-2", path="/machine/peripheral/guestd-dimm-2")
    await until(lambda: len(server.removals()) > 1)
    if how != "command":
        server.leave("guestd-dimm-1")
        await until(lambda: "guestd-mem-1" not in server.backends)
        assert server.removals() == ["guestd-dimm-2", "guestd-dimm-1"]
    warned = [
        record.getMessage() for record in caplog.records if "guestd-dimm-2 was not removed" in record.getMessage()
    ]
    assert len(warned) == 1


async def test_progress_and_success_of_an_eject_are_no_refusal(server: DimmQmp, driver: Vm) -> None:
    await driver.request_memory(ALL)
    await driver.request_memory(ALL - DIMM_BYTES)
    for source, status in ((3, 0x84), (3, 0), (1, 1)):
        info = {"device": "guestd-dimm-2", "slot": "2", "slot-type": "DIMM", "source": source, "status": status}
        server.emit("ACPI_DEVICE_OST", info=info)
    server.emit("ACPI_DEVICE_OST", info=7)
    await asyncio.sleep(0.05)
    assert server.removals() == ["guestd-dimm-2"]


async def test_without_an_answer_it_is_asked_again_later(
    server: DimmQmp, driver: Vm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dimms, "ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(dimms, "REST_SECONDS", 0.05)
    await driver.request_memory(ALL)
    await driver.request_memory(ALL - DIMM_BYTES)
    await until(lambda: len(server.removals()) >= 2)
    assert set(server.removals()) == {"guestd-dimm-2"}  # another one could be one too many


async def test_a_settled_shrink_goes_no_further(server: DimmQmp, driver: Vm) -> None:
    await driver.request_memory(ALL)
    await driver.request_memory(BOOT)
    await driver.settle_memory()
    server.leave("guestd-dimm-2")
    await until(lambda: "guestd-mem-2" not in server.backends)
    await asyncio.sleep(0.02)
    assert server.removals() == ["guestd-dimm-2"]
    assert (await driver.observe()).memory_held_bytes == ALL - DIMM_BYTES


async def test_dimms_are_found_again_after_a_restart_and_leftovers_are_ended(server: DimmQmp, driver: Vm) -> None:
    await driver.request_memory(BOOT + 2 * DIMM_BYTES)
    server.backends["guestd-mem-7"] = {"id": "guestd-mem-7", "size": DIMM_BYTES, "share": True}
    await driver.close()
    again = QemuVm(server.path, QUICK)
    await again.open(lambda: None)
    state = await again.observe()
    assert (state.memory_held_bytes, state.memory_plugged_bytes) == (BOOT + 3 * DIMM_BYTES, BOOT + 2 * DIMM_BYTES)
    await until(lambda: "guestd-mem-7" not in server.backends)
    await again.request_memory(BOOT + DIMM_BYTES)
    assert server.removals() == ["guestd-dimm-1"]
    await again.close()


async def test_a_dimm_of_somebody_else_is_never_removed(server: DimmQmp, driver: Vm) -> None:
    server.backends["more"] = {"id": "more", "size": DIMM_BYTES, "share": True}
    server.dimms["dimm0"] = {"id": "dimm0", "memdev": "/objects/more", "size": DIMM_BYTES, "addr": 4096 * MIB}
    assert (await driver.observe()).boot_memory_bytes == BOOT + DIMM_BYTES
    await driver.request_memory(1)
    assert server.removals() == []


async def test_a_lost_answer_is_an_unknown_outcome_and_nothing_is_added_twice(server: DimmQmp, driver: Vm) -> None:
    server.answers["device_add"] = CUT  # done, but the answer is lost
    with pytest.raises(OutcomeUnknown):
        await driver.request_memory(BOOT + DIMM_BYTES)
    del server.answers["device_add"]
    await asyncio.sleep(0.2)
    assert (await driver.observe()).memory_held_bytes == BOOT + DIMM_BYTES
    await driver.request_memory(BOOT + DIMM_BYTES)
    assert list(server.dimms) == ["guestd-dimm-0"]


async def test_the_balloon_counts_from_all_dimms(server: DimmQmp, driver: Vm) -> None:
    server.answers["query-balloon"] = {"actual": BOOT}
    await driver.request_memory(BOOT + DIMM_BYTES)
    assert server.changes()[-1] == ("balloon", {"value": BOOT + DIMM_BYTES})
    server.answers["query-balloon"] = {"actual": BOOT + DIMM_BYTES - 100 * MIB}
    state = await driver.observe()
    assert (state.memory_ballooned_bytes, state.memory_held_bytes) == (100 * MIB, BOOT + DIMM_BYTES - 100 * MIB)
    await driver.settle_memory()
    assert server.changes()[-1] == ("balloon", {"value": BOOT + DIMM_BYTES - 100 * MIB})


async def test_an_old_qemu_does_not_tell_its_slots_and_has_no_dimms(server: DimmQmp, driver: Vm) -> None:
    server.answers["qom-get"] = Refuse("Property 'pc-q35-6.2-machine.memory' not found")
    state = await driver.observe()
    assert (state.memory_max_bytes, state.memory_unit_bytes) == (BOOT, 1)


async def test_of_a_vm_that_is_only_observed_no_dimm_is_removed_and_no_memory_ended(
    server: DimmQmp, driver: QemuVm
) -> None:
    await driver.request_memory(ALL)
    await driver.request_memory(BOOT)
    assert server.removals() == ["guestd-dimm-2"]
    driver.only_observe(True)
    server.backends["guestd-mem-7"] = {"id": "guestd-mem-7", "size": DIMM_BYTES, "share": True}
    server.leave("guestd-dimm-2")
    for _ in range(3):
        await driver.observe()
        await asyncio.sleep(0.01)
    assert server.removals() == ["guestd-dimm-2"], "it was asked for before"
    assert {"guestd-mem-2", "guestd-mem-7"} <= server.backends.keys()
    driver.only_observe(False)
    await driver.observe()
    await until(lambda: not {"guestd-mem-2", "guestd-mem-7"} & server.backends.keys())
