"""Events in the file: rows to and from, and the questions that are asked about them.

Numbers grow with time, so a time is found by bisection and needs no index. A guest's events are looked up stretch by
stretch of 4,096 numbers: an index that begins with the stretch grows at its end only, where one by guest would have
each write touch a page for every guest, which was most of what history cost. Weak spot: where the host's clock was set
back events of that time may be left out of an answer about it.
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
_STRETCH_BITS = 12
STRETCH = f"(id >> {_STRETCH_BITS})"
"""The expression that the index begins with: it is used only where the same one is asked for."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_LARGEST = (1 << 63) - 1
_ENCODER, _DECODER = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(DecisionInputs)


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
    if query.guest:
        return _of_guest(database, query.guest, low, high, query.limit, newest=query.newest)
    order = "DESC" if query.newest else "ASC"
    rows = database.execute(
        f"SELECT {_COLUMNS} FROM events WHERE id > ? AND id < ? ORDER BY id {order} LIMIT ?",  # noqa: S608 - fixed words
        (low, high, query.limit),
    ).fetchall()
    return tuple(_event(one) for one in (rows[::-1] if query.newest else rows))


def newest_before(
    database: sqlite3.Connection, guest: str, kind: Kind, codes: Sequence[EventCode], end: datetime
) -> Event | None:
    """The last event about one kind of a guest, of those codes and before that time."""
    more = f"AND kind = ? AND code IN ({', '.join('?' * len(codes))})"
    found = _of_guest(database, guest, 0, _first_id(database, end), 1, True, more, (kind, *codes))
    return found[0] if found else None


def around(
    database: sqlite3.Connection, guest: str, kind: Kind, at: datetime | None, before: int, after: int
) -> tuple[Event, ...]:
    """The last events about one kind of a guest before that time (None: now), and the next ones; oldest first."""
    middle = _LARGEST if at is None else _first_id(database, at)
    older = _of_guest(database, guest, 0, middle, before, True, "AND kind = ?", (kind,))
    return older + _of_guest(database, guest, middle - 1, _LARGEST, after, False, "AND kind = ?", (kind,))


def _of_guest(
    database: sqlite3.Connection,
    guest: str,
    low: int,
    high: int,
    limit: int,
    newest: bool,
    more: str = "",
    values: tuple[object, ...] = (),
) -> tuple[Event, ...]:
    """The first events of a guest with numbers between those two, or the last ones; oldest first.

    :param more: a further condition, and its values.
    """
    order, end = ("DESC", "max") if newest else ("ASC", "min")
    select = (
        f"SELECT {_COLUMNS} FROM events WHERE {STRETCH} = ? AND guest = ? AND id > ? AND id < ? {more} "  # noqa: S608
        f"ORDER BY id {order} LIMIT ?"
    )
    next_id = f"SELECT {end}(id) FROM events WHERE id > ? AND id < ?"  # noqa: S608 - nothing but fixed words
    rows: list[tuple[object, ...]] = []
    first, last = low, high  # what is still to be looked at
    while len(rows) < limit:
        (found,) = database.execute(next_id, (first, last)).fetchone()
        if found is None:
            break
        stretch = found >> _STRETCH_BITS
        rows += database.execute(select, (stretch, guest, low, high, *values, limit - len(rows))).fetchall()
        if newest:
            last = stretch << _STRETCH_BITS
        else:
            first = ((stretch + 1) << _STRETCH_BITS) - 1
    return tuple(_event(one) for one in (rows[::-1] if newest else rows))


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
        return _ENCODER.encode(inputs)
    except OverflowError:  # a credit above 64 bits: the words are kept
        return None


def _decoded(data: bytes) -> DecisionInputs | None:
    try:
        return _DECODER.decode(data)
    except msgspec.MsgspecError:
        return None
