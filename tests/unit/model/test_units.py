"""Rounding, reading and showing amounts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.model.units import (
    GIB,
    KIB,
    MIB,
    TIB,
    format_cpus,
    format_size,
    parse_cpus,
    parse_size,
    round_down,
    round_up,
)


@given(st.integers(0, 1 << 60), st.integers(1, 1 << 40))
def test_rounding_goes_to_the_nearest_multiple_on_its_side(amount: int, unit: int) -> None:
    low, high = round_down(amount, unit), round_up(amount, unit)
    assert low % unit == high % unit == 0
    assert amount - unit < low <= amount <= high < amount + unit


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("17", 17),
        ("17B", 17),
        (" 512 MiB ", 512 * MIB),
        ("1.5GiB", 3 * GIB // 2),
        ("0.5 KiB", 512),
        ("2TiB", 2 * TIB),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1MiB", "1 MB", "1mib", "1e9", "1,5GiB", "0.3B", "nan", "inf", "1 GiB 2", "1.GiB", "0x10"]
)
def test_what_is_no_size_is_refused_and_shown(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a"):
        parse_size(text)


@given(st.integers(0, (1 << 63) - 1))
def test_bytes_are_exact_however_many(amount: int) -> None:
    assert parse_size(str(amount)) == amount
    assert parse_size(f"{amount}B") == amount
    assert parse_size(f"{amount // KIB}KiB") == amount // KIB * KIB


@pytest.mark.parametrize(("text", "cpus"), [("2", 2000), ("1.5", 1500), ("250m", 250), (" 3 ", 3000), ("0.001", 1)])
def test_cpus(text: str, cpus: int) -> None:
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["", "m", "-1", "1.5x", "nan", "two", "0.0001", "0.5m", "1e3"])
def test_what_is_no_number_of_cpus_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a number of CPUs|finer than a millicore"):
        parse_cpus(text)


@pytest.mark.parametrize(
    ("amount", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (KIB, "1 KiB"), (1536 * MIB, "1.5 GiB"), (512 * MIB, "512 MiB"), (-GIB, "-1 GiB")],
)
def test_sizes_for_people(amount: int, shown: str) -> None:
    assert format_size(amount) == shown


def test_cpus_for_people() -> None:
    assert [format_cpus(amount) for amount in (0, 250, 1000, 1500, 64_000)] == ["0", "0.25", "1", "1.5", "64"]
