"""PSI triggers. Urgent data on a TCP stream is the other thing that signals POLLPRI: it stands in for the kernel."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.guest.psi import TRIGGERS, Watcher, check_trigger, open_trigger


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
