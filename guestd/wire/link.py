"""The guest's end of the stream: one gRPC channel through the relay's unix socket, one bidirectional call."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from guestd.model.errors import ProtocolError, UnreachableError
from guestd.model.messages import BrokerMessage, GuestMessage, Hello, Welcome
from guestd.v1 import guest_pb2, guest_pb2_grpc
from guestd.wire import convert

_log = logging.getLogger(__name__)
_WELCOME_SECONDS = 10.0
_MISSED_HEARTBEATS = 3.0

_OPTIONS = (
    ("grpc.max_receive_message_length", convert.MAX_MESSAGE_BYTES),
    ("grpc.enable_retries", 0),
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.http2.bdp_probe", 0),  # else each message costs a ping too
)

if TYPE_CHECKING:
    _Call = grpc.aio.StreamStreamCall[guest_pb2.NegotiateRequest, guest_pb2.NegotiateResponse]


class Stream:
    """One open stream. Messages go out in order; there is at most one of each sort waiting."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[GuestMessage] = asyncio.Queue(maxsize=64)

    def say(self, message: GuestMessage) -> None:
        """Send soon. A broker that reads too slowly loses the stream, not the guest its memory."""
        try:
            self._waiting.put_nowait(message)
        except asyncio.QueueFull:
            raise UnreachableError("the broker does not read what it is sent") from None

    async def _requests(self) -> AsyncIterator[GuestMessage]:
        while True:
            yield await self._waiting.get()


async def converse(
    path: Path,
    hello: Hello,
    on_open: Callable[[Stream, Welcome], None],
    on_message: Callable[[BrokerMessage], None],
) -> None:
    """Dial, say hello, and hand on what the broker says until the stream ends. Always ends by raising.

    :param path: the relay's unix socket.
    :raise UnreachableError: When the broker cannot be reached, or the stream has ended.
    :raise ProtocolError: When the broker says something that makes no sense.
    """
    stream = Stream()
    channel = grpc.aio.insecure_channel(f"unix:{path}", options=_OPTIONS)
    call = guest_pb2_grpc.GuestServiceStub(channel).Negotiate()
    sending = asyncio.create_task(_send(call, stream, hello))
    try:
        heartbeat_seconds = await _welcome(call, stream, on_open)
        while True:
            async with asyncio.timeout(_MISSED_HEARTBEATS * heartbeat_seconds):
                response = await call.read()
            if response is grpc.aio.EOF:
                raise UnreachableError("the broker ended the stream")
            message = convert.broker_message_from_wire(response)  # type: ignore[arg-type]  # EOF has no type of its own
            if message is not None:
                on_message(message)
    except TimeoutError:
        raise UnreachableError("the broker has been silent for too long") from None
    except grpc.aio.AioRpcError as error:
        raise UnreachableError(f"{error.code().name}: {error.details()}") from None
    finally:
        sending.cancel()
        call.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        await channel.close()


async def _welcome(call: "_Call", stream: Stream, on_open: Callable[[Stream, Welcome], None]) -> float:
    async with asyncio.timeout(_WELCOME_SECONDS):
        response = await call.read()
    if response is grpc.aio.EOF:
        # Reading the status raises what the broker said.
        raise UnreachableError(f"{(await call.code()).name}: {await call.details()}")
    welcome = convert.broker_message_from_wire(response)  # type: ignore[arg-type]  # as above
    if not isinstance(welcome, Welcome):
        raise ProtocolError("the broker's first message was not a welcome")
    on_open(stream, welcome)
    return welcome.heartbeat_seconds


async def _send(call: "_Call", stream: Stream, hello: Hello) -> None:
    await call.write(convert.guest_message_to_wire(hello))
    async for message in stream._requests():
        await call.write(convert.guest_message_to_wire(message))
