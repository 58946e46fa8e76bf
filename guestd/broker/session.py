"""One guest's open stream as the broker keeps it: what is to be sent, and how much it may say."""

import asyncio

from guestd.broker.failpoint import Failpoint, reach
from guestd.model.errors import FloodError, ProtocolError
from guestd.model.messages import BrokerMessage, Grant, Heartbeat, Reclaim, Throttle, Welcome

MESSAGES_PER_SECOND = 50.0
MESSAGES_BURST = 200.0


class Session:
    """An outbox that holds at most one message of each sort: a slow reader gets the newest (invariant 21). Orders
    about one kind of resource are one sort.
    """

    def __init__(self, welcome: Welcome, now: float) -> None:
        self._waiting: dict[object, BrokerMessage] = {Welcome: welcome}
        self._order_taken = False
        self._filled = asyncio.Event()
        self._filled.set()
        self._end: ProtocolError | None = None
        self._allowance = MESSAGES_BURST
        self._counted_at = now

    def put(self, message: Grant | Reclaim | Throttle | Heartbeat) -> None:
        """Send a message; one of the same sort that still waits is replaced by it."""
        key: object = message.kind if isinstance(message, Grant | Reclaim) else type(message)
        self._waiting.pop(key, None)
        self._waiting[key] = message
        self._filled.set()

    def end(self, error: ProtocolError) -> None:
        """End the stream with that reason."""
        self._end = error
        self._filled.set()

    async def next(self) -> BrokerMessage:
        """The next message to send; the one before was written to the stream.

        :raise ProtocolError: When the stream is to end.
        """
        if self._order_taken:
            reach(Failpoint.ANSWERED)
        await self._filled.wait()
        if self._end is not None:
            raise self._end
        key = next(iter(self._waiting))
        message = self._waiting.pop(key)
        self._order_taken = isinstance(message, Grant | Reclaim)
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
