"""What changes on the host, for all browsers that watch.

Four looks a second at what changed, each encoded once for all. Nobody watching costs nothing.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import replace

import msgspec

from guestd.broker.web.rows import row
from guestd.broker.web.watcher import KEPT_EVENTS, Watcher, encode_message
from guestd.model.errors import GuestdError, NotFoundError
from guestd.model.event import Event, EventQuery
from guestd.wire.server import OperatorBackend

_log = logging.getLogger(__name__)
_LOOK_SECONDS = 0.25
_MOST_WATCHERS = 32
_RETRY_SECONDS = 5.0
_AT_ONCE = 50  # guests that are looked at before others have their turn
_encode = msgspec.json.Encoder().encode


class CrowdedError(GuestdError):
    """As many browsers watch as may."""


class Feed:
    """The host's state as JSON, kept while somebody watches."""

    def __init__(self, backend: OperatorBackend) -> None:
        self._backend = backend
        self._host = b"null"
        self._rows: dict[str, bytes] = {}
        self._events: deque[bytes] = deque(maxlen=KEPT_EVENTS)
        self._watchers: set[Watcher] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._complete = asyncio.Event()

    async def join(self) -> tuple[Watcher, bytes]:
        """A new watcher, and the whole state that it is to be told first.

        :raise CrowdedError: When there are too many already.
        :raise GuestdError: When it came to an end before there was anything to tell.
        """
        if len(self._watchers) >= _MOST_WATCHERS:
            raise CrowdedError(f"{_MOST_WATCHERS} browsers watch this broker already; close one of them")
        watcher = Watcher()
        self._watchers.add(watcher)
        try:
            if not self._tasks:
                self._tasks = [asyncio.create_task(self._follow_guests()), asyncio.create_task(self._follow_events())]
                for task in self._tasks:
                    task.add_done_callback(self._on_end)
            await self._complete.wait()
            if watcher.ended:
                raise GuestdError("the live page begins anew, try again")
        except BaseException:
            await self.leave(watcher)
            raise
        watcher.forget()
        return watcher, encode_message(self._host, self._rows.values(), (), self._events, 0)

    def news(self, watcher: Watcher) -> bytes:
        """What it has not been told yet."""
        return watcher.take(self._host, self._rows)

    async def leave(self, watcher: Watcher) -> None:
        """It does not watch any more; the last one stops it all."""
        self._watchers.discard(watcher)
        if not self._watchers:
            await asyncio.gather(*self._reset(), return_exceptions=True)

    async def close(self) -> None:
        """Send everybody away."""
        await asyncio.gather(*self._reset(), return_exceptions=True)

    async def state(self) -> bytes:
        """The whole state now, for who does not watch."""
        rows = {}
        for names in _batches(self._backend.guest_names()):
            rows.update(self._look(names))
            await asyncio.sleep(0)
        return encode_message(self._look_at_host(), rows.values(), (), (), 0)

    def _reset(self) -> list[asyncio.Task[None]]:
        """Forget everything, at once: who joins next begins anew. Returns what still has to end."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        for watcher in self._watchers:
            watcher.end()
        self._watchers.clear()
        self._rows.clear()
        self._events.clear()
        self._complete.set()
        self._complete = asyncio.Event()
        return tasks

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """The page must not take the broker along: whoever watches is sent away, and comes again."""
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("the live page lost track, browsers begin anew", exc_info=error)
            self._reset()

    async def _follow_guests(self) -> None:
        changed, event, stop = self._backend.subscribe()
        changed.update(self._backend.guest_names())
        try:
            while True:
                event.clear()
                names = sorted(changed)
                changed.clear()
                told = set()
                for batch in _batches(names):
                    rows = self._look(batch)
                    gone = {name for name in batch if name not in rows and self._rows.pop(name, None) is not None}
                    told |= gone | {name for name, text in rows.items() if self._rows.get(name) != text}
                    self._rows.update(rows)
                    await asyncio.sleep(0)
                host, self._host = self._host, self._look_at_host()
                self._complete.set()
                if told or host != self._host:
                    for watcher in self._watchers:
                        watcher.tell(told)
                await asyncio.sleep(_LOOK_SECONDS)
                await event.wait()
        finally:
            stop()

    async def _follow_events(self) -> None:
        """Those that happened just before, and all from then on; without a store of events the page does without."""
        last: int | None = None
        while True:
            try:
                if last is None:
                    last = 0
                    for event in await self._backend.events(EventQuery(limit=KEPT_EVENTS, newest=True)):
                        last = self._tell_event(event, 0)
                async with contextlib.aclosing(self._backend.follow_events("", last)) as follow:
                    async for seen in follow:
                        last = self._tell_event(seen.event, seen.missed)
            except GuestdError as error:
                _log.warning("the live page has no events: %s; trying again", error)
            await asyncio.sleep(_RETRY_SECONDS)

    def _tell_event(self, event: Event, missed: int) -> int:
        text = _encode(replace(event, inputs=None))  # what went into it is for `explain`
        self._events.append(text)
        for watcher in self._watchers:
            watcher.tell_event(text, missed)
        return event.id

    def _look(self, names: Iterable[str]) -> dict[str, bytes]:
        rows = {}
        for name in names:
            with contextlib.suppress(NotFoundError):
                rows[name] = _encode(row(self._backend.guest_view(name)))
        return rows

    def _look_at_host(self) -> bytes:
        return _encode(self._backend.host_view())


def _batches(names: list[str]) -> Iterable[list[str]]:
    return (names[start : start + _AT_ONCE] for start in range(0, len(names), _AT_ONCE))
