"""How finely history is kept for how long, and how rows become an answer. Pure.

1. Of each step the highest value is kept: a peak that hurt is never averaged away.
2. A row is written only when it differs from the one before; until the next row, its value holds. Each guest is
   written again at every `REPEAT_STEPS`-th step, so that a reader looks back no further than that.
3. A value holds no longer than the run in which it was written: what happened while nothing was recorded is unknown.

Three tiers: 10 s for an hour (what is going on), a minute for a day (last night), ten minutes for two weeks (the same
weekday before); the first two a little longer, so that the last hour and day are whole. A guest that never rests costs
4,000 rows of about 80 bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from guestd.model.history import History, HistoryPoint, HistoryResource
from guestd.model.resources import Kind

Values = tuple[int, ...]
"""Demand, reserved, plugged, usable and used of CPU (millicores), then of memory (bytes)."""

REPEAT_STEPS = 60
GONE: Values = (-1,) * 10
"""The guest is no more. Below anything else, for of two rows of one step the higher one counts."""


@dataclass(frozen=True, slots=True)
class Tier:
    """Steps of one length, and for how long they are kept."""

    step_seconds: int  # a divisor of the next tier's
    keep_seconds: int


TIERS = (Tier(10, 75 * 60), Tier(60, 25 * 3600), Tier(600, 14 * 86400))


def highest(one: Values, other: Values) -> Values:
    """Of each amount the higher one."""
    return tuple(map(max, one, other))


def pick_tier(since: float, now: float, oldest: Sequence[int | None]) -> int:
    """The finest tier that goes back to `since` (seconds of the epoch), or as far as any does.

    :param oldest: the oldest step of each tier that is still stored.
    """
    last = len(TIERS) - 1
    known_since = _begin(last + 1, oldest[last]) if oldest[last] is not None else now
    for number, tier in enumerate(TIERS[:-1]):
        begin = _begin(number, oldest[number]) if oldest[number] is not None else now
        if now - tier.keep_seconds <= since and begin <= max(since, known_since):
            return number
    return last


def _begin(tier: int, step: int | None) -> float:
    """When that step began; of the tier after the last: when that step of the last ended."""
    number = min(tier, len(TIERS) - 1)
    return float(((step or 0) + (tier > number)) * TIERS[number].step_seconds)


def hold(rows: Mapping[int, Values], runs: Sequence[tuple[int, int]], first: int, last: int) -> dict[int, Values]:
    """The value of each step within `first..last`, where it is known (laws 2 and 3).

    :param runs: first and last step of each stretch in which something was recorded.
    """
    found: dict[int, Values] = {}
    for began, ended in runs:
        value: Values | None = None
        for step in range(max(began, first - REPEAT_STEPS), min(ended, last) + 1):
            value = rows.get(step, value)
            if step >= first and value is not None and value[0] >= 0:
                found[step] = value
    return found


def merge(values: Mapping[int, Values], step_seconds: int, first: int, last: int, max_points: int) -> History:
    """Steps so long that `max_points` of them reach from `first` to `last`."""
    width = max(1, -(-(last - first + 1) // max_points))
    groups: dict[int, Values] = {}
    for step, value in values.items():
        at = first + (step - first) // width * width
        groups[at] = highest(groups[at], value) if at in groups else value
    points = tuple(_point(at * step_seconds, groups[at]) for at in sorted(groups))
    return History(float(width * step_seconds), points)


def _point(at: int, values: Values) -> HistoryPoint:
    resources = (HistoryResource(Kind.CPU, *values[:5]), HistoryResource(Kind.MEMORY, *values[5:]))
    return HistoryPoint(datetime.fromtimestamp(at, UTC), resources)
