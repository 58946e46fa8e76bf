"""gRPC from the client's side: against gRPC's own server, and against one that does what that never does."""

import asyncio
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes

from guestd.model.errors import UnreachableError
from guestd.wire.call import MAX_UNSENT, Call, open_call

LIMIT = 64 * 1024
PATH = "/test.Service/Talk"
TEXT = "schön: 100 % of ☃\nis \x01 odd"
OK_HEADERS = [(":status", "200"), ("content-type", "application/grpc")]


class Server:
    """gRPC's own; each call is `talk`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heard: list[bytes] = []
        self.over = asyncio.Event()
        self.stopping = asyncio.Event()
        self.grpc = grpc.aio.server(options=(("grpc.http2.bdp_probe", 0),))
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(self.talk)
        self.grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", {"Talk": handler}),))
        self.grpc.add_insecure_port(f"unix:{path}")

    async def talk(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> AsyncIterator[bytes]:
        """Echoes; some words are orders."""
        context.add_done_callback(lambda _: self.over.set())
        async for request in requests:
            self.heard.append(request)
            if request == b"abort":
                await context.abort(grpc.StatusCode.ABORTED, TEXT)
            elif request == b"end":
                return
            elif request == b"later":
                await self.stopping.wait()
                await asyncio.sleep(0.2)  # GOAWAY has been sent
                await context.abort(grpc.StatusCode.UNAVAILABLE, "ends now")
            elif request == b"slow":
                await asyncio.sleep(0.3)
            else:
                yield request

    async def call(self, path: str = PATH) -> Call:
        return await open_call(await connect(self.path), path, LIMIT)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    with tempfile.TemporaryDirectory(prefix="gd", dir="/tmp") as root:
        one = Server(Path(root) / "s")
        await one.grpc.start()
        yield one
        await one.grpc.stop(0)


async def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, str(path))
    return sock


async def test_messages_go_both_ways_whole_and_in_order(server: Server) -> None:
    call = await server.call()
    sent = [b"", b"x", bytes(range(256)) * 256, *(bytes([number]) * 20_000 for number in range(50))]
    for message in sent:
        call.send(message)
    async with asyncio.timeout(10):
        assert [await call.read() for _ in sent] == sent
    call.close()


async def test_a_server_that_reads_late_gets_all_of_it(server: Server) -> None:
    call = await server.call()
    sent = [b"slow", *(bytes([number]) * 30_000 for number in range(40))]  # 20 times what flow control lets through
    for message in sent:
        call.send(message)
    async with asyncio.timeout(10):
        assert [await call.read() for _ in sent[1:]] == sent[1:]
    assert server.heard == sent
    call.close()


async def test_a_status_arrives_with_its_text_after_what_was_said(server: Server) -> None:
    call = await server.call()
    call.send(b"first")
    call.send(b"abort")
    async with asyncio.timeout(5):
        assert await call.read() == b"first"
        with pytest.raises(UnreachableError) as caught:
            await call.read()
    assert str(caught.value) == f"ABORTED: {TEXT}"
    call.close()


async def test_a_good_end_is_an_end(server: Server) -> None:
    call = await server.call()
    call.send(b"end")
    with pytest.raises(UnreachableError, match=r"^the broker ended the stream$"):
        await call.read()
    call.send(b"nobody hears it")
    call.close()


async def test_a_service_that_is_not_there_is_said(server: Server) -> None:
    call = await server.call("/other.Service/Talk")
    with pytest.raises(UnreachableError, match=r"^UNIMPLEMENTED: "):
        await call.read()
    call.close()


async def test_a_server_that_stops_may_still_say_why(server: Server) -> None:
    call = await server.call()
    call.send(b"later")
    call.send(b"not read any more")
    while not server.heard:  # noqa: ASYNC110 - whatever a test waits for
        await asyncio.sleep(0.01)
    stopping = asyncio.create_task(server.grpc.stop(5))
    server.stopping.set()
    with pytest.raises(UnreachableError, match=r"^UNAVAILABLE: ends now$"):
        await call.read()
    call.close()
    await stopping


async def test_a_server_that_stops_at_once_ends_the_call(server: Server) -> None:
    call = await server.call()
    call.send(b"hello")
    assert await call.read() == b"hello"
    await server.grpc.stop(0)
    with pytest.raises(UnreachableError, match=r"^(UNAVAILABLE|CANCELLED): "):
        await call.read()
    call.close()


async def test_hanging_up_is_noticed(server: Server) -> None:
    call = await server.call()
    call.send(b"hello")
    assert await call.read() == b"hello"
    call.close()
    async with asyncio.timeout(5):
        await server.over.wait()
    assert server.heard == [b"hello"]


class Odd:
    """A server that says what a test has it say, in pieces as small as asked for."""

    def __init__(self) -> None:
        self.ours, self.sock = socket.socketpair()
        self.http = H2Connection(H2Configuration(client_side=False, validate_outbound_headers=False))
        self.http.initiate_connection()

    async def call(self) -> Call:
        call = await open_call(self.ours, PATH, LIMIT)
        self.http.receive_data(self.sock.recv(65536))
        return call

    def say(self, piece_bytes: int = 65536) -> None:
        data = self.http.data_to_send()
        for start in range(0, len(data), piece_bytes):
            self.sock.send(data[start : start + piece_bytes])


@pytest.fixture
def odd() -> Iterator[Odd]:
    one = Odd()
    yield one
    one.sock.close()


async def test_bytes_may_come_one_by_one(odd: Odd) -> None:
    call = await odd.call()
    odd.http.send_headers(1, OK_HEADERS)
    odd.http.send_data(1, b"\0\0\0\0\x05hello\0\0")
    odd.http.send_data(1, b"\0\0\x01!")
    odd.http.send_headers(1, [("grpc-status", "10"), ("grpc-message", "so%20there")], end_stream=True)
    odd.say(piece_bytes=1)
    assert [await call.read(), await call.read()] == [b"hello", b"!"]
    with pytest.raises(UnreachableError, match=r"^ABORTED: so there$"):
        await call.read()
    call.close()


async def test_a_ping_is_answered_after_a_goaway_too(odd: Odd) -> None:
    call = await odd.call()
    odd.http.ping(b"12345678")
    odd.say()
    odd.sock.send(b"\0\0\x08\x07\0\0\0\0\0" + bytes(8))  # GOAWAY
    odd.sock.send(b"\0\0\x08\x06\0\0\0\0\0" + b"87654321")  # PING
    loop = asyncio.get_running_loop()
    odd.sock.setblocking(False)
    heard = b""
    async with asyncio.timeout(5):
        while b"87654321" not in heard:
            heard += await loop.sock_recv(odd.sock, 65536)
    assert b"12345678" in heard
    call.close()


def no_status(odd: Odd) -> None:
    odd.http.send_headers(1, OK_HEADERS)
    odd.http.end_stream(1)


def too_long(odd: Odd) -> None:
    odd.http.send_headers(1, OK_HEADERS)
    odd.http.send_data(1, b"\0" + (LIMIT + 1).to_bytes(4) + b"x")


def compressed(odd: Odd) -> None:
    odd.http.send_headers(1, OK_HEADERS)
    odd.http.send_data(1, b"\x01\0\0\0\x01x")


def half_a_message(odd: Odd) -> None:
    odd.http.send_headers(1, OK_HEADERS)
    odd.http.send_data(1, b"\0\0\0\0\x05he")
    odd.http.send_headers(1, [("grpc-status", "13")], end_stream=True)


def a_long_frame(odd: Odd) -> None:
    odd.sock.send((1 << 20).to_bytes(3) + b"\0\0\0\0\0\x01" + bytes(100))


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (no_status, r"^UNKNOWN: the broker ended the stream without a status"),
        (too_long, r"^RESOURCE_EXHAUSTED: a message of 65537 bytes from the broker, at most 65536"),
        (compressed, r"^RESOURCE_EXHAUSTED: a compressed message"),
        (half_a_message, r"^INTERNAL: $"),
        (a_long_frame, r"^INTERNAL: the broker does not speak HTTP/2: .*1048576"),
        (lambda odd: odd.http.reset_stream(1, ErrorCodes.ENHANCE_YOUR_CALM), r"^UNAVAILABLE: .*HTTP/2 error 11"),
        (lambda odd: odd.http.send_headers(1, [(":status", "404")]), r"^UNAVAILABLE: .* HTTP status 404"),
        (lambda odd: odd.http.send_headers(1, [*OK_HEADERS, ("grpc-status", "99")], True), r"^status 99: $"),
        (
            lambda odd: odd.sock.send(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
            r"^INTERNAL: the broker does not speak HTTP/2",
        ),
        (lambda odd: odd.sock.close(), r"^UNAVAILABLE: the connection has ended"),
    ],
)
async def test_how_a_call_can_end(odd: Odd, act: Callable[[Odd], object], said: str) -> None:
    call = await odd.call()
    act(odd)
    if odd.sock.fileno() >= 0:
        odd.say()
    async with asyncio.timeout(5):
        with pytest.raises(UnreachableError, match=said):
            await call.read()
    call.close()


async def test_a_server_that_does_not_read_cannot_fill_memory(odd: Odd) -> None:
    call = await odd.call()
    sent = 0
    with pytest.raises(UnreachableError, match="does not read"):
        for _ in range(10_000):
            call.send(bytes(1000))
            sent += 1
    assert sent <= 66 + MAX_UNSENT  # HTTP/2 lets 64 KiB through unasked
    call.close()
