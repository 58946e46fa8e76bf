"""Fractions of a CPU on this machine's own cgroups (version 1): a real QEMU with busy vCPUs, measured from outside."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from guestd.broker.cgroup.cpu_group import CpuGroup
from guestd.broker.hypervisor.qemu import QemuVm
from guestd.lab.machine import Machine
from guestd.lab.qemu import MachineConfig
from guestd.model.vm import VmState, VmStatus

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(480),
    pytest.mark.skipif(
        not Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").exists(),
        reason="no cgroups of version 1 with the controller cpu",
    ),
]

NAME = "test-quota"
ROOT = Path("/sys/fs/cgroup/cpu")
GROUP = ROOT / f"guestd-{NAME}"
ELSEWHERE = ROOT / "guestd-test-elsewhere"
WINDOW_SECONDS = 5.0
TOLERANCE = 0.1

COUNT = '''
"""So many busy processes, each of which counts where all can see it: NUMBER."""
import mmap, os, sys, time

number = int(sys.argv[1])
with open("/run/counts", "w+b") as file:
    file.truncate(8 * number)
    counts = mmap.mmap(file.fileno(), 8 * number)
for process in range(number):
    if os.fork() == 0:
        count = 0
        while True:
            for _ in range(1000):
                pass
            count += 1
            counts[8 * process : 8 * process + 8] = count.to_bytes(8, "little")
while True:
    time.sleep(1000)
'''


class Bench:
    """A machine with busy vCPUs, the driver under test, and clocks of its own."""

    def __init__(self, machine: Machine, driver: QemuVm) -> None:
        self.machine, self.driver = machine, driver

    async def threads(self) -> list[int]:
        """The vCPU threads, by QEMU's word on the observers' socket."""
        return [cpu["thread-id"] for cpu in await self.machine.query("query-cpus-fast")]

    def ran_seconds(self, thread: int) -> float:
        """CPU time of one thread by the scheduler."""
        return int(Path(f"/proc/{self.machine.pid}/task/{thread}/schedstat").read_text().split()[0]) / 1e9

    async def counted(self) -> tuple[float, int]:
        """When, and how far the guest's processes have counted."""
        output = (await self.machine.console.run("od -An -v -t u8 /run/counts", 60)).stdout
        return time.monotonic(), sum(int(word) for word in output.split())

    async def measure(self) -> tuple[int, list[float]]:
        """Millicores that the vCPU threads had in the window, and what QMP took meanwhile, in milliseconds."""
        threads, took = await self.threads(), []
        before, begun = sum(map(self.ran_seconds, threads)), time.monotonic()
        while time.monotonic() - begun < WINDOW_SECONDS or len(took) < 200:
            asked = time.monotonic()
            await self.machine.query("query-status")
            took.append((time.monotonic() - asked) * 1e3)
            await asyncio.sleep(0.01)
        used = sum(map(self.ran_seconds, threads)) - before
        return round(1000 * used / (time.monotonic() - begun)), took

    async def bind(self, millicores: int) -> None:
        """Set the quota, by the driver; and have nothing else on this machine take the vCPUs' turn."""
        await self.driver.request_cpu_quota(millicores)
        (GROUP / "cpu.shares").write_text("262144")
        state = await self.driver.observe()
        assert (state.cpu_enforced, state.cpu_quota_millicores) == (True, millicores)

    async def qmp(self, what: str) -> list[float]:
        """What QMP takes now, in milliseconds."""
        _, took = await self.measure()
        print(f"QMP {what}: median {statistics.median(took):.2f}, p99 {p99(took):.2f} ms of {len(took)}")
        return took

    async def bound(self, millicores: int, what: str) -> VmState:
        """Measure what the vCPUs have while bound: never more than 10 % above it, and not less than 10 % below it in
        one of three windows, as others may need this machine too.
        """
        for _ in range(3):
            used, _ = await self.measure()
            state = await self.driver.observe()
            print(f"{what}: {used} of {millicores} millicores used, {state.cpu_throttled_permille} permille throttled")
            assert used <= millicores * (1 + TOLERANCE)
            if used >= millicores * (1 - TOLERANCE):
                return state
        raise AssertionError(f"{what}: only {used} millicores, less than {millicores} less 10 %, three times")

    async def online(self, cpu: int) -> None:
        path = f"/sys/devices/system/cpu/cpu{cpu}/online"
        await self.machine.console.wait_path(path, 60)
        await self.machine.console.run(f"grep -q 1 {path} || echo 1 > {path}", 60)


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


def members(group: Path) -> set[int]:
    return {int(line) for line in (group / "tasks").read_text().split()}


def remove(group: Path) -> None:
    with contextlib.suppress(OSError):
        group.rmdir()


@pytest.fixture(autouse=True)
def _no_group_stays_behind() -> Iterator[None]:
    yield
    for group in (ELSEWHERE, GROUP):
        for _ in range(100):
            remove(group)
            if not group.exists():
                break
            time.sleep(0.05)


@pytest.fixture
async def driver_of() -> AsyncIterator[Any]:
    drivers: list[QemuVm] = []

    async def open_driver(machine: Machine) -> QemuVm:
        driver = QemuVm(machine.paths.qmp, cpu_group=partial(CpuGroup, NAME))
        drivers.append(driver)
        await driver.open(lambda: None)
        return driver

    yield open_driver
    for driver in drivers:
        await driver.close()


async def test_qmp_answers_though_the_vcpus_wait(machine_factory: Any, driver_of: Any) -> None:
    """Beside a VM whose emulator is bound as well: the last measurement, for its threads don't come out again."""
    machine: Machine = await machine_factory(MachineConfig(name="qmp", cpus=2))
    driver: QemuVm = await driver_of(machine)
    bench = Bench(machine, driver)
    await machine.console.run(f"systemctl stop guestd; cat > /run/count.py <<'END'\n{COUNT}\nEND")
    await machine.console.spawn("python3 -S /run/count.py 4")
    await driver.request_cpu_quota(2000)  # as much as two vCPUs can use
    unbound = await bench.qmp("unbound")
    await bench.bind(250)
    bound = await bench.qmp("with vCPUs at 250 millicores")
    for thread in Path(f"/proc/{machine.pid}/task").iterdir():
        (GROUP / "tasks").write_text(thread.name)
    all_bound = await bench.qmp("with the emulator in the same group")
    assert statistics.median(bound) < 3 * statistics.median(unbound)
    assert statistics.median(bound) < statistics.median(all_bound) / 3
    assert p99(bound) < p99(all_bound) / 2


async def test_vcpus_get_what_they_are_given(machine_factory: Any, driver_of: Any) -> None:
    machine: Machine = await machine_factory(MachineConfig(name="quota", cpus=2))
    print(f"booted in {machine.boot_seconds:.1f} s")
    driver: QemuVm = await driver_of(machine)
    bench = Bench(machine, driver)
    await machine.console.run(f"systemctl stop guestd; cat > /run/count.py <<'END'\n{COUNT}\nEND")
    await machine.console.spawn("python3 -S /run/count.py 4")

    state = await driver.observe()
    assert (state.cpu_enforced, state.cpu_quota_millicores, state.cpu_throttled_permille) == (True, 0, 0)
    assert members(GROUP) == set(await bench.threads())  # and so not the emulator's
    assert machine.pid not in members(GROUP)
    used, _ = await bench.measure()
    print(f"unbound: {used} millicores")

    # What is used, and what the guest gets done, at each quota.
    rates = []
    for millicores in (250, 500, 1000):
        await bench.bind(millicores)
        await asyncio.sleep(0.3)
        since, first = await bench.counted()
        state = await bench.bound(millicores, "two busy vCPUs")
        until, last = await bench.counted()
        rates.append((last - first) / (until - since))
        assert state.cpu_throttled_permille >= 500
        assert state.cpu_throttled_permille % 10 == 0
    print(f"guest throughput at 250, 500, 1000 millicores: {', '.join(f'{rate:.0f}' for rate in rates)} loops/s")
    assert rates[0] < rates[1] < rates[2]
    # A vCPU more is not more CPU time.
    await bench.bind(500)
    before = members(GROUP)
    await driver.request_vcpus(3)
    (added,) = members(GROUP) - before
    await bench.online(2)
    ran = bench.ran_seconds(added)
    await bench.bound(500, "three busy vCPUs")
    assert bench.ran_seconds(added) - ran > 0.2  # it has its part of it
    assert members(GROUP) == set(await bench.threads())

    # Somebody removes the group: the next look mends it.
    ELSEWHERE.mkdir()
    for thread in members(GROUP):
        (ELSEWHERE / "tasks").write_text(str(thread))
    GROUP.rmdir()
    state = await driver.observe()
    assert (state.cpu_enforced, state.cpu_quota_millicores) == (True, 500)
    assert members(GROUP) == set(await bench.threads())
    ELSEWHERE.rmdir()

    # Another broker finds it as it is.
    await driver.close()
    assert members(GROUP) == set(await bench.threads())
    driver = await driver_of(machine)
    state = await driver.observe()
    assert (state.cpu_enforced, state.cpu_quota_millicores, state.vcpus) == (True, 500, 3)

    # To park a vCPU is to bound the VM; to unplug it takes the guest's help.
    bounding = []
    for number in range(40):
        begun = time.monotonic()
        await driver.request_cpu_quota(2000 + number % 2)
        bounding.append((time.monotonic() - begun) * 1e3)
    await machine.console.run("pkill -f 'count[.]py'; true", 60)
    begun = time.monotonic()
    await machine.console.run("echo 0 > /sys/devices/system/cpu/cpu2/online", 60)
    offline = (time.monotonic() - begun) * 1e3
    begun = time.monotonic()
    await driver.request_vcpus(2)
    while (await driver.observe()).vcpus != 2:
        await asyncio.sleep(0.005)
        await driver.request_vcpus(2)
        assert time.monotonic() - begun < 30
    unplug = (time.monotonic() - begun) * 1e3
    print(f"request_cpu_quota: median {statistics.median(bounding):.2f} ms, worst {max(bounding):.2f} ms")
    print(f"guest offlines an idle vCPU: {offline:.0f} ms (with the console); device_del until gone: {unplug:.0f} ms")
    assert statistics.median(bounding) < unplug

    # The group goes with QEMU.
    await machine.kill()
    for _ in range(100):
        if (await driver.observe()).status is VmStatus.GONE and not GROUP.exists():
            break
        await asyncio.sleep(0.05)
    assert not GROUP.exists()
    assert await driver.observe() == VmState(VmStatus.GONE)
