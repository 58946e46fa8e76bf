"""The guest's end of the stream: hello, welcome, and what both sides say until it ends."""

import asyncio
import socket
from collections.abc import Awaitable, Callable

from guestd.model.errors import GuestdError, ProtocolError, UnreachableError
from guestd.model.messages import BrokerMessage, GuestMessage, Hello, Welcome
from guestd.wire import amounts, convert
from guestd.wire.call import Call, open_call

_WELCOME_SECONDS = 10.0
_MISSED_HEARTBEATS = 3.0


class Stream:
    """One open stream. Messages go out in order."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def say(self, message: GuestMessage) -> None:
        """Send soon. A broker that reads too slowly loses messages, not the guest its memory.

        :raise UnreachableError: When too much waits to be sent already.
        """
        self._call.send(convert.guest_message_to_wire(message).SerializeToString())

    def close(self) -> None:
        """End the conversation."""
        self._call.close()


async def converse(
    dial: Callable[[], Awaitable[socket.socket]],
    hello: Hello,
    on_open: Callable[[Stream, Welcome], None],
    on_message: Callable[[BrokerMessage], None],
) -> None:
    """Dial, say hello, and hand on what the broker says until the stream ends. Always ends by raising.

    :param dial: gives a connection to the broker.
    :raise UnreachableError: When the broker cannot be reached, or the stream has ended.
    :raise ProtocolError: When the broker says something that makes no sense.
    """
    try:
        call = await open_call(await dial(), convert.NEGOTIATE, amounts.MAX_MESSAGE_BYTES)
    except (OSError, GuestdError) as error:
        raise UnreachableError(str(error)) from error
    stream = Stream(call)
    try:
        stream.say(hello)
        heartbeat_seconds = await _welcome(call, stream, on_open)
        while True:
            message = await _hear(call, _MISSED_HEARTBEATS * heartbeat_seconds)
            if message is not None:
                on_message(message)
    finally:
        call.close()


async def _welcome(call: Call, stream: Stream, on_open: Callable[[Stream, Welcome], None]) -> float:
    welcome = await _hear(call, _WELCOME_SECONDS)
    if not isinstance(welcome, Welcome):
        raise ProtocolError("the broker's first message was not a welcome")
    on_open(stream, welcome)
    return welcome.heartbeat_seconds


async def _hear(call: Call, limit_seconds: float) -> BrokerMessage | None:
    try:
        async with asyncio.timeout(limit_seconds):
            raw = await call.read()
    except TimeoutError:
        raise UnreachableError("the broker has been silent for too long") from None
    return convert.broker_message_from_bytes(raw)
