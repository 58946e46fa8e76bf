"""The daemon's side of the helper: against the real helper over a fake tree, and against a scripted one."""

import asyncio
import contextlib
import errno
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from guestd.guest import hands as module
from guestd.guest import helper
from guestd.guest.core.ops import BlockOp, BlockTarget, CpuOp, HandStatus, HookEvent, HookOp, Op, TrimOp
from guestd.guest.hands import DryHands, HelperGone, RootHands
from guestd.model.resources import Kind


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for n in range(4):
        directory = tmp_path / f"sys/devices/system/cpu/cpu{n}"
        directory.mkdir(parents=True)
        (directory / "online").write_text("0\n")
        block = tmp_path / f"sys/devices/system/memory/memory{n}"
        block.mkdir(parents=True)
        (block / "state").write_text("offline\n")
    return tmp_path


@pytest.fixture
async def hands(root: Path) -> AsyncIterator[RootHands]:
    """The real thing: this process is the daemon, but not the helper's child."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            ours.close()
            stand_in = os.fork()
            if stand_in == 0:
                theirs.close()
                signal.alarm(60)
                signal.pause()
                os._exit(0)
            os.write(tell, f"{stand_in}\n".encode())

            def dial(port: int, timeout_seconds: float) -> socket.socket:
                if port == 1:
                    raise ConnectionResetError(errno.ECONNRESET, "nobody listens")
                near, far = socket.socketpair()
                far.send(b"host")
                return near

            helper.Helper(theirs, stand_in, str(root), dial=dial).run()
        os._exit(0)
    theirs.close()
    os.close(tell)
    with os.fdopen(told) as pipe:
        stand_in = int(pipe.readline())
    client = RootHands(ours)
    yield client
    client.close()
    os.kill(stand_in, signal.SIGKILL)
    os.waitpid(pid, 0)  # noqa: ASYNC222 - it ends at once


async def test_single_operations(hands: RootHands, root: Path) -> None:
    result = await hands.online_cpu(1)
    assert (result.op, result.status, result.state, result.ok) == (CpuOp(1, True), HandStatus.OK, "online", True)
    assert 0 < result.elapsed_seconds < 5
    assert (await hands.offline_cpu(1)).ok
    refused = await hands.offline_cpu(0)
    assert (refused.status, refused.errno, refused.ok) == (HandStatus.REFUSED, errno.EPERM, False)
    assert (await hands.set_block(2, BlockTarget.OFFLINE)).ok
    assert (await hands.set_block(9, BlockTarget.ONLINE_MOVABLE)).status is HandStatus.GONE


async def test_a_batch_answers_each_in_order(hands: RootHands) -> None:
    ops: list[Op] = [CpuOp(3, True), BlockOp(77, BlockTarget.ONLINE), CpuOp(2, True)]
    results = await hands.batch(ops)
    assert [result.op for result in results] == ops
    assert [result.status for result in results] == [HandStatus.OK, HandStatus.GONE, HandStatus.OK]
    assert await hands.batch([]) == []
    with pytest.raises(ValueError, match="257 operations"):
        await hands.batch([CpuOp(1, True)] * 257)


async def test_many_at_once_wait_for_a_worker(hands: RootHands, root: Path) -> None:
    for n in range(4, 41):  # one for each: an ordinary file is empty for a moment while another worker writes it
        path = root / f"sys/devices/system/cpu/cpu{n}/online"
        path.parent.mkdir()
        path.write_text("0\n")
    results = await asyncio.gather(*(hands.online_cpu(n) for n in range(1, 41)))
    assert all(result.ok for result in results)


async def test_a_hanging_write_times_out_with_all_that_follows(hands: RootHands, root: Path) -> None:
    path = root / "sys/devices/system/memory/memory1/state"
    path.unlink()
    os.mkfifo(path)
    begun = time.monotonic()
    results = await hands.batch([BlockOp(n, BlockTarget.OFFLINE) for n in range(3)], deadline_seconds=0.3)
    assert [result.status for result in results] == [HandStatus.OK, HandStatus.TIMEOUT, HandStatus.TIMEOUT]
    assert time.monotonic() - begun < 3


async def test_a_cancelled_call_kills_its_worker(hands: RootHands, root: Path) -> None:
    path = root / "sys/devices/system/memory/memory1/state"
    path.unlink()
    os.mkfifo(path)
    for _ in range(3 * helper.MAX_WORKERS):  # would run out of workers otherwise
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await hands.set_block(1, BlockTarget.OFFLINE, deadline_seconds=60)
    assert (await hands.online_cpu(1)).ok


async def test_dial_gives_a_non_blocking_stream(hands: RootHands) -> None:
    with await hands.dial(4747) as stream:
        assert not stream.getblocking()
        assert await asyncio.get_running_loop().sock_recv(stream, 10) == b"host"
    with pytest.raises(ConnectionResetError, match="dial 1: failed"):
        await hands.dial(1)


async def test_psi_trigger(hands: RootHands, root: Path) -> None:
    (root / "proc/pressure").mkdir(parents=True)
    (root / "proc/pressure/cpu").touch()
    fd = await hands.psi_trigger("cpu")
    assert os.pread(fd, 100, 0) == b"some 100000 1000000\0"
    os.close(fd)
    with pytest.raises(FileNotFoundError):
        await hands.psi_trigger("io")
    with pytest.raises(OSError, match="refused"):
        await hands.psi_trigger("nonsense")


# --- a scripted helper --------------------------------------------------------------------------------


@pytest.fixture
async def script() -> AsyncIterator[tuple[RootHands, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    client = RootHands(ours)
    yield client, theirs
    client.close()
    theirs.close()


async def receive(sock: socket.socket) -> str:
    return (await asyncio.get_running_loop().sock_recv(sock, 65536)).decode()


async def test_requests_as_they_are_sent(script: tuple[RootHands, socket.socket]) -> None:
    client, theirs = script
    task = asyncio.create_task(client.batch([CpuOp(1, True), BlockOp(5, BlockTarget.ONLINE_KERNEL)], 1.5))
    assert await receive(theirs) == "1 1500\ncpu 1 online\nblock 5 online_kernel"
    theirs.send(b"1 result 1 failed 16 2500 offline")
    theirs.send(b"1 result 0 ok 0 1 online")
    first, second = await task  # all results are in: "end" is not waited for
    assert first.ok and second.errno == errno.EBUSY and second.elapsed_seconds == 0.0025
    assert str(second) == "block 5 online_kernel: failed (EBUSY), 2.5 ms"


async def test_what_memory_and_hooks_came_to(script: tuple[RootHands, socket.socket]) -> None:
    client, theirs = script
    hook = HookOp(HookEvent.BEFORE_SHRINK, Kind.MEMORY, 3 << 30, 1 << 30, 20)
    task = asyncio.create_task(client.batch([TrimOp(4096), TrimOp(8192), hook, hook], 25))
    assert await receive(theirs) == (
        "1 25000\nreclaim 4096\nreclaim 8192"
        "\nhook before-shrink memory 3221225472 1073741824 20\nhook before-shrink memory 3221225472 1073741824 20"
    )
    theirs.send(b"1 result 0 ok 0 1 2048")
    theirs.send(b"1 result 1 gone 2 1 ")
    theirs.send(b"1 result 2 ok 0 2500 wait:30:10-postgres.sh")
    theirs.send(b"1 result 3 failed 1 2500 failed:20_jvm")
    trimmed, refused, wait, failed = await task
    assert (trimmed.ok, trimmed.state) == (True, "2048")
    assert (refused.status, refused.errno) == (HandStatus.GONE, errno.ENOENT)
    assert (wait.ok, wait.state) == (True, "wait:30:10-postgres.sh")
    assert (failed.ok, failed.status, failed.state) == (False, HandStatus.FAILED, "failed:20_jvm")


async def test_the_real_helper_understands_every_operation(hands: RootHands) -> None:
    ops: list[Op] = [TrimOp(1 << 20), HookOp(HookEvent.AFTER_GROW, Kind.CPU, 1000, 2000, 5)]
    trimmed, hooked = await hands.batch(ops)
    assert trimmed.status is HandStatus.GONE  # the fake tree has no such file
    assert (hooked.status, hooked.state) == (HandStatus.OK, "none")


@pytest.mark.parametrize(
    ("last", "status"),
    [
        ("end ok", HandStatus.FAILED),
        ("end died", HandStatus.FAILED),
        ("end timeout", HandStatus.TIMEOUT),
        ("end stuck", HandStatus.STUCK),
        ("refused busy", HandStatus.REFUSED),
        ("refused grammar", HandStatus.REFUSED),
    ],
)
async def test_operations_without_a_result_share_the_fate(
    script: tuple[RootHands, socket.socket], last: str, status: HandStatus
) -> None:
    client, theirs = script
    task = asyncio.create_task(client.online_cpu(1))
    await receive(theirs)
    theirs.send(f"1 {last}".encode())
    assert (await task).status is status


async def test_only_the_operation_that_is_stuck_is_stuck(script: tuple[RootHands, socket.socket]) -> None:
    client, theirs = script
    task = asyncio.create_task(client.batch([CpuOp(number, True) for number in (1, 2, 3, 4)]))
    await receive(theirs)
    theirs.send(b"1 result 0 ok 0 1 online")
    theirs.send(b"1 end stuck")
    statuses = [result.status for result in await task]
    assert statuses == [HandStatus.OK, HandStatus.STUCK, HandStatus.TIMEOUT, HandStatus.TIMEOUT]


@pytest.mark.parametrize("how", ["closed", "close()"])
async def test_a_helper_that_is_gone(script: tuple[RootHands, socket.socket], how: str) -> None:
    client, theirs = script
    task = asyncio.create_task(client.online_cpu(1))
    await receive(theirs)
    theirs.close() if how == "closed" else client.close()
    with pytest.raises(HelperGone):
        await task
    assert client.gone.done()
    with pytest.raises(HelperGone):
        await client.dial(1)


async def test_a_helper_that_does_not_answer_is_gone(
    script: tuple[RootHands, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GRACE_SECONDS", 0.1)
    with pytest.raises(HelperGone, match="no longer answers"):
        await script[0].online_cpu(1, deadline_seconds=0.05)
    assert script[0].gone.done()


async def test_late_and_unknown_messages_are_ignored_and_their_descriptors_closed(
    script: tuple[RootHands, socket.socket],
) -> None:
    client, theirs = script
    reading, writing = os.pipe()
    socket.send_fds(theirs, [b"77 result 0 ok 0 1 "], [writing])
    theirs.send(b"nonsense")
    os.close(writing)
    await asyncio.sleep(0.05)
    assert os.read(reading, 1) == b""
    os.close(reading)
    assert not client.gone.done()


async def test_a_stream_for_a_cancelled_dial_is_closed(script: tuple[RootHands, socket.socket]) -> None:
    client, theirs = script
    task = asyncio.create_task(client.dial(4747))
    assert await receive(theirs) == "1 5000\ndial 4747"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await receive(theirs) == "1 cancel"
    near, far = socket.socketpair()
    socket.send_fds(theirs, [b"1 result 0 ok 0 1 "], [near.fileno()])
    near.close()
    far.setblocking(False)
    assert await asyncio.get_running_loop().sock_recv(far, 1) == b""
    far.close()


async def test_a_full_socket_is_waited_for(script: tuple[RootHands, socket.socket]) -> None:
    client, theirs = script
    client._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    big = [BlockOp(n, BlockTarget.ONLINE_MOVABLE) for n in range(100)]
    tasks = [asyncio.create_task(client.batch(big)) for _ in range(helper.MAX_WORKERS)]
    await asyncio.sleep(0.05)
    for n in range(helper.MAX_WORKERS):
        assert (await receive(theirs)).startswith(f"{n + 1} 10000\n")
        theirs.send(f"{n + 1} end timeout".encode())
    for results in await asyncio.gather(*tasks):
        assert {result.status for result in results} == {HandStatus.TIMEOUT}


async def test_dry_hands_touch_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    dry = DryHands()
    results = await dry.batch([CpuOp(1, True), BlockOp(3, BlockTarget.OFFLINE)])
    assert [result.status for result in results] == [HandStatus.DRY_RUN] * 2
    assert not results[0].ok
    assert "would do: block 3 offline" in caplog.text
    calls: list[Callable[[], object]] = [lambda: dry.dial(1), lambda: dry.psi_trigger("cpu")]
    for call in calls:
        with pytest.raises(PermissionError):
            await call()  # type: ignore[misc]
