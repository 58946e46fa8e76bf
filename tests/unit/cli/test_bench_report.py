"""What the bench makes of its numbers."""

import pytest

from guestd.cli.bench import report
from guestd.cli.bench.report import Footprint, Rounds, Usage

MACHINE = {"guest_kernel": "6.1.0", "qemu": "7.2.0", "accel": "tcg", "host_cores": 2}


def rounds(*seconds: float | None, kernel: float = 0.1) -> Rounds:
    found = Rounds()
    for one in seconds:
        grown_at = None if one is None else 5.0 + one
        found.add_guestd({"onset": 5.0, "grown_at": grown_at, "longest_gap_seconds": 0.01})
        found.add_kernel(kernel, 0.0005)
    return found


def usage(t: float, cpu: float, switches: int) -> Usage:
    return Usage(t, [1, 2], 30 << 20, cpu, switches)


def footprint(cpu: float = 1.0, switches: int = 500, pss: int = 40 << 20) -> Footprint:
    """120 s, against a bare process of 1 s of CPU, 500 switches and 40 MiB."""
    return Footprint(
        usage(10, 7, 100),
        usage(130, 7 + cpu, 100 + switches),
        usage(10, 3, 50),
        usage(130, 4, 550),
        guestd_alone_pss_bytes=pss,
        bare_alone_pss_bytes=40 << 20,
        grows=0,
    )


def test_a_round_in_which_nothing_came_is_endless_and_never_dropped() -> None:
    assert report.median([0.1, None, 0.3]) == 0.3
    assert report.median([None, None, 0.3]) is None
    assert report.median([]) is None
    assert report.largest([0.1, None]) is None
    assert report.largest([0.1, 0.4]) == 0.4


def test_median_of_an_even_number_lies_between() -> None:
    assert report.median([0.4, 0.1, 0.2, 0.9]) == pytest.approx(0.3)


def test_all_reached() -> None:
    result = report.document(MACHINE, rounds(0.5, 0.9), rounds(0.6), footprint())
    assert result["reached"]
    assert result["cpu"]["ratio_p50"] == pytest.approx(7.0)
    assert not any("not reached" in line for line in report.table(result))


def test_what_is_not_reached_is_said_in_numbers() -> None:
    text = "\n".join(report.table(report.document(MACHINE, rounds(1.2), rounds(0.9), footprint(cpu=2.0))))
    assert "not reached: 1.20 s, target 1 s" in text
    assert "not reached: 0.90 s, target 0.6 s" in text
    assert "not reached: 2.00 times, target 1.25 times" in text
    assert text.count("not reached") == 3


def test_each_part_of_the_footprint_counts() -> None:
    for worse in (footprint(cpu=1.3), footprint(switches=700), footprint(pss=60 << 20)):
        assert not worse.document()["reached"]
    assert footprint(cpu=1.2, switches=600, pss=50 << 20).document()["reached"]


def test_shares_are_of_the_time_between() -> None:
    found = footprint(cpu=1.2, switches=600).document()
    assert found["guestd"]["cpu_share"] == pytest.approx(0.01)
    assert found["guestd"]["context_switches_per_second"] == pytest.approx(5.0)
    assert found["idle_seconds"] == 120


def test_a_bench_that_broke_off_has_reached_nothing_but_keeps_its_rounds() -> None:
    result = report.document(MACHINE, rounds(0.5), Rounds(), None)
    assert not result["reached"]
    assert result["cpu"]["guestd_seconds"] == [pytest.approx(0.5)]
    text = "\n".join(report.table(result))
    assert "memory onset to usable, p50             none" in text
    assert "footprint: not reached: it was not measured" in text
