"""Samples in the file. By time first: all that one step writes is side by side, and so is what is pruned. A guest's
past is read by one look-up per step, of which there are at most 2,100.
"""

import sqlite3
from collections.abc import Sequence
from itertools import pairwise

from guestd.broker.history.steps import REPEAT_STEPS, TIERS, Values, highest, hold, merge, pick_tier
from guestd.model.history import History
from guestd.model.resources import Kind

_COLUMNS = [f"{kind}_{what}" for kind in Kind for what in ("demand", "reserved", "plugged", "usable", "used")]
_OR_HIGHER = "ON CONFLICT (tier, step, guest) DO UPDATE SET " + ", ".join(
    f"{name} = max({name}, excluded.{name})" for name in _COLUMNS
)
"""Of two rows of one step, of two runs, the higher values count."""
PUT = f"INSERT INTO samples VALUES ({', '.join('?' * 13)}) {_OR_HIGHER}"  # noqa: S608 - nothing but fixed names
"""Tier, step, guest and values."""
_OF_GUEST = f"""
WITH RECURSIVE wanted (number) AS (VALUES (?) UNION ALL SELECT number + 1 FROM wanted WHERE number < ?)
SELECT step, {", ".join(_COLUMNS)} FROM wanted CROSS JOIN samples ON tier = ? AND step = number AND guest = ?
"""  # noqa: S608 - nothing but fixed names

_ROLL_UP = f"""
INSERT INTO samples SELECT ?, ?, guest, {", ".join(f"max({name})" for name in _COLUMNS)} FROM samples
WHERE tier = ? AND step >= ? AND step < ? GROUP BY guest
{_OR_HIGHER}
"""  # noqa: S608 - nothing but fixed names


def roll_up(database: sqlite3.Connection, ended: float) -> None:
    """Make the steps that were not over when a run ended (seconds of the epoch) of those of the tier below."""
    for number, (below, tier) in enumerate(pairwise(TIERS)):
        step, width = int(ended // tier.step_seconds), tier.step_seconds // below.step_seconds
        database.execute(_ROLL_UP, (number + 1, step, number, step * width, (step + 1) * width))


def read(
    database: sqlite3.Connection,
    guest: int,
    run: int,
    open_steps: Sequence[tuple[int, Values]],
    since: float,
    until: float,
    max_points: int,
    now: float,
) -> History:
    """A guest's steps that begin within `since..until`, in seconds of the epoch.

    :param run: the one that is not over.
    :param open_steps: what each tier's step that is not over has so far.
    """
    tier = pick_tier(since, now, [oldest(database, number) for number in range(len(TIERS))])
    seconds = TIERS[tier].step_seconds
    earliest = now - TIERS[tier].keep_seconds
    first, last = -int(-max(since, earliest) // seconds), -int(-min(until, now) // seconds) - 1
    rows: dict[int, Values] = {}
    for step, *amounts in database.execute(_OF_GUEST, (first - REPEAT_STEPS, last, tier, guest)):
        rows[step] = tuple(amounts)
    for step, values in open_steps[tier : tier + 1]:
        rows[step] = highest(rows.get(step, values), values)
    ends = database.execute("SELECT began, CASE id WHEN ? THEN ? ELSE ended END FROM runs ORDER BY id", (run, now))
    spans = [(int(began // seconds), int(ended // seconds)) for began, ended in ends]
    return merge(hold(rows, spans, first, last), seconds, first, last, max_points)


def oldest(database: sqlite3.Connection, tier: int) -> int | None:
    """The first step of that tier that is there."""
    found: int | None = database.execute("SELECT min(step) FROM samples WHERE tier = ?", (tier,)).fetchone()[0]
    return found


def newest(database: sqlite3.Connection, tier: int) -> int | None:
    """The last one."""
    found: int | None = database.execute("SELECT max(step) FROM samples WHERE tier = ?", (tier,)).fetchone()[0]
    return found
