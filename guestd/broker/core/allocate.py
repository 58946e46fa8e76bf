"""Who gets how much of one kind of resource: weighted max-min with an idle tax, in whole units, then bursts.

The law:

1. Every claim gets its minimum (its *floor*: the minimum rounded up to its unit), always.
2. Above that there is one integer water level L for all claims of a kind, the highest at which the sum still fits the
   capacity. The share of a claim is s = L × weight >> 19, and it gets taxed(s), but never less than its floor and
   never more than its *ceiling* ``max(floor, min(round_down(max, unit), round_up(demand, unit)))``. So nobody's amount
   can be raised without lowering that of one who has less for its weight (weighted max-min fairness, Bertsekas &
   Gallager, "Data Networks", section 6.5.2, with minimums).
   Idle tax (Waldspurger, OSDI 2002, section 5; 0.75 in ESXi): what is in use costs 1 of the share, what is
   idle costs 1/(1-tax): taxed(s) = s up to what is used, then used + ((s - used) × keep >> 10), keep being
   (1-tax) × 1024. It matters only where there is not enough for all, and not by who holds what. CPU has none.
3. Amounts are whole units: what is taxed(s) is rounded down. What that leaves over goes out one unit each, to those who
   lost most by it for their weight, ties by name; who has no use for a unit or whose unit does not fit is passed over.
4. What is then left of the burst capacity is filled in the same way (the same weights, a level of its own, no tax)
   among those that have burst > max, have reached round_down(max, unit) and want more than max, from the amount they
   have to ``min(round_down(burst, unit), round_up(demand, unit))``. It lowers no amount of the rules before.
5. The result depends on the set of claims only, not on any order, and on integers only.

When the minimums alone exceed the capacity (a host that lost memory) all get their minimum and nothing more: that it
never happens is the business of admission.

It is counted in grains, 1 millicore or 1 MiB: capacities, maximums and bursts are rounded down to them, all else up. A
unit is a multiple of them; one that is not is taken as the next multiple. A claim that is fixed (minimum, maximum and
demand the same, unit 1) gets exactly that.

Weak spots: one unit each is handed out, so with units of very different sizes something can stay free that a
second round could place. It is less than the largest unit that was passed over.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import compress

import numpy as np

from guestd.broker.core.waterfill import (
    KEEP_ALL,
    KEEP_BITS,
    LARGEST_GRAINS,
    LARGEST_WEIGHT,
    LEVEL_BITS,
    Column,
    Rows,
    fill,
)
from guestd.model.resources import Kind
from guestd.model.units import MIB, round_down, round_up

LARGEST_IDLE_TAX = 0.99
_UNSOLVED = -1
_FIRST_ROWS = 64


@dataclass(frozen=True, slots=True)
class Claim:
    """One guest's claim on one kind of resource, in millicores or bytes.

    `used` is what of the demand is really in use (matters for memory only); `burst` the ceiling above `max` that it
    may use now, 0 for none.
    """

    min: int
    max: int
    demand: int
    weight: int
    unit: int
    used: int = 0
    burst: int = 0

    @property
    def fixed(self) -> bool:
        """Whether it gets exactly what it says, whole units or not."""
        return self.unit == 1 and self.min == self.max == self.demand


class _Column(IntEnum):
    """What is kept of each claim, in grains unless it says otherwise."""

    FLOOR = 0
    CEILING = 1
    WEIGHT = 2  # plain number
    UNIT = 3
    FULL = 4  # the least level that gives it its ceiling
    USED = 5
    TOP = 6  # the maximum in whole units: from here on it is a burst
    BURST = 7  # what it may have and wants with its burst; 0 for nothing above its maximum
    BURST_FULL = 8  # the least level that gives it that
    SHORT = 9  # millicores or bytes that a fixed claim is short of whole grains
    TARGET = 10  # millicores or bytes, after the last solve
    LENT = 11  # what of it came from a burst, after the last solve


class Pool:
    """All claims on one kind of resource, kept as columns that change row by row.

    :param idle_tax: 0 to 0.99; of no effect on claims whose `used` covers their ceiling. A higher one is cut.
    """

    def __init__(self, kind: Kind, idle_tax: float = 0.0) -> None:
        self.kind = kind
        self.scarce = False
        """Whether some demand up to a maximum was not met at the last solve."""
        self._grain = MIB if kind is Kind.MEMORY else 1
        self._keep = round((1 - min(max(idle_tax, 0.0), LARGEST_IDLE_TAX)) * KEEP_ALL)
        self._names: list[str] = []
        self._claims: list[Claim] = []
        self._row: dict[str, int] = {}
        self._table = np.zeros((len(_Column), _FIRST_ROWS), np.int64)
        self._in_order = True
        self._level = self._burst_level = 0  # of the last solve: where to look first
        self._solved: tuple[int, int] | None = None  # the capacities of the last solve, None when claims changed

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._row

    def put(self, name: str, claim: Claim) -> None:
        """Add a claim or change it; an equal one changes nothing.

        :raise ValueError: When an amount, unit or weight is outside of what can be computed with.
        """
        row = self._row.get(name)
        if row is not None and self._claims[row] == claim:
            return
        values = self._values(name, claim)
        if row is None:
            row = self._append(name, claim)
        self._claims[row] = claim
        self._table[: len(values), row] = values
        self._solved = None

    def remove(self, name: str) -> None:
        """Forget a claim; the last row takes its place.

        :raise KeyError: When there is none of that name.
        """
        row = self._row.pop(name)
        last_name, last_claim = self._names.pop(), self._claims.pop()
        if last_name != name:
            self._names[row], self._claims[row], self._row[last_name] = last_name, last_claim, row
            self._table[:, row] = self._table[:, len(self._names)]
            self._in_order = False
        self._solved = None

    def solve(self, capacity: int, burst_capacity: int | None = None) -> list[str]:
        """Share the capacity out, if anything changed since the last time.

        :param burst_capacity: what may be lent above maximums together with all that is not; the capacity if None.
        :return: The names whose target changed, sorted; a name that was put anew is among them.
        """
        capacities = (capacity, capacity if burst_capacity is None else burst_capacity)
        if capacities == self._solved:
            return []
        self._sort_rows()
        self._solved = capacities
        table = self._table[:, : len(self._names)]
        amounts = self._shares(capacity // self._grain)
        self.scarce = bool((amounts < table[_Column.CEILING]).any())
        lent = self._bursts(amounts, capacities[1] // self._grain - int(amounts.sum()))
        table[_Column.LENT] = lent
        targets = (amounts + lent) * self._grain - table[_Column.SHORT]
        changed = targets != table[_Column.TARGET]
        table[_Column.TARGET] = targets
        return list(compress(self._names, changed.tobytes())) if changed.any() else []

    def target(self, name: str) -> int:
        """The whole amount, with its burst, after the last solve; 0 before the first.

        :raise KeyError: When there is no claim of that name.
        """
        return max(0, int(self._table[_Column.TARGET, self._row[name]]))

    def burst(self, name: str) -> int:
        """How much of the target is lent above the maximum (and above the minimum in whole units).

        :raise KeyError: When there is no claim of that name.
        """
        row = self._row[name]
        if self._table[_Column.LENT, row] == 0:
            return 0
        floor = int(self._table[_Column.FLOOR, row]) * self._grain
        return self.target(name) - max(self._claims[row].max, floor)

    def _shares(self, capacity_grains: int) -> Column:
        """Rules 1 to 3."""
        table = self._table[:, : len(self._names)]
        floor, ceiling, weight, unit, full = table[: _Column.FULL + 1]
        used = table[_Column.USED] if self._keep < KEEP_ALL else None
        rows = Rows(floor, ceiling, weight, unit, full, used, self._keep)
        amounts, self._level = fill(rows, capacity_grains, self._level)
        return amounts

    def _bursts(self, amounts: Column, left_grains: int) -> Column:
        """Rule 4: what is lent to each above its amount."""
        table = self._table[:, : len(self._names)]
        lent = np.zeros_like(amounts)
        if left_grains <= 0:
            return lent
        able = np.nonzero((table[_Column.BURST] > amounts) & (amounts >= table[_Column.TOP]))[0]
        if able.size == 0:
            return lent
        has, weight = amounts[able], table[_Column.WEIGHT, able]
        ceiling, unit, full = (table[column, able] for column in (_Column.BURST, _Column.UNIT, _Column.BURST_FULL))
        rows = Rows(has, ceiling, weight, unit, full)
        whole, self._burst_level = fill(rows, left_grains + int(has.sum()), self._burst_level)
        lent[able] = whole - has
        return lent

    def _append(self, name: str, claim: Claim) -> int:
        row = len(self._names)
        if row == self._table.shape[1]:
            self._table = np.concatenate((self._table, np.zeros_like(self._table)), axis=1)
        self._in_order = self._in_order and (row == 0 or self._names[-1] < name)
        self._names.append(name)
        self._claims.append(claim)
        self._row[name] = row
        self._table[_Column.TARGET, row] = _UNSOLVED
        self._table[_Column.LENT, row] = 0
        return row

    def _sort_rows(self) -> None:
        """Ties are decided by row, so the rows must be in the order of the names."""
        if self._in_order:
            return
        order = sorted(range(len(self._names)), key=self._names.__getitem__)
        self._names = [self._names[row] for row in order]
        self._claims = [self._claims[row] for row in order]
        self._row = {name: row for row, name in enumerate(self._names)}
        self._table[:, : len(order)] = self._table[:, order]
        self._in_order = True

    def _values(self, name: str, claim: Claim) -> tuple[int, ...]:
        """The row of a claim, up to `_Column.SHORT`."""
        grain = self._grain
        if not 1 <= claim.weight <= LARGEST_WEIGHT:
            raise ValueError(f"{name}: weight is {claim.weight}, must be within 1..{LARGEST_WEIGHT}")
        if claim.unit < 1:
            raise ValueError(f"{name}: unit is {claim.unit}, must be above 0")
        unit = -(-claim.unit // grain)
        floor = round_up(-(-claim.min // grain), unit)
        top = round_down(claim.max // grain, unit)
        burst = round_down(claim.burst // grain, unit)
        for word, amount in (("min", floor), ("max", top), ("burst", burst), ("unit", unit)):
            if not 0 <= amount <= LARGEST_GRAINS:
                raise ValueError(f"{name}: {word} is {amount * grain}, must be within 0..{LARGEST_GRAINS * grain}")
        wanted = round_up(-(-max(claim.demand, 0) // grain), unit)
        used = min(-(-max(claim.used, 0) // grain), LARGEST_GRAINS)
        ceiling = max(floor, min(top, wanted))
        full = self._full(ceiling, claim.weight, used)
        burst = min(burst, wanted) if min(claim.burst, claim.demand) > claim.max else 0
        burst_full = -(-(burst << LEVEL_BITS) // claim.weight)
        short = floor * grain - claim.min if claim.fixed else 0
        return floor, ceiling, claim.weight, unit, full, used, top, burst, burst_full, short

    def _full(self, ceiling: int, weight: int, used: int) -> int:
        """The least level whose share after tax is at least the ceiling."""
        idle = max(0, ceiling - used)
        share = ceiling - idle + -(-(idle << KEEP_BITS) // self._keep)
        return -(-(share << LEVEL_BITS) // weight)


def allocate(
    capacity: int,
    claims: Mapping[str, Claim],
    kind: Kind = Kind.MEMORY,
    idle_tax: float = 0.0,
    burst_capacity: int | None = None,
) -> dict[str, int]:
    """The amount of each claim with its burst, by name: one solve of a pool of its own.

    :param capacity: what can be given in all, in millicores or bytes.
    :raise ValueError: When an amount, unit or weight is outside of what can be computed with.
    """
    pool = Pool(kind, idle_tax)
    for name, claim in claims.items():
        pool.put(name, claim)
    pool.solve(capacity, burst_capacity)
    return {name: pool.target(name) for name in claims}
