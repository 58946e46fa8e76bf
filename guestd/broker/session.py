"""One guest's open stream as the broker keeps it: what is to be sent, and how much it may say."""

from guestd.broker.failpoint import Failpoint, reach
from guestd.model.errors import FloodError, ProtocolError
from guestd.model.messages import BrokerMessage, Grant, Heartbeat, Reclaim, Throttle, Welcome
from guestd.runtime.bell import Bell

MESSAGES_PER_SECOND = 50.0
MESSAGES_BURST = 200.0
CONNECTION_MESSAGES = 10.0
"""What a new stream counts as: it costs the broker as much."""


class Allowance:
    """How much one guest may say, over all its streams: a new stream brings no new allowance."""

    __slots__ = ("_counted_at", "_left")

    def __init__(self, now: float) -> None:
        self._left, self._counted_at = MESSAGES_BURST, now

    def count(self, now: float, messages: float = 1.0) -> None:
        """Count so many messages that came in.

        :raise FloodError: When it is one too many.
        """
        passed = max(0.0, now - self._counted_at)
        self._left = min(MESSAGES_BURST, self._left + passed * MESSAGES_PER_SECOND)
        self._counted_at = now
        if self._left < messages:
            raise FloodError(f"more than {MESSAGES_PER_SECOND:g} messages a second")
        self._left -= messages


class Session:
    """An outbox that holds at most one message of each sort: a slow reader gets the newest (invariant 21). Orders
    about one kind of resource are one sort.
    """

    def __init__(self, welcome: Welcome) -> None:
        self._waiting: dict[object, BrokerMessage] = {Welcome: welcome}
        self._order_taken = False
        self._filled = Bell(rung=True)
        self._end: ProtocolError | None = None

    def put(self, message: Grant | Reclaim | Throttle | Heartbeat) -> None:
        """Send a message; one of the same sort that still waits is replaced by it."""
        key: object = message.kind if isinstance(message, Grant | Reclaim) else type(message)
        self._waiting.pop(key, None)
        self._waiting[key] = message
        self._filled.ring()

    def end(self, error: ProtocolError) -> None:
        """End the stream with that reason."""
        self._end = error
        self._filled.ring()

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
