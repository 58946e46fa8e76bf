"""The search for the level: the highest that fits, wherever it starts, up to the bounds of what can be counted."""

import random

import numpy as np
import pytest

from guestd.broker.core.waterfill import (
    KEEP_ALL,
    LARGEST_GRAINS,
    LARGEST_WEIGHT,
    LEVEL_BITS,
    Column,
    Rows,
    fill,
    find_level,
)


def column(values: list[int]) -> Column:
    return np.array(values, np.int64)


def make(source: random.Random, count: int, size: int, weights: tuple[int, ...], keep: int) -> Rows:
    floor = [source.randint(0, size // 4) for _ in range(count)]
    ceiling = [source.choice((low, source.randint(low, size), size)) for low in floor]
    weight = [source.choice(weights) for _ in range(count)]
    used = [source.randint(0, size) for _ in range(count)]
    rows = Rows(*map(column, (floor, ceiling, weight, [1] * count, weight)), column(used), keep)
    return Rows(rows.floor, rows.ceiling, rows.weight, rows.unit, rows.levels(rows.ceiling), rows.used, keep)


def amount(rows: Rows, row: int, level: int) -> int:
    """One row's amount by whole numbers of any size."""
    assert rows.used is not None
    share, used = level * int(rows.weight[row]) >> LEVEL_BITS, int(rows.used[row])
    if share > used:
        share = used + ((share - used) * rows.keep >> 10)
    return max(int(rows.floor[row]), min(int(rows.ceiling[row]), share))


@pytest.mark.parametrize("size", [8, 1000, 1 << 20, LARGEST_GRAINS])
@pytest.mark.parametrize("weights", [(1,), (1, LARGEST_WEIGHT), (25, 50, 100, 1000), tuple(range(1, LARGEST_WEIGHT))])
@pytest.mark.parametrize("keep", [KEEP_ALL, 256, 10])
def test_the_level_is_the_highest_that_fits_from_any_guess(size: int, weights: tuple[int, ...], keep: int) -> None:
    source = random.Random(size)
    for count in (1, 2, 5, 40, 300):
        rows = make(source, count, size, weights, keep)
        floors, ceilings = int(rows.floor.sum()), int(rows.ceiling.sum())
        if floors == ceilings:
            continue
        capacity = source.randint(floors, ceilings - 1)
        level = find_level(rows, capacity)
        assert sum(amount(rows, row, level) for row in range(count)) <= capacity
        assert sum(amount(rows, row, level + 1) for row in range(count)) > capacity
        for guess in (1, level - 1, level, level + 1, 2 * level, source.randint(0, 2 * level + 1), 1 << 70):
            assert find_level(rows, capacity, guess) == level


def test_the_largest_that_can_be_counted_with_does_not_overflow() -> None:
    """Full of idle memory at the highest tax, by one with the least and one with the greatest weight."""
    weight = column([1, LARGEST_WEIGHT])
    full = -(-((LARGEST_GRAINS * 1024 // 10 + 1) << LEVEL_BITS) // weight)
    rows = Rows(column([0, 0]), column([LARGEST_GRAINS] * 2), weight, column([1, 1]), full, column([0, 0]), 10)
    top = int(full.max())
    assert rows.amounts(top).tolist() == [LARGEST_GRAINS] * 2
    assert rows.shares(top).min() >= LARGEST_GRAINS
    assert rows.levels(rows.ceiling).min() > 0
    amounts, _ = fill(rows, 2 * LARGEST_GRAINS - 1)
    assert sorted(amounts.tolist()) == [LARGEST_GRAINS - 1, LARGEST_GRAINS]
