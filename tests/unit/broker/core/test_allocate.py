"""Hand-computed splits, the pool's bookkeeping, and equality with a dumb allocator on many random cases."""

import random
from collections.abc import Iterator

import pytest
from dumb_allocate import dumb_allocate

from guestd.broker.core.allocate import Claim, Pool, allocate
from guestd.model.resources import Kind
from guestd.model.units import GIB, MIB
from guestd.sim.instances import random_claims

CPU = 1000


def claim(low: int, high: int, demand: int, weight: int = 100, unit: int = CPU, burst: int = 0) -> Claim:
    return Claim(low, high, demand, weight, unit, burst=burst)


@pytest.mark.parametrize(
    ("capacity", "claims", "expected"),
    [
        (8000, {"a": claim(1000, 4000, 1200)}, {"a": 2000}),  # a demand is rounded up
        (8000, {"a": claim(1000, 3500, 9000)}, {"a": 3000}),  # a maximum is rounded down
        (8000, {"a": claim(250, 4000, 0)}, {"a": 1000}),  # a minimum is rounded up
        (8000, {"a": claim(1000, 4000, -5)}, {"a": 1000}),  # what a guest says is believed within bounds only
        (8000, {"a": claim(1000, 4000, 1 << 200)}, {"a": 4000}),
        (4000, {"a": claim(1000, 4000, 4000, 300), "b": claim(1000, 4000, 4000)}, {"a": 3000, "b": 1000}),
        (8000, {"a": claim(1000, 8000, 8000, 300), "b": claim(1000, 8000, 8000)}, {"a": 6000, "b": 2000}),
        (6000, {"a": claim(1000, 8000, 1000, 300), "b": claim(1000, 8000, 8000)}, {"a": 1000, "b": 5000}),
        (5000, {"b": claim(1000, 9000, 9000), "a": claim(1000, 9000, 9000)}, {"a": 3000, "b": 2000}),  # ties by name
        (1000, {"a": claim(1000, 2000, 2000), "b": claim(1000, 2000, 2000)}, {"a": 1000, "b": 1000}),
        (-500, {"a": claim(1000, 2000, 2000, burst=4000)}, {"a": 1000}),
        (0, {}, {}),
        # The large unit comes first but does not fit into what is left; the small one does, exactly or with room.
        (2250, {"a": claim(1000, 9000, 9000), "b": claim(250, 9000, 9000, unit=250)}, {"a": 1000, "b": 1250}),
        (3700, {"a": claim(1000, 9000, 9000), "b": claim(250, 9000, 9000, unit=250)}, {"a": 1000, "b": 2000}),
    ],
)
def test_split(capacity: int, claims: dict[str, Claim], expected: dict[str, int]) -> None:
    assert allocate(capacity, claims, Kind.CPU) == expected


@pytest.mark.parametrize(
    ("capacity", "burst_capacity", "claims", "expected"),
    [
        (8000, None, {"a": claim(1000, 2000, 9000, burst=4000)}, {"a": 4000}),
        (8000, None, {"a": claim(1000, 2000, 2500, burst=4000)}, {"a": 3000}),  # no more than is wanted
        (8000, None, {"a": claim(1000, 2000, 2000, burst=4000)}, {"a": 2000}),
        (8000, None, {"a": claim(1000, 2000, 9000)}, {"a": 2000}),
        (8000, 3000, {"a": claim(1000, 2000, 9000, burst=4000)}, {"a": 3000}),
        (8000, 1000, {"a": claim(1000, 2000, 9000, burst=4000)}, {"a": 2000}),  # overcommitted: nothing real is left
        (8000, None, {"a": claim(1000, 3500, 9000, burst=4500)}, {"a": 4000}),  # both in whole units
        # b's demand up to its maximum comes before a's burst.
        (6000, None, {"a": claim(1000, 2000, 9000, 9999, burst=8000), "b": claim(1000, 4000, 4000, 1)},
         {"a": 2000, "b": 4000}),
        # By weight, and from what each has.
        (10000, None, {"a": claim(1000, 2000, 9000, 300, burst=8000), "b": claim(1000, 2000, 9000, burst=8000)},
         {"a": 7000, "b": 3000}),  # b lost more for its weight
        (10000, None, {"a": claim(1000, 2000, 9000, 150, burst=8000), "b": claim(1000, 2000, 9000, burst=8000)},
         {"a": 6000, "b": 4000}),
    ],
)  # fmt: skip
def test_burst(capacity: int, burst_capacity: int | None, claims: dict[str, Claim], expected: dict[str, int]) -> None:
    assert allocate(capacity, claims, Kind.CPU, burst_capacity=burst_capacity) == expected


def test_idle_memory_costs_four_times_as_much_at_a_tax_of_three_quarters() -> None:
    busy = Claim(GIB, 16 * GIB, 16 * GIB, 100, GIB, used=16 * GIB)
    idle = Claim(GIB, 16 * GIB, 16 * GIB, 100, GIB, used=0)
    assert allocate(20 * GIB, {"busy": busy, "idle": idle}) == {"busy": 10 * GIB, "idle": 10 * GIB}
    assert allocate(20 * GIB, {"busy": busy, "idle": idle}, idle_tax=0.75) == {"busy": 16 * GIB, "idle": 4 * GIB}
    assert allocate(32 * GIB, {"busy": busy, "idle": idle}, idle_tax=0.75) == {"busy": 16 * GIB, "idle": 16 * GIB}


def test_a_fixed_claim_gets_the_exact_amount_and_is_charged_whole_grains() -> None:
    fixed = Claim(3 * MIB + 1, 3 * MIB + 1, 3 * MIB + 1, 100, 1)
    other = Claim(MIB, 100 * MIB, 100 * MIB, 100, MIB)
    assert allocate(10 * MIB + 5, {"fixed": fixed, "other": other}) == {"fixed": 3 * MIB + 1, "other": 6 * MIB}


def test_a_change_of_a_fixed_claim_below_a_grain_is_a_change() -> None:
    pool = Pool(Kind.MEMORY)
    for amount in (5 * MIB - 3, 5 * MIB - 2):
        pool.put("a", Claim(amount, amount, amount, 1, 1))
        assert pool.solve(GIB) == ["a"]
        assert pool.target("a") == amount


def test_solve_names_what_changed_and_nothing_else() -> None:
    pool = Pool(Kind.CPU)
    for name in ("c", "a", "b"):
        pool.put(name, claim(1000, 4000, 2000))
    assert pool.target("a") == 0
    assert pool.solve(6000) == ["a", "b", "c"]
    assert pool.solve(6000) == []
    pool.put("b", claim(1000, 4000, 2000))
    assert pool.solve(6000) == []
    pool.put("b", claim(1000, 4000, 3000))
    assert not pool.scarce
    assert pool.solve(6000) == []  # nothing is free
    assert pool.scarce
    assert pool.solve(7000) == ["b"]
    assert not pool.scarce
    pool.remove("a")
    pool.put("a", claim(1000, 4000, 2000))
    assert pool.solve(7000) == ["a"]
    pool.remove("c")
    pool.put("aa", claim(1000, 1000, 1000))
    assert pool.solve(7000) == ["aa"]
    assert [pool.target(name) for name in ("a", "aa", "b")] == [2000, 1000, 3000]
    assert len(pool) == 3
    with pytest.raises(KeyError):
        pool.target("c")


def test_burst_is_what_is_above_the_maximum() -> None:
    pool = Pool(Kind.CPU)
    pool.put("lent", claim(1000, 3500, 9000, burst=8000))
    pool.put("none", claim(1000, 3500, 3000, burst=8000))
    pool.put("rounded", claim(1500, 1500, 9000))
    pool.put("rounded and lent", claim(1500, 1500, 9000, burst=3000))
    assert pool.solve(1 << 20) == ["lent", "none", "rounded", "rounded and lent"]
    assert [pool.burst(name) for name in ("lent", "none", "rounded", "rounded and lent")] == [4500, 0, 0, 1000]
    assert pool.target("lent") == 8000
    assert not pool.scarce


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (claim(1000, 2000, 2000, weight=0), "vm: weight is 0"),
        (claim(1000, 2000, 2000, weight=10_001), "vm: weight is 10001"),
        (claim(1000, 2000, 2000, unit=0), "vm: unit is 0"),
        (claim(-1000, 2000, 2000), "vm: min is -1000"),
        (claim(1000, 1 << 60, 2000), "vm: max is 1152921504606846"),
        (claim(1000, 2000, 2000, unit=1 << 60), "vm: min is 1152921504606846"),
        (claim(1000, 2000, 2000, burst=1 << 60), "vm: burst is 1152921504606846"),
    ],
)
def test_what_cannot_be_computed_with_is_refused_and_changes_nothing(wrong: Claim, words: str) -> None:
    pool = Pool(Kind.CPU)
    with pytest.raises(ValueError, match=words):
        pool.put("vm", wrong)
    assert len(pool) == 0
    assert pool.solve(1000) == []


# ---- against the dumb allocator --------------------------------------------------------------------------------

CASES = 32_000
PARTS = 8
GRAIN = {Kind.CPU: 1, Kind.MEMORY: MIB}
LARGEST = {Kind.CPU: 1 << 31, Kind.MEMORY: 1 << 56}
LARGEST_BYTES = LARGEST[Kind.MEMORY]


def case(source: random.Random) -> tuple[int, dict[str, Claim], Kind, float, int | None]:
    """An instance of up to 12 claims: tight or roomy, small or near the bounds, alike or all different."""
    kind = source.choice(list(Kind))
    grain = GRAIN[kind]
    size = source.choice((10, 100, 100, 5000, LARGEST[kind] // grain)) * grain
    units = source.choice(((1,), (7,), (1000,), (128,), (250, 1000), (128, 256, 2048), (1, 3, 100)))
    weights = source.choice(((100,), (1, 10_000), (1, 2, 3), (50, 100, 300), range(1, 10_001)))
    odd = source.random() < 0.5  # amounts that are no whole grains
    claims = {
        f"vm-{number}": one_claim(source, size, source.choice(units) * grain, source.choice(weights), grain, odd)
        for number in source.sample(range(20), source.randint(1, 12))
    }
    wanted = sum(max(one.min, min(one.max, one.demand)) for one in claims.values())
    capacity = round(wanted * source.choice((0.0, source.random(), source.random(), 1.0, 1.2, 2.0)))
    burst_capacity = source.choice((None, None, round(capacity * source.uniform(0.5, 2))))
    tax = source.choice((0.0, 0.0, 0.5, 0.75, 0.99, source.random())) if kind is Kind.MEMORY else 0.0
    return capacity, claims, kind, tax, burst_capacity


def one_claim(source: random.Random, size: int, unit: int, weight: int, grain: int, odd: bool) -> Claim:
    def amount(most: int) -> int:
        most = max(most, 1)
        drawn = source.choice((source.randint(0, most), source.randint(0, max(1, most // 8)), most))
        return drawn if odd else drawn // grain * grain

    high = amount(size)
    low = amount(high)
    if low // unit * unit + unit > size:
        low //= 2
    if source.random() < 0.1:
        return Claim(low, low, low, weight, 1)
    demand = amount(2 * size)
    burst = min(high + amount(size), LARGEST_BYTES) if source.random() < 0.6 else 0
    return Claim(low, high, demand, weight, unit, amount(demand), burst)


def cases(part: int) -> Iterator[tuple[int, dict[str, Claim], Kind, float, int | None]]:
    source = random.Random(part)
    for _ in range(CASES // PARTS):
        yield case(source)


@pytest.mark.parametrize("part", range(PARTS))
def test_equal_to_the_dumb_allocator(part: int) -> None:
    scarce = lent = 0
    for capacity, claims, kind, tax, burst_capacity in cases(part):
        expected = dumb_allocate(capacity, claims, kind, tax, burst_capacity)
        got = allocate(capacity, claims, kind, tax, burst_capacity)
        assert got == expected, (capacity, claims, kind, tax, burst_capacity)
        scarce += any(got[name] + one.unit <= min(one.max, one.demand) for name, one in claims.items())
        lent += any(got[name] > max(one.min + one.unit, one.max) for name, one in claims.items())
    assert scarce > CASES // PARTS // 4  # the cases are not all trivial
    assert lent > CASES // PARTS // 8


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("tenths", [3, 6, 9])
def test_equal_to_the_dumb_allocator_on_large_instances(kind: Kind, tenths: int) -> None:
    claims = random_claims(700, kind, tenths)
    capacity = sum(min(one.max, one.demand) for one in claims.values()) * tenths // 10
    tax = 0.75 if kind is Kind.MEMORY else 0.0
    assert allocate(capacity, claims, kind, tax) == dumb_allocate(capacity, claims, kind, tax)


@pytest.mark.parametrize("seed", range(6))
def test_a_pool_with_a_history_gives_what_a_new_one_gives(seed: int) -> None:
    source = random.Random(seed)
    kind = list(Kind)[seed % 2]
    tax = 0.75 if kind is Kind.MEMORY else 0.0
    supply = list(random_claims(400, kind, seed).values())
    pool = Pool(kind, tax)
    present: dict[str, Claim] = {}
    known: dict[str, int] = {}
    for _ in range(150):
        for _ in range(source.choice((0, 1, 1, 20, 60))):
            name = f"vm-{source.randrange(200)}"
            if name in present and source.random() < 0.5:
                pool.remove(name)
                del present[name], known[name]
            else:
                present[name] = source.choice(supply)
                pool.put(name, present[name])
                known.setdefault(name, -1)
        capacity = round(sum(min(one.max, one.demand) for one in present.values()) * source.choice((0.3, 0.7, 1.1)))
        changed = pool.solve(capacity)
        targets = allocate(capacity, present, kind, tax)
        assert {name: pool.target(name) for name in present} == targets
        assert changed == sorted(name for name in present if known[name] != targets[name])
        known = targets
