"""A guest that can only report: the real `guestd run` and a real broker, as processes, and a hypervisor in a third.

`Elsewhere` is another system than Linux: the tree that guestd is given is empty, and psutil alone knows the load. What
psutil says comes from files that the test writes, for a machine of four CPUs whose memory is what the hypervisor
lets it have. `test_a_container…` is the real thing without tricks: a mount namespace with an empty /sys, or a
read-only one, which root finds without a user to become.
"""

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import psutil
import pytest
from broker_rig import guest_table, host_table, short_directory
from process_rig import BrokerProcess, HypervisorProcess, Process

from guestd.broker.config import DEFAULT_PORT
from guestd.broker.core.track import Timing
from guestd.model.resources import Kind
from guestd.model.units import GIB, MIB
from guestd.model.view import GuestView
from guestd.sim.remote import VmSpec
from guestd.wire.client import BrokerClient

CPUS = 4
KERNEL_BYTES = 48 * MIB
TIMING = Timing(cool_down_seconds=0.3, retry_seconds=0.3)
_STEP_SECONDS = 0.05
_SETTLE_SECONDS = 40.0
# What is started instead of `guestd`: the same program, on a machine whose load the test makes up.
PROGRAM = """
import sys
from pathlib import Path
import psutil
from guestd.guest import app
system, empty, config = map(Path, sys.argv[1:])
psutil.PROCFS_PATH = str(system)
psutil.getloadavg = lambda: (float((system / "loadavg").read_text()), 0.0, 0.0)
app.main(["run", "--config", str(config)], None, empty)
"""
MEMINFO = (
    "MemTotal: {total} kB\nMemFree: {free} kB\nMemAvailable: {free} kB\nBuffers: 0 kB\nCached: 0 kB\nShmem: 0 kB\n"
)
MEMINFO += "Active: 0 kB\nInactive: 0 kB\nSlab: 0 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n"


class Elsewhere:
    """What psutil is told: so many busy threads, so much memory in use."""

    def __init__(self, directory: Path, hypervisor: HypervisorProcess) -> None:
        self.directory, self._hypervisor = directory, hypervisor
        self.busy, self.used_bytes = 0.1, 200 * MIB
        self._ticks = [[0.0, 0.0] for _ in range(CPUS)]  # busy, idle

    async def run(self) -> None:
        """The machine's time goes by."""
        before = time.monotonic()
        while True:
            await self.step(time.monotonic() - before)
            before = time.monotonic()
            await asyncio.sleep(_STEP_SECONDS)

    async def step(self, seconds: float) -> None:
        lines = ["cpu  0 0 0 0 0 0 0 0 0 0"]
        for number, ticks in enumerate(self._ticks):
            share = min(max(self.busy - number, 0.0), 1.0)
            ticks[0] += share * seconds * 100
            ticks[1] += (1 - share) * seconds * 100
            lines.append(f"cpu{number} {int(ticks[0])} 0 0 {int(ticks[1])} 0 0 0 0 0 0")
        total = (await self._hypervisor.link.truth())["a"].memory_plugged_bytes - KERNEL_BYTES
        free = max(total - self.used_bytes, 0)
        self._write("stat", "\n".join([*lines, "btime 1700000000", ""]))
        self._write("meminfo", MEMINFO.format(total=total >> 10, free=free >> 10))
        self._write("loadavg", str(self.busy))

    def _write(self, name: str, text: str) -> None:
        new = self.directory / f"{name}.new"
        new.write_text(text)
        new.rename(self.directory / name)


@pytest.fixture
def root() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@pytest.fixture
async def hypervisor(root: Path) -> AsyncIterator[HypervisorProcess]:
    """A VM that booted with four CPUs and 2 GiB, with a balloon and nothing to plug."""
    spec = VmSpec("a", boot_bytes=2 * GIB, device_bytes=0, balloon=True, vcpus=CPUS, vcpus_max=CPUS, cpu_enforced=True)
    async with HypervisorProcess(root, [spec]) as one:
        yield one


@pytest.fixture
async def client(root: Path, hypervisor: HypervisorProcess) -> AsyncIterator[BrokerClient]:
    config = host_table(root).replace('cpu_bandwidth = "off"\n', "") + guest_table(root, "a")
    broker = BrokerProcess(root, hypervisor.socket, config, TIMING)
    try:
        await broker.start()
        async with BrokerClient(broker.run_dir) as one:
            yield one
    finally:
        await broker.kill()


async def until(client: BrokerClient, what: str, holds: Callable[[GuestView], bool], guest: Process) -> GuestView:
    """Ask until the broker shows it; what it showed."""
    end = time.monotonic() + _SETTLE_SECONDS
    while True:
        [view] = await client.guests()
        if holds(view):
            return view
        assert guest.running, guest.said
        assert time.monotonic() < end, f"not so: {what}\n{view}\n{guest.said[-2000:]}"
        await asyncio.sleep(0.05)


def cpu(view: GuestView) -> int:
    return view.resource(Kind.CPU).reserved


def memory(view: GuestView) -> int:
    return view.resource(Kind.MEMORY).reserved


def write_config(root: Path) -> Path:
    config = root / "guestd.toml"
    config.write_text(f'broker_socket = "{root}/a_{DEFAULT_PORT}"\n')
    return config


async def test_the_broker_sizes_a_guest_that_psutil_alone_knows(
    root: Path, hypervisor: HypervisorProcess, client: BrokerClient
) -> None:
    empty, system = root / "empty", root / "system"
    empty.mkdir()
    system.mkdir()
    elsewhere, guest = Elsewhere(system, hypervisor), Process(root / "guestd.log")
    await elsewhere.step(0.0)
    time_goes_by = asyncio.create_task(elsewhere.run())
    try:
        await guest.spawn(sys.executable, "-c", PROGRAM, str(system), str(empty), str(write_config(root)))
        # It says hello and what it needs; what there is at first is kept until a lower need has held.
        first = await until(client, "served", lambda view: view.connected and bool(view.demand_reasons), guest)
        assert first.resource(Kind.CPU).onlined == CPUS * 1000
        assert first.resource(Kind.MEMORY).usable == 2 * GIB - KERNEL_BYTES
        assert first.resource(Kind.MEMORY).onlined == 0  # it knows of no blocks
        # Nothing to do: both go down to what is needed, by quota and balloon.
        idle = await until(client, "small", lambda view: cpu(view) == 1000 and memory(view) < GIB, guest)
        assert memory(idle) >= elsewhere.used_bytes
        # Load: the quota goes up to what the vCPUs can use, the balloon lets go.
        elsewhere.busy, elsewhere.used_bytes = 2.9, memory(idle) - 64 * MIB
        await until(client, "more CPU", lambda view: cpu(view) >= 3000, guest)
        await until(client, "more memory", lambda view: memory(view) > memory(idle), guest)
        # And back.
        elsewhere.busy, elsewhere.used_bytes = 0.1, 200 * MIB
        await until(client, "small again", lambda view: cpu(view) == 1000 and memory(view) < GIB, guest)
        [view] = await client.guests()
        requests = await hypervisor.link.log()
    finally:
        time_goes_by.cancel()
        await guest.kill()
    assert {one.method for one in requests} <= {"request_cpu_quota", "request_memory", "settle_memory"}
    assert "cannot bring cpu or memory online" in view.degraded
    assert [(one.refusals, one.failures, one.partials) for one in view.resources] == [(0, 0, 0)] * 2
    assert "reports only" in guest.said
    assert "Traceback" not in guest.said and "dry run" not in guest.said


ISOLATED = """
mount -t tmpfs none /sys && mount --bind {empty} /proc/pressure \
 && mount --bind {nothing} /proc/sys/kernel/random/boot_id && exec "$@"
"""


def _may_unshare() -> bool:
    unshare = shutil.which("unshare")
    command = [unshare or "false", "-m", "mount", "-t", "tmpfs", "none", "/sys"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


async def test_a_container_without_sys_pressure_and_boot_id_is_served(root: Path, client: BrokerClient) -> None:
    if not _may_unshare():
        pytest.skip("no right to a mount namespace here")
    empty, nothing, guest = root / "empty", root / "nothing", Process(root / "guestd.log")
    empty.mkdir()
    nothing.touch()
    program = "import sys; from guestd.guest import app; app.main(sys.argv[1:], None)"
    try:
        await guest.spawn(
            *("unshare", "-m", "sh", "-ec", ISOLATED.format(empty=empty, nothing=nothing), "sh"),
            *(sys.executable, "-c", program, "run", "--config", str(write_config(root))),
        )
        view = await until(client, "served", lambda view: view.connected and bool(view.demand_reasons), guest)
        assert view.resource(Kind.MEMORY).usable == psutil.virtual_memory().total
        assert view.resource(Kind.CPU).onlined == (os.cpu_count() or 0) * 1000
        assert "cannot bring cpu or memory online" in view.degraded
        assert guest.running
    finally:
        with contextlib.suppress(ProcessLookupError):
            await guest.kill()
    assert "reports only" in guest.said
    assert "Traceback" not in guest.said


# Files that a kernel with CPUs and blocks to switch has, in a /sys that is read-only.
READ_ONLY = """
mount -t tmpfs none /sys && cd /sys && mkdir -p devices/system/cpu/cpu0 devices/system/cpu/cpu1 devices/system/memory \
 && touch devices/system/cpu/cpu1/online && echo 8000000 > devices/system/memory/block_size_bytes && cd / \
 && mount -o remount,ro /sys && exec "$@"
"""


async def test_a_container_with_a_read_only_sys_and_no_user_for_guestd_is_served(
    root: Path, client: BrokerClient
) -> None:
    if not _may_unshare() or os.geteuid() != 0:
        pytest.skip("no right to a mount namespace here")
    guest, config = Process(root / "guestd.log"), write_config(root)
    config.write_text(config.read_text() + 'user = "guestd-nobody"\n')
    try:
        await guest.spawn(
            *("unshare", "-m", "sh", "-ec", READ_ONLY, "sh"),
            *(sys.executable, "-m", "guestd.guest.main", "run", "--config", str(config)),
        )
        view = await until(client, "served", lambda view: view.connected and bool(view.demand_reasons), guest)
        assert "cannot bring cpu or memory online" in view.degraded
        assert guest.running
    finally:
        with contextlib.suppress(ProcessLookupError):
            await guest.kill()
    assert "reports only" in guest.said
    assert "Traceback" not in guest.said
