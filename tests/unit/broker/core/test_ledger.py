"""The book: what is charged, what is free, who is admitted."""

import pytest

from guestd.broker.core.ledger import Entry, HostCapacity, admit, free
from guestd.model.errors import AdmissionError
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB, MIB

HOST = HostCapacity(Resources(8000, 8 * GIB), Resources(1000, GIB), Resources(0, 128 * MIB))


def limits(cpu: int, memory: int) -> Limits:
    return Limits(Resources(cpu, memory), Resources(cpu, memory))


def test_a_guest_is_charged_its_minimum_or_what_is_reserved() -> None:
    assert Entry(reserved=300, min=500).charged == 500
    assert Entry(reserved=700, min=500).charged == 700


def test_free_may_be_negative_when_the_host_is_over() -> None:
    assert free(1000, [Entry(300, 500), Entry(200, 100)]) == 300
    assert free(1000, [Entry(900, 0), Entry(0, 400)]) == -300
    assert free(1000, []) == 1000


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
