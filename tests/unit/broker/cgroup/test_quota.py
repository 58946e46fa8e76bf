"""Millicores and what the kernel takes for them; how throttling is counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.broker.cgroup.quota import Quota, ThrottleMeter, quota_of, weight_of


@given(st.integers(1, 4096 * 1000))
def test_the_kernel_takes_every_quota_and_it_means_what_was_asked(millicores: int) -> None:
    quota = quota_of(millicores)
    assert quota.quota_us >= 1_000
    assert 1_000 <= quota.period_us <= 1_000_000
    assert quota.quota_us * 1000 == millicores * quota.period_us
    assert quota.millicores == millicores


@pytest.mark.parametrize(
    ("millicores", "quota"),
    [
        (250, Quota(5_000, 20_000)),
        (50, Quota(1_000, 20_000)),
        (49, Quota(4_900, 100_000)),
        (10, Quota(1_000, 100_000)),
        (9, Quota(9_000, 1_000_000)),
        (1, Quota(1_000, 1_000_000)),
    ],
)
def test_the_shortest_period_that_the_kernel_takes_is_used(millicores: int, quota: Quota) -> None:
    assert quota_of(millicores) == quota


@pytest.mark.parametrize("millicores", [0, -1])
def test_no_cpu_at_all_cannot_be_asked_for(millicores: int) -> None:
    with pytest.raises(ValueError, match="a whole number from 1 up"):
        quota_of(millicores)


def test_a_quota_that_somebody_else_set_is_rounded_but_never_to_none() -> None:
    assert Quota(33_333, 100_000).millicores == 333
    assert Quota(1_000, 1_000_000_000).millicores == 1


def test_a_group_weighs_as_many_threads_as_it_has_cpus_and_at_least_one() -> None:
    assert [weight_of(m, 1024, 262_144) for m in (10, 1000, 4000, 1_000_000)] == [1024, 1024, 4096, 262_144]


def test_the_share_of_throttled_periods_is_that_of_the_last_second() -> None:
    meter = ThrottleMeter()
    assert meter.look(0.0, 0, 0) == 0
    assert meter.look(0.5, 5, 5) == 1000
    assert meter.look(1.0, 10, 5) == 500
    assert meter.look(1.5, 15, 5) == 0  # since 0.5
    assert meter.look(3.0, 30, 10) == 330  # in steps of 10, since 1.5


def test_a_vm_that_wants_nothing_is_not_throttled() -> None:
    meter = ThrottleMeter()
    meter.look(0.0, 100, 50)
    assert meter.look(5.0, 100, 50) == 0


def test_many_looks_are_remembered_as_few_and_the_window_still_moves() -> None:
    meter = ThrottleMeter()
    for number in range(10_000):
        throttled = meter.look(number / 1000, number // 100, min(number // 100, 50))
        assert len(meter._looks) <= 22
    assert throttled == 0  # the bound was last hit at 5 s


def test_counters_that_begin_anew_are_another_groups() -> None:
    meter = ThrottleMeter()
    meter.look(0.0, 1000, 900)
    assert meter.look(1.0, 3, 3) == 0
    assert meter.look(2.0, 13, 8) == 500
