"""What a broker leaves to the next one."""

import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from guestd.broker import journal as module
from guestd.broker.config import GuestConfig
from guestd.broker.core.actions import Record
from guestd.broker.journal import Journal, Saved
from guestd.model.errors import JournalError
from guestd.model.resources import Limits, Resources
from guestd.model.units import GIB, TIB

LIMITS = Limits(Resources(1000, GIB), Resources(4000, 2 * TIB), Resources(7, 8))
GUEST = GuestConfig("a", LIMITS, "/run/a.qmp", None, "/run/a")


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
    assert saved.reserved == {"a": (Resources(2000, 2 * GIB), 7), "b": (Resources(3, 4 * TIB), 9)}
    assert saved.added == {"a": GUEST}
    assert saved.limits == {"a": (LIMITS, "today")}
    assert saved.paused == {"a"}


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


async def test_a_newer_schema_is_refused_and_left_alone(path: Path) -> None:
    await reopened(path)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE meta SET value = 2 WHERE key = 'schema'")
    database.close()
    said = await fails(path)
    assert "has schema 2, this version knows 1" in said
    assert "newer guestd-broker" in said
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone() == (1,)
    database.close()


async def test_what_is_no_journal_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    for content in (b"this is not a database, whatever its name says" * 50, b"SQLite format 3\0" + b"\xff" * 4096):
        path.write_bytes(content)
        assert str(path) in await fails(path)
        assert path.read_bytes() == content


async def test_damaged_content_is_refused(path: Path) -> None:
    for statement in (
        "INSERT INTO added VALUES ('a', '{')",
        "INSERT INTO limits VALUES ('a', '{\"min\": 5}', 'today')",
    ):
        await reopened(path)
        with sqlite3.connect(path) as database:
            database.execute(statement)
        database.close()
        assert "damaged" in await fails(path)
        path.unlink()


async def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "journal.db", Path("/proc/guestd/journal.db"), tmp_path):
        assert str(path) in await fails(path)


async def test_two_brokers_cannot_have_one_journal(
    path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.1)
    assert "locked" in await fails(path)
    await journal.record([Record("a", Resources(1, 1), 1)])  # the first one is none the worse
    await journal.close()
    assert (await reopened(path)).epoch == 2


async def test_a_journal_that_was_half_made_is_made_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = module._CREATE
    monkeypatch.setattr(module, "_CREATE", whole.replace("INSERT INTO meta", "INSERT INTO nowhere"))
    await fails(path)
    monkeypatch.setattr(module, "_CREATE", whole)
    assert (await reopened(path)).epoch == 1


async def test_when_a_commit_fails_nothing_is_written(path: Path, journal: Journal) -> None:
    too_big = Record("b", Resources(1, 1 << 62), 1 << 62)
    with pytest.raises(JournalError):
        await journal.record([Record("a", Resources(1, 1), 1), Record(None, Resources(1, 1), 1)])  # type: ignore[arg-type]
    await journal.record([too_big])
    await journal.close()
    assert list((await reopened(path)).reserved) == ["b"]


async def test_before_open_and_after_close_every_call_fails_cleanly(path: Path) -> None:
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
