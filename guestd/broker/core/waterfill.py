"""The water level and the handing out of whole units, on columns.

The law is in `allocate`; this is the arithmetic, which knows no names, only rows in the order in which ties are
decided. All columns are int64 in grains (1 millicore, 1 MiB), levels have `LEVEL_BITS` binary digits after the point.

Why nothing overflows: amounts are at most `LARGEST_GRAINS` = 2^36, weights below 2^14, and of what is idle at least
10/1024 counts, so that a share of 2^36 × 102.4 < 2^42.7 reaches any ceiling. A level is cut down to the row's `full`
before it is multiplied, which gives less than 2^42.7 × 2^19 + 2^14 < 2^63. Losses are within ±2^36, and 2^36 × 10^8
< 2^63. A sum of amounts has room for 2^26 rows.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LEVEL_BITS = 19
KEEP_BITS = 10
KEEP_ALL = 1 << KEEP_BITS
LARGEST_GRAINS = 1 << 36
LARGEST_WEIGHT = 10_000
_LOSS_SCALE = LARGEST_WEIGHT**2
"""Two different fractions whose denominators are weights are more than 1/this apart: multiplied by it and rounded down
they still differ, and are in the same order."""

_STAIRCASE = 1 << 14
"""Bounds that are closer than that are halved: so near by slopes mislead."""

Column = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rows:
    """What competes: `full` is the least level whose share reaches the ceiling. `used` is None where idleness is not
    taxed, otherwise `keep`/1024 of the share above it counts."""

    floor: Column
    ceiling: Column
    weight: Column
    unit: Column
    full: Column
    used: Column | None = None
    keep: int = KEEP_ALL

    def pick(self, rows: npt.NDArray[np.intp]) -> "Rows":
        """Some of the rows, by index."""
        return Rows(
            self.floor[rows],
            self.ceiling[rows],
            self.weight[rows],
            self.unit[rows],
            self.full[rows],
            None if self.used is None else self.used[rows],
            self.keep,
        )

    def shares(self, level: int) -> Column:
        """What the level gives each row after tax; not held up by the floor, cut off somewhere above the ceiling."""
        share = np.minimum(self.full, level)
        share *= self.weight
        share >>= LEVEL_BITS
        if self.used is not None:
            idle = share - self.used
            np.maximum(idle, 0, out=idle)
            share -= idle
            idle *= self.keep
            idle >>= KEEP_BITS
            share += idle
        return share

    def levels(self, amounts: Column) -> Column:
        """The least levels at which the shares after tax reach these amounts."""
        if self.used is not None:
            idle = np.maximum(amounts - self.used, 0)
            amounts = amounts - idle - (-idle << KEEP_BITS) // self.keep
        return -((-amounts << LEVEL_BITS) // self.weight)

    def amounts(self, level: int) -> Column:
        """What each gets at the level, before rounding to units."""
        share = self.shares(level)
        np.maximum(share, self.floor, out=share)
        np.minimum(share, self.ceiling, out=share)
        return share


def fill(rows: Rows, capacity: int, guess: int = 0) -> tuple[Column, int]:
    """Amounts in whole units (rules 2 and 3), and the level. Where the floors alone exceed the capacity: the floors.

    :param guess: a level near the one that is sought saves time, and changes nothing else; 0 for none.
    """
    if int(rows.ceiling.sum()) <= capacity:
        return rows.ceiling.copy(), guess
    if int(rows.floor.sum()) > capacity:
        return rows.floor.copy(), guess
    level = find_level(rows, capacity, guess)
    amounts = rows.amounts(level)
    between = np.nonzero((amounts > rows.floor) & (amounts < rows.ceiling))[0]
    lost = amounts[between] % rows.unit[between]
    amounts[between] -= lost
    rest = capacity - int(amounts.sum())
    losers = lost > 0
    others = amounts < rows.ceiling  # these got their whole share or, by their floor, more: they come last
    others[between[losers]] = False
    rest = hand_out(rows, amounts, between[losers], lost[losers], rest)
    last = np.nonzero(others & (rows.unit <= rest))[0]
    hand_out(rows, amounts, last, rows.pick(last).shares(level) - amounts[last], rest)
    return amounts, level


def find_level(rows: Rows, capacity: int, guess: int = 0) -> int:
    """The highest level that fits. The floors do, the ceilings do not.

    The sum grows with the level in a line with bends, which close by is a staircase. So from each guess the next one
    follows the line there, a little farther each time that this does not cross the level sought. Once that is shut in
    and following the line no longer halves the distance of the bounds, they are halved. Rows that get the same at
    both bounds are settled and taken out. When no row gets more than one grain more at the upper bound than at the
    lower, the level is just below that at which the first grain too many is due. Only exact sums decide.
    """
    low, high, settled = 0, int(rows.full.max()), 0
    at_low, at_high = rows.floor, rows.ceiling
    guess = guess or (capacity << LEVEL_BITS) // int(rows.weight.sum())
    top, margin = high, 1
    while (distance := high - low) > 1:
        guess = min(max(guess, low + 1), high - 1)
        amounts = rows.amounts(guess)
        room = capacity - settled - int(amounts.sum())
        slope = _slope(rows, amounts)
        if room >= 0:
            low, at_low = guess, amounts
        else:
            high, at_high = guess, amounts
        shut_in = low > 0 and high < top
        if slope == 0 or (shut_in and (high - low < _STAIRCASE or (high - low) * 2 > distance)):
            guess = (low + high) // 2
        else:
            margin = 1 if shut_in else margin * 8
            guess += (room << LEVEL_BITS + KEEP_BITS) // slope + (margin if room >= 0 else -margin)
        more = at_high - at_low
        if np.count_nonzero(more) * 4 < more.size * 3:
            moving = np.nonzero(more)[0]
            settled += int(at_low.sum())
            rows, at_low, at_high, more = rows.pick(moving), at_low[moving], at_high[moving], more[moving]
            settled -= int(at_low.sum())
        if high - low < _STAIRCASE and int(more.max()) == 1:
            due = np.sort(rows.levels(at_low + 1)[more > 0])
            return int(due[capacity - settled - int(at_low.sum())]) - 1
    return low


def _slope(rows: Rows, amounts: Column) -> int:
    """By how much the sum grows per level where the amounts are these, times 2^(LEVEL_BITS + KEEP_BITS)."""
    weight = rows.weight * ((amounts > rows.floor) & (amounts < rows.ceiling))
    slope = int(weight.sum()) * KEEP_ALL
    if rows.used is not None:
        weight *= amounts > rows.used
        slope -= int(weight.sum()) * (KEEP_ALL - rows.keep)
    return slope


def hand_out(rows: Rows, amounts: Column, waiting: npt.NDArray[np.intp], lost: Column, rest: int) -> int:
    """Rule 3: one unit more for each of those waiting, in the order of losses, while it fits; changes `amounts`.

    :return: What is left of the rest.
    """
    key = lost * _LOSS_SCALE // rows.weight[waiting]
    waiting = waiting[np.argsort(-key, kind="stable")]
    unit = rows.unit[waiting]
    while waiting.size:
        fitting = int(np.searchsorted(np.cumsum(unit), rest, side="right"))
        amounts[waiting[:fitting]] += unit[:fitting]
        rest -= int(unit[:fitting].sum())
        # Whoever comes next does not fit, nor will any with a unit as large: each round is rid of a size of unit.
        waiting, unit = waiting[fitting:], unit[fitting:]
        small = unit <= rest
        waiting, unit = waiting[small], unit[small]
    return rest
