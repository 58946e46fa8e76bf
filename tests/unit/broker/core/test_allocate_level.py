"""The allocator against the exact water level, in fractions: nobody is more than one unit away from it."""

from fractions import Fraction
from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from guestd.broker.core.allocate import Claim, allocate

UNIT = 4


@st.composite
def claims(draw: st.DrawFn) -> list[Claim]:
    made = []
    for number in range(draw(st.integers(0, 8))):
        low = draw(st.integers(1, 5 * UNIT))
        high = draw(st.integers(low, low + 60 * UNIT))
        weight = draw(st.sampled_from((1, 50, 100, 100, 100, 300, 10_000)))
        made.append(Claim(f"vm-{number}", low, high, draw(st.integers(0, 80 * UNIT)), weight, UNIT))
    return made


def at(level: Fraction, claim: Claim) -> Fraction:
    return max(Fraction(claim.floor), min(Fraction(claim.ceiling), level * claim.weight))


def exact(capacity: int, wanted: list[Claim]) -> dict[str, Fraction]:
    """Real amounts at the highest level that fits; the sum grows linearly between two bounds of any claim."""

    def total(level: Fraction) -> Fraction:
        return sum((at(level, claim) for claim in wanted), Fraction(0))

    bounds = {Fraction(bound, claim.weight) for claim in wanted for bound in (claim.floor, claim.ceiling)}
    levels = sorted(bounds | {Fraction(0)})
    best = levels[-1] if total(levels[-1]) <= capacity else Fraction(0)
    for low, high in pairwise(levels):
        if total(low) <= capacity < total(high):
            best = low + (high - low) * (capacity - total(low)) / (total(high) - total(low))
    return {claim.name: at(best, claim) for claim in wanted}


MANY_SMALL = [
    Claim("vm-0", 1, 72, 69, 300, UNIT),
    Claim("vm-1", 1, 12, 9, 50, UNIT),
    Claim("vm-2", 1, 1, 0, 1, UNIT),
    Claim("vm-3", 1, 12, 9, 50, UNIT),
    Claim("vm-4", 1, 1, 0, 1, UNIT),
]


@settings(max_examples=500, deadline=None)
@example(MANY_SMALL, 96)  # here handing out unit by unit gives vm-0 two units more than is its due
@given(claims(), st.integers(0, 300 * UNIT))
def test_each_share_is_within_one_unit_of_the_exact_one(wanted: list[Claim], capacity: int) -> None:
    amounts, shares = allocate(capacity, wanted), exact(capacity, wanted)
    for claim in wanted:
        assert abs(amounts[claim.name] - shares[claim.name]) < UNIT, (claim, amounts, shares)
