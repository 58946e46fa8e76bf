"""Hand-computed splits."""

import pytest

from guestd.broker.core.allocate import Claim, allocate

CPU = 1000


def claim(name: str, low: int, high: int, demand: int, weight: int = 100, unit: int = CPU) -> Claim:
    return Claim(name, low, high, demand, weight, unit)


@pytest.mark.parametrize(
    ("capacity", "claims", "expected"),
    [
        (8000, [claim("a", 1000, 4000, 1200)], {"a": 2000}),  # a demand is rounded up
        (8000, [claim("a", 1000, 3500, 9000)], {"a": 3000}),  # a maximum is rounded down
        (8000, [claim("a", 250, 4000, 0)], {"a": 1000}),  # a minimum is rounded up
        (4000, [claim("a", 1000, 4000, 4000, 300), claim("b", 1000, 4000, 4000)], {"a": 3000, "b": 1000}),
        (8000, [claim("a", 1000, 8000, 8000, 300), claim("b", 1000, 8000, 8000)], {"a": 6000, "b": 2000}),
        (6000, [claim("a", 1000, 8000, 1000, 300), claim("b", 1000, 8000, 8000)], {"a": 1000, "b": 5000}),
        (5000, [claim("a", 1000, 9000, 9000), claim("b", 1000, 9000, 9000)], {"a": 3000, "b": 2000}),  # ties by name
        (1000, [claim("a", 1000, 2000, 2000), claim("b", 1000, 2000, 2000)], {"a": 1000, "b": 1000}),
        (0, [], {}),
    ],
)
def test_split(capacity: int, claims: list[Claim], expected: dict[str, int]) -> None:
    assert allocate(capacity, claims) == expected


def test_units_of_different_sizes_fit_together() -> None:
    small, large = claim("small", 1, 1000, 1000, unit=1), claim("large", 100, 1000, 1000, unit=100)
    amounts = allocate(450, [small, large])
    assert amounts == {"large": 200, "small": 226} or sum(amounts.values()) <= 450
    assert amounts["large"] % 100 == 0
    assert sum(amounts.values()) <= 450
