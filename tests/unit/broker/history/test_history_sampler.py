"""Downsampling and what is read of it, against a reference that is plainly right."""

from collections import defaultdict
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from guestd.broker.history.sampler import Sampler
from guestd.broker.history.steps import GONE, REPEAT_STEPS, TIERS, Values, hold

BEGIN = 1_800_000_000.0


def values(number: int) -> Values:
    """Ten that differ and move both ways."""
    return tuple(number * place if place % 2 else 1000 - number * place for place in range(1, 11))


def reference(changes: list[tuple[float, str, Values]], end: float, seconds: int) -> dict[str, dict[int, Values]]:
    """The highest values of each step that is over, second by second."""
    found: dict[str, dict[int, Values]] = defaultdict(dict)
    now: dict[str, Values] = {}
    for second in range(int(BEGIN), int(end // seconds * seconds)):
        seen = dict(now)
        for at, name, new in changes:
            if second <= at < second + 1:
                seen[name] = tuple(map(max, seen.get(name, new), new))
                now[name] = new
        for name, amounts in seen.items():
            step = second // seconds
            known = found[name].get(step, amounts)
            found[name][step] = tuple(map(max, known, amounts))
    return found


def stored(sampler: Sampler) -> dict[tuple[int, str], dict[int, Values]]:
    """What a table would hold of the rows."""
    found: dict[tuple[int, str], dict[int, Values]] = defaultdict(dict)
    for tier, step, name, amounts in sampler.rows:
        found[tier, name][step] = tuple(map(max, found[tier, name].get(step, amounts), amounts))
    return found


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 1500), st.sampled_from("abc"), st.integers(0, 9)), max_size=40),
    st.integers(1, 2500),
    st.lists(st.integers(0, 2500), max_size=20),
)
def test_every_step_of_every_tier_has_its_highest_values(
    made: list[tuple[int, str, int]], length: int, ticks: list[int]
) -> None:
    changes = sorted((BEGIN + second, name, values(number)) for second, name, number in made)
    end = BEGIN + max(length, made[-1][0] if made else 0, *(second for second, _, _ in made), 0)
    sampler = Sampler(BEGIN)
    happen: list[tuple[float, str, Values | None]] = [*changes]
    happen += [(BEGIN + second, "", None) for second in (*ticks, *range(0, int(end - BEGIN), 500))]
    for at, name, new in sorted(happen, key=lambda one: one[0]):
        if at > end:
            continue
        assert sampler.tick(at)
        if new is not None:
            sampler.note(name, new)
    assert sampler.tick(end)
    table = stored(sampler)
    for number, tier in enumerate(TIERS):
        expected = reference(changes, end, tier.step_seconds)
        first, last = int(BEGIN // tier.step_seconds), int(end // tier.step_seconds) - 1
        for name in "abc":
            known = hold(table[number, name], [(first, last)], first, last)
            assert known == expected[name], (tier, name)


def test_a_quiet_guest_costs_a_row_per_sixty_steps() -> None:
    sampler = Sampler(BEGIN)
    sampler.note("quiet", values(3))
    for step in range(10 * REPEAT_STEPS):
        sampler.tick(BEGIN + step * TIERS[0].step_seconds)
    rows = [step for tier, step, _, _ in sampler.rows if tier == 0]
    assert len(rows) <= 2 + 10
    assert max(later - earlier for earlier, later in pairwise(rows)) <= REPEAT_STEPS


def test_a_peak_within_a_step_is_seen_and_does_not_last() -> None:
    sampler = Sampler(BEGIN)
    sampler.note("a", values(0))
    for second in range(0, 100, 10):
        sampler.tick(BEGIN + second)
    sampler.note("a", values(7))
    sampler.note("a", values(0))
    for second in range(100, 200, 10):
        sampler.tick(BEGIN + second)
    first = int(BEGIN // 10)
    known = hold(stored(sampler)[0, "a"], [(first, first + 20)], first, first + 18)
    peak = tuple(map(max, values(0), values(7)))
    assert [step - first for step, amounts in known.items() if amounts == peak] == [9]
    assert known[first + 10] == values(0)


def test_a_guest_that_is_gone_is_not_carried_on() -> None:
    sampler = Sampler(BEGIN)
    sampler.note("a", values(1))
    sampler.note("b", values(2))
    sampler.tick(BEGIN + 35)
    sampler.forget("a")
    sampler.tick(BEGIN + 90)
    table, first = stored(sampler), int(BEGIN // 10)
    assert set(hold(table[0, "a"], [(first, first + 8)], first, first + 8)) == {first + step for step in range(4)}
    assert set(hold(table[0, "b"], [(first, first + 8)], first, first + 8)) == {first + step for step in range(9)}
    assert table[0, "a"][first + 4] == GONE
    assert sampler.open_steps("a") == []


def test_what_is_not_over_is_known_in_every_tier() -> None:
    sampler = Sampler(BEGIN)
    sampler.note("a", values(5))
    sampler.tick(BEGIN + 30)
    sampler.note("a", values(1))
    sampler.tick(BEGIN + 50)
    highest = tuple(map(max, values(5), values(1)))
    begins = [int(BEGIN // tier.step_seconds) for tier in TIERS]
    assert sampler.open_steps("a") == [(begins[0] + 5, values(1)), (begins[1], highest), (begins[2], highest)]


def test_a_clock_that_jumps_begins_anew() -> None:
    for jump in (-100.0, 10.0 * REPEAT_STEPS + 20):
        sampler = Sampler(BEGIN)
        sampler.note("a", values(5))
        assert sampler.tick(BEGIN + 20)
        rows = len(sampler.rows)
        assert not sampler.tick(BEGIN + 20 + jump)
        assert sampler.tick(BEGIN + 20 + jump + 10)
        assert sampler.rows[rows:] == [(0, int((BEGIN + 20 + jump) // 10), "a", values(5))]
