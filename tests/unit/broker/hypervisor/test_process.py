"""The watch on a peer's process."""

import asyncio
import os
import socket
import sys
from pathlib import Path

from guestd.broker.hypervisor.process import ProcessWatch

LISTEN = "import socket,sys,time; s=socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); time.sleep(60)"


async def test_the_end_of_the_listener_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "s"
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", LISTEN, str(path))
    ended = asyncio.Event()
    with socket.socket(socket.AF_UNIX) as sock:
        for _ in range(500):
            if sock.connect_ex(str(path)) == 0:
                break
            await asyncio.sleep(0.01)
        watch = ProcessWatch.of_peer(sock, ended.set)
        assert watch is not None
        assert (watch.pid, watch.exited) == (child.pid, False)
        child.kill()
        async with asyncio.timeout(1):
            await ended.wait()
        assert watch.exited
        watch.close()
        await child.wait()
        assert ProcessWatch.of_peer(sock, ended.set) is None  # too late to be watched


async def test_closing_leaves_no_descriptor() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        watch = ProcessWatch.of_peer(ours, lambda: None)
        assert watch is not None
        assert watch.pid == os.getpid()
        watch.close()
        watch.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
