"""Bytes through the relays, and whose they are."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from guestd.wire import relay
from guestd.wire.relay import (
    MAX_CONNECTIONS_PER_GUEST,
    IngressRelay,
    Peer,
    Peers,
    unix_listener,
)


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gd", dir="/tmp") as path:
        yield Path(path)


class Server:
    """Echoes, and notes by which name it was reached."""

    def __init__(self) -> None:
        self.peers: list[str] = []
        self.open = 0
        self._server: asyncio.Server

    async def start(self, path: Path) -> None:
        self._server = await asyncio.start_unix_server(self._serve, path)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = writer.get_extra_info("peername")
        self.peers.append("unix-abstract:" + name[1:].decode() if name else "unix:")
        self.open += 1
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        self.open -= 1
        writer.close()

    def close(self) -> None:
        self._server.close()


class Rig:
    """An ingress relay in front of an echo server."""

    def __init__(self, root: Path) -> None:
        self.root, self.peers, self.server = root, Peers(), Server()
        self.relay = IngressRelay(root / "server", self.peers)

    async def start(self) -> None:
        await self.server.start(self.root / "server")
        self.relay.listen_unix("a", self.root / "a", privileged_ports=False)
        self.relay.listen_unix("b", self.root / "b", privileged_ports=True)


@pytest.fixture
async def rig(root: Path) -> AsyncIterator[Rig]:
    one = Rig(root)
    await one.start()
    yield one
    await one.relay.close()
    one.server.close()


async def dial(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_unix_connection(path)


async def echo(path: Path, data: bytes) -> bytes:
    reader, writer = await dial(path)
    try:
        writer.write(data)
        writer.write_eof()
        async with asyncio.timeout(5):
            return await reader.read()
    finally:
        writer.close()


async def test_bytes_pass_both_ways_unchanged_however_many(rig: Rig) -> None:
    data = bytes(range(256)) * 8192  # 2 MiB: more than any buffer on the way
    reader, writer = await dial(rig.root / "a")

    async def send() -> None:
        writer.write(data)
        await writer.drain()
        writer.write_eof()

    sending = asyncio.create_task(send())
    async with asyncio.timeout(10):
        assert await reader.read(-1) == data
    await sending
    writer.close()


async def test_the_socket_is_the_identity(rig: Rig) -> None:
    readers = {}
    for name in ("a", "b"):
        readers[name] = await dial(rig.root / name)
        readers[name][1].write(b"x")
        assert await readers[name][0].read(1) == b"x"
    found = [rig.peers.find(peer) for peer in rig.server.peers]
    assert found == [Peer("a", "unix, process-unproven"), Peer("b", "unix")]
    for _, writer in readers.values():
        writer.close()
    await until(lambda: rig.server.open == 0)
    assert [rig.peers.find(peer) for peer in rig.server.peers] == [None, None]


async def test_who_comes_past_the_relay_is_nobody(rig: Rig) -> None:
    await echo(rig.root / "server", b"x")
    assert [rig.peers.find(peer) for peer in rig.server.peers] == [None]
    assert rig.peers.find("unix-abstract:made-up") is None
    assert rig.peers.find("") is None


async def test_a_name_is_used_once(rig: Rig) -> None:
    for _ in range(3):
        assert await echo(rig.root / "a", b"x") == b"x"
    assert len(set(rig.server.peers)) == 3


async def test_one_guest_has_so_many_connections_and_another_its_own(rig: Rig) -> None:
    opened = [await dial(rig.root / "a") for _ in range(MAX_CONNECTIONS_PER_GUEST)]
    await until(lambda: rig.server.open == MAX_CONNECTIONS_PER_GUEST)
    reader, writer = await dial(rig.root / "a")
    async with asyncio.timeout(5):
        assert await reader.read() == b""
    writer.close()
    assert await echo(rig.root / "b", b"x") == b"x"
    opened.pop()[1].close()
    await until(lambda: rig.server.open == MAX_CONNECTIONS_PER_GUEST - 1)
    assert await echo(rig.root / "a", b"x") == b"x"
    for _, writer in opened:
        writer.close()


async def test_without_a_server_a_connection_ends_and_the_next_works(rig: Rig) -> None:
    rig.server.close()
    (rig.root / "server").unlink(missing_ok=True)
    assert await echo_or_nothing(rig.root / "a") == b""
    rig.server = Server()
    await rig.server.start(rig.root / "server")
    assert await echo(rig.root / "a", b"x") == b"x"


async def test_stopping_ends_that_guests_connections_only(rig: Rig) -> None:
    a, b = await dial(rig.root / "a"), await dial(rig.root / "b")
    for reader, writer in (a, b):
        writer.write(b"x")
        await reader.read(1)
    await rig.relay.stop_listening("a")
    await rig.relay.stop_listening("nobody")
    async with asyncio.timeout(5):
        assert await a[0].read() == b""
    with pytest.raises(ConnectionRefusedError):
        await dial(rig.root / "a")
    b[1].write(b"y")
    assert await b[0].read(1) == b"y"
    for _, writer in (a, b):
        writer.close()


async def test_who_floods_is_cut_off_for_a_while_longer_each_time_and_nobody_else(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "_SHUN_SECONDS", 0.3)
    a, b = await dial(rig.root / "a"), await dial(rig.root / "b")
    for reader, writer in (a, b):
        writer.write(b"x")
        assert await reader.read(1) == b"x"
    assert rig.relay.shun("a") == 0.3
    assert rig.relay.shun("a") == 0, "goes on already"
    async with asyncio.timeout(5):
        assert await a[0].read() == b"", "what was open is closed"
        assert await echo(rig.root / "a", b"") == b"", "and what is new"
    b[1].write(b"y")
    assert await b[0].read(1) == b"y"

    async def served() -> bool:
        try:
            return await echo(rig.root / "a", b"z") == b"z"
        except ConnectionError:  # closed before it was written
            return False

    for _ in range(250):
        if await served():
            break
        await asyncio.sleep(0.02)
    else:
        pytest.fail("never listened to again")
    assert rig.relay.shun("a") == 0.6
    for _, writer in (a, b):
        writer.close()


async def test_a_guest_is_listened_to_again_after_a_stop(rig: Rig) -> None:
    await rig.relay.stop_listening("a")
    rig.relay.listen_unix("a", rig.root / "a", privileged_ports=False)
    assert await echo(rig.root / "a", b"x") == b"x"


def test_a_leftover_socket_is_replaced_and_a_bad_path_named(root: Path) -> None:
    for _ in range(2):
        listener = unix_listener(root / "s")
        listener.close()
    with pytest.raises(OSError, match=r"cannot listen on .*x{100}"):
        unix_listener(root / ("x" * 120))
    with pytest.raises(OSError, match=r"cannot listen on .*missing/s: No such file"):
        unix_listener(root / "missing" / "s")


async def echo_or_nothing(path: Path) -> bytes:
    try:
        return await echo(path, b"x")
    except ConnectionError:
        return b""


async def until(holds: object) -> None:
    async with asyncio.timeout(5):
        while not holds():  # type: ignore[operator]  # noqa: ASYNC110 - whatever a test waits for
            await asyncio.sleep(0.005)
