"""The token bucket: hand-computed, and within its bounds whatever the clock does."""

import math
import random

import pytest

from guestd.broker.core.burst import Bucket

MAX = 1000


def test_drains_by_what_is_above_and_refills_otherwise() -> None:
    bucket = Bucket.full(10_000, now=100.0)
    assert bucket.credit == 10_000
    assert bucket.seconds_left(2000) == 5.0
    bucket.advance(103.0, held=MAX + 2000, limits_max=MAX, cap=10_000, refill=500)
    assert bucket.credit == 4000
    bucket.advance(105.0, held=MAX, limits_max=MAX, cap=10_000, refill=500)
    assert bucket.credit == 5000
    assert bucket.seconds_until(5000, refill=500) == 0.0
    assert bucket.seconds_until(6000, refill=500) == pytest.approx(2.0, abs=1e-5)
    assert bucket.seconds_until(6000, refill=0) == math.inf
    assert bucket.seconds_left(0) == math.inf
    bucket.advance(200.0, held=MAX + 1, limits_max=MAX, cap=10_000, refill=500)
    assert bucket.credit == 4905


def test_many_small_steps_are_one_large_step() -> None:
    """Exact: no step loses what is below a resource x second, or below a microsecond."""
    small, large = Bucket.full(1 << 60, 0.0), Bucket.full(1 << 60, 0.0)
    for step in range(1, 7001):
        small.advance(step / 7000, held=MAX + 7, limits_max=MAX, cap=1 << 60, refill=1)
    large.advance(1.0, held=MAX + 7, limits_max=MAX, cap=1 << 60, refill=1)
    assert small == large
    assert large.credit_microseconds == (1 << 60) * 1_000_000 - 7_000_000


@pytest.mark.parametrize(("held", "later"), [(MAX + 10, 40), (MAX, 51)])
def test_a_clock_set_back_counts_as_no_time_and_runs_on_from_there(held: int, later: int) -> None:
    bucket = Bucket.restored(50, now=1000.0)
    bucket.advance(998.0, held=held, limits_max=MAX, cap=100, refill=1)
    assert bucket.credit == 50
    bucket.advance(999.0, held=held, limits_max=MAX, cap=100, refill=1)
    assert bucket.credit == later


@pytest.mark.parametrize(("held", "credit"), [(MAX + 1, 0), (MAX, 1000)])
def test_a_clock_set_ahead_only_reaches_the_bounds(held: int, credit: int) -> None:
    bucket = Bucket.restored(500, now=0.0)
    bucket.advance(1e18, held=held, limits_max=MAX, cap=1000, refill=1)
    assert bucket.credit == credit


def test_a_lower_cap_cuts_at_once_and_a_higher_one_gives_nothing() -> None:
    bucket = Bucket.full(1000, now=5.0)
    bucket.advance(5.0, held=0, limits_max=MAX, cap=300, refill=10)
    assert bucket.credit == 300
    bucket.advance(5.0, held=0, limits_max=MAX, cap=1000, refill=10)
    assert bucket.credit == 300
    bucket.advance(5.0, held=0, limits_max=MAX, cap=0, refill=10)
    assert bucket.credit == 0


def test_what_the_journal_says_is_cut_to_sense() -> None:
    assert Bucket.restored(-5, now=0.0).credit == 0
    bucket = Bucket.restored(10_000, now=0.0)
    bucket.advance(0.0, held=0, limits_max=MAX, cap=100, refill=0)
    assert bucket.credit == 100


def test_waiting_as_long_as_it_says_is_enough() -> None:
    source = random.Random(1)
    for _ in range(2000):
        now, refill, wanted = source.uniform(0, 1e6), source.randint(1, 10_000), source.randint(1, 100_000)
        bucket = Bucket.restored(0, now)
        wait = bucket.seconds_until(wanted, refill)
        bucket.advance(now + wait, held=0, limits_max=MAX, cap=wanted, refill=refill)
        assert bucket.credit == wanted, (now, refill)


def test_within_bounds_under_any_clock() -> None:
    source = random.Random(2)
    bucket, now = Bucket.full(5000, 0.0), 0.0
    low = high = 0
    for _ in range(20_000):
        now += source.choice((0.001, 1.0, -1.0, -1e9, 1e9, 3.3))
        cap = source.choice((0, 5000, 5000, 5000, 100))
        bucket.advance(now, source.choice((0, MAX, MAX + 1, MAX + 9000)), MAX, cap, source.choice((0, 1, 50)))
        assert 0 <= bucket.credit_microseconds <= cap * 1_000_000
        low += bucket.credit == 0
        high += bucket.credit == cap > 0
    assert low > 100
    assert high > 100
