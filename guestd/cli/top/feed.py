"""What is known of a broker now, kept up to date for as long as somebody looks.

1. Everything known is on the `Board`. What comes in sets `changed`; whoever draws does so when it suits.
2. When the broker goes, the board keeps what it has and says since when and why it is old. Another client is
   made and tried every second, so that gRPC's own growing pauses do not count.
3. After that all guests are read anew, and the events from the last one that was seen.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol

from guestd.model.errors import GuestdError, NotFoundError, UnreachableError
from guestd.model.event import Event, EventQuery, SeenEvent
from guestd.model.explanation import GuestExplanation
from guestd.model.view import GuestRemoved, GuestView, HostView

EVENTS_KEPT: Final = 50
_WATCH_INTERVAL_SECONDS: Final = 0.25
_HOST_INTERVAL_SECONDS: Final = 1.0
_RETRY_SECONDS: Final = 1.0


class Source(Protocol):
    """What is needed of `wire.client.BrokerClient`."""

    async def host(self) -> HostView: ...
    async def guests(self) -> tuple[GuestView, ...]: ...
    def watch_guests(self, min_interval_seconds: float | None = None) -> AsyncIterator[GuestView | GuestRemoved]: ...
    async def events(self, query: EventQuery) -> tuple[Event, ...]: ...
    def watch_events(self, guest: str = "", after_id: int = 0) -> AsyncIterator[SeenEvent]: ...
    async def explain(self, name: str) -> GuestExplanation: ...


Connect = Callable[[], AbstractAsyncContextManager[Source]]


class Board:
    """What is known. `guests` by name; `problem` says why all of it is old, and is empty while it is not."""

    def __init__(self) -> None:
        self.host: HostView | None = None
        self.guests: dict[str, GuestView] = {}
        self.problem = ""
        self.lost_at = 0.0  # monotonic
        self.no_events = ""  # why there are none
        self.last_event_id = 0
        self.changed = True
        self._events: dict[str, deque[Event]] = {}

    def events(self, name: str) -> tuple[Event, ...]:
        """The last ones of a guest, newest first."""
        return tuple(reversed(self._events.get(name, ())))

    def add_events(self, events: Iterable[Event]) -> None:
        """Take events in, in any order and any number of times."""
        for event in events:
            self.last_event_id = max(self.last_event_id, event.id)
            known = self._events.setdefault(event.guest, deque(maxlen=EVENTS_KEPT))
            if not known or known[-1].id < event.id:
                known.append(event)
            elif all(one.id != event.id for one in known):
                merged = sorted((*known, event), key=lambda one: one.id)
                self._events[event.guest] = deque(merged, maxlen=EVENTS_KEPT)
            self.changed = True

    def remove(self, name: str) -> None:
        """Forget a guest."""
        self.guests.pop(name, None)
        self._events.pop(name, None)
        self.changed = True


class Feed:
    """Keeps `board` by what the broker tells.

    :param connect: makes a client; it is entered, used until it fails, and left.
    """

    def __init__(self, connect: Connect, retry_seconds: float = _RETRY_SECONDS) -> None:
        self.board = Board()
        self._connect, self._retry_seconds = connect, retry_seconds
        self._source: Source | None = None

    async def run(self) -> None:
        """Follow the broker until cancelled."""
        while True:
            try:
                async with self._connect() as source:
                    await self._follow(source)
            except* GuestdError as group:
                self._lose(_first(group))
            finally:
                self._source = None
            await asyncio.sleep(self._retry_seconds)

    async def explain(self, name: str) -> GuestExplanation | str:
        """Why a guest has what it has; in words why nothing is known of that."""
        if self._source is None:
            return "the broker does not answer"
        try:
            return await self._source.explain(name)
        except GuestdError as error:
            return str(error)

    async def fetch_events(self, name: str) -> None:
        """Read what happened to a guest before it was followed."""
        if self._source is None:
            return
        try:
            self.board.add_events(await self._source.events(EventQuery(guest=name, limit=EVENTS_KEPT, newest=True)))
        except UnreachableError:
            return  # the streams tell it too
        except NotFoundError:
            return
        except GuestdError as error:
            self.board.no_events = str(error)
            self.board.changed = True

    def _lose(self, error: GuestdError) -> None:
        board = self.board
        if not board.problem:
            board.lost_at = time.monotonic()
        board.problem = str(error)
        board.changed = True

    async def _follow(self, source: Source) -> None:
        board = self.board
        board.host = await source.host()
        board.guests = {guest.name: guest for guest in await source.guests()}
        board.problem, board.no_events, board.changed = "", "", True
        self._source = source
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_guests(source))
            tasks.create_task(self._follow_host(source))
            tasks.create_task(self._follow_events(source))

    async def _follow_guests(self, source: Source) -> None:
        async for change in source.watch_guests(_WATCH_INTERVAL_SECONDS):
            if isinstance(change, GuestRemoved):
                self.board.remove(change.name)
            else:
                self.board.guests[change.name] = change
                self.board.changed = True

    async def _follow_host(self, source: Source) -> None:
        while True:
            await asyncio.sleep(_HOST_INTERVAL_SECONDS)
            host = await source.host()
            if host != self.board.host:
                self.board.host, self.board.changed = host, True

    async def _follow_events(self, source: Source) -> None:
        """A broker that tells no events is followed all the same."""
        try:
            async for seen in source.watch_events(after_id=self.board.last_event_id):
                self.board.add_events((seen.event,))
        except UnreachableError:
            raise
        except GuestdError as error:
            self.board.no_events = str(error)
            self.board.changed = True


def _first(group: BaseExceptionGroup[GuestdError]) -> GuestdError:
    """One of them: they have one cause."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, GuestdError)
    return error
