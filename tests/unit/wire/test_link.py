"""The guest's end of the stream, against a broker that says whatever a test wants."""

import asyncio
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from guestd.model.errors import ProtocolError, UnreachableError
from guestd.model.guest import Identity
from guestd.model.messages import BrokerMessage, Grant, Heartbeat, Hello, OrderId, Usable, Welcome
from guestd.model.resources import Kind, Resources
from guestd.v1 import guest_pb2, guest_pb2_grpc
from guestd.wire import amounts, convert, link
from guestd.wire.call import open_call
from guestd.wire.link import Stream, converse

HELLO = Hello(1, 1, Identity(bytes(16), 1), Usable())
WELCOME = Welcome(1, "a", 1, 1.0, Resources(), Resources())
GRANT = Grant(OrderId(1, 1, 1), Kind.CPU, 1000)
Requests = AsyncIterator[guest_pb2.NegotiateRequest]


class Broker(guest_pb2_grpc.GuestServiceServicer):
    """Says what is in `says` (a number: waits so long), then ends with `status`, or listens for ever."""

    def __init__(self) -> None:
        self.says: list[BrokerMessage | guest_pb2.NegotiateResponse | float] = []
        self.status: grpc.StatusCode | None = None
        self.heard: list[object] = []

    async def Negotiate(self, requests: Requests, context: object) -> AsyncIterator[guest_pb2.NegotiateResponse]:
        listening = asyncio.create_task(self._listen(requests))
        try:
            for one in self.says:
                if isinstance(one, float):
                    await asyncio.sleep(one)
                else:
                    wire = one if isinstance(one, guest_pb2.NegotiateResponse) else convert.broker_message_to_wire(one)
                    yield wire
            if self.status is not None:
                await context.abort(self.status, "because")  # type: ignore[attr-defined]
            await listening
        finally:
            listening.cancel()

    async def _listen(self, requests: Requests) -> None:
        async for request in requests:
            self.heard.append(convert.guest_message_from_wire(request))


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gd", dir="/tmp") as root:
        yield Path(root) / "s"


@pytest.fixture
async def broker(path: Path) -> AsyncIterator[Broker]:
    one, server = Broker(), grpc.aio.server()
    guest_pb2_grpc.add_GuestServiceServicer_to_server(one, server)
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    yield one
    await server.stop(0)


async def dial(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, str(path))
    except OSError:
        sock.close()
        raise
    return sock


class Talk:
    """What came of a conversation."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.welcomes: list[Welcome] = []
        self.messages: list[BrokerMessage] = []

    async def run(self, path: Path) -> None:
        async with asyncio.timeout(8):
            await converse(lambda: dial(path), HELLO, self._on_open, self.messages.append)

    def _on_open(self, stream: Stream, welcome: Welcome) -> None:
        self.streams.append(stream)
        self.welcomes.append(welcome)


async def test_nobody_there_is_unreachable(path: Path) -> None:
    with pytest.raises(UnreachableError, match="No such file"):
        await Talk().run(path)


async def test_hello_welcome_and_what_follows(broker: Broker, path: Path) -> None:
    broker.says, broker.status = [WELCOME, GRANT, Heartbeat(), 0.1], grpc.StatusCode.ABORTED
    talk = Talk()
    with pytest.raises(UnreachableError, match="ABORTED: because"):
        await talk.run(path)
    assert (talk.welcomes, talk.messages) == ([WELCOME], [GRANT, Heartbeat()])
    assert broker.heard == [HELLO]


async def test_what_is_said_arrives_in_order(broker: Broker, path: Path) -> None:
    broker.says = [WELCOME]
    talk = Talk()
    talking = asyncio.create_task(talk.run(path))
    async with asyncio.timeout(5):
        while not talk.streams:  # noqa: ASYNC110 - whatever a test waits for
            await asyncio.sleep(0.01)
        for number in range(50):
            talk.streams[0].say(Heartbeat(Usable(number)))
        while len(broker.heard) < 51:  # noqa: ASYNC110 - whatever a test waits for
            await asyncio.sleep(0.01)
    assert broker.heard == [HELLO, *(Heartbeat(Usable(number)) for number in range(50))]
    talking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await talking


@pytest.mark.parametrize("status", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.FAILED_PRECONDITION])
async def test_a_refusal_says_why(broker: Broker, path: Path, status: grpc.StatusCode) -> None:
    broker.status = status
    talk = Talk()
    with pytest.raises(UnreachableError, match=f"{status.name}: because"):
        await talk.run(path)
    assert talk.streams == []


async def test_a_broker_that_just_ends_is_unreachable(broker: Broker, path: Path) -> None:
    broker.says, broker.status = [WELCOME], grpc.StatusCode.UNAVAILABLE
    with pytest.raises(UnreachableError):
        await Talk().run(path)


async def test_welcome_must_come_first(broker: Broker, path: Path) -> None:
    broker.says = [GRANT]
    with pytest.raises(ProtocolError, match="not a welcome"):
        await Talk().run(path)


async def test_nonsense_from_the_broker_ends_the_stream(broker: Broker, path: Path) -> None:
    broker.says = [WELCOME, guest_pb2.NegotiateResponse(grant=guest_pb2.Grant(amount=1 << 63))]
    with pytest.raises(ProtocolError, match=r"grant\.kind"):
        await Talk().run(path)


async def test_messages_of_tomorrow_are_skipped(broker: Broker, path: Path) -> None:
    broker.says, broker.status = [WELCOME, guest_pb2.NegotiateResponse(), GRANT, 0.1], grpc.StatusCode.ABORTED
    talk = Talk()
    with pytest.raises(UnreachableError):
        await talk.run(path)
    assert talk.messages == [GRANT]


async def test_silence_is_not_waited_for_without_end(broker: Broker, path: Path) -> None:
    broker.says = [WELCOME, Heartbeat()]  # heartbeats are promised each second
    with pytest.raises(UnreachableError, match="silent for too long"):
        await Talk().run(path)


async def test_no_welcome_is_not_waited_for_without_end(
    broker: Broker, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "_WELCOME_SECONDS", 0.2)
    with pytest.raises(UnreachableError, match="silent for too long"):
        await Talk().run(path)


async def test_a_broker_that_does_not_read_cannot_fill_memory() -> None:
    ours, theirs = socket.socketpair()
    call = await open_call(ours, convert.NEGOTIATE, amounts.MAX_MESSAGE_BYTES)
    stream = Stream(call)
    with pytest.raises(UnreachableError, match="does not read"):
        for _ in range(10_000):
            stream.say(Heartbeat(Usable(1, 1, 1 << 30, 1 << 30)))
    call.close()
    theirs.close()
