"""Who gets how much of one kind of resource: weighted max-min, in whole units.

The law:

1. Every claim gets its minimum, always.
2. Above that there is one water level for all: a claim gets ``level × weight``, but never less than
   its minimum and never more than its ceiling ``max(min, min(max, demand))``. The level is the highest at
   which the sum still fits the capacity. So nobody's amount can be raised without lowering that of
   one who has less for its weight (weighted max-min fairness, Bertsekas & Gallager, "Data Networks",
   section 6.5.2, with minimums).
3. Amounts are whole units: ceilings and minimums are rounded up (a demand of 1.2 vCPUs is one for 2), a
   maximum down, the shares at the level down. What is left over by rounding goes out one unit each,
   to those who lost most for their weight, ties by name.
4. The result depends on the set of claims only, not on any order, and on integers only.

When the minimums alone exceed the capacity (a host that lost memory) all get their minimum: that it
never happens is the business of admission.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from guestd.model.units import round_down, round_up

_LEVEL_BITS = 24
"""Binary digits after the point of the water level: finer than a byte for weights up to 10,000."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One guest's claim on one kind of resource, all in that kind's unit of measure."""

    name: str
    min: int
    max: int
    demand: int
    weight: int
    unit: int

    @property
    def floor(self) -> int:
        return round_up(self.min, self.unit)

    @property
    def ceiling(self) -> int:
        wanted = min(round_down(self.max, self.unit), round_up(self.demand, self.unit))
        return max(self.floor, wanted)


def allocate(capacity: int, claims: Iterable[Claim]) -> dict[str, int]:
    """The amount of each claim by name; see the law above.

    :param capacity: what can be given in all, in the same unit of measure as the claims.
    """
    ordered = sorted(claims, key=lambda claim: claim.name)
    level = _level(capacity, ordered)
    amounts = {claim.name: _at_level(claim, level) for claim in ordered}
    return _hand_out_rest(capacity, ordered, amounts, level)


def _share(claim: Claim, level: int) -> int:
    return level * claim.weight >> _LEVEL_BITS


def _at_level(claim: Claim, level: int) -> int:
    """The claim's whole units at a water level."""
    return max(claim.floor, min(claim.ceiling, round_down(_share(claim, level), claim.unit)))


def _level(capacity: int, claims: list[Claim]) -> int:
    """The highest level at which the (unrounded) shares fit the capacity, or one that satisfies all."""
    bounds = [(claim.floor, claim.ceiling, claim.weight) for claim in claims]

    def fits(level: int) -> bool:
        return sum(max(low, min(high, level * weight >> _LEVEL_BITS)) for low, high, weight in bounds) <= capacity

    high = max((((top + 1) << _LEVEL_BITS) // weight + 1 for _, top, weight in bounds), default=0)
    if fits(high):
        return high
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def _hand_out_rest(capacity: int, claims: list[Claim], amounts: dict[str, int], level: int) -> dict[str, int]:
    """Rule 3: one more unit each for those who lost most by rounding down."""
    rest = capacity - sum(amounts.values())

    def loss(claim: Claim) -> tuple[float, str]:
        lost = min(_share(claim, level), claim.ceiling) - amounts[claim.name]
        return (-lost / claim.weight, claim.name)

    for claim in sorted(claims, key=loss):
        if claim.unit <= rest and amounts[claim.name] + claim.unit <= claim.ceiling:
            amounts[claim.name] += claim.unit
            rest -= claim.unit
    return amounts
