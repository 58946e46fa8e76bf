"""PSI triggers. Urgent data on a TCP stream is the other thing that signals POLLPRI: it stands in for the kernel."""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.guest import psi
from guestd.guest.psi import TRIGGERS, Watcher, check_trigger, open_trigger, widened


def open_descriptors() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("spec", [*TRIGGERS.values(), "full 1 500000", "some 10000000 10000000"])
def test_good_triggers(spec: str) -> None:
    check_trigger(spec)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "some",
        "some 1",
        "some 1 2 3",
        "any 100000 1000000",
        "some 0 1000000",
        "some 1000001 1000000",
        "some 100 499999",
        "some 100 10000001",
        "some -1 1000000",
        "some 1e5 1000000",
        "some  100 1000000",
        "some 100 1000000\n",
        "some 100 9999999999999",
        "some ١٠٠ 1000000",
    ],
)
def test_bad_triggers(spec: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        check_trigger(spec)
    with pytest.raises(ValueError):
        open_trigger(str(tmp_path / "never-opened"), spec)


@given(st.text(max_size=30))
def test_anything_else_is_a_value_error(spec: str) -> None:
    with contextlib.suppress(ValueError):
        check_trigger(spec)


def test_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.touch()
    os.close(open_trigger(str(path), TRIGGERS["memory"]))
    assert path.read_bytes() == b"some 50000 1000000\0"


def test_no_psi_is_an_os_error_and_leaks_nothing(tmp_path: Path) -> None:
    before = open_descriptors()
    with pytest.raises(FileNotFoundError):
        open_trigger(str(tmp_path / "cpu"), TRIGGERS["cpu"])
    with pytest.raises(OSError):
        open_trigger("/dev/full", TRIGGERS["cpu"])  # takes the open, not the write
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("spec", "wide"),
    [
        ("some 100000 1000000", "some 200000 2000000"),
        ("full 1 500000", "full 4 2000000"),
        ("some 300000 3000000", "some 400000 4000000"),
        ("some 100000 2000000", None),
        ("some 10000000 10000000", None),
    ],
)
def test_a_wider_trigger_stands_for_the_same_share(spec: str, wide: str | None) -> None:
    assert widened(spec) == wide


@pytest.mark.parametrize("spec", TRIGGERS.values())
def test_the_wider_ones_are_triggers(spec: str) -> None:
    wide = widened(spec)
    assert wide is not None and widened(wide) is None


@pytest.mark.parametrize(
    ("refusal", "asked_for"),
    [
        (None, ["some 50000 1000000"]),
        (errno.EINVAL, ["some 50000 1000000", "some 100000 2000000"]),
        (errno.EPERM, ["some 50000 1000000"]),
        (errno.EACCES, ["some 50000 1000000"]),
        (errno.EOPNOTSUPP, ["some 50000 1000000"]),
    ],
)
def test_only_a_window_that_is_refused_is_asked_for_again(
    refusal: int | None, asked_for: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def kernel(path: str, spec: str) -> int:
        asked.append(spec)
        if refusal is not None and not spec.endswith(" 2000000"):
            raise OSError(refusal, os.strerror(refusal))
        return 77

    monkeypatch.setattr(psi, "_open", kernel)
    if refusal in (None, errno.EINVAL):
        assert open_trigger("/proc/pressure/memory", TRIGGERS["memory"]) == 77
    else:
        with pytest.raises(OSError) as caught:
            open_trigger("/proc/pressure/memory", TRIGGERS["memory"])
        assert caught.value.errno == refusal
    assert asked == asked_for


@pytest.mark.parametrize("kind", TRIGGERS)
def test_this_kernel_gives_a_trigger_or_says_why(kind: str) -> None:
    """Whatever it is, and whoever we are: 1 s with CAP_SYS_RESOURCE, 2 s without since Linux 6.5, EPERM before."""
    path = Path("/proc/pressure") / kind
    try:
        fd = open_trigger(str(path), TRIGGERS[kind])
    except OSError as error:
        assert error.errno in (errno.ENOENT, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP)
    else:
        assert os.read(fd, 5) == b"some "
        os.close(fd)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    with near, far:
        yield near, far


async def test_the_loop_is_woken_once_per_event(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    fired = asyncio.Event()
    count = 0

    def callback() -> None:
        nonlocal count
        count += 1
        near.recv(1, socket.MSG_OOB)  # the kernel's trigger is consumed by the poll itself
        fired.set()

    watcher = Watcher(os.dup(near.fileno()), callback, asyncio.get_running_loop())
    far.send(b"ordinary")
    await asyncio.sleep(0.05)
    assert count == 0  # only POLLPRI counts
    for expected in (1, 2):
        far.send(b"!", socket.MSG_OOB)
        async with asyncio.timeout(5):
            await fired.wait()
        fired.clear()
        await asyncio.sleep(0.05)
        assert count == expected
    watcher.close()
    watcher.close()
    far.send(b"!", socket.MSG_OOB)
    await asyncio.sleep(0.05)
    assert count == 2


async def test_two_triggers_are_told_apart(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    fired: list[str] = []
    loop = asyncio.get_running_loop()

    def reader(name: str, sock: socket.socket) -> Callable[[], object]:
        def callback() -> None:
            fired.append(name)
            sock.recv(1, socket.MSG_OOB)

        return callback

    first = Watcher(os.dup(near.fileno()), reader("near", near), loop)
    second = Watcher(os.dup(far.fileno()), reader("far", far), loop)
    near.send(b"!", socket.MSG_OOB)
    await asyncio.sleep(0.05)
    far.send(b"!", socket.MSG_OOB)
    await asyncio.sleep(0.05)
    assert fired == ["far", "near"]
    first.close()
    second.close()


async def test_a_trigger_that_is_lost_ends_its_watcher(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    lost = asyncio.Event()
    fired: list[None] = []
    fd = os.dup(near.fileno())
    Watcher(fd, lambda: fired.append(None), asyncio.get_running_loop(), on_lost=lost.set)
    far.close()
    near.shutdown(socket.SHUT_RDWR)
    async with asyncio.timeout(5):
        await lost.wait()
    assert not fired
    with pytest.raises(OSError):
        os.fstat(fd)
