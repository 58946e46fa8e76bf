"""The root helper, for real: forked, over a fake tree."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helper_rig import Rig, block_file, cpu_file, make_endless

from guestd.guest import helper
from guestd.guest.helper import loop as module


def test_a_batch_is_done_in_order_and_each_result_reported(root: Path, start: Callable[..., Rig]) -> None:
    rig = start()
    rig.ask("5 5000\ncpu 1 online\nblock 3 online_movable\ncpu 0 offline\nblock 99 offline\nblock 2 offline")
    assert rig.answers() == [
        ["5", "result", "0", "ok", "0", "online"],
        # The kernel would say "online"; the plain file says what was written.
        ["5", "result", "1", "failed", "0", "online_movable"],
        ["5", "result", "2", "refused", str(errno.EPERM), ""],
        ["5", "result", "3", "gone", str(errno.ENOENT), ""],
        ["5", "result", "4", "ok", "0", "offline"],
        ["5", "end", "ok"],
    ]
    assert cpu_file(root, 1).read_text() == "1"
    assert block_file(root, 3).read_text() == "online_movable"


def test_nonsense_is_answered_and_the_next_request_served(root: Path, start: Callable[..., Rig]) -> None:
    rig = start()
    for message in (b"", b"\xff\xfe", b"7 100\nexec true", b"7 100\ncpu 1 online" + b" " * 20_000):
        rig.sock.send(message)
    assert [rig.read() for _ in range(4)] == [
        "0 refused grammar",
        "0 refused grammar",
        "7 refused grammar",
        "7 refused grammar",
    ]
    assert cpu_file(root, 1).read_text() == "0\n"
    rig.ask("8 1000\ncpu 1 online")
    assert rig.answers()[-1] == ["8", "end", "ok"]


def test_descriptors_in_a_message_are_dropped(start: Callable[..., Rig]) -> None:
    rig = start()
    reading, writing = os.pipe()
    socket.send_fds(rig.sock, [b"nonsense"], [writing])
    os.close(writing)
    assert rig.read() == "0 refused grammar"
    assert os.read(reading, 1) == b""  # nobody holds the other end
    os.close(reading)


def test_a_write_that_never_returns_is_killed_at_its_deadline(root: Path, start: Callable[..., Rig]) -> None:
    make_endless(block_file(root, 1))
    rig = start()
    begun = time.monotonic()
    rig.ask("9 300\nblock 0 offline\nblock 1 offline\nblock 2 offline")
    assert rig.answers() == [["9", "result", "0", "ok", "0", "offline"], ["9", "end", "timeout"]]
    assert 0.3 <= time.monotonic() - begun < 3
    # The helper lives, and the block is not refused: its worker has been reaped.
    rig.ask("10 200\nblock 1 offline")
    assert rig.answers() == [["10", "end", "timeout"]]


def test_a_request_can_be_cancelled(root: Path, start: Callable[..., Rig]) -> None:
    make_endless(block_file(root, 1))
    rig = start()
    rig.ask("9 60000\nblock 1 offline")
    rig.ask("9 cancel")
    rig.ask("77 cancel")
    assert rig.answers() == [["9", "end", "timeout"]]


def test_others_go_on_while_one_hangs(root: Path, start: Callable[..., Rig]) -> None:
    make_endless(block_file(root, 1))
    rig = start()
    rig.ask("1 60000\nblock 1 offline")
    rig.ask("2 5000\ncpu 1 online")
    assert rig.answers()[-1] == ["2", "end", "ok"]
    rig.ask("1 5000\ncpu 2 online")
    assert rig.answers() == [["1", "refused", "duplicate"]]
    rig.ask("1 cancel")
    assert rig.answers() == [["1", "end", "timeout"]]


def test_workers_are_bounded(root: Path, start: Callable[..., Rig]) -> None:
    make_endless(block_file(root, 1))
    rig = start()
    for n in range(helper.MAX_WORKERS):
        rig.ask(f"{n + 1} 60000\nblock 1 offline")
    rig.ask("100 5000\ncpu 1 online")
    assert rig.answers() == [["100", "refused", "busy"]]
    rig.ask("3 cancel")
    assert rig.answers() == [["3", "end", "timeout"]]
    rig.ask("100 5000\ncpu 1 online")
    assert rig.answers()[-1] == ["100", "end", "ok"]


def test_a_worker_that_cannot_be_killed_is_stuck_and_its_block_refused(
    root: Path, start: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STUCK_AFTER_SECONDS", 0.2)
    make_endless(block_file(root, 1))
    rig = start(kill=lambda pid, number: None)
    rig.ask("1 200\nblock 0 offline\nblock 1 offline\nblock 2 offline")
    assert rig.answers() == [["1", "result", "0", "ok", "0", "offline"], ["1", "end", "stuck"]]
    rig.ask("2 5000\nblock 1 online\nblock 2 offline")
    assert rig.answers() == [
        ["2", "result", "0", "stuck", str(errno.EBUSY), ""],
        ["2", "result", "1", "ok", "0", "offline"],
        ["2", "end", "ok"],
    ]
    # The kernel lets go at last: the late results are for nobody, the block is served again.
    fd = os.open(block_file(root, 1), os.O_RDONLY)
    late = os.open(block_file(root, 1), os.O_WRONLY)
    assert rig.read().startswith("1 result 1 ")
    assert rig.read().startswith("1 result 2 ok ")
    os.close(fd)
    os.close(late)
    block_file(root, 1).unlink()
    block_file(root, 1).write_text("offline\n")
    deadline = time.monotonic() + 5
    while True:
        rig.ask("3 5000\nblock 1 offline")
        if rig.answers()[0][3] == "ok":
            break
        assert time.monotonic() < deadline


def test_where_too_much_is_stuck_the_host_can_still_be_reached(
    root: Path, start: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_STUCK", 0)

    def dial(port: int, timeout_seconds: float) -> socket.socket:
        raise ConnectionResetError(errno.ECONNRESET, "no")

    rig = start(dial=dial)
    rig.ask("1 5000\ncpu 1 online")
    assert rig.answers() == [["1", "refused", "busy"]]
    rig.ask("2 5000\ndial 7777\ncpu 1 online")
    assert rig.answers() == [["2", "refused", "busy"]]
    rig.ask("3 5000\ndial 7777")
    assert rig.answers() == [["3", "result", "0", "failed", str(errno.ECONNRESET), ""], ["3", "end", "ok"]]
    rig.ask("4 5000\npsi memory")
    assert rig.answers()[-1] == ["4", "end", "ok"]


def test_a_reclaim_that_never_returns_is_killed_and_one_that_is_stuck_keeps_others_out(
    root: Path, start: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STUCK_AFTER_SECONDS", 0.2)
    path = root / "sys/fs/cgroup/memory.reclaim"
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    rig = start()
    rig.ask("1 200\nreclaim 4096")
    assert rig.answers() == [["1", "end", "timeout"]]
    rig.close()
    rig = start(kill=lambda pid, number: None)
    rig.ask("1 200\nreclaim 4096")
    assert rig.answers() == [["1", "end", "stuck"]]
    rig.ask("2 5000\nreclaim 8192\ncpu 4095 online")
    assert rig.answers()[:2] == [
        ["2", "result", "0", "stuck", str(errno.EBUSY), ""],
        ["2", "result", "1", "gone", str(errno.ENOENT), ""],
    ]
    os.close(os.open(path, os.O_RDONLY))


def test_a_worker_that_is_killed_by_someone_else_is_reported(root: Path, start: Callable[..., Rig]) -> None:
    make_endless(block_file(root, 1))
    rig = start()
    rig.ask("1 60000\nblock 1 offline")
    worker = _only_child(rig.pid, rig.daemon)
    os.kill(worker, signal.SIGTERM)  # workers have the default: systemd's signal ends them
    assert rig.answers() == [["1", "end", "died"]]


def test_a_worker_that_dies_as_a_request_comes_takes_no_other_with_it(root: Path) -> None:
    """Both are found in one look. The request lets go of the dead one, and the new one gets its descriptor's number."""
    daemon, helpers_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    one = module.Helper(helpers_end, 0, str(root))
    assert one._fork()
    [(dead, worker)] = one._workers.items()
    number = worker.channel.fileno()
    os.kill(dead, signal.SIGKILL)
    os.waitid(os.P_PID, dead, os.WEXITED | os.WNOWAIT)
    daemon.send(b"1 9000\ncpu 1 online")
    one._receive(hung_up=False)
    [fresh] = one._workers.keys() - {dead}
    try:
        assert one._workers[fresh].channel.fileno() == number
        one._finish(number)
        one._finish(9999)
        assert one._workers[fresh].channel.fileno() == number, "it was not hung up on"
        daemon.settimeout(10)
        assert daemon.recv(4096).startswith(b"1 result 0 ok")
    finally:
        os.kill(fresh, signal.SIGKILL)
        for pid in (dead, fresh):
            os.waitpid(pid, 0)
            one._workers[pid].close()
        daemon.close()
        helpers_end.close()


def test_dial_hands_over_the_connected_stream(tmp_path: Path, start: Callable[..., Rig]) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "host"))
        listener.listen()

        def dial(port: int, timeout_seconds: float) -> socket.socket:
            assert port == 7777 and 0 < timeout_seconds <= 5
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(tmp_path / "host"))
            return sock

        rig = start(dial=dial)
        rig.ask("1 5000\ndial 7777")
        message, fds, _, _ = socket.recv_fds(rig.sock, 512, 4)
        assert message.startswith(b"1 result 0 ok 0 ")
        assert rig.read() == "1 end ok"
        with socket.socket(fileno=fds[0]) as mine, listener.accept()[0] as theirs:
            mine.send(b"hello")
            assert theirs.recv(9) == b"hello"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionResetError(errno.ECONNRESET, "no"), ["failed", str(errno.ECONNRESET), ""]),
        (TimeoutError("late"), ["timeout", str(errno.ETIMEDOUT), ""]),
    ],
)
def test_dial_that_fails_is_a_result(start: Callable[..., Rig], error: OSError, words: list[str]) -> None:
    def dial(port: int, timeout_seconds: float) -> socket.socket:
        raise error

    rig = start(dial=dial)
    rig.ask("1 5000\ndial 7777")
    assert rig.answers() == [["1", "result", "0", *words], ["1", "end", "ok"]]


def test_psi_opens_only_the_fixed_trigger(root: Path, start: Callable[..., Rig]) -> None:
    (root / "proc/pressure").mkdir(parents=True)
    (root / "proc/pressure/memory").touch()
    rig = start()
    rig.ask("1 5000\npsi memory\npsi cpu")
    message, fds, _, _ = socket.recv_fds(rig.sock, 512, 4)
    assert message.startswith(b"1 result 0 ok 0 ")
    assert (root / "proc/pressure/memory").read_bytes() == b"some 50000 1000000\0"
    os.close(fds[0])
    assert rig.answers()[0][:5] == ["1", "result", "1", "failed", str(errno.ENOENT)]


def test_the_helper_ends_with_the_daemons_status(start: Callable[..., Rig]) -> None:
    rig = start()
    os.kill(rig.pid, signal.SIGTERM)
    assert rig.wait() == 40 + signal.SIGTERM


def test_reload_is_passed_on(start: Callable[..., Rig]) -> None:
    rig = start()
    os.kill(rig.pid, signal.SIGHUP)
    assert rig.wait() == 40 + signal.SIGHUP


def test_a_killed_daemon_is_128_and_its_signal(root: Path, start: Callable[..., Rig]) -> None:
    make_endless(block_file(root, 1))
    rig = start()
    rig.ask("1 60000\nblock 1 offline")
    worker = _only_child(rig.pid, rig.daemon)
    os.kill(rig.daemon, signal.SIGKILL)
    assert rig.wait() == 128 + signal.SIGKILL
    _wait_gone(worker)


@pytest.mark.parametrize("how", [socket.SHUT_WR, socket.SHUT_RDWR])
def test_a_closed_socket_neither_ends_nor_spins_the_helper(how: int, start: Callable[..., Rig]) -> None:
    rig = start()
    rig.sock.shutdown(how)
    time.sleep(0.3)
    before = _cpu_ticks(rig.pid)
    time.sleep(0.5)
    assert _cpu_ticks(rig.pid) - before <= 1
    os.kill(rig.pid, signal.SIGTERM)
    assert rig.wait() == 40 + signal.SIGTERM


def test_an_idle_helper_never_wakes(start: Callable[..., Rig]) -> None:
    rig = start()
    rig.ask("1 1000\ncpu 1 online")
    rig.answers()
    time.sleep(0.2)
    before = _switches(rig.pid)
    time.sleep(1.0)
    assert _switches(rig.pid) == before


def test_a_daemon_that_does_not_read_is_not_served_further(start: Callable[..., Rig]) -> None:
    rig = start()
    rig.sock.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        for sent in range(100_000):
            rig.sock.send(b"nonsense")
            if sent % 100 == 0:
                time.sleep(0.001)
    assert sent < 5_000  # its queue and ours are full: bounded
    rig.sock.settimeout(5)
    for _ in range(sent):
        assert rig.read() == "0 refused grammar"


def test_the_helper_imports_little() -> None:
    heavy = {"asyncio", "typing", "subprocess", "logging", "re", "pathlib", "dataclasses", "inspect", "pwd"}
    code = "import sys; import guestd.guest.helper; print(*sys.modules)"
    listed = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": str(Path(helper.__file__).parents[3])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert heavy & (set(listed.stdout.split()) - {"pwd"}) == set()


def _only_child(pid: int, but: int) -> int:
    deadline = time.monotonic() + 5
    while True:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        children = [int(word) for word in text.split() if int(word) != but]
        if children and Path(f"/proc/{children[0]}/wchan").exists():
            time.sleep(0.1)  # past its preparations
            return children[0]
        assert time.monotonic() < deadline


def _wait_gone(pid: int) -> None:
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}/stat").exists() and _stat(pid)[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()


def _cpu_ticks(pid: int) -> int:
    return sum(map(int, _stat(pid)[11:13]))


def _switches(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
