"""The broker's memory over restarts, in SQLite (WAL, synchronous=FULL: a commit that returned is on disk).

It holds the number of the last epoch, what is reserved for each guest (an upper bound until the
hypervisor has spoken), and what operators set by calls: guests added, limits, pauses. All calls run in one
writer thread, so that they are ordered and the event loop never waits for a disk.
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
from guestd.model.errors import JournalError
from guestd.model.resources import Limits, Resources

SCHEMA = 1
_LOCK_SECONDS = 5.0
_CREATE = """
BEGIN;
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
CREATE TABLE reserved (
    guest TEXT PRIMARY KEY, cpu_millicores INTEGER NOT NULL, memory_bytes INTEGER NOT NULL, revision INTEGER NOT NULL
) STRICT;
CREATE TABLE added (guest TEXT PRIMARY KEY, definition TEXT NOT NULL) STRICT;
CREATE TABLE limits (guest TEXT PRIMARY KEY, limits TEXT NOT NULL, set_at TEXT NOT NULL) STRICT;
CREATE TABLE paused (guest TEXT PRIMARY KEY) STRICT;
INSERT INTO meta VALUES ('schema', 1), ('epoch', 0);
COMMIT;
"""
T = TypeVar("T")


@dataclass(slots=True)
class Saved:
    """What an earlier broker left."""

    epoch: int = 0
    reserved: dict[str, tuple[Resources, int]] = field(default_factory=dict)  # with the revision
    added: dict[str, GuestConfig] = field(default_factory=dict)
    limits: dict[str, tuple[Limits, str]] = field(default_factory=dict)  # with the time they were set
    paused: set[str] = field(default_factory=set)


class Journal:
    """One open database. `open` first; every call raises `JournalError` when it fails, and then nothing was written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._database: sqlite3.Connection | None = None
        self._closed = False

    async def open(self) -> Saved:
        """Open or create, begin a new epoch, and return what was saved.

        :raise JournalError: When the file cannot be used, or was written by a newer version.
        """
        return await self._run(self._open)

    async def record(self, records: list[Record]) -> None:
        """Write what is reserved, all in one commit."""
        rows = [(one.guest, one.reserved.cpu_millicores, one.reserved.memory_bytes, one.revision) for one in records]
        await self._write("INSERT OR REPLACE INTO reserved VALUES (?, ?, ?, ?)", rows)

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
        except (sqlite3.Error, OSError) as error:
            raise JournalError(
                f"journal {self._path}: {error}; is the disk full or read-only, or the file not guestd's?"
            ) from error

    async def _write(self, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
        await self._run(lambda: self._commit(statement, rows))

    def _commit(self, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
        database = self._opened()
        with database:
            database.executemany(statement, rows)

    def _forget(self, name: str) -> None:
        with self._opened() as database:
            for table in ("reserved", "added", "limits", "paused"):
                database.execute(f"DELETE FROM {table} WHERE guest = ?", (name,))  # noqa: S608 - fixed names

    def _opened(self) -> sqlite3.Connection:
        if self._database is None:
            raise sqlite3.ProgrammingError("not open")
        return self._database

    def _open(self) -> Saved:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        database = sqlite3.connect(self._path, check_same_thread=False, timeout=_LOCK_SECONDS)
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=FULL")
            # Two brokers on one journal would grant everything twice: the lock is held for good.
            database.execute("PRAGMA locking_mode=EXCLUSIVE")
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
                database.executescript(_CREATE)
            found = database.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()
            if found is None or found[0] > SCHEMA:
                raise JournalError(
                    f"journal {self._path}: has schema {found and found[0]}, this version knows {SCHEMA}; it was "
                    f"written by a newer guestd-broker: use that one, or move the file away (limits set by calls "
                    f"are lost then)"
                )
            with database:
                database.execute("UPDATE meta SET value = value + 1 WHERE key = 'epoch'")
            saved = self._load(database)
        except BaseException:
            database.close()
            raise
        self._database = database
        return saved

    def _load(self, database: sqlite3.Connection) -> Saved:
        saved = Saved(database.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()[0])
        for guest, cpu, memory, revision in database.execute("SELECT * FROM reserved"):
            saved.reserved[guest] = (Resources(cpu, memory), revision)
        try:
            for guest, definition in database.execute("SELECT * FROM added"):
                saved.added[guest] = msgspec.json.decode(definition, type=GuestConfig)
            for guest, limits, set_at in database.execute("SELECT * FROM limits"):
                saved.limits[guest] = (msgspec.json.decode(limits, type=Limits), set_at)
        except msgspec.MsgspecError as error:
            raise JournalError(f"journal {self._path}: {error}; the file is damaged, move it away") from error
        saved.paused = {guest for (guest,) in database.execute("SELECT * FROM paused")}
        return saved
