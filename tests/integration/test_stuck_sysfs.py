"""A write to sysfs that never returns: `guestd run` with its real helper, as processes, on a tree of files.

A lease on a file has whoever opens it for writing wait in the kernel, while it can be read as ever. A kill that does
nothing makes that a worker in D state. What a helper alone does then is in `tests/unit/guest/helper`.
"""

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from broker_rig import short_directory
from process_rig import Process
from scripted_broker import ScriptedBroker

from guestd.model.messages import AckStatus, RefusalReason
from guestd.model.resources import Kind
from guestd.model.units import MIB

BLOCK = 128 * MIB
CPU, MEMORY = "sys/devices/system/cpu", "sys/devices/system/memory"
PROGRAM = """
import os, socket, sys
from pathlib import Path
from guestd.guest.helper.loop import Helper

root, config = map(Path, sys.argv[1:])
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
child = os.fork()
if child:
    theirs.close()
    def kill(pid, number):
        if not (root / "unkillable").exists():
            os.kill(pid, number)
    sys.exit(Helper(ours, child, str(root), kill=kill).run())
ours.close()
import psutil
from guestd.guest import app
psutil.PROCFS_PATH = str(root / "proc")
app.drop_privileges = lambda user: None  # another test's business
app.main(["run", "--config", str(config)], theirs, root)
"""
"""`guestd.guest.main` with the root of the tree, and a helper whose workers cannot be killed while a file is there."""

FILES = {
    "proc/stat": "cpu  9 0 9 99 0 0 0 0 0 0\n"
    + "".join(f"cpu{number} 9 0 9 99 0 0 0 0 0 0\n" for number in range(4))
    + "btime 1700000000\nprocs_running 1\n",
    "proc/meminfo": "MemTotal: 1024000 kB\nMemFree: 900000 kB\nMemAvailable: 920000 kB\nBuffers: 0 kB\nCached: 0 kB\n"
    "Shmem: 0 kB\nActive: 0 kB\nInactive: 0 kB\nSlab: 0 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n",
    "proc/vmstat": "nr_free_pages 225000\npswpin 0\npswpout 0\noom_kill 0\n",
    "proc/loadavg": "0.00 0.00 0.00 1/99 999\n",
    f"{CPU}/possible": "0-3\n",
    f"{CPU}/present": "0-3\n",
    f"{CPU}/online": "0\n",
    f"{CPU}/hotplug/states": "",
    f"{MEMORY}/block_size_bytes": f"{BLOCK:x}\n",
    **{f"{CPU}/cpu{number}/online": "0\n" for number in (1, 2, 3)},
    **{f"{MEMORY}/memory{index}/state": "online\n" for index in range(8)},
    **{f"{MEMORY}/memory{index}/valid_zones": "Normal\n" if index < 4 else "Movable\n" for index in range(8)},
}
"""Four CPUs of which one is online, and a GiB in 8 blocks that no driver takes page by page."""


@pytest.fixture
def root() -> Iterator[Path]:
    with short_directory() as directory:
        for name, text in FILES.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        yield directory


@contextlib.contextmanager
def never_returning(path: Path) -> Iterator[None]:
    """Have whoever opens a file for writing wait until the end of the block; 45 s at most (lease-break-time)."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # the kernel says that somebody waits
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        yield
    finally:
        os.close(fd)
        signal.signal(signal.SIGIO, before)


async def kernel(root: Path) -> None:
    """The list of CPUs follows their switches."""
    while True:
        on = [number for number in (1, 2, 3) if (root / CPU / f"cpu{number}/online").read_text().strip() == "1"]
        text = ",".join(map(str, [0, *on])) + "\n"
        if (root / CPU / "online").read_text() != text:
            new = root / CPU / "new"
            new.write_text(text)
            new.rename(root / CPU / "online")
        await asyncio.sleep(0.02)


@pytest.fixture
async def served(root: Path) -> AsyncIterator[tuple[ScriptedBroker, Process]]:
    (root / "guestd.toml").write_text(f'broker_socket = "{root}/broker"\n')
    guestd = Process(root / "guestd.log")
    following = asyncio.create_task(kernel(root))
    async with ScriptedBroker(root, root / "broker") as broker:
        await guestd.spawn(sys.executable, "-c", PROGRAM, str(root), str(root / "guestd.toml"))
        try:
            await broker.until("it says what it needs", lambda: broker.demand is not None)
            yield broker, guestd
        finally:
            (root / "unkillable").unlink(missing_ok=True)
            await guestd.kill()
            following.cancel()


def states(root: Path) -> list[str]:
    return [(root / MEMORY / f"memory{index}/state").read_text().strip() for index in range(8)]


async def test_a_stuck_cpu_and_a_stuck_block_do_not_stop_the_rest(
    root: Path, served: tuple[ScriptedBroker, Process]
) -> None:
    broker, guestd = served
    (root / "unkillable").touch()
    stuck_block, stuck_cpu = root / MEMORY / "memory7/state", root / CPU / "cpu1/online"
    with never_returning(stuck_block), never_returning(stuck_cpu):
        memory, cpus = await asyncio.gather(
            broker.ask(broker.reclaim(Kind.MEMORY, 4 * BLOCK, 1, seconds=60.0), 60),
            broker.ask(broker.grant(Kind.CPU, 4000, 1), 60),
        )
        # The others went, and none that is not movable in its place: boot memory is there.
        assert states(root) == ["online"] * 4 + ["offline"] * 3 + ["online"]
        assert (memory.status, memory.achieved) == (AckStatus.PARTIAL, 5 * BLOCK)
        assert memory.text.startswith("block 7 offline: stuck")
        # The two CPUs behind it in the same request came up all the same.
        assert (cpus.status, cpus.achieved) == (AckStatus.PARTIAL, 3000)
        assert cpus.refusal is RefusalReason.FAILED
        assert cpus.text.startswith("cpu 1 online: stuck")
        assert broker.demand is not None
        reasons = {reason.code: reason.text for reason in broker.demand.reasons}
        assert "block 7 offline" in reasons["quarantined"]
        assert "cpu 1 online" in reasons["quarantined"]
        assert guestd.said.count("stuck in the kernel, refused from now on") == 2
    await broker.until("the block's write lands after all", lambda: states(root)[7] == "offline")
    await broker.until("it is noted", lambda: guestd.said.count("the worker that was stuck has ended") == 2)
    answer = await broker.ask(broker.reclaim(Kind.MEMORY, 4 * BLOCK, 2))
    assert answer.status is AckStatus.DONE
    assert guestd.running
    assert len(broker.hellos) == 1
    assert "Traceback" not in guestd.said
