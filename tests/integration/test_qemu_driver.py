"""The QEMU driver against a real QEMU without a guest: what QEMU answers, does by itself, and how it ends."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from qemu.qmp import QMPClient

from guestd.broker.hypervisor.qemu import QemuVm
from guestd.broker.hypervisor.qmp_link import LinkTiming
from guestd.model.errors import HypervisorError, HypervisorGone, OutcomeUnknown
from guestd.model.units import GIB, MIB
from guestd.model.vm import VmState, VmStatus

QEMU = "qemu-system-x86_64"
BOOT = 512 * MIB
QUICK = LinkTiming(greeting_seconds=0.4, retry_min_seconds=0.05, retry_max_seconds=0.2)


@pytest.fixture(autouse=True)
def _needs_qemu() -> None:
    if shutil.which(QEMU) is None:
        missing = f"{QEMU} is not installed (Debian: qemu-system-x86)"
        if os.environ.get("GUESTD_REQUIRE_VM") == "1":
            pytest.fail(missing)
        pytest.skip(missing)


class Machine:
    """A QEMU process at a QMP socket, and a second QMP socket for the test's own eyes and hands."""

    def __init__(self, folder: Path) -> None:
        self.qmp, self.own_qmp, self.log = folder / "qmp", folder / "own", folder / "log"
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, *extra: str, balloon: bool = True, virtio_mem: bool = True, slots: int = 4) -> None:
        args = ["-M", "q35", "-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none"]
        args += ["-smp", "1,maxcpus=4", "-m", f"512M,slots={slots},maxmem=4G" if slots else "512M"]
        if virtio_mem:
            args += ["-object", "memory-backend-memfd,id=vmem0,size=2G,share=on,reserve=off"]
            args += ["-device", "virtio-mem-pci,id=vm0,memdev=vmem0,requested-size=0"]
        if balloon:
            args += ["-device", "virtio-balloon-pci"]
        for path in (self.qmp, self.own_qmp):
            args += ["-qmp", f"unix:{path},server=on,wait=off"]
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(QEMU, *args, *extra, stdout=log, stderr=log)
        for _ in range(500):
            if self.own_qmp.exists() or self.process.returncode is not None:
                break
            await asyncio.sleep(0.01)
        assert self.process.returncode is None, self.log.read_text()

    async def command(self, command: str, **arguments: object) -> object:
        """Run a command on the test's own socket, with nothing of the driver's in between."""
        client = QMPClient()
        await client.connect(str(self.own_qmp))
        try:
            return await client.execute(command, arguments)
        finally:
            await client.disconnect()

    async def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(how)
        await self.process.wait()


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    if machine.process is not None and machine.process.returncode is None:
        await machine.kill()


@pytest.fixture
async def driver(machine: Machine) -> AsyncIterator[QemuVm]:
    driver = QemuVm(machine.qmp, QUICK)
    yield driver
    await driver.close()


async def until(
    driver: QemuVm, wanted: Callable[[VmState], bool], within_seconds: float = 5.0
) -> tuple[VmState, float]:
    """The first state that is wanted, and how long it took; fails with the last state seen."""
    start = time.monotonic()
    while True:
        state = None
        with contextlib.suppress(OutcomeUnknown):  # the connection broke while asking
            state = await driver.observe()
        took = time.monotonic() - start
        if state is not None and wanted(state):
            return state, took
        assert took < within_seconds, state
        await asyncio.sleep(0.01)


async def calls(driver: QemuVm) -> list[float]:
    """Open the driver; the list that comes back grows with each `on_change`."""
    seen: list[float] = []
    await driver.open(lambda: seen.append(time.monotonic()))
    return seen


async def test_a_fresh_vm_is_described(machine: Machine, driver: QemuVm) -> None:
    await machine.start("-S")
    await calls(driver)
    assert await driver.observe() == VmState(
        status=VmStatus.FROZEN,  # prelaunch
        vcpus=1,
        vcpus_min=1,
        vcpus_max=4,
        boot_memory_bytes=BOOT,
        memory_plugged_bytes=BOOT,
        memory_held_bytes=BOOT,
        memory_min_bytes=128 * MIB,
        memory_max_bytes=BOOT + 2 * GIB,
        memory_unit_bytes=2 * MIB,
    )


async def test_cpus_are_added_at_the_lowest_slots(machine: Machine, driver: QemuVm) -> None:
    await machine.start()
    await calls(driver)
    await driver.request_vcpus(3)
    await driver.request_vcpus(3)
    state = await driver.observe()
    assert (state.vcpus, state.vcpus_min) == (3, 1)
    slots = await machine.command("query-hotpluggable-cpus")
    assert isinstance(slots, list)
    ids = {slot["props"]["core-id"]: slot.get("qom-path", "/none").rpartition("/")[2] for slot in slots}
    assert ids == {0: "device[0]", 1: "guestd-cpu-1", 2: "guestd-cpu-2", 3: "none"}
    with pytest.raises(HypervisorError, match="5 vCPUs asked for, but the machine has 4 slots"):
        await driver.request_vcpus(5)


async def test_without_a_guest_system_qemu_refuses_the_removal(machine: Machine, driver: QemuVm) -> None:
    await machine.start()
    await calls(driver)
    await driver.request_vcpus(2)
    with pytest.raises(HypervisorError, match="device unplug request for not supported device type"):
        await driver.request_vcpus(1)
    assert (await driver.observe()).vcpus == 2


async def test_requested_memory_is_held_before_it_is_plugged(machine: Machine, driver: QemuVm) -> None:
    await machine.start()
    await calls(driver)
    await driver.request_memory(BOOT + GIB + 5)
    state = await driver.observe()
    assert (state.memory_held_bytes, state.memory_plugged_bytes) == (BOOT + GIB, BOOT)
    await driver.settle_memory()
    state = await driver.observe()
    assert (state.memory_held_bytes, state.memory_plugged_bytes) == (BOOT, BOOT)
    with pytest.raises(HypervisorError, match=r"can have 2\.5 GiB at most"):
        await driver.request_memory(8 * GIB)


async def test_a_guest_reset_keeps_requested_memory_and_is_counted(machine: Machine, driver: QemuVm) -> None:
    await machine.start()
    seen = await calls(driver)
    await driver.request_memory(BOOT + GIB)
    seen.clear()
    await machine.command("system_reset")
    state, _ = await until(driver, lambda state: state.resets > 0)
    assert state.memory_held_bytes == BOOT + GIB
    await asyncio.sleep(0.05)
    assert seen


async def test_the_balloon_is_found_by_its_answer(machine: Machine, driver: QemuVm) -> None:
    await machine.start(balloon=False)
    await calls(driver)
    assert (await driver.observe()).memory_min_bytes == BOOT
    await driver.request_memory(256 * MIB)  # stops at what can be reached
    assert (await driver.observe()).memory_held_bytes == BOOT


async def test_a_balloon_that_the_guest_ignores_frees_nothing(machine: Machine, driver: QemuVm) -> None:
    await machine.start(virtio_mem=False, slots=0)
    await calls(driver)
    await driver.request_memory(256 * MIB)
    await driver.settle_memory()
    state = await driver.observe()
    assert (state.memory_held_bytes, state.memory_min_bytes) == (BOOT, 128 * MIB)
    assert (state.memory_max_bytes, state.memory_unit_bytes) == (BOOT, MIB)


async def test_dimms_count_as_boot_memory_also_for_the_balloon(machine: Machine, driver: QemuVm) -> None:
    await machine.start("-object", "memory-backend-ram,id=d0,size=256M", "-device", "pc-dimm,id=dimm0,memdev=d0")
    await calls(driver)
    state = await driver.observe()
    assert state.boot_memory_bytes == state.memory_held_bytes == BOOT + 256 * MIB


@pytest.mark.parametrize(("shared", "kind"), [(True, "memory-backend-memfd"), (False, "memory-backend-ram")])
async def test_without_virtio_mem_memory_is_added_as_dimms(
    machine: Machine, driver: QemuVm, shared: bool, kind: str
) -> None:
    ram = ["-object", "memory-backend-memfd,id=ram0,size=512M,share=on", "-machine", "memory-backend=ram0"]
    await machine.start(*(ram if shared else []), virtio_mem=False)
    await calls(driver)
    state = await driver.observe()
    assert (state.memory_unit_bytes, state.memory_max_bytes) == (512 * MIB, BOOT + 2 * GIB)  # four of what it has
    await driver.request_memory(BOOT + GIB + 5)
    await driver.request_memory(BOOT + GIB)
    state = await driver.observe()
    assert state.memory_held_bytes == state.memory_plugged_bytes == BOOT + GIB
    assert state.boot_memory_bytes == BOOT
    devices = await machine.command("query-memory-devices")
    assert isinstance(devices, list)
    assert {one["data"]["id"]: one["data"]["size"] for one in devices} == dict.fromkeys(
        ("guestd-dimm-0", "guestd-dimm-1"), 512 * MIB
    )
    assert await machine.command("qom-get", path="/objects/guestd-mem-0", property="type") == kind
    await driver.request_memory(BOOT + 2 * GIB)
    assert (await driver.observe()).memory_held_bytes == BOOT + 2 * GIB  # all slots, all names
    with pytest.raises(HypervisorError, match=r"can have 2\.5 GiB at most"):
        await driver.request_memory(BOOT + 3 * GIB)


async def test_a_dimm_stays_until_the_guest_lets_go_of_it(machine: Machine, driver: QemuVm) -> None:
    await machine.start(virtio_mem=False)
    await calls(driver)
    await driver.request_memory(BOOT + GIB)
    await driver.request_memory(BOOT)  # QEMU takes the request; there is no guest to answer
    assert (await driver.observe()).memory_held_bytes == BOOT + GIB
    await driver.settle_memory()
    assert (await driver.observe()).memory_held_bytes == BOOT + GIB


async def test_a_backend_that_a_broker_left_is_ended_by_the_next(machine: Machine, driver: QemuVm) -> None:
    await machine.start(virtio_mem=False)
    left = {"qom-type": "memory-backend-ram", "id": "guestd-mem-0", "size": 512 * MIB}
    await machine.command("object-add", **left)
    await calls(driver)
    assert (await driver.observe()).memory_held_bytes == BOOT + 512 * MIB
    await until(driver, lambda state: state.memory_held_bytes == BOOT)


async def test_a_paused_vm_is_frozen(machine: Machine, driver: QemuVm) -> None:
    await machine.start()
    seen = await calls(driver)
    assert (await driver.observe()).status is VmStatus.RUNNING
    for command, status in (("stop", VmStatus.FROZEN), ("cont", VmStatus.RUNNING)):
        await asyncio.sleep(0.05)
        seen.clear()
        await machine.command(command)
        await asyncio.sleep(0.05)
        assert (await driver.observe()).status is status
        assert len(seen) == 1


async def test_a_migrating_vm_is_frozen_and_thaws_when_it_is_cancelled(machine: Machine, driver: QemuVm) -> None:
    await machine.start()
    await calls(driver)
    await machine.command("migrate-set-parameters", **{"max-bandwidth": 1000})
    await machine.command("migrate", uri=f"unix:{machine.qmp.parent / 'nobody'}")  # fails soon
    await until(driver, lambda state: state.status is VmStatus.RUNNING)
    await machine.command("migrate", uri="exec:cat >/dev/null")
    assert (await driver.observe()).status is VmStatus.FROZEN
    await machine.command("migrate_cancel")
    await until(driver, lambda state: state.status is VmStatus.RUNNING)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_a_dead_vm_is_gone_within_a_second_and_a_new_one_is_found(
    machine: Machine, driver: QemuVm, how: signal.Signals
) -> None:
    await machine.start()
    seen = await calls(driver)
    await driver.request_vcpus(2)
    seen.clear()
    killed = asyncio.create_task(machine.kill(how))
    await until(driver, lambda state: state.status is VmStatus.GONE, within_seconds=1.0)
    await killed
    assert await driver.observe() == VmState(VmStatus.GONE)
    await asyncio.sleep(0.05)
    assert seen
    with pytest.raises(HypervisorGone):
        await driver.request_vcpus(1)
    await asyncio.sleep(0.5)
    assert await driver.observe() == VmState(VmStatus.GONE)  # and stays so
    await machine.start()
    state, _ = await until(driver, lambda state: state.status is VmStatus.RUNNING)
    assert state.vcpus == 1


async def test_a_socket_file_that_a_dead_vm_left_means_gone(machine: Machine, driver: QemuVm) -> None:
    await machine.start()
    await machine.kill()
    assert machine.qmp.exists()
    await calls(driver)
    assert (await driver.observe()).status is VmStatus.GONE


async def test_no_socket_file_says_nothing(machine: Machine, driver: QemuVm) -> None:
    await calls(driver)
    assert (await driver.observe()).status is VmStatus.UNREACHABLE
    await machine.start()
    await until(driver, lambda state: state.status is VmStatus.RUNNING)


async def test_a_stopped_qemu_is_unreachable_and_not_gone(machine: Machine) -> None:
    await machine.start()
    driver = QemuVm(machine.qmp, LinkTiming(greeting_seconds=0.3, answer_seconds=0.3, retry_max_seconds=0.2))
    await calls(driver)
    assert machine.process is not None
    machine.process.send_signal(signal.SIGSTOP)
    await unknown(driver.observe())
    for _ in range(10):
        assert (await driver.observe()).status is VmStatus.UNREACHABLE
        await asyncio.sleep(0.1)
    machine.process.send_signal(signal.SIGCONT)
    await until(driver, lambda state: state.status is VmStatus.RUNNING)
    await driver.close()


async def unknown(call: Awaitable[object]) -> None:
    with pytest.raises(OutcomeUnknown):
        await call


async def test_a_second_client_waits_without_spinning(
    machine: Machine, driver: QemuVm, caplog: pytest.LogCaptureFixture
) -> None:
    await machine.start()
    with socket.socket(socket.AF_UNIX) as first:
        first.connect(str(machine.qmp))
        assert await asyncio.to_thread(first.recv, 4096)
        seen = await calls(driver)
        before = time.process_time()
        for _ in range(20):
            assert (await driver.observe()).status is VmStatus.UNREACHABLE
            await asyncio.sleep(0.1)
        assert time.process_time() - before < 0.2
        assert len(seen) <= 1
        assert len([record for record in caplog.records if record.levelname == "WARNING"]) <= 1
    await until(driver, lambda state: state.status is VmStatus.RUNNING)
