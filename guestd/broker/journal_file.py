"""The journal's file: made whole or not at all, checked before it is believed, and what is wrong with it in words.

1. A new journal is made under another name and renamed when it is complete and synced: a file under its own name
   that is empty or half made was damaged by something else, and is refused.
2. Nothing is written to a file that is not guestd's, or newer than this version.
3. An older schema is brought up in one transaction; a crash in it leaves the old one.
4. One connection holds the file's lock for as long as it is open. No shared memory is used (the lock is taken before
   the write-ahead log is first touched), so that a full disk cannot show as SIGBUS.

`PRAGMA quick_check` runs at each open: 3 ms for 10,000 guests. Weak spot: SQLite's pages carry no checksums; a
flipped bit inside a number is not found. The hypervisor's word wins over such a number anyway.
"""

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from guestd.model.errors import JournalError

SCHEMA = 2
_LOCK_SECONDS = 5.0
_SMALLEST_BYTES = 512  # of a page, https://www.sqlite.org/fileformat2.html
_SIDE_FILES = ("-wal", "-shm", "-journal")
_CREATE = """
BEGIN;
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
CREATE TABLE reserved (
    guest TEXT PRIMARY KEY, cpu_millicores INTEGER NOT NULL, memory_bytes INTEGER NOT NULL, revision INTEGER NOT NULL,
    cpu_credit INTEGER, memory_credit INTEGER
) STRICT;
CREATE TABLE added (guest TEXT PRIMARY KEY, definition TEXT NOT NULL) STRICT;
CREATE TABLE limits (guest TEXT PRIMARY KEY, limits TEXT NOT NULL, set_at TEXT NOT NULL) STRICT;
CREATE TABLE paused (guest TEXT PRIMARY KEY) STRICT;
INSERT INTO meta VALUES ('schema', 2), ('epoch', 0);
COMMIT;
"""
_UPGRADES = {
    1: (
        "ALTER TABLE reserved ADD COLUMN cpu_credit INTEGER",
        "ALTER TABLE reserved ADD COLUMN memory_credit INTEGER",
        "UPDATE meta SET value = 2 WHERE key = 'schema'",
    )
}
"""From each older schema to the next."""


def open_database(path: Path, create: bool = True) -> sqlite3.Connection:
    """A checked connection of the current schema, in autocommit mode: use `transaction` to write.

    :raise JournalError: When the file cannot be used; its content was not changed then.
    :raise sqlite3.Error: When SQLite says so; see `explain`.
    :raise OSError: When the system says so; see `explain`.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    why_not = _why_not_writable(path)
    if why_not is not None:  # SQLite would open it for reading, and leave files that cannot be written beside it
        raise JournalError(f"journal {path}: cannot be written: {why_not}")
    if not path.exists():
        if not create:
            raise JournalError(f"journal {path}: was moved or deleted while in use; put it back, or restart the broker")
        _make(path)
    elif path.is_dir():
        raise JournalError(f"journal {path}: is a directory; move it away, a file of that name is made then")
    elif (size := path.stat().st_size) < _SMALLEST_BYTES:  # SQLite would take it for a new one
        raise JournalError(f"journal {path}: is damaged (it has only {size} bytes); {way_out(path)}")
    database = sqlite3.connect(
        f"file:{quote(str(path))}?mode=rw",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        timeout=_LOCK_SECONDS,
    )
    try:
        database.execute("PRAGMA locking_mode=EXCLUSIVE")
        _check(path, database)
        mode = database.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        if mode != "wal":
            raise JournalError(f"journal {path}: cannot have a write-ahead log there, only {mode!r}")
        database.execute("PRAGMA synchronous=FULL")
        _upgrade(path, database)
    except BaseException:
        database.close()
        raise
    return database


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All or nothing, and on disk when it ends."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):  # SQLite may have rolled back by itself; the first error is the one to tell
            database.execute("ROLLBACK")
        raise


def empty_log(database: sqlite3.Connection) -> None:
    """Bring everything into the main file, synced, and drop the write-ahead log.

    :raise sqlite3.Error: When it did not work out; nothing is lost, and it may be tried again.
    """
    busy, _, _ = database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if busy:
        raise sqlite3.OperationalError("the write-ahead log cannot be emptied now")


def explain(path: Path, error: Exception) -> str:
    """An error of SQLite or the system with the file's name, what is wrong, and the way out."""
    return f"journal {path}: {error}: {_meaning(path, error)}"


def _meaning(path: Path, error: Exception) -> str:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    number = getattr(error, "errno", None)
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return f"it is damaged or not guestd's; {way_out(path)}"
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return "another guestd-broker has it; end that one first"
    if code == sqlite3.SQLITE_FULL or number in (errno.ENOSPC, errno.EDQUOT) or (code and _is_full(path)):
        return f"the disk is full; make room on the file system of {path.parent}, a running broker goes on by itself"
    why_not = _why_not_writable(path) if code or number in (errno.EROFS, errno.EACCES, errno.EPERM) else None
    if why_not is not None:
        return why_not
    if code == sqlite3.SQLITE_IOERR or number == errno.EIO:
        return "the disk or its file system failed; see the kernel's log, a running broker tries again"
    return "it cannot be used"


def way_out(path: Path) -> str:
    """What to do about a file that cannot be used, and what is lost then."""
    return (
        f"move it and {path.name}-wal away and start again; lost with it are limits, guests and pauses set by calls, "
        f"and burst credit; what each VM holds is read from the hypervisor again"
    )


def _is_full(path: Path) -> bool:
    with suppress(OSError):
        return os.statvfs(path.parent).f_bavail == 0
    return False


def _why_not_writable(path: Path) -> str | None:
    """None when nothing is wrong with that."""
    with suppress(OSError):
        if os.statvfs(path.parent).f_flag & os.ST_RDONLY:
            return f"the file system of {path.parent} is read-only; mount it writable"
        for one in (path.parent, path, path.with_name(path.name + "-wal")):
            if one.exists() and not os.access(one, os.W_OK):
                return f"{one} is read-only for user {os.geteuid()}; make that user its owner"
    return None


def _make(path: Path) -> None:
    """Law 1. Leftovers of another journal of that name would be applied to the new one, so they go."""
    new = path.with_name(path.name + ".new")
    for leftover in (new, *(Path(f"{one}{end}") for one in (new, path) for end in _SIDE_FILES)):
        leftover.unlink(missing_ok=True)
    database = sqlite3.connect(new)
    try:
        database.executescript(_CREATE)
    finally:
        database.close()
    new.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _check(path: Path, database: sqlite3.Connection) -> None:
    """Whether the file may be used."""
    found = database.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise JournalError(f"journal {path}: is damaged ({found}); {way_out(path)}")
    if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
        raise JournalError(f"journal {path}: is a database, but not guestd's; {way_out(path)}")
    row = database.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()
    schema = row and row[0]
    if not isinstance(schema, int) or (schema < SCHEMA and schema not in _UPGRADES):
        raise JournalError(f"journal {path}: is damaged (schema {schema}); {way_out(path)}")
    if schema > SCHEMA:
        raise JournalError(
            f"journal {path}: has schema {schema}, this version knows {SCHEMA}; it was written by a newer "
            f"guestd-broker: use that one, or {way_out(path)}"
        )


def _upgrade(path: Path, database: sqlite3.Connection) -> None:
    """Law 3."""
    with transaction(database):
        while (schema := database.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()[0]) < SCHEMA:
            for statement in _UPGRADES[schema]:
                database.execute(statement)
