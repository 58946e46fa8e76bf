"""What holds of every split. (That each share is at the exact water level: test_allocate_level.py.)"""

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
