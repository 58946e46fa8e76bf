"""Events in the file: rows to and from, and the questions that are asked about them.

Numbers grow with time, so a time is found by bisection and needs no index. Weak spot: where the host's clock was set
back events of that stretch may be left out of an answer about a time.
"""

import sqlite3
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import msgspec

from guestd.model.event import DecisionInputs, Event, EventCode, EventQuery
from guestd.model.reason import Reason
from guestd.model.resources import Kind

PUT = "INSERT OR REPLACE INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_COLUMNS = "id, at, guest, kind, code, text, before, after, reason_code, reason_text, inputs"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_LARGEST = (1 << 63) - 1


def row(event: Event) -> tuple[object, ...]:
    """What is written of an event."""
    reason = event.reason
    return (
        event.id,
        _microseconds(event.at),
        event.guest,
        event.kind or "",
        event.code,
        event.text,
        min(event.before, _LARGEST),
        min(event.after, _LARGEST),
        reason and reason.code,
        reason and reason.text,
        None if event.inputs is None else _encoded(event.inputs),
    )


def find(database: sqlite3.Connection, query: EventQuery) -> tuple[Event, ...]:
    """See `EventQuery`."""
    low = query.after_id
    if query.since is not None:
        low = max(low, _first_id(database, query.since) - 1)
    high = _LARGEST if query.until is None else _first_id(database, query.until)
    where, values = "id > ? AND id < ?", (low, high)
    if query.guest:
        where = f"guest = ? AND {where}"
    guest = (query.guest,) if query.guest else ()
    order = "DESC" if query.newest else "ASC"
    rows = database.execute(
        f"SELECT {_COLUMNS} FROM events WHERE {where} ORDER BY id {order} LIMIT ?",  # noqa: S608 - nothing but fixed words
        (*guest, *values, query.limit),
    ).fetchall()
    return tuple(_event(one) for one in (rows[::-1] if query.newest else rows))


def newest_before(
    database: sqlite3.Connection, guest: str, kind: Kind, codes: Sequence[EventCode], end: datetime
) -> Event | None:
    """The last event about one kind of a guest, of those codes and before that time."""
    marks = ", ".join("?" * len(codes))
    found = database.execute(
        f"SELECT {_COLUMNS} FROM events WHERE guest = ? AND id < ? AND kind = ? AND code IN ({marks}) "  # noqa: S608
        "ORDER BY id DESC LIMIT 1",
        (guest, _first_id(database, end), kind, *codes),
    ).fetchone()
    return found and _event(found)


def around(
    database: sqlite3.Connection, guest: str, kind: Kind, at: datetime | None, before: int, after: int
) -> tuple[Event, ...]:
    """The last events about one kind of a guest before that time (None: now), and the next ones; oldest first."""
    middle = _LARGEST if at is None else _first_id(database, at)
    select = f"SELECT {_COLUMNS} FROM events WHERE guest = ? AND kind = ? AND id"  # noqa: S608 - fixed words
    older = database.execute(f"{select} < ? ORDER BY id DESC LIMIT ?", (guest, kind, middle, before)).fetchall()
    newer = database.execute(f"{select} >= ? ORDER BY id LIMIT ?", (guest, kind, middle, after)).fetchall()
    return tuple(_event(one) for one in older[::-1] + newer)


def _first_id(database: sqlite3.Connection, at: datetime) -> int:
    """The number of the first event that is not before that time, or one above all."""
    wanted = _microseconds(at)
    low, high = database.execute("SELECT coalesce(min(id), 1), coalesce(max(id), 0) + 1 FROM events").fetchone()
    while low < high:
        middle = (low + high) // 2
        id_, when = database.execute(
            "SELECT id, at FROM events WHERE id >= ? ORDER BY id LIMIT 1", (middle,)
        ).fetchone()
        if when < wanted:
            low = id_ + 1
        else:
            high = middle
    return int(low)


def _event(columns: tuple[object, ...]) -> Event:
    id_, at, guest, kind, code, text, before, after, reason_code, reason_text, inputs = columns
    assert isinstance(at, int)
    return Event(
        id=_int(id_),
        at=_EPOCH + at * _MICROSECOND,
        guest=str(guest),
        kind=Kind(str(kind)) if kind else None,
        code=EventCode(str(code)),
        text=str(text),
        before=_int(before),
        after=_int(after),
        reason=None if reason_code is None else Reason(str(reason_code), str(reason_text)),
        inputs=_decoded(inputs) if isinstance(inputs, bytes) else None,
    )


def _int(value: object) -> int:
    assert isinstance(value, int)
    return value


def _microseconds(at: datetime) -> int:
    return (at - _EPOCH) // _MICROSECOND


def _encoded(inputs: DecisionInputs) -> bytes | None:
    try:
        return msgspec.msgpack.encode(inputs)
    except OverflowError:  # a credit above 64 bits: the words are kept
        return None


def _decoded(data: bytes) -> DecisionInputs | None:
    try:
        return msgspec.msgpack.decode(data, type=DecisionInputs)
    except msgspec.MsgspecError:
        return None
