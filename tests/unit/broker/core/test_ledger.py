"""The book: what is charged, what is free, who is admitted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.broker.core.ledger import Book, HostCapacity, admit
from guestd.model.errors import AdmissionError
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB, MIB

HOST = HostCapacity(Resources(8000, 8 * GIB), Resources(1000, GIB), Resources(0, 128 * MIB))


def limits(cpu: int, memory: int) -> Limits:
    return Limits(Resources(cpu, memory), Resources(cpu, memory))


def sums(book: Book) -> tuple[int, int, int, int]:
    return (book.charged, book.reserved, book.minimums, len(book))


def test_a_guest_is_charged_its_minimum_or_what_is_reserved() -> None:
    book = Book()
    book.put("a", reserved=300, minimum=500)
    assert sums(book) == (500, 300, 500, 1)
    book.put("b", reserved=700, minimum=500)
    assert sums(book) == (1200, 1000, 1000, 2)
    book.put("a", reserved=900, minimum=100)
    assert sums(book) == (1600, 1600, 600, 2)
    book.remove("b")
    assert sums(book) == (900, 900, 100, 1)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.none() | st.tuples(st.integers(0, 99), st.integers(0, 99)))))
def test_the_running_sums_are_the_sums(changes: list[tuple[str, tuple[int, int] | None]]) -> None:
    book, lines = Book(), dict[str, tuple[int, int]]()
    for name, line in changes:
        if line is None:
            book.remove(name)
            lines.pop(name, None)
        else:
            book.put(name, *line)
            lines[name] = line
    charged = sum(max(line) for line in lines.values())
    assert sums(book) == (charged, sum(r for r, _ in lines.values()), sum(m for _, m in lines.values()), len(lines))


def test_overcommit_backs_no_minimum() -> None:
    host = HostCapacity(Resources(16_000, 16 * GIB), physical=Resources(8000, 8 * GIB))
    assert host.for_guests(Kind.CPU, 1) == 16_000
    assert host.backed(Kind.CPU, 1) == 8000
    with pytest.raises(AdmissionError, match=r"there is 8 CPU.*overcommit does not count"):
        admit(host, {"a": limits(5000, GIB), "b": limits(4000, GIB)})


def test_reserve_and_overhead_are_not_for_guests() -> None:
    assert HOST.for_guests(Kind.CPU, 4) == 7000
    assert HOST.for_guests(Kind.MEMORY, 4) == 7 * GIB - 512 * MIB


def test_minimums_that_just_fit_are_admitted() -> None:
    admit(HOST, {})
    admit(HOST, {"a": limits(3000, 3 * GIB), "b": limits(4000, 4 * GIB - 256 * MIB)})
    with pytest.raises(AdmissionError):  # and not by a byte more
        admit(HOST, {"a": limits(3000, 3 * GIB + 1), "b": limits(4000, 4 * GIB - 256 * MIB)})


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (
            limits(4001, GIB),
            r"cpu: the minimums of 2 guests add up to 7.001 CPU, but the host has 7 CPU .*reserve 1 CPU",
        ),
        (limits(1000, 4 * GIB), r"memory: the minimums of 2 guests add up to 7 GiB, but the host has 6.8 GiB"),
    ],
)
def test_minimums_that_do_not_fit_are_refused_with_the_numbers(second: Limits, said: str) -> None:
    with pytest.raises(AdmissionError, match=said):
        admit(HOST, {"a": limits(3000, 3 * GIB), "b": second})


def test_a_host_that_has_less_than_its_reserve_has_nothing() -> None:
    with pytest.raises(AdmissionError, match="the host has 0 CPU"):
        admit(HostCapacity(Resources(500, GIB), Resources(1000, 0)), {"a": limits(1, 1)})
