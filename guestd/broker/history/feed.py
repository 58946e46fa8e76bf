"""The newest events in memory, their numbers, and those who follow them. Lives on the event loop, waits for no disk.

1. A number is given once and grows, over restarts too: the store reserves them in blocks, before they are used.
   Where it could not, numbering goes on from the milliseconds of the epoch, above any that were counted.
2. An event is in every follower's queue before `put` returns.
3. A follower that does not read loses the oldest of its queue, and is told how many.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from itertools import takewhile

from guestd.model.event import Event, EventQuery, SeenEvent

TAIL = 10_000
QUEUE = 1_000


class Follower:
    """One who follows the events of a guest, or of all (empty)."""

    def __init__(self, guest: str, waiting: list[Event]) -> None:
        self.guest = guest
        self._waiting = deque(waiting)
        self._most = max(QUEUE, len(waiting))
        self._missed = 0
        self._filled = asyncio.Event()

    def put(self, event: Event) -> None:
        """Queue it."""
        if len(self._waiting) >= self._most:
            self._waiting.popleft()
            self._missed += 1
        self._waiting.append(event)
        self._filled.set()

    async def next(self) -> SeenEvent:
        """The next one."""
        while not self._waiting:
            self._filled.clear()
            await self._filled.wait()
        missed, self._missed = self._missed, 0
        return SeenEvent(self._waiting.popleft(), missed)


class Feed:
    """The tail of all events.

    :param wall: seconds of the epoch.
    """

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._tail: deque[Event] = deque(maxlen=TAIL)
        self._followers: list[Follower] = []
        self.next_id = 1
        self._reserved: int | None = None  # numbers below are ours; None: law 1's other way

    def begin(self, next_id: int | None, reserved: int | None) -> None:
        """Begin with that number; None: nobody knows those that were given before."""
        self.next_id = next_id or int(self._wall() * 1000)
        self._reserved = reserved

    def reserve(self, below: int) -> None:
        """Numbers below that are ours."""
        self._reserved = below

    def take_id(self) -> int:
        """The number of the next event."""
        if self._reserved is not None and self.next_id >= self._reserved:
            self.next_id, self._reserved = max(self.next_id, int(self._wall() * 1000)), None
        self.next_id += 1
        return self.next_id - 1

    def put(self, event: Event) -> None:
        """Keep it, and tell the followers."""
        self._tail.append(event)
        for follower in self._followers:
            if not follower.guest or follower.guest == event.guest:
                follower.put(event)

    @property
    def followed(self) -> bool:
        """Whether somebody follows."""
        return bool(self._followers)

    @property
    def oldest_id(self) -> int:
        """Number of the oldest event in memory, or of the next one."""
        return self._tail[0].id if self._tail else self.next_id

    def follow(self, guest: str, after_id: int) -> Follower:
        """Begin with what is in memory after that event, until `leave`."""
        missing = takewhile(lambda event: event.id > after_id, reversed(self._tail))
        waiting = [event for event in missing if not guest or event.guest == guest]
        follower = Follower(guest, waiting[::-1])
        self._followers.append(follower)
        return follower

    def leave(self, follower: Follower) -> None:
        """Follow no longer."""
        self._followers.remove(follower)

    def events(self, query: EventQuery) -> tuple[Event, ...]:
        """What is in memory of the answer."""
        found = [event for event in self._tail if _asked_for(event, query)]
        return tuple(found[-query.limit :] if query.newest else found[: query.limit])


def _asked_for(event: Event, query: EventQuery) -> bool:
    return (
        event.id > query.after_id
        and query.guest in ("", event.guest)
        and (query.since is None or event.at >= query.since)
        and (query.until is None or event.at < query.until)
    )
