"""Two sockets joined, one side of each pair in the test's hands."""

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from guestd.wire.splice import Splice


class Rig:
    """guest ↔ (one, other) ↔ server."""

    def __init__(self) -> None:
        self.guest, one = socket.socketpair()
        self.server, other = socket.socketpair()
        for sock in (self.guest, self.server):
            sock.setblocking(False)
        self.closed = 0
        self.inner = (one, other)
        self.splice = Splice(one, other, self._on_closed)

    def _on_closed(self) -> None:
        self.closed += 1

    async def read(self, sock: socket.socket, count: int) -> bytes:
        """Exactly so much, or less at the end."""
        loop, found = asyncio.get_running_loop(), b""
        async with asyncio.timeout(10):
            while len(found) < count and (data := await loop.sock_recv(sock, 65536)):
                found += data
        return found

    async def until_closed(self) -> None:
        async with asyncio.timeout(5):
            while not self.closed:  # noqa: ASYNC110 - a plain callback
                await asyncio.sleep(0.005)
        assert [sock.fileno() for sock in self.inner] == [-1, -1]


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    one = Rig()
    yield one
    one.splice.close()
    one.guest.close()
    one.server.close()
    assert one.closed == 1


async def test_an_end_is_passed_on_and_the_other_way_stays_open(rig: Rig) -> None:
    rig.guest.send(b"last words")
    rig.guest.shutdown(socket.SHUT_WR)
    assert await rig.read(rig.server, 1 << 20) == b"last words"
    rig.server.send(b"answer")
    assert await rig.read(rig.guest, 6) == b"answer"
    assert not rig.closed
    rig.server.shutdown(socket.SHUT_WR)
    await rig.until_closed()


async def test_who_does_not_read_holds_the_writer_up_and_nothing_is_lost(rig: Rig) -> None:
    loop, data = asyncio.get_running_loop(), bytes(range(256)) * 16384  # 4 MiB
    sent = 0
    for _ in range(50):  # until every buffer on the way is full
        await asyncio.sleep(0.005)
        try:
            sent += rig.guest.send(data[sent:])
        except BlockingIOError:
            continue
    assert sent < len(data), "somebody keeps it all"
    rest = asyncio.create_task(loop.sock_sendall(rig.guest, data[sent:]))
    assert await rig.read(rig.server, len(data)) == data
    await rest


async def test_what_is_held_still_arrives_after_the_writer_has_gone(rig: Rig) -> None:
    sent = 0
    for _ in range(50):
        await asyncio.sleep(0.005)
        try:
            sent += rig.guest.send(b"x" * 65536)
        except BlockingIOError:
            continue
    rig.guest.close()
    assert len(await rig.read(rig.server, 1 << 30)) == sent
    rig.server.close()
    await rig.until_closed()


async def test_a_broken_side_is_the_end_of_both(rig: Rig) -> None:
    rig.server.close()
    await asyncio.sleep(0.02)
    rig.guest.send(b"to nobody")
    await rig.until_closed()
    assert await rig.read(rig.guest, 1) == b""


async def test_closing_twice_tells_once(rig: Rig) -> None:
    rig.splice.close()
    rig.splice.close()
    assert rig.closed == 1
