"""The broker's memory over restarts, in SQLite (WAL, synchronous=FULL: a commit that returned is on disk).

It holds the number of the last epoch, what is reserved for each guest (an upper bound until the
hypervisor has spoken) with its burst credit, and what operators set by calls: guests added, limits, pauses.

1. All calls run in one writer thread, so that they are ordered and the event loop never waits for a disk.
2. A call that raised `JournalError` wrote nothing that this process will ever build upon.
3. After a write failed nothing more is written until everything that was committed before is in the main file
   and synced, the write-ahead log is gone (with whatever the failed commit left in it, which the page
   cache may show and the disk may not have), and the file was opened and checked anew. A kernel reports a failed
   sync once and then calls the pages clean: a second sync of the same log would prove nothing. On a full disk
   this alone makes room, unless the main file has to grow.

Weak spot: when the broker dies between a failed commit and that clean-up, the next one may find the commit done. It
held an upper bound, or a call that was answered with an error: both are safe to find.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from guestd.broker.config import GuestConfig
from guestd.broker.core.actions import Record
from guestd.broker.failpoint import Failpoint, reach
from guestd.broker.journal_file import empty_log, explain, open_database, transaction, way_out
from guestd.model.errors import JournalError
from guestd.model.resources import Limits, Resources

_RESERVE = """
INSERT INTO reserved VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (guest) DO UPDATE SET
    cpu_millicores = excluded.cpu_millicores, memory_bytes = excluded.memory_bytes, revision = excluded.revision,
    cpu_credit = coalesce(excluded.cpu_credit, cpu_credit),
    memory_credit = coalesce(excluded.memory_credit, memory_credit)
"""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SavedGuest:
    """One guest's line: what was reserved by decision `revision`, and its burst credit (resource x seconds;
    None: never recorded).
    """

    reserved: Resources = field(default_factory=Resources)
    revision: int = 0
    credit: Resources | None = None


@dataclass(slots=True)
class Saved:
    """What an earlier broker left."""

    epoch: int = 0
    reserved: dict[str, SavedGuest] = field(default_factory=dict)
    added: dict[str, GuestConfig] = field(default_factory=dict)
    limits: dict[str, tuple[Limits, str]] = field(default_factory=dict)  # with the time they were set
    paused: set[str] = field(default_factory=set)


class Journal:
    """One open database. `open` first; every call raises `JournalError` when it fails, and may be repeated."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._database: sqlite3.Connection | None = None
        self._epoch = 0  # ours, when open
        self._inode = 0
        self._doubtful = False  # a write failed: see law 3
        self._closed = False

    async def open(self) -> Saved:
        """Open or create, begin a new epoch, and return what was saved.

        :raise JournalError: When the file cannot be used, or was written by a newer version.
        """
        return await self._run(self._open)

    async def record(self, records: Sequence[Record]) -> None:
        """Write what is reserved, all in one commit. A credit of None stays as it was recorded."""
        await self._write(
            _RESERVE,
            [
                (
                    one.guest,
                    one.reserved.cpu_millicores,
                    one.reserved.memory_bytes,
                    one.revision,
                    one.credit and one.credit.cpu_millicores,
                    one.credit and one.credit.memory_bytes,
                )
                for one in records
            ],
        )

    async def add_guest(self, guest: GuestConfig) -> None:
        """Keep a guest that was added by a call."""
        definition = msgspec.json.encode(guest).decode()
        await self._write("INSERT OR REPLACE INTO added VALUES (?, ?)", [(guest.name, definition)])

    async def forget_guest(self, name: str) -> None:
        """Forget everything about a guest."""
        await self._run(lambda: self._forget(name))

    async def set_limits(self, name: str, limits: Limits, set_at: str) -> None:
        """Keep limits that win over the file's."""
        text = msgspec.json.encode(limits).decode()
        await self._write("INSERT OR REPLACE INTO limits VALUES (?, ?, ?)", [(name, text, set_at)])

    async def reset_limits(self, name: str) -> None:
        """Back to the file's limits."""
        await self._write("DELETE FROM limits WHERE guest = ?", [(name,)])

    async def set_paused(self, name: str, paused: bool) -> None:
        """Keep whether decisions about a guest are paused."""
        statement = "INSERT OR REPLACE INTO paused VALUES (?)" if paused else "DELETE FROM paused WHERE guest = ?"
        await self._write(statement, [(name,)])

    async def close(self) -> None:
        """Close; what was written stays."""
        if self._database is not None:
            database, self._database = self._database, None
            await self._run(database.close)
        self._closed = True
        self._thread.shutdown(wait=True)

    async def _run(self, call: Callable[[], T]) -> T:
        if self._closed:
            raise JournalError(f"journal {self._path}: is closed")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        except (sqlite3.Error, OSError, OverflowError) as error:
            raise JournalError(explain(self._path, error)) from error

    async def _write(self, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
        await self._run(lambda: self._commit([(statement, rows)]))

    def _forget(self, name: str) -> None:
        tables = ("reserved", "added", "limits", "paused")
        self._commit([(f"DELETE FROM {table} WHERE guest = ?", [(name,)]) for table in tables])  # noqa: S608 - fixed

    # ---- in the writer thread --------------------------------------------------------------------

    def _commit(self, statements: Sequence[tuple[str, Sequence[tuple[object, ...]]]]) -> None:
        database = self._sound()
        try:
            with transaction(database):
                for statement, rows in statements:
                    database.executemany(statement, rows)
                reach(Failpoint.RECORDING)
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
            raise  # refused before anything was written
        except sqlite3.Error:
            self._doubtful = True
            raise

    def _sound(self) -> sqlite3.Connection:
        """The open database, after a failed write made sound again (law 3)."""
        if not self._epoch:
            raise sqlite3.ProgrammingError("not open")
        if self._doubtful and self._database is not None:
            empty_log(self._database)
            database, self._database = self._database, None
            database.close()
        if self._database is None:
            self._database = self._open_again()
            self._doubtful = False
        if not self._path.exists() or self._path.stat().st_ino != self._inode:
            raise JournalError(
                f"journal {self._path}: was moved or deleted while in use; put it back, or restart the broker"
            )
        return self._database

    def _open_again(self) -> sqlite3.Connection:
        database = open_database(self._path, create=False)
        epoch = _epoch(database)
        if epoch != self._epoch:
            database.close()
            raise JournalError(
                f"journal {self._path}: holds epoch {epoch}, this broker's is {self._epoch}: another one took "
                f"it over; end one of the two"
            )
        self._inode = self._path.stat().st_ino
        return database

    def _open(self) -> Saved:
        database = open_database(self._path)
        try:
            saved = self._load(database)
            with transaction(database):
                database.execute("UPDATE meta SET value = value + 1 WHERE key = 'epoch'")
            saved.epoch = _epoch(database)
        except BaseException:
            database.close()
            raise
        reach(Failpoint.STARTED)
        self._database, self._epoch, self._inode = database, saved.epoch, self._path.stat().st_ino
        return saved

    def _load(self, database: sqlite3.Connection) -> Saved:
        saved = Saved(_epoch(database))
        for guest, *amounts in database.execute(
            "SELECT guest, cpu_millicores, memory_bytes, revision, cpu_credit, memory_credit FROM reserved"
        ):
            if any(amount is not None and amount < 0 for amount in amounts):
                raise self._damaged(f"{guest}: an amount below 0")
            cpu, memory, revision, cpu_credit, memory_credit = amounts
            credit = None if cpu_credit is None or memory_credit is None else Resources(cpu_credit, memory_credit)
            saved.reserved[guest] = SavedGuest(Resources(cpu, memory), revision, credit)
        try:
            for guest, definition in database.execute("SELECT guest, definition FROM added"):
                saved.added[guest] = msgspec.json.decode(definition, type=GuestConfig)
            for guest, limits, set_at in database.execute("SELECT guest, limits, set_at FROM limits"):
                saved.limits[guest] = (msgspec.json.decode(limits, type=Limits), set_at)
        except msgspec.MsgspecError as error:
            raise self._damaged(f"{guest}: {error}") from error
        saved.paused = {guest for (guest,) in database.execute("SELECT guest FROM paused")}
        return saved

    def _damaged(self, what: str) -> JournalError:
        return JournalError(f"journal {self._path}: is damaged ({what}); {way_out(self._path)}")


def _epoch(database: sqlite3.Connection) -> int:
    row = database.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()
    if row is None:
        raise sqlite3.DatabaseError("there is no epoch in it")
    return int(row[0])
