"""Statistics, targets and the one document of the guest's benches."""

import json
from pathlib import Path

import pytest

from guestd.cli.bench.guest import report
from guestd.cli.bench.guest.report import Target

MACHINE = {"accel": "tcg"}


def part(reached: bool) -> dict[str, object]:
    return {"targets": [Target("a", 2.0 if reached else 0.5, 1.0).document()]}


def test_a_round_in_which_nothing_came_is_endless_and_never_dropped() -> None:
    assert report.median([0.1, None, 0.3]) == 0.3
    assert report.median([None, None, 0.3]) is None
    assert report.median([]) is None
    assert report.largest([0.1, None]) is None
    assert report.largest([0.1, 0.4]) == 0.4


def test_median_of_an_even_number_lies_between() -> None:
    assert report.median([0.4, 0.1, 0.2, 0.9]) == pytest.approx(0.3)


def test_few_rounds_have_no_p99() -> None:
    assert report.summary([1.0] * 199)["p99"] is None
    found = report.summary([float(number) for number in range(201)])
    assert (found["p50"], found["p99"], found["max"]) == (100.0, 198.0, 200.0)


def test_a_target_is_reached_or_not_and_what_is_not_known_is_not() -> None:
    assert Target("fast", 10.0, 10.0).reached
    assert not Target("fast", 9.9, 10.0).reached
    assert Target("small", 0.5, 0.5, at_most=True).reached
    assert not Target("small", 0.51, 0.5, at_most=True).reached
    assert not Target("fast", None, 1.0).reached


def test_a_part_that_is_measured_again_replaces_only_itself() -> None:
    first = report.merged(None, MACHINE, {"ramp": part(True), "tax": part(True)})
    assert first["reached"]
    second = report.merged(first, {"accel": "kvm"}, {"tax": part(False)})
    assert not second["reached"]
    assert second["parts"]["ramp"] == first["parts"]["ramp"]
    assert second["parts"]["tax"]["machine"] == {"accel": "kvm"}


def test_nothing_measured_has_reached_nothing() -> None:
    assert not report.merged(None, MACHINE, {})["reached"]


def test_a_document_of_another_kind_is_not_mixed_in() -> None:
    old = {"schema": 0, "parts": {"ramp": part(True)}}
    assert set(report.merged(old, MACHINE, {"tax": part(True)})["parts"]) == {"tax"}


def test_a_broken_file_is_no_document(tmp_path: Path) -> None:
    assert report.read(tmp_path / "none") is None
    (tmp_path / "half").write_text('{"schema":')
    assert report.read(tmp_path / "half") is None
    (tmp_path / "whole").write_text(json.dumps({"schema": 1}))
    assert report.read(tmp_path / "whole") == {"schema": 1}


def test_targets_are_all_shown() -> None:
    targets = [Target("a", 2.0, 1.0), Target("b", 0.5, 1.0, note="why"), Target("c", None, 1.0)]
    text = report.target_lines([one.document() for one in targets])
    assert text[0] == "  reached     a: 2 times, target ≥ 1"
    assert text[1] == "  NOT REACHED b: 0.5 times, target ≥ 1 (why)"
    assert text[2] == "  NOT REACHED c: not measured, target ≥ 1"


def test_columns_line_up() -> None:
    assert report.grid(["name", "p50"], [["a", "10.00 s"]]) == ["name      p50", "a     10.00 s"]
