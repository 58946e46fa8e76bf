"""What goes when the file is full, or rows are too old.

Of events and samples whoever has more makes room; among samples the tier that goes back furthest for what it is meant
to keep.
"""

import sqlite3

from guestd.broker.history.samples_table import newest, oldest
from guestd.broker.history.steps import TIERS
from guestd.broker.journal_file import transaction

_EVENT_BYTES, _SAMPLE_BYTES = 400, 80  # about; only to compare the two
_STEPS_AT_ONCE = 50
_FULL_SHARE = 0.9
_OLDEST_EVENTS = """
DELETE FROM events WHERE id <= coalesce(
    (SELECT id FROM events ORDER BY id LIMIT 1 OFFSET ?), (SELECT max(id) FROM events)
)
"""


def make_room(database: sqlite3.Connection, most_pages: int, rows_at_once: int) -> None:
    """Until a tenth of the pages is free, or there is nothing left to drop."""
    while pages_used(database) > most_pages * _FULL_SHARE:
        events, samples = get(database, "events"), get(database, "samples")
        with transaction(database):
            if events * _EVENT_BYTES > samples * _SAMPLE_BYTES:
                gone = database.execute(_OLDEST_EVENTS, (rows_at_once,)).rowcount
                count(database, "events", -gone)
            else:
                gone = _cut(database)
        if not gone:
            return


def age(database: sqlite3.Connection, now: float) -> None:
    """Drop what is older than its tier keeps, a few steps at a time."""
    for number, tier in enumerate(TIERS):
        end = int((now - tier.keep_seconds) // tier.step_seconds)
        for _ in range(_STEPS_AT_ONCE):
            first = oldest(database, number)
            if first is None or first >= end:
                break
            with transaction(database):
                _drop(database, number, first)


def pages_used(database: sqlite3.Connection) -> int:
    """Pages of the main file that hold something."""
    return pragma(database, "page_count") - pragma(database, "freelist_count")


def pragma(database: sqlite3.Connection, name: str) -> int:
    """A number that SQLite knows."""
    return int(database.execute(f"PRAGMA {name}").fetchone()[0])


def get(database: sqlite3.Connection, key: str) -> int:
    """A number that is kept in the file."""
    return int(database.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()[0])


def count(database: sqlite3.Connection, table: str, change: int) -> None:
    """So many rows more."""
    database.execute("UPDATE meta SET value = max(0, value + ?) WHERE key = ?", (change, table))


def _cut(database: sqlite3.Connection) -> int:
    """Drop the oldest step of a tier; how many rows those were."""
    ages = []
    for number, tier in enumerate(TIERS):
        first, last = oldest(database, number), newest(database, number)
        if first is not None and last is not None:
            ages.append(((last - first + 1) * tier.step_seconds / tier.keep_seconds, number, first))
    if not ages:
        return 0
    _, number, first = max(ages)
    return _drop(database, number, first)


def _drop(database: sqlite3.Connection, tier: int, step: int) -> int:
    gone = database.execute("DELETE FROM samples WHERE tier = ? AND step = ?", (tier, step)).rowcount
    count(database, "samples", -gone)
    return gone
