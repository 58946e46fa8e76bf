"""The broker's memory for people: what happened, and how much each guest wanted and had.

1. The event loop never waits for it: events are seen by followers at once and written every few seconds, by one
   thread, in batches. What a crash takes are those seconds. What nobody follows is put together a few times a second,
   and so are looks at guests: one by one, between other work, each takes several times as long.
2. It stops nobody: what cannot be written is dropped and counted, said once, and tried again with the next batch.
3. A guest's flood leaves a count, not a full store (`floods.py`); texts are bounded.
4. Questions are answered by the same thread, after what is waiting was written. While the file cannot be read, the
   newest events are answered from memory; that nothing was is never said for that.
"""

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from guestd.broker.core.guest import GuestState
from guestd.broker.history import events_table, samples_table
from guestd.broker.history.feed import Feed
from guestd.broker.history.file import Batch, HistoryFile
from guestd.broker.history.floods import Floods
from guestd.broker.history.sampler import Sampler, sample
from guestd.broker.history.schema import way_out
from guestd.broker.history.steps import TIERS
from guestd.broker.metrics.tally import Tally
from guestd.model.errors import HistoryError
from guestd.model.event import DECISIONS, DecisionInputs, Event, EventCode, EventQuery, SeenEvent
from guestd.model.history import History
from guestd.model.reason import Reason
from guestd.model.resources import Kind

_log = logging.getLogger(__name__)
_WRITE_SECONDS = 2.0
_STEP_SECONDS = TIERS[0].step_seconds
_LOOK_SECONDS = 0.25  # a change of need comes in three rounds of decisions: seen together they cost a third
_MARK_SECONDS = 60.0  # how often it is written that the broker still looks, when nothing else is
_MOST_WAITING = 50_000  # events and samples, each, that wait for a slow disk
_PAGE = 1000
_LONGEST_TEXT_BYTES = 512
_LONGEST_CODE_BYTES = 64
DEFAULT_POINTS, MOST_POINTS = 300, 2000
_AROUND = 10
_LAST = 20
T = TypeVar("T")
_Noted = tuple[float, float, EventCode, str, str, Kind | None, int, int, Reason | None, DecisionInputs | None]
"""When, by the wall's clock and a monotonic one, and what `Store.note` was told."""


@dataclass(frozen=True, slots=True)
class Past:
    """One kind of a guest at a time: the decision in force then, if one is recorded, and what happened around."""

    decision: Event | None
    events: tuple[Event, ...]


class Store:
    """Events and history. All calls on the event loop.

    :param wall: seconds of the epoch.
    :param tally: counts what is not kept.
    :param changed: the guests that changed since it was last called.
    """

    def __init__(
        self,
        path: Path,
        most_bytes: int,
        wall: Callable[[], float] = time.time,
        tally: Tally | None = None,
        changed: Callable[[], Iterable[GuestState]] = lambda: (),
    ) -> None:
        self._path, self._wall, self._tally, self._take_changed = path, wall, tally or Tally(), changed
        self._file = HistoryFile(path, most_bytes)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="history")
        self._feed, self._floods, self._sampler = Feed(wall), Floods(), Sampler(wall())
        self._noted: list[_Noted] = []
        self._waiting: list[Event] = []
        self._looked_at = 0.0
        self._look_again: asyncio.TimerHandle | None = None
        self._new_run = False
        self._openings = 0
        self._trouble = False  # and that was said
        self._way_out = ""  # of the last call, when it failed
        self._lost_before = 0, 0  # events and samples, when it was last said
        self._marked_at = 0.0
        self._task: asyncio.Task[None] | None = None
        self._writes: set[asyncio.Task[None]] = set()
        self._closed = False

    # ---- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the file and write now and then, until `stop`. Does not fail."""
        opened = await self._ask(lambda database: self._file.first_id)
        self._openings = self._file.openings
        self._feed.begin(opened, None if opened is None else self._file.reserved)
        self._task = asyncio.create_task(self._keep_writing())

    async def stop(self) -> None:
        """Write what is waiting, and close."""
        if self._closed:
            return
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._tick()
            self._sampler.finish()
            await self._write()
            await asyncio.gather(*self._writes)
        self._closed = True
        await asyncio.get_running_loop().run_in_executor(self._thread, self._file.close, self._feed.next_id)
        self._thread.shutdown(wait=True)

    # ---- what happens ----------------------------------------------------------------------------

    def note(
        self,
        code: EventCode,
        text: str,
        guest: str = "",
        kind: Kind | None = None,
        before: int = 0,
        after: int = 0,
        reason: Reason | None = None,
        inputs: DecisionInputs | None = None,
    ) -> None:
        """Something happened."""
        self._noted.append((self._wall(), time.monotonic(), code, text, guest, kind, before, after, reason, inputs))
        if self._feed.followed:
            self._put_noted()
        else:
            self._tick_soon()

    def look(self) -> None:
        """Something changed about guests. What lasts for less than a quarter of a second may go unseen, and what begins
        so shortly before a step ends may count as the next one's.
        """
        now, before = self._wall(), self._looked_at
        if 0 <= now - before < _LOOK_SECONDS and now // _STEP_SECONDS == before // _STEP_SECONDS:
            self._tick_soon()
        else:
            self._tick()

    def forget(self, name: str) -> None:
        """The guest is no more; its past stays for a while."""
        self._tick()
        self._sampler.forget(name)
        self._floods.forget(name)

    # ---- questions -------------------------------------------------------------------------------

    async def events(self, query: EventQuery) -> tuple[Event, ...]:
        """See `wire.server.OperatorBackend`."""
        found = await self._answer(lambda database: events_table.find(database, query))
        return self._feed.events(query) if found is None else found

    async def follow(self, guest: str, after_id: int) -> AsyncGenerator[SeenEvent, None]:
        """See `wire.server.OperatorBackend`. A number that was never given counts as none."""
        self._put_noted()
        seen = after_id if 0 < after_id < self._feed.next_id else self._feed.next_id - 1
        while seen + 1 < self._feed.oldest_id:
            page = await self.events(EventQuery(guest, after_id=seen, limit=_PAGE))
            for event in page:
                yield SeenEvent(event)
            seen = page[-1].id if page else self._feed.oldest_id - 1
        follower = self._feed.follow(guest, seen)
        try:
            while True:
                yield await follower.next()
        finally:
            self._feed.leave(follower)

    async def history(self, name: str, since: datetime | None, until: datetime | None, max_points: int) -> History:
        """See `wire.server.OperatorBackend`. `max_points` 0 means 300.

        :raise ValueError: When the range is none, or the points are too many.
        :raise HistoryError: When the file cannot be read, with what to do about it.
        """
        now = self._wall()
        end = now if until is None else until.timestamp()
        begin = min(now, end) - 3600 if since is None else since.timestamp()
        if begin >= end:
            raise ValueError("the range of time is empty: it must begin before it ends")
        if not 0 <= max_points <= MOST_POINTS:
            raise ValueError(f"max_points is {max_points}, must be within 1..{MOST_POINTS}, or 0 for {DEFAULT_POINTS}")
        self._tick()
        open_steps = self._sampler.open_steps(name)
        points = max_points or DEFAULT_POINTS

        def read(database: sqlite3.Connection) -> History:
            guest, run = self._file.guest_and_run(name)
            return samples_table.read(database, guest, run, open_steps, begin, end, points, now)

        return self._found(await self._answer(read))

    async def last_events(self, name: str, kind: Kind) -> tuple[Event, ...]:
        """The last 20 about one kind of a guest, oldest first."""
        found = await self._answer(lambda database: events_table.around(database, name, kind, None, _LAST, 0))
        if found is None:
            held = self._feed.events(EventQuery(name, limit=_MOST_WAITING))
            found = tuple(event for event in held if event.kind is kind)[-_LAST:]
        return found

    async def past(self, name: str, at: datetime) -> dict[Kind, Past]:
        """What was decided about a guest by then. A whole minute means until its end: "at 14:02" is up to 14:03.

        :raise HistoryError: When the file cannot be read, with what to do about it.
        """
        end = at + (timedelta(minutes=1) if not at.second and not at.microsecond else timedelta(microseconds=1))

        def read(database: sqlite3.Connection) -> dict[Kind, Past]:
            return {
                kind: Past(
                    events_table.newest_before(database, name, kind, DECISIONS, end),
                    events_table.around(database, name, kind, end, _AROUND, _AROUND),
                )
                for kind in Kind
            }

        return self._found(await self._answer(read))

    # ---- the writer ------------------------------------------------------------------------------

    async def _keep_writing(self) -> None:
        while True:
            await asyncio.sleep(_WRITE_SECONDS)
            for name, left_out in self._floods.over(time.monotonic()):
                self.note(EventCode.BROKER, f"{left_out} events were left out: too many at once", name)
            self._tick()
            await self._write()

    def _tick_soon(self) -> None:
        if self._look_again is None:
            self._look_again = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._tick)

    def _tick(self) -> None:
        """Put together what was noted, close the steps that are over, and see what changed."""
        if self._look_again is not None:
            self._look_again.cancel()
            self._look_again = None
        self._put_noted()
        self._looked_at = self._wall()
        if not self._sampler.tick(self._looked_at):
            self._new_run = True
        for guest in self._take_changed():
            self._sampler.note(guest.name, sample(guest))
        if len(self._sampler.rows) > _MOST_WAITING:
            self._tally.samples_lost += len(self._sampler.rows)
            self._sampler.rows, self._new_run = [], True

    def _put_noted(self) -> None:
        """Make events of what was noted, but for what a guest's flood leaves out."""
        noted, self._noted = self._noted, []
        for wall, now, code, text, guest, kind, before, after, reason, inputs in noted:
            limited = guest and code is not EventCode.OPERATOR
            if limited and not self._floods.take(guest, now):
                self._tally.events_left_out += 1
                continue
            if reason is not None and not _is_plain(reason):
                reason = Reason(_bounded(reason.code, _LONGEST_CODE_BYTES), _bounded(reason.text))
            at = datetime.fromtimestamp(wall, UTC)
            event = Event(self._feed.take_id(), at, guest, kind, code, _bounded(text), before, after, reason, inputs)
            self._feed.put(event)
            if len(self._waiting) < _MOST_WAITING:
                self._waiting.append(event)
            else:
                self._tally.events_lost += 1

    async def _write(self) -> None:
        """Write what is waiting. Who waits for it may go away meanwhile: it is written all the same."""
        task = asyncio.create_task(self._write_waiting())
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        await asyncio.shield(task)

    async def _write_waiting(self) -> None:
        self._put_noted()
        batch = Batch(self._feed.next_id, self._wall(), self._waiting, self._sampler.rows, self._new_run)
        quiet = not (batch.events or batch.rows or batch.new_run)
        if quiet and 0 <= batch.now - self._marked_at < _MARK_SECONDS:
            return
        self._waiting, self._sampler.rows, self._new_run = [], [], False
        self._marked_at = batch.now
        reserved = await self._call(lambda: self._file.write(batch))
        if reserved is None:
            self._tally.events_lost += len(batch.events)
            self._tally.samples_lost += len(batch.rows)
            self._new_run = True
            return
        self._feed.reserve(reserved)
        if batch.new_run or self._file.openings != self._openings:
            self._openings = self._file.openings
            self._sampler.restart(self._wall())
        if self._trouble:
            self._trouble = False
            (events, samples), lost = self._lost_before, (self._tally.events_lost, self._tally.samples_lost)
            lost_now = f"{lost[0] - events} events and {lost[1] - samples} samples were not kept"
            text, self._lost_before = f"history can be written again; {lost_now}", lost
            _log.warning("%s", text)
            self.note(EventCode.BROKER, text)

    async def _answer(self, question: Callable[[sqlite3.Connection], T]) -> T | None:
        """The file's answer, with all that happened until now; None when it has none."""
        await self._write()
        return await self._ask(question)

    def _found(self, answer: T | None) -> T:
        if answer is None:
            raise HistoryError(self._way_out or f"history {self._path}: it is closed; the broker is about to end")
        return answer

    async def _ask(self, question: Callable[[sqlite3.Connection], T]) -> T | None:
        now = self._wall()
        return await self._call(lambda: self._file.call(now, question))

    async def _call(self, what: Callable[[], T]) -> T | None:
        """Do it in the writer thread; None when that failed, which is said once until something was written again."""
        if self._closed:
            return None
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._thread, what)
        except Exception as error:  # law 2, whatever it is: SQLite has no place for some numbers, either
            self._way_out = way_out(self._path, error)
            if not self._trouble:
                self._trouble = True
                text = f"{self._way_out}; until then events and history are not kept, the broker goes on"
                _log.warning("%s", text)
                self.note(EventCode.BROKER, text)
            return None
        self._way_out = ""
        return found


def _is_plain(reason: Reason) -> bool:
    """Whether it can be kept as it is, as nearly all can."""
    code, text = reason.code, reason.text
    return code.isascii() and text.isascii() and len(code) <= _LONGEST_CODE_BYTES and len(text) <= _LONGEST_TEXT_BYTES


def _bounded(text: str, most: int = _LONGEST_TEXT_BYTES) -> str:
    """The text, cut where it is longer than that in UTF-8, with what UTF-8 does not have (half a surrogate) escaped."""
    if text.isascii() and len(text) <= most:
        return text
    return text.encode("utf-8", "backslashreplace")[:most].decode("utf-8", "ignore")
