"""The file: bounded, the same after a restart, and begun anew when it cannot be used."""

import contextlib
import os
import sqlite3
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

import pytest

from guestd.broker.history import events_table, prune, samples_table
from guestd.broker.history.file import ID_BLOCK, Batch, HistoryFile
from guestd.broker.history.schema import PAGE_BYTES
from guestd.broker.history.steps import TIERS
from guestd.model.event import DecisionInputs, Event, EventCode, EventQuery
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB

NOW = 1_800_000_000.0
BEGIN = datetime.fromtimestamp(NOW, UTC)
LIMITS = Limits(Resources(1000, GIB), Resources(4000, 8 * GIB))
INPUTS = DecisionInputs(4000, 3900, LIMITS, 2000, 2000, 4000, capacity=64_000, free=9000, scarce=True)


def event(number: int, guest: str = "a", text: str = "growing to 4 CPU: needs 4 CPU") -> Event:
    at = BEGIN + timedelta(seconds=number)
    return Event(number, at, guest, Kind.CPU, EventCode.GROWING, text, 2000, 4000, Reason("demand", "needs it"), INPUTS)


def events(file: HistoryFile, query: EventQuery) -> list[int]:
    return [one.id for one in file.call(NOW, lambda database: events_table.find(database, query))]


def size(path: Path) -> int:
    return sum(one.stat().st_size for one in path.parent.iterdir())


def test_an_event_comes_back_as_it_was(tmp_path: Path) -> None:
    made = [
        event(1),
        Event(2, BEGIN + timedelta(microseconds=1), "", None, EventCode.BROKER, "tab\there, \x1b[31m, \u202e, ü"),
        Event(3, BEGIN, "a" * 64, Kind.MEMORY, EventCode.SHRUNK, "", (1 << 63) - 1, 0, Reason("", "")),
    ]
    file = HistoryFile(tmp_path / "history.db", 1 << 20)
    file.write(Batch(4, NOW, made))
    file.close(4)
    again = HistoryFile(tmp_path / "history.db", 1 << 20)
    assert list(again.call(NOW, lambda database: events_table.find(database, EventQuery()))) == made
    assert again.first_id == 4
    again.close(4)


def test_a_guests_events_are_found_wherever_they_are(tmp_path: Path) -> None:
    """As by looking at all of them: across stretches of numbers, and over gaps as crashes leave them."""
    random = Random(7)
    starts = (1, 4090, 70_000, 1_800_000_000_000)
    made = [replace(event(one, random.choice("aab")), id=start + one) for start in starts for one in range(20)]
    of_memory = [replace(one, kind=Kind.MEMORY, code=EventCode.GROWN) for one in made[::3]]
    made = sorted({one.id: one for one in (*made, *of_memory)}.values(), key=lambda one: one.id)
    made = [replace(one, at=BEGIN + timedelta(seconds=place)) for place, one in enumerate(made)]
    file = HistoryFile(tmp_path / "history.db", 1 << 20)
    file.write(Batch(made[-1].id + 1, NOW, made))
    codes = (EventCode.GROWN, EventCode.SHRUNK)
    for _ in range(300):
        since, until = (random.choice([None, random.choice(made).at]) for _ in range(2))
        query = EventQuery(
            random.choice("abc"), since, until, random.choice([0, random.choice(made).id]), random.randint(0, 50)
        )
        found = [
            one.id
            for one in made
            if one.guest == query.guest
            and one.id > query.after_id
            and (since is None or one.at >= since)
            and (until is None or one.at < until)
        ]
        assert events(file, query) == found[: query.limit]
        newest = found[-query.limit :] if query.limit else []
        assert events(file, replace(query, newest=True)) == newest
        at = random.choice(made).at
        near = [one for one in made if one.guest == "a" and one.kind is Kind.CPU]
        older, newer = [one for one in near if one.at < at], [one for one in near if one.at >= at]
        around = file.call(NOW, lambda database, at=at: events_table.around(database, "a", Kind.CPU, at, 3, 4))
        assert around == tuple(older[-3:] + newer[:4])
        before = file.call(
            NOW, lambda database, at=at: events_table.newest_before(database, "a", Kind.MEMORY, codes, at)
        )
        of_that_kind = [one for one in made if (one.guest, one.kind) == ("a", Kind.MEMORY) and one.at < at]
        assert before == (of_that_kind[-1] if of_that_kind else None)
    file.close(0)


def test_a_file_with_the_index_of_the_first_schema_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    file = HistoryFile(path, 1 << 20)
    file.write(Batch(4, NOW, [event(1), event(2, "b"), event(3)]))
    file.close(4)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(
            "DROP INDEX events_of_guest; CREATE INDEX events_of_guest ON events (guest, id); PRAGMA user_version = 1"
        )
    again = HistoryFile(path, 1 << 20)
    assert events(again, EventQuery("a")) == [1, 3]
    plan = again.call(
        NOW,
        lambda database: database.execute(
            f"EXPLAIN QUERY PLAN SELECT * FROM events WHERE {events_table.STRETCH} = 0 AND guest = 'a' AND id < 9"
        ).fetchall(),
    )
    assert "USING INDEX events_of_guest (<expr>=? AND guest=? AND id<?)" in str(plan)
    again.close(4)
    assert not list(tmp_path.glob("*.bad-*"))


def test_numbers_grow_over_a_crash_though_the_last_were_never_written(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    first = HistoryFile(path, 1 << 20)
    assert first.call(NOW, lambda _: first.first_id) == 1
    assert first.reserved == 1 + ID_BLOCK
    first.write(Batch(ID_BLOCK, NOW, [event(number) for number in range(1, 4)]))
    reserved = first.reserved
    assert reserved == 2 * ID_BLOCK
    first._close()  # as a crash does: the next number is not told
    second = HistoryFile(path, 1 << 20)
    second.call(NOW, lambda _: None)
    assert second.first_id == reserved
    assert second.reserved > reserved
    second.close(reserved + 5)
    third = HistoryFile(path, 1 << 20)
    third.call(NOW, lambda _: None)
    assert third.first_id == reserved + 5
    third.close(0)


@pytest.mark.parametrize(("mib", "guests", "events_each", "rounds"), [(1, 50, 300, 20), (16, 1500, 2000, 30)])
def test_the_files_stay_within_the_bound(tmp_path: Path, mib: int, guests: int, events_each: int, rounds: int) -> None:
    path = tmp_path / "history.db"
    file = HistoryFile(path, mib << 20)
    largest = 0
    number = 1
    for minute in range(rounds):
        now = NOW + 60 * minute
        rows = [
            (0, int(now // 10) + step, f"guest-{guest}", tuple(range(step, step + 10)))
            for step in range(6)
            for guest in range(guests)
        ]
        made = [event(number + one, f"guest-{one % guests}", "x" * 400) for one in range(events_each)]
        number += len(made)
        file.write(Batch(number, now, made, rows))
        largest = max(largest, size(path))
    assert largest <= mib << 20
    assert largest > (mib << 20) * 0.6
    kept = events(file, EventQuery(newest=True, limit=100_000))
    assert kept[-1] == number - 1
    assert kept == list(range(kept[0], number))
    assert kept[0] > 1
    newest = file.call(NOW, lambda database: samples_table.newest(database, 0))
    assert newest == int(now // 10) + 5
    oldest = file.call(NOW, lambda database: samples_table.oldest(database, 0))
    assert oldest is not None
    assert oldest > int(NOW // 10)
    for table in ("events", "samples"):
        statement = f"SELECT count(*) FROM {table}"
        counted = file.call(NOW, lambda database, text=statement: database.execute(text).fetchone()[0])  # type: ignore[misc]
        assert counted == file.call(NOW, lambda database, name=table: prune.get(database, name))  # type: ignore[misc]
        assert counted * (400 if table == "events" else 80) > (mib << 20) * 0.15, "one crowds out the other"
    file.close(number)


def test_a_commit_that_could_take_what_is_the_journals_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk of 1 MiB of which 600 KiB are free: one event fits, 150 may take a page of the log each."""
    answer = os.statvfs_result((4096, 4096, 256, 150, 150, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: answer)
    file = HistoryFile(tmp_path / "history.db", 64 << 20)
    file.write(Batch(2, NOW, [event(1)]))
    before = size(tmp_path / "history.db")
    with pytest.raises(OSError, match="left to the journal"):
        file.write(Batch(152, NOW, [event(number) for number in range(2, 152)]))
    assert size(tmp_path / "history.db") - before <= 10 * PAGE_BYTES
    assert file.openings == 1  # as on any full disk it can still be read
    assert events(file, EventQuery()) == [1]
    file.close(152)


def test_a_bound_that_was_lowered_makes_the_file_smaller(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    file = HistoryFile(path, 8 << 20)
    file.write(Batch(20_001, NOW, [event(number) for number in range(1, 20_001)]))
    file.close(20_001)
    assert size(path) > 4 << 20
    file = HistoryFile(path, 1 << 20)
    kept = events(file, EventQuery(limit=100_000))
    assert size(path) <= 1 << 20
    assert kept[-1] == 20_000
    file.write(Batch(20_002, NOW, [event(20_001)]))
    file.close(20_002)
    assert size(path) <= 1 << 20


def test_samples_and_guests_that_are_too_old_go(tmp_path: Path) -> None:
    file = HistoryFile(tmp_path / "history.db", 1 << 20)
    rows = [(tier, int(NOW // one.step_seconds), "old", (1,) * 10) for tier, one in enumerate(TIERS)]
    file.write(Batch(1, NOW, [], rows))
    later = NOW
    for _ in range(4):
        later += 5 * 86400
        step = int(later // TIERS[2].step_seconds)
        file.write(Batch(1, later, [], [(2, step, "new", (2,) * 10)]))
    guests = file.call(later, lambda database: database.execute("SELECT name FROM guests").fetchall())
    assert guests == [("new",)]
    oldest = file.call(later, lambda database: [samples_table.oldest(database, tier) for tier in range(3)])
    assert oldest[:2] == [None, None]
    assert oldest[2] == int((NOW + 10 * 86400) // 600)
    file.write(Batch(1, later, [], [(0, int(later // 10), "old", (3,) * 10)]))
    assert file.guest_and_run("old")[0] not in (0, file.guest_and_run("new")[0])
    file.close(1)


@pytest.mark.parametrize("how", ["garbage", "newer", "journal"])
def test_a_file_that_cannot_be_used_is_moved_aside_and_said_once(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "history.db"
    if how == "garbage":
        path.write_bytes(b"this is no database" * 1000)
    else:
        database = sqlite3.connect(path)
        database.execute("CREATE TABLE meta (key TEXT)")
        if how == "newer":
            database.execute("PRAGMA application_id = 0x67756864")
            database.execute("PRAGMA user_version = 9999")
        database.close()
    before = path.read_bytes()
    file = HistoryFile(path, 1 << 20)
    file.call(NOW, lambda _: None)
    assert file.first_id == NOW * 1000, "above all that were given before"
    file.write(Batch(file.first_id + 1, NOW, [replace(event(1), id=file.first_id)]))
    assert events(file, EventQuery()) == [file.first_id]
    file.close(file.first_id + 1)
    assert path.with_name("history.db.bad-1").read_bytes() == before
    assert [record.getMessage().split(";")[1] for record in caplog.records] == [
        f" moved to {path}.bad-1, a new one begins: events and history before are there"
    ]


def test_no_more_than_three_bad_files_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    for number in range(5):
        path.write_bytes(b"%d" % number * 5000)
        file = HistoryFile(path, 1 << 20)
        file.call(NOW, lambda _: None)
        file.close(1)
    kept = {one.name: one.read_bytes()[:1] for one in tmp_path.iterdir() if "bad" in one.name}
    assert kept == {"history.db.bad-1": b"0", "history.db.bad-2": b"1", "history.db.bad-3": b"4"}


def test_damage_that_shows_later_is_moved_aside_too(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    file = HistoryFile(path, 4 << 20)
    file.write(Batch(5001, NOW, [event(number) for number in range(1, 5001)]))
    file.close(5001)
    with path.open("r+b") as raw:
        raw.seek(8 * 4096)
        raw.write(b"\xff" * (path.stat().st_size - 20 * 4096))
    file = HistoryFile(path, 4 << 20)
    with pytest.raises(sqlite3.DatabaseError):
        for _ in range(2):
            events(file, EventQuery(limit=10_000))
            file.write(Batch(5002, NOW, [event(5001)]))
    assert path.with_name("history.db.bad-1").exists()
    file.write(Batch(5002, NOW, [event(5001)]))
    assert events(file, EventQuery()) == [5001]
    file.close(5002)


def test_a_file_that_is_moved_away_in_use_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    file = HistoryFile(path, 1 << 20)
    file.write(Batch(2, NOW, [event(1)]))
    path.rename(tmp_path / "elsewhere")
    file.write(Batch(3, NOW, [event(2)]))
    assert path.exists()
    assert events(file, EventQuery()) == [2]
    assert file.openings == 2
    file.close(3)
