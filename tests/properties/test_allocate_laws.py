"""What holds of every split. (That it is the one that the law says: tests/unit/broker/core/test_allocate.py.)"""

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from random import Random

from hypothesis import example, given, settings
from hypothesis import strategies as st

from guestd.broker.core.allocate import Claim, Pool, allocate
from guestd.model.resources import Kind
from guestd.model.units import MIB, round_down, round_up

UNIT = 4
WEIGHTS = (1, 50, 100, 100, 100, 300, 10_000)
Claims = dict[str, Claim]


@st.composite
def claims(draw: st.DrawFn, units: tuple[int, ...] = (UNIT,), burst: bool = False, most: int = 8) -> Claims:
    made = {}
    for number in range(draw(st.integers(0, most))):
        low = draw(st.integers(1, 5 * UNIT))
        high = draw(st.integers(low, low + 60 * UNIT))
        above = draw(st.integers(0, 40 * UNIT)) if burst else 0
        wanted = draw(st.integers(0, 80 * UNIT))
        weight, unit = draw(st.sampled_from(WEIGHTS)), draw(st.sampled_from(units))
        made[f"vm-{number}"] = Claim(low, high, wanted, weight, unit, burst=high + above if above else 0)
    return made


MIXED = (1, UNIT, 3 * UNIT)
capacities = st.integers(0, 300 * UNIT)


def floor(claim: Claim) -> int:
    return round_up(claim.min, claim.unit)


def ceiling(claim: Claim) -> int:
    return max(floor(claim), min(round_down(claim.max, claim.unit), round_up(claim.demand, claim.unit)))


def burst_ceiling(claim: Claim) -> int:
    lent = min(round_down(claim.burst, claim.unit), round_up(claim.demand, claim.unit))
    return max(ceiling(claim), lent if min(claim.burst, claim.demand) > claim.max else 0)


def split(capacity: int, wanted: Claims, burst_capacity: int | None = None) -> dict[str, int]:
    return allocate(capacity, wanted, Kind.CPU, burst_capacity=burst_capacity)


@settings(max_examples=1000)
@given(claims(MIXED, burst=True), capacities, capacities, st.randoms())
def test_no_order_matters_and_bounds_hold(wanted: Claims, capacity: int, burst_capacity: int, random: Random) -> None:
    amounts = split(capacity, wanted, burst_capacity)
    shuffled = list(wanted.items())
    random.shuffle(shuffled)
    assert split(capacity, dict(shuffled), burst_capacity) == amounts
    minimums = sum(map(floor, wanted.values()))
    assert sum(amounts.values()) <= max(capacity, burst_capacity, minimums)
    for name, claim in wanted.items():
        assert floor(claim) <= amounts[name] <= burst_ceiling(claim)
        assert amounts[name] % claim.unit == 0


@settings(max_examples=300)
@given(claims(MIXED, burst=True), claims(MIXED, burst=True), capacities, st.randoms())
def test_no_history_matters(wanted: Claims, others: Claims, capacity: int, random: Random) -> None:
    pool = Pool(Kind.CPU)
    events = [(f"{name}{suffix}", claim) for suffix in ("", "x") for name, claim in others.items()]
    random.shuffle(events)
    for name, claim in events:
        pool.put(name, claim)
        if random.random() < 0.3:
            pool.solve(random.randint(0, 300 * UNIT))
    for name in {name for name, _ in events} - wanted.keys():
        pool.remove(name)
    for name, claim in wanted.items():
        pool.put(name, claim)
    pool.solve(capacity)
    assert {name: pool.target(name) for name in wanted} == split(capacity, wanted)
    assert pool.scarce == any(pool.target(name) < ceiling(claim) for name, claim in wanted.items())
    for name, claim in wanted.items():
        assert pool.burst(name) == max(0, pool.target(name) - max(claim.max, floor(claim)))


@settings(max_examples=1000)
@given(claims(), capacities, st.integers(0, 100 * UNIT))
def test_more_capacity_takes_from_nobody(wanted: Claims, capacity: int, more: int) -> None:
    before, after = split(capacity, wanted), split(capacity + more, wanted)
    assert all(after[name] >= before[name] - UNIT for name in before)
    assert sum(after.values()) >= sum(before.values())


@settings(max_examples=1000)
@given(claims(), capacities)
def test_nobody_can_be_raised_at_the_cost_of_one_who_has_more_for_its_weight(wanted: Claims, capacity: int) -> None:
    """Weighted max-min fairness, within one unit."""
    amounts = split(capacity, wanted)
    free = capacity - sum(amounts.values())
    for name, claim in wanted.items():
        if amounts[name] == ceiling(claim):
            continue
        assert free < claim.unit, "what is free is given to one who wants it"
        for other, giver in wanted.items():
            if other != name and amounts[other] > floor(giver):
                less, more = amounts[other] - giver.unit, amounts[name] + claim.unit
                assert Fraction(less, giver.weight) <= Fraction(more, claim.weight), (name, other)


@settings(max_examples=500)
@given(claims(MIXED, burst=True), capacities, capacities)
def test_bursts_come_from_the_surplus_only(wanted: Claims, capacity: int, burst_capacity: int) -> None:
    plain = split(capacity, {name: replace(claim, burst=0) for name, claim in wanted.items()})
    amounts = split(capacity, wanted, burst_capacity)
    lent = {name: amounts[name] - plain[name] for name in wanted}
    assert all(amount >= 0 for amount in lent.values())
    assert sum(lent.values()) <= max(0, burst_capacity - sum(plain.values()))
    for name, claim in wanted.items():
        if lent[name]:
            assert plain[name] >= round_down(claim.max, claim.unit)
            assert claim.demand > claim.max


@settings(max_examples=500)
@given(
    used=st.integers(0, 64),
    others=claims((MIB,), most=4),
    capacity=st.integers(0, 200),
    tax=st.sampled_from((0.1, 0.5, 0.75, 0.99, 5.0)),
)
def test_of_two_that_are_alike_the_idle_one_gets_no_more(used: int, others: Claims, capacity: int, tax: float) -> None:
    size = 64 * MIB
    busy = Claim(MIB, size, size, 100, MIB, used=size)
    idle = replace(busy, used=used * MIB)
    both = {
        name: replace(claim, max=claim.max * MIB, demand=claim.demand * MIB, used=claim.demand * MIB)
        for name, claim in others.items()
    }
    both |= {"a": idle, "z": busy}  # "a" wins ties
    taxed, plain = allocate(capacity * MIB, both, idle_tax=tax), allocate(capacity * MIB, both)
    assert plain["z"] <= plain["a"] <= plain["z"] + MIB
    assert taxed["a"] <= taxed["z"] + MIB
    assert taxed["a"] <= plain["a"] + MIB, "the tax is never a gain"
    assert sum(taxed.values()) == sum(plain.values()), "what one loses by it others get"
    if tax >= 0.5 and used * MIB + 8 * MIB < plain["z"] < size:
        assert taxed["a"] < taxed["z"]
    if all(plain[name] == max(MIB, min(claim.max, claim.demand)) for name, claim in both.items()):
        assert taxed == plain, "where there is enough for all there is no tax"


# ---- the exact water level, in fractions ----------------------------------------------------------------------


def exact(capacity: int, wanted: Claims) -> dict[str, Fraction]:
    """Real amounts at the highest level that fits; the sum grows linearly between two bounds of any claim."""

    def at(level: Fraction, claim: Claim) -> Fraction:
        return max(Fraction(floor(claim)), min(Fraction(ceiling(claim)), level * claim.weight))

    def total(level: Fraction) -> Fraction:
        return sum((at(level, claim) for claim in wanted.values()), Fraction(0))

    bounds = {Fraction(bound(claim), claim.weight) for claim in wanted.values() for bound in (floor, ceiling)}
    levels = sorted(bounds | {Fraction(0)})
    best = levels[-1] if total(levels[-1]) <= capacity else Fraction(0)
    for low, high in pairwise(levels):
        if total(low) <= capacity < total(high):
            best = low + (high - low) * (capacity - total(low)) / (total(high) - total(low))
    return {name: at(best, claim) for name, claim in wanted.items()}


MANY_SMALL = {
    "vm-0": Claim(1, 72, 69, 300, UNIT),
    "vm-1": Claim(1, 12, 9, 50, UNIT),
    "vm-2": Claim(1, 1, 0, 1, UNIT),
    "vm-3": Claim(1, 12, 9, 50, UNIT),
    "vm-4": Claim(1, 1, 0, 1, UNIT),
}


@settings(max_examples=500)
@example(MANY_SMALL, 96)  # here handing out unit by unit gives vm-0 two units more than is its due
@given(claims(), capacities)
def test_each_share_is_within_one_unit_of_the_exact_one(wanted: Claims, capacity: int) -> None:
    amounts, shares = split(capacity, wanted), exact(capacity, wanted)
    for name, claim in wanted.items():
        assert abs(amounts[name] - shares[name]) < UNIT + 1, (claim, amounts, shares)  # a share is whole grains
