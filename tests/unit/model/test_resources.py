"""Amounts of both kinds, and limits on them."""

import pytest

from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB, MIB


def test_amounts_by_kind() -> None:
    both = Resources(1500, GIB)
    assert (both.get(Kind.CPU), both.get(Kind.MEMORY)) == (1500, GIB)
    assert both.with_(Kind.CPU, 1) == Resources(1, GIB)
    assert both.with_(Kind.MEMORY, 1) == Resources(1500, 1)
    assert both + Resources(500, GIB) == Resources(2000, 2 * GIB)
    assert both - Resources(500, MIB) == Resources(1000, GIB - MIB)
    assert str(both) == "1.5 CPU, 1 GiB"


def test_limits_that_are_sound_have_no_problems() -> None:
    assert Limits(Resources(1, 1), Resources(1, 1)).problems() == []
    assert Limits(Resources(1, 1), Resources(1, 1)).weight == Resources(100, 100)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (Limits(Resources(0, GIB), Resources(1000, GIB)), "cpu: min is 0 CPU, must be above 0"),
        (Limits(Resources(-5, GIB), Resources(1000, GIB)), "cpu: min is -0.005 CPU, must be above 0"),
        (Limits(Resources(1000, 2 * GIB), Resources(1000, GIB)), "memory: min 2 GiB is above max 1 GiB"),
        (Limits(Resources(1, 1), Resources(1, 1), Resources(0, 100)), "cpu: weight is 0, must be within 1..10000"),
        (Limits(Resources(1, 1), Resources(1, 1), Resources(1, 10_001)), "memory: weight is 10001, must be within"),
    ],
)
def test_each_contradiction_is_named_with_its_numbers(limits: Limits, said: str) -> None:
    [problem] = limits.problems()
    assert problem.startswith(said)


def test_all_contradictions_are_named_at_once() -> None:
    assert len(Limits(Resources(0, 0), Resources(-1, -1), Resources(0, 0)).problems()) == 6
