"""Which tier answers, what holds for how long, and how steps become fewer."""

import pytest

from guestd.broker.history.steps import REPEAT_STEPS, TIERS, Values, hold, merge, pick_tier
from guestd.model.resources import Kind

NOW = 1_800_000_000.0
HOUR, DAY = 3600, 86400


def flat(amount: int) -> Values:
    return (amount,) * 10


def since(*ages: float | None) -> list[int | None]:
    """The oldest step of each tier, that many seconds ago."""
    return [
        None if age is None else int((NOW - age) // tier.step_seconds) for age, tier in zip(ages, TIERS, strict=True)
    ]


@pytest.mark.parametrize(
    ("age", "oldest", "tier"),
    [
        (HOUR, since(75 * 60, 25 * HOUR, 14 * DAY), 0),
        (HOUR + 16 * 60, since(75 * 60, 25 * HOUR, 14 * DAY), 1),
        (DAY, since(75 * 60, 25 * HOUR, 14 * DAY), 1),
        (3 * DAY, since(75 * 60, 25 * HOUR, 14 * DAY), 2),
        (90 * DAY, since(75 * 60, 25 * HOUR, 14 * DAY), 2),
        (HOUR, since(300, 300, None), 0),  # the broker is young: nothing goes back further
        (HOUR, since(1000, 1000, 1200), 0),
        (HOUR, since(600, 25 * HOUR, 14 * DAY), 1),  # the file is small
        (HOUR, since(None, None, None), 0),
    ],
)
def test_the_finest_tier_that_goes_back_so_far(age: float, oldest: list[int | None], tier: int) -> None:
    assert pick_tier(NOW - age, NOW, oldest) == tier


def test_a_value_holds_until_the_next_row_and_the_end_of_its_run() -> None:
    rows = {10: flat(1), 14: flat(2), 30: flat(3)}
    known = hold(rows, [(9, 17), (25, 40)], 0, 32)
    assert known == {
        **{step: flat(1) for step in range(10, 14)},
        **{step: flat(2) for step in range(14, 18)},
        **{step: flat(3) for step in range(30, 33)},
    }


def test_a_reader_looks_back_for_what_holds_where_it_begins() -> None:
    assert hold({100 - REPEAT_STEPS: flat(4)}, [(0, 200)], 100, 101) == {100: flat(4), 101: flat(4)}
    assert hold({100 - REPEAT_STEPS - 1: flat(4)}, [(0, 200)], 100, 101) == {}


def test_merged_steps_are_no_more_than_asked_for_and_keep_the_highest() -> None:
    known = {step: (step % 7,) * 10 for step in range(100, 200) if not 120 <= step < 140}
    for most in (1, 3, 10, 99, 100, 300):
        found = merge(known, 10, 100, 199, most)
        width = int(found.step_seconds) // 10
        assert len(found.points) <= most
        assert width == -(-100 // most)
        for point in found.points:
            begin = int(point.at.timestamp()) // 10
            inside = [known[step][0] for step in range(begin, begin + width) if step in known]
            assert [one.kind for one in point.resources] == list(Kind)
            assert all(one.demand == one.used == max(inside) for one in point.resources)
    assert merge({}, 10, 100, 199, 5).points == ()
