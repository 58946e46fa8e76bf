"""What a broker leaves to the next one."""

import os
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from guestd.broker import journal_file
from guestd.broker.config import GuestConfig
from guestd.broker.core.actions import Record
from guestd.broker.journal import Journal, Saved, SavedGuest
from guestd.model.errors import JournalError
from guestd.model.resources import Limits, Resources
from guestd.model.units import GIB, TIB

LIMITS = Limits(
    Resources(1000, GIB),
    Resources(4000, 2 * TIB),
    Resources(7, 8),
    Resources(6000, 3 * TIB),
    Resources(2000, TIB),
    Resources(20, GIB),
)
GUEST = GuestConfig("a", LIMITS, "/run/a.qmp", None, "/run/a")
# As the first version of guestd made it, word for word.
SCHEMA_1 = """
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
OLD_LIMITS = (
    '{"min":{"cpu_millicores":1000,"memory_bytes":1},"max":{"cpu_millicores":2000,"memory_bytes":2},'
    '"weight":{"cpu_millicores":100,"memory_bytes":100}}'
)
OLD_GUEST = (
    '{"name":"a","limits":' + OLD_LIMITS + ',"qmp_socket":"/q","cid":7,"vsock_path":null,'
    '"vsock_privileged_ports":false,"origin":""}'
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.db"


@pytest.fixture
async def journal(path: Path) -> AsyncIterator[Journal]:
    one = Journal(path)
    await one.open()
    yield one
    await one.close()


async def reopened(path: Path) -> Saved:
    again = Journal(path)
    try:
        return await again.open()
    finally:
        await again.close()


async def fails(path: Path) -> str:
    journal = Journal(path)
    with pytest.raises(JournalError) as caught:
        await journal.open()
    await journal.close()
    return str(caught.value)


def in_file(path: Path, script: str) -> None:
    """Do something to the file behind everybody's back."""
    database = sqlite3.connect(path)
    database.executescript(script)
    database.close()


def value(path: Path, key: str) -> int:
    database = sqlite3.connect(path)
    found = database.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()[0]
    database.close()
    return int(found)


async def many_guests(path: Path, count: int = 400) -> None:
    """A journal of several pages, all of it in the main file."""
    one = Journal(path)
    await one.open()
    await one.record([Record(f"guest-{number:05}", Resources(number, number), 1) for number in range(count)])
    await one.close()
    assert not path.with_name("journal.db-wal").exists()


async def test_everything_comes_back(path: Path, journal: Journal) -> None:
    await journal.record([Record("a", Resources(1, 1), 1), Record("b", Resources(3, 4 * TIB), 9)])
    await journal.record([Record("a", Resources(2000, 2 * GIB), 7)])
    await journal.add_guest(GUEST)
    await journal.set_limits("a", LIMITS, "yesterday")
    await journal.set_limits("a", LIMITS, "today")
    await journal.set_limits("b", LIMITS, "today")
    await journal.reset_limits("b")
    await journal.set_paused("a", True)
    await journal.set_paused("a", True)
    await journal.set_paused("b", True)
    await journal.set_paused("b", False)
    await journal.close()
    saved = await reopened(path)
    assert saved.reserved == {
        "a": SavedGuest(Resources(2000, 2 * GIB), 7),
        "b": SavedGuest(Resources(3, 4 * TIB), 9),
    }
    assert saved.added == {"a": GUEST}
    assert saved.limits == {"a": (LIMITS, "today")}
    assert saved.paused == {"a"}


async def test_a_credit_stays_until_another_is_recorded(path: Path, journal: Journal) -> None:
    await journal.record([Record("a", Resources(1, 1), 1), Record("b", Resources(1, 1), 1, Resources(5, 6 * TIB))])
    await journal.record([Record("a", Resources(2, 2), 2, Resources()), Record("b", Resources(2, 2), 2)])
    await journal.close()
    saved = (await reopened(path)).reserved
    assert saved["a"] == SavedGuest(Resources(2, 2), 2, Resources())
    assert saved["b"] == SavedGuest(Resources(2, 2), 2, Resources(5, 6 * TIB))


async def test_a_forgotten_guest_leaves_nothing(path: Path, journal: Journal) -> None:
    await journal.record([Record("a", Resources(1, 1), 1)])
    await journal.add_guest(GUEST)
    await journal.set_limits("a", LIMITS, "today")
    await journal.set_paused("a", True)
    await journal.forget_guest("a")
    await journal.forget_guest("nobody")
    await journal.close()
    saved = await reopened(path)
    assert (saved.reserved, saved.added, saved.limits, saved.paused) == ({}, {}, {}, set())


async def test_epochs_grow_with_each_start(path: Path) -> None:
    assert [(await reopened(path)).epoch for _ in range(3)] == [1, 2, 3]


async def test_a_journal_of_the_first_schema_is_taken_over_whole(path: Path) -> None:
    path.parent.mkdir()
    in_file(
        path,
        SCHEMA_1 + "PRAGMA journal_mode=WAL; UPDATE meta SET value = 41 WHERE key = 'epoch';"
        "INSERT INTO reserved VALUES ('a', 2000, 3, 4); INSERT INTO paused VALUES ('a');"
        f"INSERT INTO added VALUES ('a', '{OLD_GUEST}'); INSERT INTO limits VALUES ('a', '{OLD_LIMITS}', 'today');",
    )
    saved = await reopened(path)
    old = Limits(Resources(1000, 1), Resources(2000, 2))
    assert saved.epoch == 42
    assert saved.reserved == {"a": SavedGuest(Resources(2000, 3), 4, None)}
    assert saved.added == {"a": GuestConfig("a", old, "/q", 7)}
    assert saved.limits == {"a": (old, "today")}
    assert saved.paused == {"a"}
    assert value(path, "schema") == journal_file.SCHEMA
    journal = Journal(path)
    await journal.open()
    await journal.record([Record("a", Resources(1, 1), 5, Resources(7, 8))])
    await journal.close()
    assert (await reopened(path)).reserved["a"].credit == Resources(7, 8)


async def test_a_failed_upgrade_leaves_the_old_schema(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.parent.mkdir()
    in_file(path, SCHEMA_1)
    whole = journal_file._UPGRADES[1]
    monkeypatch.setitem(journal_file._UPGRADES, 1, (*whole, "INSERT INTO nowhere VALUES (1)"))
    assert "no such table: nowhere" in await fails(path)
    database = sqlite3.connect(path)
    assert [row[1] for row in database.execute("PRAGMA table_info(reserved)")][-1] == "revision"
    database.close()
    assert value(path, "schema") == 1
    monkeypatch.setitem(journal_file._UPGRADES, 1, whole)
    assert (await reopened(path)).epoch == 1


async def test_a_newer_schema_is_refused_and_left_alone(path: Path) -> None:
    await reopened(path)
    in_file(path, "UPDATE meta SET value = 3 WHERE key = 'schema'")
    said = await fails(path)
    assert f"{path}: has schema 3, this version knows 2" in said
    assert "newer guestd-broker" in said
    assert (value(path, "epoch"), value(path, "schema")) == (1, 3)


async def test_a_schema_that_never_was_is_damage(path: Path) -> None:
    for statement in ("UPDATE meta SET value = 0 WHERE key = 'schema'", "DELETE FROM meta WHERE key = 'schema'"):
        await reopened(path)
        in_file(path, statement)
        assert "is damaged (schema" in await fails(path)
        path.unlink()


async def test_what_is_no_journal_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    for content in (b"this is not a database, whatever its name says" * 50, b"SQLite format 3\0" + b"\xff" * 4096):
        path.write_bytes(content)
        said = await fails(path)
        assert f"journal {path}: " in said
        assert "damaged or not guestd's; move it and journal.db-wal away" in said
        assert "limits, guests and pauses set by calls" in said
        assert path.read_bytes() == content


async def test_a_database_of_somebody_else_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    in_file(path, "CREATE TABLE theirs (x)")
    before = path.read_bytes()
    assert "is a database, but not guestd's; move it" in await fails(path)
    assert path.read_bytes() == before


async def test_an_empty_file_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    assert f"{path}: is damaged (it has only 0 bytes); move it" in await fails(path)
    assert path.stat().st_size == 0


@pytest.mark.parametrize(
    "header",
    [b"\0" * 16, b"SQLite format 3\0" + b"\0" * 16, os.urandom(100)],
    ids=["zeros", "no more than the magic", "noise"],
)
async def test_a_damaged_header_is_refused(path: Path, header: bytes) -> None:
    await many_guests(path)
    with path.open("r+b") as file:
        file.write(header)
    said = await fails(path)
    assert f"journal {path}: " in said
    assert "move it and journal.db-wal away" in said


@pytest.mark.parametrize("page", [1, 2, 5, 7])
async def test_a_page_overwritten_in_the_middle_is_refused(path: Path, page: int) -> None:
    await many_guests(path)
    with path.open("r+b") as file:
        file.seek(4096 * page)
        file.write(b"\xa5" * 4096)
    said = await fails(path)
    assert f"journal {path}: " in said
    assert "damaged" in said
    assert "move it and journal.db-wal away" in said


@pytest.mark.parametrize("left", [1, 3, 5000, 4096 * 6])
async def test_a_truncated_file_is_refused(path: Path, left: int) -> None:
    await many_guests(path)
    assert path.stat().st_size > left
    os.truncate(path, left)
    said = await fails(path)
    assert f"journal {path}: " in said
    assert "damaged" in said
    assert path.stat().st_size == left


async def test_damaged_content_is_refused(path: Path) -> None:
    for statement in (
        "INSERT INTO added VALUES ('a', '{')",
        "INSERT INTO limits VALUES ('a', '{\"min\": 5}', 'today')",
        "INSERT INTO reserved VALUES ('a', 1, -1, 1, NULL, NULL)",
    ):
        await reopened(path)
        in_file(path, statement)
        assert "is damaged (a: " in await fails(path)
        assert value(path, "epoch") == 1  # looked at before anything is written
        path.unlink()


async def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "journal.db", Path("/proc/guestd/journal.db"), tmp_path):
        assert str(path) in await fails(path)
    assert "is a directory; move it away" in await fails(tmp_path)


async def test_two_brokers_cannot_have_one_journal(
    path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_file, "_LOCK_SECONDS", 0.1)
    assert "is locked: another guestd-broker has it" in await fails(path)
    await journal.record([Record("a", Resources(1, 1), 1)])  # the first one is none the worse
    assert "is locked" in await fails(path)
    await journal.close()
    assert (await reopened(path)).epoch == 2


async def test_a_journal_that_was_half_made_is_made_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = journal_file._CREATE
    monkeypatch.setattr(journal_file, "_CREATE", whole.replace("INSERT INTO meta", "INSERT INTO nowhere"))
    await fails(path)
    assert not path.exists()
    monkeypatch.setattr(journal_file, "_CREATE", whole)
    path.with_name("journal.db.new-journal").write_bytes(b"left by a crash")
    assert (await reopened(path)).epoch == 1
    assert [one.name for one in path.parent.iterdir()] == ["journal.db"]


async def test_what_another_journal_left_beside_is_not_applied_to_a_new_one(path: Path) -> None:
    """Somebody moved the database away, and not its log."""
    journal = Journal(path)
    await journal.open()
    await journal.record([Record(f"old-{number}", Resources(1, 1), 1) for number in range(300)])
    log = path.with_name("journal.db-wal").read_bytes()
    await journal.close()
    assert len(log) > 4096
    path.unlink()
    path.with_name("journal.db-wal").write_bytes(log)
    assert await reopened(path) == Saved(1)


async def test_when_a_commit_fails_nothing_is_written(path: Path, journal: Journal) -> None:
    too_big = Record("b", Resources(1, 1 << 62), 1 << 62)
    with pytest.raises(JournalError):
        await journal.record([Record("a", Resources(1, 1), 1), Record(None, Resources(1, 1), 1)])  # type: ignore[arg-type]
    with pytest.raises(JournalError):
        await journal.record([Record("a", Resources(1, 1), 1), Record("c", Resources(1, 1 << 64), 1)])
    await journal.record([too_big])
    await journal.close()
    assert list((await reopened(path)).reserved) == ["b"]


async def test_every_commit_is_one_transaction(path: Path, journal: Journal) -> None:
    statements: list[str] = []
    assert journal._database is not None
    journal._database.set_trace_callback(statements.append)
    await journal.record([Record(f"g{number}", Resources(1, 1), 1) for number in range(500)])
    await journal.forget_guest("g1")
    assert statements.count("COMMIT") == 2
    assert statements.count("BEGIN IMMEDIATE") == 2


async def test_a_journal_moved_away_in_use_takes_nothing_more(path: Path, journal: Journal) -> None:
    """Else commits would be durable in a file that no next broker finds."""
    elsewhere = path.with_name("elsewhere.db")
    path.rename(elsewhere)
    with pytest.raises(JournalError, match="was moved or deleted while in use; put it back"):
        await journal.record([Record("a", Resources(1, 1), 1)])
    path.write_bytes(b"something else")
    with pytest.raises(JournalError, match="was moved or deleted"):
        await journal.record([Record("a", Resources(1, 1), 1)])
    elsewhere.rename(path)
    await journal.record([Record("b", Resources(1, 1), 1)])
    await journal.close()
    assert list((await reopened(path)).reserved) == ["b"]


async def test_a_file_that_another_broker_took_over_is_not_written(path: Path, journal: Journal) -> None:
    await journal.record([Record("a", Resources(1, 1), 1)])
    assert journal._database is not None
    journal._database.close()  # as if the lock was lost while the file was opened anew after an error
    journal._database = None
    assert (await reopened(path)).epoch == 2
    with pytest.raises(JournalError, match="holds epoch 2, this broker's is 1: another one took it over"):
        await journal.record([Record("b", Resources(1, 1), 1)])
    assert list((await reopened(path)).reserved) == ["a"]


async def test_a_journal_that_is_not_open_fails_cleanly(path: Path) -> None:
    journal = Journal(path)
    with pytest.raises(JournalError):
        await journal.record([Record("a", Resources(1, 1), 1)])
    with pytest.raises(JournalError):
        await journal.forget_guest("a")
    await journal.open()
    await journal.close()
    await journal.close()
    with pytest.raises(JournalError):
        await journal.set_paused("a", True)
