"""The root helper, for real: forked, over a fake tree; a FIFO nobody reads is the write that never returns."""

import contextlib
import errno
import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.guest import helper


def make_tree(root: Path, cpus: int = 4, blocks: int = 8) -> Path:
    for n in range(cpus):
        directory = root / f"sys/devices/system/cpu/cpu{n}"
        directory.mkdir(parents=True)
        if n:
            (directory / "online").write_text("0\n")
    for n in range(blocks):
        directory = root / f"sys/devices/system/memory/memory{n}"
        directory.mkdir(parents=True)
        (directory / "state").write_text("offline\n")
    return root


def cpu_file(root: Path, n: int) -> Path:
    return root / f"sys/devices/system/cpu/cpu{n}/online"


def block_file(root: Path, n: int) -> Path:
    return root / f"sys/devices/system/memory/memory{n}/state"


def make_endless(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


class Rig:
    """A helper process with a daemon process below it; the test holds the daemon's end of the socket."""

    def __init__(self, root: Path, **options: object) -> None:
        self.sock, helpers_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(10)
        told, tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self.sock.close()
            status = 99
            with contextlib.suppress(BaseException):
                waited_for = {signal.SIGHUP, signal.SIGTERM}
                signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)  # before there is anybody to be hit by one
                daemon = os.fork()
                if daemon == 0:
                    helpers_end.close()
                    signal.alarm(60)  # no orphan, whatever the test does
                    os._exit(40 + signal.sigwait(waited_for))
                signal.pthread_sigmask(signal.SIG_UNBLOCK, waited_for)
                os.write(tell, f"{daemon}\n".encode())
                status = helper.Helper(helpers_end, daemon, str(root), **options).run()  # type: ignore[arg-type]
            os._exit(status)
        helpers_end.close()
        os.close(tell)
        with os.fdopen(told) as pipe:
            self.daemon = int(pipe.readline())
        self.ask("x")
        assert self.read() == "0 refused grammar"  # it serves: its signals are caught
        self.status: int | None = None

    def ask(self, text: str) -> None:
        self.sock.send(text.encode())

    def read(self) -> str:
        return self.sock.recv(4096).decode()

    def answers(self) -> list[list[str]]:
        """All messages up to and with the one that ends a request, as words, without the time."""
        found = []
        while True:
            words = self.read().split(" ")
            if words[1] == "result":
                assert int(words.pop(5)) >= 0
            found.append(words)
            if words[1] != "result":
                return found

    def wait(self) -> int:
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def close(self) -> None:
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.daemon, signal.SIGKILL)
            self.wait()
        self.sock.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_tree(tmp_path)


@pytest.fixture
def start(root: Path) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(**options: object) -> Rig:
        rigs.append(Rig(root, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


# --- grammar ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "operation"),
    [
        ("cpu 3 online", ("cpu", "3", "online")),
        ("cpu 0 offline", ("cpu", "0", "offline")),
        ("block 37 online_movable", ("block", "37", "online_movable")),
        ("block 16777215 offline", ("block", "16777215", "offline")),
        ("dial 7777", ("dial", "7777")),
        ("psi memory", ("psi", "memory")),
    ],
)
def test_operations_of_the_grammar(line: str, operation: tuple[str, ...]) -> None:
    assert helper.parse_operation(line) == operation
    assert helper.parse_request(f"7 100\n{line}".encode()) == (7, 100, [operation])


@pytest.mark.parametrize(
    "line",
    [
        "",
        "cpu",
        "cpu 1",
        "cpu 1 on",
        "cpu 01 online",
        "cpu -1 online",
        "cpu +1 online",
        "cpu 1 online ",
        "cpu  1 online",
        "cpu 1\tonline",
        "cpu 65536 online",
        "cpu 99999999999999999999 online",
        "cpu ../1 online",
        "cpu 1/../../x online",
        "CPU 1 online",
        "cpu 1 online_movable",
        "block 1 removable",
        "block 16777216 offline",
        "block 1 online\0",
        "block ١ offline",
        "dial 0",
        "dial 4294967295",
        "dial 1 2",
        "psi irq",
        "psi memory some",
        "exec true",
    ],
)
def test_everything_else_is_refused(line: str) -> None:
    assert helper.parse_operation(line) is None
    with pytest.raises(helper.BadRequest):
        helper.parse_request(f"7 100\n{line}".encode())


@pytest.mark.parametrize(
    "head", ["", "7", "0 100", "7 0", "7 600001", "7 1e3", "4294967296 100", "7 100 1", " 7 100", "7 100 "]
)
def test_bad_heads_are_refused(head: str) -> None:
    with pytest.raises(helper.BadRequest):
        helper.parse_request(f"{head}\ncpu 1 online".encode())


def test_a_request_has_at_least_one_operation_and_at_most_the_bound() -> None:
    with pytest.raises(helper.BadRequest) as caught:
        helper.parse_request(b"7 100")
    assert caught.value.request_id == 7
    line = b"\nblock 1 online"
    assert len(helper.parse_request(b"7 100" + line * helper.MAX_OPERATIONS)[2]) == helper.MAX_OPERATIONS
    with pytest.raises(helper.BadRequest):
        helper.parse_request(b"7 100" + line * (helper.MAX_OPERATIONS + 1))


WORDS = st.sampled_from(
    (
        *("cpu", "block", "dial", "psi", "0", "1", "00", "-1", "99999999", "online", "offline", "online_movable"),
        *("memory", "/", "..", "", "\0", "é", "7 100", "\n", " "),
    )
)


@given(st.one_of(st.binary(max_size=200), st.lists(WORDS, max_size=12).map(lambda w: " ".join(w).encode())))
def test_fuzz_a_request_is_understood_exactly_or_refused(message: bytes) -> None:
    helper.parse_cancel(message)
    try:
        request_id, deadline_ms, operations = helper.parse_request(message)
    except helper.BadRequest as error:
        assert 0 <= error.request_id < 1 << 32
        return
    # What was understood says the same again, byte for byte: nothing was skipped or bent.
    again = "\n".join([f"{request_id} {deadline_ms}", *(" ".join(op) for op in operations)])
    assert again.encode() == message
    for op in operations:
        assert "/" not in " ".join(op) and "." not in " ".join(op)


@given(st.text(max_size=30))
def test_fuzz_operations(line: str) -> None:
    operation = helper.parse_operation(line)
    assert operation is None or " ".join(operation) == line


def test_cancel() -> None:
    assert helper.parse_cancel(b"12 cancel") == 12
    assert helper.parse_cancel(b"12 cancel ") is None
    assert helper.parse_cancel(b"x cancel") is None


# --- single operations --------------------------------------------------------------------------------


def test_cpu_goes_online_and_offline(root: Path) -> None:
    assert helper.set_cpu(str(root), "1", "online") == ("ok", 0, "online")
    assert cpu_file(root, 1).read_text() == "1"
    assert helper.set_cpu(str(root), "1", "offline") == ("ok", 0, "offline")


def test_cpu_0_is_never_taken_offline(root: Path) -> None:
    cpu_file(root, 0).write_text("1\n")
    assert helper.set_cpu(str(root), "0", "offline") == ("refused", errno.EPERM, "")
    assert cpu_file(root, 0).read_text() == "1\n"


def test_a_cpu_without_a_switch_is_always_on(root: Path) -> None:
    assert helper.set_cpu(str(root), "0", "online") == ("already", 0, "online")
    cpu_file(root, 2).unlink()
    assert helper.set_cpu(str(root), "2", "offline") == ("refused", errno.EOPNOTSUPP, "online")


def test_what_is_not_there_is_gone(root: Path) -> None:
    assert helper.set_cpu(str(root), "99", "online") == ("gone", errno.ENOENT, "")
    assert helper.set_block(str(root), "99", "offline") == ("gone", errno.ENOENT, "")
    assert not block_file(root, 99).parent.exists()


def test_the_state_read_back_decides(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, text: str) -> None:
        raise OSError(errno.EINVAL, "as the kernel does for a block that is in that state")

    monkeypatch.setattr(helper, "_write", refuse)
    assert helper.set_block(str(root), "1", "offline") == ("already", 0, "offline")
    assert helper.set_block(str(root), "1", "online_movable") == ("failed", errno.EINVAL, "offline")
    monkeypatch.setattr(helper, "_write", lambda path, text: None)
    assert helper.set_block(str(root), "1", "online") == ("failed", 0, "offline")


def test_a_block_that_vanishes_while_it_is_written_is_gone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vanish(path: str, text: str) -> None:
        Path(path).unlink()
        raise OSError(errno.ENODEV, "gone while open")

    monkeypatch.setattr(helper, "_write", vanish)
    assert helper.set_block(str(root), "1", "offline") == ("gone", errno.ENODEV, "")


class FakeVsock:
    """Counts what is asked of a socket; ports in `taken` are in use."""

    def __init__(self, taken: set[int], fail: int = 0) -> None:
        self.taken, self.fail, self.calls = taken, fail, list[object]()

    def bind(self, address: tuple[int, int]) -> None:
        if address[1] in self.taken:
            raise OSError(errno.EADDRINUSE, "in use")
        self.calls.append(("bind", address))

    def settimeout(self, seconds: float | None) -> None:
        self.calls.append(("timeout", seconds))

    def connect(self, address: tuple[int, int]) -> None:
        self.calls.append(("connect", address))
        if self.fail:
            raise OSError(self.fail, "no")

    def close(self) -> None:
        self.calls.append("close")


def test_dial_takes_the_highest_free_reserved_port() -> None:
    sock = FakeVsock({1023, 1022})
    helper.connect_from_reserved(cast(socket.socket, sock), 7777, 1.5)
    assert sock.calls == [
        ("bind", (socket.VMADDR_CID_ANY, 1021)),
        ("timeout", 1.5),
        ("connect", (2, 7777)),
        ("timeout", None),
    ]


@pytest.mark.parametrize(
    ("taken", "fail", "number"),
    [(set(range(1024)), 0, errno.EADDRINUSE), (set(), errno.ECONNRESET, errno.ECONNRESET)],
)
def test_dial_that_fails_leaves_nothing_open(taken: set[int], fail: int, number: int) -> None:
    sock = FakeVsock(taken, fail)
    with pytest.raises(OSError) as caught:
        helper.connect_from_reserved(cast(socket.socket, sock), 7777, 1.5)
    assert caught.value.errno == number
    assert sock.calls[-1] == "close"


# --- the process ------------------------------------------------------------------------------------


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
    monkeypatch.setattr(helper, "STUCK_AFTER_SECONDS", 0.2)
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


def test_a_worker_that_is_killed_by_someone_else_is_reported(root: Path, start: Callable[..., Rig]) -> None:
    make_endless(block_file(root, 1))
    rig = start()
    rig.ask("1 60000\nblock 1 offline")
    worker = _only_child(rig.pid, rig.daemon)
    os.kill(worker, signal.SIGTERM)  # workers have the default: systemd's signal ends them
    assert rig.answers() == [["1", "end", "died"]]


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
        env={"PYTHONPATH": str(Path(helper.__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert heavy & (set(listed.stdout.split()) - {"pwd"}) == set()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give root up")
def test_privileges_are_dropped_for_good() -> None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            helper.drop_privileges("nobody")
            status = Path("/proc/self/status").read_text()
            os.write(writing, status.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        lines = dict(line.split(":\t", 1) for line in pipe.read().splitlines() if ":\t" in line)
    os.waitpid(pid, 0)
    entry = pwd.getpwnam("nobody")
    assert lines["Uid"].split() == [str(entry.pw_uid)] * 4
    assert lines["Gid"].split() == [str(entry.pw_gid)] * 4
    assert lines["Groups"].split() == []
    assert int(lines["CapEff"], 16) == int(lines["CapPrm"], 16) == int(lines["CapAmb"], 16) == 0


def test_root_is_no_user_for_the_daemon() -> None:
    with pytest.raises(RuntimeError, match="root is root"):
        helper.drop_privileges("root")
    with pytest.raises(KeyError):
        helper.drop_privileges("no-such-user-here")


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
