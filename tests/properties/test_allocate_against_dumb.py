"""The allocator against one that is too dumb to be wrong: unit by unit to whoever has least for its weight."""

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from guestd.broker.core.allocate import Claim, allocate

UNIT = 4


@st.composite
def claims(draw: st.DrawFn, unit: int = UNIT) -> list[Claim]:
    count = draw(st.integers(0, 8))
    made = []
    for number in range(count):
        low = draw(st.integers(1, 5 * unit))
        high = draw(st.integers(low, low + 60 * unit))
        demand = draw(st.integers(0, 80 * unit))
        weight = draw(st.sampled_from((1, 50, 100, 100, 100, 300, 10_000)))
        made.append(Claim(f"vm-{number}", low, high, demand, weight, unit))
    return made


def dumb(capacity: int, wanted: list[Claim]) -> dict[str, int]:
    amounts = {claim.name: claim.floor for claim in wanted}
    rest = capacity - sum(amounts.values())
    while rest >= UNIT:
        hungry = [claim for claim in wanted if amounts[claim.name] < claim.ceiling]
        if not hungry:
            break
        poorest = min(hungry, key=lambda claim: (Fraction(amounts[claim.name] + UNIT, claim.weight), claim.name))
        amounts[poorest.name] += UNIT
        rest -= UNIT
    return amounts


@settings(max_examples=5000, deadline=None)
@given(claims(), st.integers(0, 300 * UNIT))
def test_each_share_is_within_one_unit_of_the_dumb_one(wanted: list[Claim], capacity: int) -> None:
    clever, plain = allocate(capacity, wanted), dumb(capacity, wanted)
    assert sum(clever.values()) == sum(plain.values())
    for claim in wanted:
        assert abs(clever[claim.name] - plain[claim.name]) <= UNIT, (claim, clever, plain)


@settings(max_examples=2000, deadline=None)
@given(claims(), st.integers(0, 300 * UNIT), st.randoms())
def test_order_does_not_matter_and_bounds_hold(wanted: list[Claim], capacity: int, random: object) -> None:
    amounts = allocate(capacity, wanted)
    shuffled = list(wanted)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert allocate(capacity, shuffled) == amounts
    minimums = sum(claim.floor for claim in wanted)
    assert sum(amounts.values()) <= max(capacity, minimums)
    for claim in wanted:
        assert claim.floor <= amounts[claim.name] <= claim.ceiling
        assert amounts[claim.name] % UNIT == 0


@settings(max_examples=1000, deadline=None)
@given(claims(), st.integers(0, 200 * UNIT), st.integers(0, 100 * UNIT))
def test_more_capacity_takes_from_nobody(wanted: list[Claim], capacity: int, more: int) -> None:
    before, after = allocate(capacity, wanted), allocate(capacity + more, wanted)
    assert all(after[name] >= before[name] - UNIT for name in before)
    assert sum(after.values()) >= sum(before.values())
