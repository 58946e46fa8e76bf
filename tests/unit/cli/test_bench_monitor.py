"""What the bench of looking at a broker makes of its numbers, and what its broker counts."""

import json
import time
from typing import Any

import pytest

from guestd.cli.bench.monitor_broker import Spent
from guestd.cli.bench.monitor_report import JUDGED_GUESTS, counted_share, document, spread, table

MACHINE = {"host_cpu": "a CPU", "host_cores": 2, "guestd": "0"}


def a_round(**changed: Any) -> dict[str, Any]:
    good = {
        "status_seconds": [0.4, 0.5],
        "scrape_seconds": [0.02, 0.03],
        "scrape_bytes": 40_000,
        "paint_seconds": 0.2,
        "rows_seconds": 0.4,
        "quiet_cores": 0.2,
        "watched_cores": 0.25,
        "forgetful_cores": 0.196,
        "counted": {"record": 0.02, "history": 0.01, "both": 0.03},
    }
    return {**good, **changed}


def test_all_targets_reached() -> None:
    result = document(MACHINE, JUDGED_GUESTS, [a_round(), a_round()])
    assert result["reached"], result["targets"]
    assert json.loads(json.dumps(result)) == result
    assert result["measured"]["memory_share"]["median"] == pytest.approx(0.02)
    assert result["measured"]["watching_cores"]["median"] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"status_seconds": [0.5, 0.8]}, "guestctl status, from process start"),
        ({"scrape_seconds": [0.16]}, "a scrape of the metrics"),
        ({"paint_seconds": 1.1}, "the live page's first paint"),
        ({"watched_cores": 0.31}, "broker's CPU for a watched page"),
        ({"forgetful_cores": 0.18}, "record and history, with and without"),
        ({"counted": {"record": 0.05, "history": 0.01, "both": 0.06}}, "record and history, counted"),
    ],
)
def test_a_target_that_is_not_reached_is_named_with_its_number(changed: dict[str, Any], name: str) -> None:
    result = document(MACHINE, JUDGED_GUESTS, [a_round(**changed)])
    assert not result["reached"]
    assert [one["name"] for one in result["targets"] if not one["reached"]] == [name]
    assert any(name in line and "not reached" in line for line in table(result))


def test_one_slow_round_of_five_does_not_decide() -> None:
    slow = a_round(paint_seconds=3.0, watched_cores=0.9)
    assert document(MACHINE, JUDGED_GUESTS, [a_round(), slow, a_round(), a_round(), a_round()])["reached"]


@pytest.mark.parametrize(("guests", "rounds"), [(JUDGED_GUESTS, []), (50, [a_round()])])
def test_nothing_measured_or_too_few_guests_is_nothing_reached(guests: int, rounds: list[dict[str, Any]]) -> None:
    result = document(MACHINE, guests, rounds)
    assert not any(one["reached"] for one in result["targets"])
    assert "not measured" in table(result)[-1]


def test_a_round_that_broke_off_counts_for_what_it_has() -> None:
    result = document(MACHINE, JUDGED_GUESTS, [a_round(), {"quiet_cores": 0.2}])
    assert result["measured"]["quiet_cores"]["count"] == 2
    assert result["measured"]["watched_cores"]["count"] == 1


def test_a_spread_is_median_and_extremes() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"count": 3, "median": 2.0, "min": 1.0, "max": 3.0}
    assert spread([])["median"] is None


def test_the_counted_share_is_loop_and_threads_of_what_passed() -> None:
    before = {
        "loop": {"Recorder.note": 1.0, "Store.note": 1.0},
        "threads": {"record": 1.0, "history_0": 0.0},
        "process": 5.0,
    }
    after = {
        "loop": {"Recorder.note": 1.1, "Store.note": 1.02},
        "threads": {"record": 1.1, "history_0": 0.03},
        "process": 15.0,
    }
    share = counted_share(before, after)
    assert share["record"] == pytest.approx(0.02)
    assert share["history"] == pytest.approx(0.005)
    assert share["both"] == pytest.approx(0.025)
    assert share["parts"]["record"] == pytest.approx(0.01)


def test_a_call_within_another_one_is_counted_once() -> None:
    spent = Spent()

    def burn() -> None:
        end = time.thread_time() + 0.01
        while time.thread_time() < end:
            pass

    inner = spent.counting("inner", burn)
    outer = spent.counting("outer", lambda: [inner(), inner()])
    began = time.thread_time()
    outer()
    inner()
    took = time.thread_time() - began
    told = spent.told()
    assert told["calls"] == {"inner": 1, "outer": 1}
    assert 0.03 <= sum(told["loop"].values()) <= took
