"""The allocator's law in the plainest way: whole numbers, fractions and loops, one claim at a time."""

from collections.abc import Mapping
from fractions import Fraction

from guestd.broker.core.allocate import Claim
from guestd.model.resources import Kind

LEVEL_BITS = 19


def up(amount: int, unit: int) -> int:
    return -(-amount // unit) * unit


def down(amount: int, unit: int) -> int:
    return amount // unit * unit


class Contender:
    """One claim in one of the two fillings, in grains."""

    def __init__(self, name: str, floor: int, ceiling: int, weight: int, unit: int, used: int, keep: int) -> None:
        self.name, self.floor, self.ceiling, self.weight, self.unit = name, floor, ceiling, weight, unit
        self.used, self.keep = used, keep
        self.amount = floor

    def taxed_share(self, level: int) -> int:
        share = level * self.weight >> LEVEL_BITS
        return share if share <= self.used else self.used + ((share - self.used) * self.keep >> 10)

    def at(self, level: int) -> int:
        return max(self.floor, min(self.ceiling, self.taxed_share(level)))


def fill(contenders: list[Contender], capacity: int) -> None:
    """Water level, whole units, leftovers."""
    level = highest_level(contenders, capacity)
    for one in contenders:
        one.amount = max(one.floor, down(one.at(level), one.unit))
    rest = capacity - sum(one.amount for one in contenders)

    def loss(one: Contender) -> tuple[Fraction, str]:
        lost = min(one.taxed_share(level), one.ceiling) - one.amount
        return -Fraction(lost, one.weight), one.name

    for one in sorted(contenders, key=loss):
        if one.amount < one.ceiling and one.unit <= rest:
            one.amount += one.unit
            rest -= one.unit


def highest_level(contenders: list[Contender], capacity: int) -> int:
    def fits(level: int) -> bool:
        return sum(one.at(level) for one in contenders) <= capacity

    low, high = 0, 1 << 200  # here everybody is at the ceiling
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def dumb_allocate(
    capacity: int,
    claims: Mapping[str, Claim],
    kind: Kind = Kind.MEMORY,
    idle_tax: float = 0.0,
    burst_capacity: int | None = None,
) -> dict[str, int]:
    """What `allocate` must give."""
    grain = 1 << 20 if kind is Kind.MEMORY else 1
    keep = round((1 - min(idle_tax, 0.99)) * 1024)
    contenders = {}
    for name, claim in claims.items():
        unit = up(claim.unit, grain) // grain
        floor = up(up(claim.min, grain) // grain, unit)
        ceiling = max(floor, min(down(claim.max // grain, unit), up(up(claim.demand, grain) // grain, unit)))
        used = up(claim.used, grain) // grain
        contenders[name] = Contender(name, floor, ceiling, claim.weight, unit, used, keep)
    fill(list(contenders.values()), capacity // grain)

    lent = []
    for name, claim in claims.items():
        one = contenders[name]
        if claim.burst <= claim.max or claim.demand <= claim.max or one.amount < down(claim.max // grain, one.unit):
            continue
        ceiling = min(down(claim.burst // grain, one.unit), up(up(claim.demand, grain) // grain, one.unit))
        if ceiling > one.amount:
            lent.append(Contender(name, one.amount, ceiling, one.weight, one.unit, 0, 1024))
    left = (capacity if burst_capacity is None else burst_capacity) // grain
    left -= sum(one.amount for one in contenders.values())
    if left > 0:
        fill(lent, left + sum(one.floor for one in lent))

    amounts = {name: one.amount * grain for name, one in contenders.items()}
    amounts |= {one.name: one.amount * grain for one in lent}
    for name, claim in claims.items():
        if claim.unit == 1 and claim.min == claim.max == claim.demand:
            amounts[name] = claim.min
    return amounts
