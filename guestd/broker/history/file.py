"""The file of events and history: all that is done with it, in one thread.

1. Main file and write-ahead log together stay within `most_bytes`: three quarters for the file, whose pages SQLite
   itself counts; commits are so small that the log is emptied before it has the other quarter.
2. Before rows are written the oldest make room for them (`prune.py`).
3. After a failure the file is closed, and opened anew with the next call; not for a full disk, under which it can still
   be read. Either way a new run begins: values that were written before hold until then at most (`steps.py`).
4. No commit begins that could take what the disk leaves to the journal: each row may take a page of the log.
5. Numbers of events are reserved before they are used, so that none is given twice after a crash.
"""

import errno
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

from guestd.broker.disk import leave_room
from guestd.broker.history import events_table, prune, samples_table
from guestd.broker.history.sampler import Row
from guestd.broker.history.schema import PAGE_BYTES, is_damage, move_aside, open_history
from guestd.broker.history.steps import REPEAT_STEPS, TIERS
from guestd.broker.journal_file import transaction
from guestd.model.event import Event

ID_BLOCK = 1 << 16
_RUNS_KEPT = 1000
_FORGET_SECONDS = TIERS[-1].keep_seconds + 2 * REPEAT_STEPS * TIERS[-1].step_seconds
_LARGEST_LOG_PAGES, _LARGEST_COMMIT = 1000, 2000
T = TypeVar("T")


@dataclass(slots=True)
class Batch:
    """What one write takes."""

    next_id: int  # of the event after the last
    now: float  # seconds of the epoch
    events: list[Event] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    new_run: bool = False  # what was written before does not hold any more


class HistoryFile:
    """Opened when it is first needed. Any call but `close` may raise `sqlite3.Error` or `OSError`."""

    def __init__(self, path: Path, most_bytes: int) -> None:
        self._path = path
        pages = most_bytes // PAGE_BYTES
        self._most_pages = pages * 3 // 4
        self._log_pages = min(_LARGEST_LOG_PAGES, pages // 16)
        self._at_once = min(_LARGEST_COMMIT, pages // 32)  # rows in one commit
        self._database: sqlite3.Connection | None = None
        self._ids: dict[str, int] = {}
        self._run = self._inode = 0
        self.first_id = 1  # as it was when the file was opened
        self.reserved = 0  # numbers of events below are ours
        self.openings = 0

    def call(self, now: float, what: Callable[[sqlite3.Connection], T]) -> T:
        """Do something with the open file (law 3)."""
        try:
            return what(self._sound(now))
        except (sqlite3.Error, OSError) as error:
            if not _is_full(error):
                self._close()
            if is_damage(error):
                move_aside(self._path, str(error))
            raise

    def write(self, batch: Batch) -> int:
        """Write all of it; what is too old goes. The number below which those of events are reserved."""
        leave_room(self._path.parent)
        return self.call(batch.now, lambda database: self._write(database, batch))

    def guest_and_run(self, name: str) -> tuple[int, int]:
        """Numbers of that guest (0: of none) and of the run."""
        return self._ids.get(name, 0), self._run

    def close(self, next_id: int) -> None:
        """Close; that is the number of the next event."""
        if self._database is not None:
            with suppress(sqlite3.Error):
                self._database.execute("UPDATE meta SET value = ? WHERE key = 'next_id'", (next_id,))
        self._close()

    # ---- small parts -----------------------------------------------------------------------------

    def _sound(self, now: float) -> sqlite3.Connection:
        if self._database is not None and not self._is_there():
            self._close()
        return self._database or self._open(now)

    def _is_there(self) -> bool:
        with suppress(OSError):
            return self._path.stat().st_ino == self._inode
        return False

    def _open(self, now: float) -> sqlite3.Connection:
        before = self._path.stat().st_ino if self._path.exists() else None
        if before is None:
            leave_room(self._path.parent)
        database = self._database = open_history(self._path, self._most_pages, self._log_pages)
        self._inode = self._path.stat().st_ino
        self._ids = dict(database.execute("SELECT name, id FROM guests"))
        self.first_id = prune.get(database, "next_id")
        if before not in (None, self._inode):  # moved aside, with the numbers that were given
            self.first_id = max(self.first_id, int(now * 1000))
        with transaction(database):
            self._reserve(database, self.first_id)
            self._begin_run(database, now)
        self._shrink(database)
        self.openings += 1
        return database

    def _close(self) -> None:
        if self._database is not None:
            database, self._database = self._database, None
            with suppress(sqlite3.Error):
                database.close()

    def _begin_run(self, database: sqlite3.Connection, now: float) -> None:
        for (ended,) in database.execute("SELECT ended FROM runs ORDER BY id DESC LIMIT 1").fetchall():
            samples_table.roll_up(database, ended)
        begin = "INSERT INTO runs (began, ended) VALUES (?, ?) RETURNING id"
        self._run = database.execute(begin, (now, now)).fetchall()[0][0]
        oldest = now - TIERS[-1].keep_seconds
        database.execute("DELETE FROM runs WHERE ended < ? OR id <= ?", (oldest, self._run - _RUNS_KEPT))

    def _reserve(self, database: sqlite3.Connection, next_id: int) -> None:
        self.reserved = next_id + ID_BLOCK
        database.execute("UPDATE meta SET value = ? WHERE key = 'next_id'", (self.reserved,))

    def _shrink(self, database: sqlite3.Connection) -> None:
        """Give back what the file has above a bound that was lowered."""
        if prune.pragma(database, "page_count") <= self._most_pages:
            return
        prune.make_room(database, self._most_pages, self._at_once)
        while prune.pragma(database, "page_count") > self._most_pages and prune.pragma(database, "freelist_count"):
            database.execute(f"PRAGMA incremental_vacuum({self._at_once})").fetchall()
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        database.execute(f"PRAGMA max_page_count = {self._most_pages}")

    def _write(self, database: sqlite3.Connection, batch: Batch) -> int:
        with transaction(database):
            if batch.new_run:
                self._begin_run(database, batch.now)
            database.execute("UPDATE runs SET ended = max(ended, ?) WHERE id = ?", (batch.now, self._run))
            if batch.next_id + ID_BLOCK // 2 > self.reserved:
                self._reserve(database, batch.next_id)
        for events in _slices(batch.events, self._at_once):
            self._put(database, "events", events_table.PUT, [events_table.row(event) for event in events])
        for rows in _slices(batch.rows, self._at_once):
            ids = [self._id(database, name, batch.now) for _, _, name, _ in rows]
            values = [(tier, step, id_, *amounts) for (tier, step, _, amounts), id_ in zip(rows, ids, strict=True)]
            self._put(database, "samples", samples_table.PUT, values)
        self._see(database, {name for tier, _, name, _ in batch.rows if tier == len(TIERS) - 1}, batch.now)
        prune.age(database, batch.now)
        return self.reserved

    def _put(
        self, database: sqlite3.Connection, table: str, statement: str, rows: Sequence[tuple[object, ...]]
    ) -> None:
        prune.make_room(database, self._most_pages, self._at_once)
        leave_room(self._path.parent, len(rows) * PAGE_BYTES)
        with transaction(database):
            database.executemany(statement, rows)
            prune.count(database, table, len(rows))

    def _id(self, database: sqlite3.Connection, name: str, now: float) -> int:
        known = self._ids.get(name)
        if known is None:
            insert = "INSERT INTO guests (name, seen_at) VALUES (?, ?) RETURNING id"
            known = self._ids[name] = int(database.execute(insert, (name, now)).fetchall()[0][0])
        return known

    def _see(self, database: sqlite3.Connection, names: set[str], now: float) -> None:
        """Those are there: each guest is in the last tier's rows now and then. Who was not for so long has no samples
        left, and is forgotten.
        """
        if not names:
            return
        with transaction(database):
            database.executemany("UPDATE guests SET seen_at = ? WHERE name = ?", [(now, name) for name in names])
            forget = "DELETE FROM guests WHERE seen_at < ? RETURNING name"
            for (name,) in database.execute(forget, (now - _FORGET_SECONDS,)).fetchall():
                del self._ids[name]


def _is_full(error: sqlite3.Error | OSError) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code == sqlite3.SQLITE_FULL or (isinstance(error, OSError) and error.errno == errno.ENOSPC)


def _slices(items: Iterable[T], length: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while part := list(islice(iterator, length)):
        yield part
