"""The file of events and history: how it is opened, and what becomes of one that cannot be used.

It is no journal: what is lost with it is the past. So a file that is damaged, or of another version, is moved aside and
a new one begins. One connection holds the file's lock, so that no shared memory is used (a full disk would show as
SIGBUS).
"""

import errno
import logging
import os
import sqlite3
from contextlib import suppress
from pathlib import Path

from guestd.broker.history.events_table import STRETCH

_log = logging.getLogger(__name__)
_APPLICATION = 0x67756864
SCHEMA = 2
PAGE_BYTES = 4096
_BAD_KEPT = 3
_FROM_1 = f"""
BEGIN;
DROP INDEX events_of_guest;
CREATE INDEX events_of_guest ON events ({STRETCH}, guest, id);
PRAGMA user_version = {SCHEMA};
COMMIT;
"""
_CREATE = f"""
PRAGMA page_size = {PAGE_BYTES};
PRAGMA auto_vacuum = INCREMENTAL;
BEGIN;
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE runs (id INTEGER PRIMARY KEY, began REAL NOT NULL, ended REAL NOT NULL) STRICT;
CREATE TABLE guests (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, seen_at REAL NOT NULL) STRICT;
CREATE TABLE samples (
    tier INTEGER NOT NULL, step INTEGER NOT NULL, guest INTEGER NOT NULL,
    cpu_demand INTEGER NOT NULL, cpu_reserved INTEGER NOT NULL, cpu_plugged INTEGER NOT NULL,
    cpu_usable INTEGER NOT NULL, cpu_used INTEGER NOT NULL,
    memory_demand INTEGER NOT NULL, memory_reserved INTEGER NOT NULL, memory_plugged INTEGER NOT NULL,
    memory_usable INTEGER NOT NULL, memory_used INTEGER NOT NULL,
    PRIMARY KEY (tier, step, guest)
) STRICT, WITHOUT ROWID;
CREATE TABLE events (
    id INTEGER PRIMARY KEY, at INTEGER NOT NULL, guest TEXT NOT NULL, kind TEXT NOT NULL, code TEXT NOT NULL,
    text TEXT NOT NULL, before INTEGER NOT NULL, after INTEGER NOT NULL, reason_code TEXT, reason_text TEXT, inputs BLOB
) STRICT;
CREATE INDEX events_of_guest ON events ({STRETCH}, guest, id);
INSERT INTO meta VALUES ('next_id', 1), ('events', 0), ('samples', 0);
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {SCHEMA};
COMMIT;
"""  # noqa: S608 - nothing but fixed words


def open_history(path: Path, most_pages: int, log_pages: int) -> sqlite3.Connection:
    """A connection of the current schema; whatever else is there is moved aside.

    :param most_pages: of the main file; SQLite itself refuses more.
    :param log_pages: with so many the write-ahead log is emptied into the main file.
    :raise sqlite3.Error: When SQLite says so; see `way_out`.
    :raise OSError: When the system says so; see `way_out`.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        return _open(path, most_pages, log_pages)
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        move_aside(path, str(error))
    return _open(path, most_pages, log_pages)


def _open(path: Path, most_pages: int, log_pages: int) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0.0)
    try:
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        if not database.execute("SELECT 1 FROM sqlite_master").fetchone():
            database.executescript(_CREATE)
        found = _version(database)
        if found == (_APPLICATION, 1):
            database.executescript(_FROM_1)
            found = _version(database)
        if found != (_APPLICATION, SCHEMA):
            raise _other_file(f"it is another version's or another program's ({found[0]:#x}, {found[1]})")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute(f"PRAGMA wal_autocheckpoint = {log_pages}")
        database.execute(f"PRAGMA journal_size_limit = {log_pages * PAGE_BYTES}")
        database.execute(f"PRAGMA max_page_count = {most_pages}")
    except BaseException:
        database.close()
        raise
    return database


def _version(database: sqlite3.Connection) -> tuple[int, int]:
    """Whose file it is, and of which schema."""
    application, schema = (database.execute(f"PRAGMA {n}").fetchone()[0] for n in ("application_id", "user_version"))
    return application, schema


def _other_file(text: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(text)
    error.sqlite_errorcode = sqlite3.SQLITE_NOTADB
    return error


def is_damage(error: Exception) -> bool:
    """Whether the file itself is what is wrong."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def move_aside(path: Path, why: str) -> None:
    """To the first free name of `NAME.bad-1` to `-3`, or in the place of the last.

    :raise OSError: When that is not possible.
    """
    names = [path.with_name(f"{path.name}.bad-{number}") for number in range(1, _BAD_KEPT + 1)]
    aside = next((one for one in names if not one.exists()), names[-1])
    path.rename(aside)
    with suppress(FileNotFoundError):
        path.with_name(f"{path.name}-wal").rename(aside.with_name(f"{aside.name}-wal"))
    _log.warning("history %s: %s; moved to %s, a new one begins: events and history before are there", path, why, aside)


def way_out(path: Path, error: Exception) -> str:
    """What is wrong, and what to do about it."""
    code, number = getattr(error, "sqlite_errorcode", 0) & 0xFF, getattr(error, "errno", None)
    where = f"history {path}: {error}: "
    if code == sqlite3.SQLITE_FULL or number in (errno.ENOSPC, errno.EDQUOT) or (code and _is_full(path)):
        return where + f"the disk is full; make room on the file system of {path.parent}"
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return where + "another program has it open; end that one"
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN) or number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return where + f"make {path.parent} and what is in it writable for user {os.geteuid()}"
    if code == sqlite3.SQLITE_IOERR or number == errno.EIO:
        return where + "the disk or its file system failed; see the kernel's log"
    return where + f"move {path.name} and {path.name}-wal away, new ones are made then"


def _is_full(path: Path) -> bool:
    with suppress(OSError):
        return os.statvfs(path.parent).f_bavail == 0
    return False
