"""One guest's open stream as the broker keeps it: what is to be sent, and how much it may say."""

import asyncio

from guestd.model.errors import FloodError, ProtocolError
from guestd.model.messages import BrokerMessage, Grant, Heartbeat, Reclaim, Welcome

MESSAGES_PER_SECOND = 50.0
MESSAGES_BURST = 200.0


class Session:
    """An outbox that holds at most one message of each kind: a slow reader gets the newest (invariant 21)."""

    def __init__(self, welcome: Welcome, now: float) -> None:
        self._waiting: dict[object, BrokerMessage] = {"welcome": welcome}
        self._filled = asyncio.Event()
        self._filled.set()
        self._end: ProtocolError | None = None
        self._allowance = MESSAGES_BURST
        self._counted_at = now

    def put(self, message: Grant | Reclaim | Heartbeat) -> None:
        """Send a message; one of the same sort that still waits is replaced by it."""
        key: object = "heartbeat" if isinstance(message, Heartbeat) else message.kind
        self._waiting.pop(key, None)
        self._waiting[key] = message
        self._filled.set()

    def end(self, error: ProtocolError) -> None:
        """End the stream with that reason."""
        self._end = error
        self._filled.set()

    async def next(self) -> BrokerMessage:
        """The next message to send.

        :raise ProtocolError: When the stream is to end.
        """
        await self._filled.wait()
        if self._end is not None:
            raise self._end
        key = next(iter(self._waiting))
        message = self._waiting.pop(key)
        if not self._waiting:
            self._filled.clear()
        return message

    def count(self, now: float) -> None:
        """Count one message that came in.

        :raise FloodError: When it is one too many.
        """
        passed = max(0.0, now - self._counted_at)
        self._allowance = min(MESSAGES_BURST, self._allowance + passed * MESSAGES_PER_SECOND)
        self._counted_at = now
        if self._allowance < 1:
            raise FloodError(f"more than {MESSAGES_PER_SECOND:g} messages a second")
        self._allowance -= 1
