"""Single operations, over a fake tree."""

import errno
import socket
from pathlib import Path
from typing import cast

import pytest
from helper_rig import block_file, cpu_file

from guestd.guest.helper import work as module


def test_cpu_goes_online_and_offline(root: Path) -> None:
    assert module.set_cpu(str(root), "1", "online") == ("ok", 0, "online")
    assert cpu_file(root, 1).read_text() == "1"
    assert module.set_cpu(str(root), "1", "offline") == ("ok", 0, "offline")


def test_cpu_0_is_never_taken_offline(root: Path) -> None:
    cpu_file(root, 0).write_text("1\n")
    assert module.set_cpu(str(root), "0", "offline") == ("refused", errno.EPERM, "")
    assert cpu_file(root, 0).read_text() == "1\n"


def test_a_cpu_without_a_switch_is_always_on(root: Path) -> None:
    assert module.set_cpu(str(root), "0", "online") == ("already", 0, "online")
    cpu_file(root, 2).unlink()
    assert module.set_cpu(str(root), "2", "offline") == ("refused", errno.EOPNOTSUPP, "online")


def test_what_is_not_there_is_gone(root: Path) -> None:
    assert module.set_cpu(str(root), "99", "online") == ("gone", errno.ENOENT, "")
    assert module.set_block(str(root), "99", "offline") == ("gone", errno.ENOENT, "")
    assert not block_file(root, 99).parent.exists()


def test_the_state_read_back_decides(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, text: str) -> None:
        raise OSError(errno.EINVAL, "as the kernel does for a block that is in that state")

    monkeypatch.setattr(module, "_write", refuse)
    assert module.set_block(str(root), "1", "offline") == ("already", 0, "offline")
    assert module.set_block(str(root), "1", "online_movable") == ("failed", errno.EINVAL, "offline")
    monkeypatch.setattr(module, "_write", lambda path, text: None)
    assert module.set_block(str(root), "1", "online") == ("failed", 0, "offline")


def test_a_block_that_vanishes_while_it_is_written_is_gone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vanish(path: str, text: str) -> None:
        Path(path).unlink()
        raise OSError(errno.ENODEV, "gone while open")

    monkeypatch.setattr(module, "_write", vanish)
    assert module.set_block(str(root), "1", "offline") == ("gone", errno.ENODEV, "")


def memory_files(root: Path) -> Path:
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text("MemTotal:  1000000 kB\nMemFree:    200000 kB\nMemAvailable: 300000 kB\n")
    (root / "sys/fs/cgroup").mkdir(parents=True)
    (root / "sys/fs/cgroup/memory.reclaim").touch()
    return root / "proc/meminfo"


@pytest.mark.parametrize("number", [0, errno.EAGAIN])
def test_reclaim_says_what_came_free(root: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    meminfo = memory_files(root)

    def write(path: str, text: str) -> None:
        assert (path, text) == (f"{root}/sys/fs/cgroup/memory.reclaim", "4194304")
        meminfo.write_text(meminfo.read_text().replace("200000", "203000"))
        if number:
            raise OSError(number, "the kernel found less than it was asked for")

    monkeypatch.setattr(module, "_write", write)
    assert module.reclaim(str(root), "4194304") == ("ok", 0, str(3000 * 1024))


def test_reclaim_that_frees_nothing_or_cannot_tell(root: Path) -> None:
    meminfo = memory_files(root)
    assert module.reclaim(str(root), "4096") == ("ok", 0, "0")
    assert (root / "sys/fs/cgroup/memory.reclaim").read_text() == "4096"
    for text in ("MemTotal: 1 kB\n", "MemFree:", "MemFree: much kB\n"):
        meminfo.write_text(text)
        assert module.reclaim(str(root), "4096") == ("ok", 0, "")
    meminfo.unlink()
    assert module.reclaim(str(root), "4096") == ("ok", 0, "")


def test_reclaim_where_the_kernel_has_no_file(root: Path) -> None:
    assert module.reclaim(str(root), "4096") == ("gone", errno.ENOENT, "")


def test_reclaim_that_the_kernel_refuses(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory_files(root)

    def refuse(path: str, text: str) -> None:
        raise OSError(errno.EROFS, "the sandbox")

    monkeypatch.setattr(module, "_write", refuse)
    assert module.reclaim(str(root), "4096") == ("failed", errno.EROFS, "")


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
    module.connect_from_reserved(cast(socket.socket, sock), 7777, 1.5)
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
        module.connect_from_reserved(cast(socket.socket, sock), 7777, 1.5)
    assert caught.value.errno == number
    assert sock.calls[-1] == "close"
