"""The scoreboard's verdicts, tables, JSON and pictures."""

import json
from pathlib import Path

import numpy as np
from rich.console import Console

from guestd.model.units import GIB
from guestd.sim.scoreboard import pictures, report
from guestd.sim.scoreboard.fast import STEP_SECONDS, Result
from guestd.sim.scoreboard.fleet import Fleet, Outcome
from guestd.sim.scoreboard.report import AUTOPILOT, SlowScore
from guestd.sim.traces import MemoryTrace

SLOW = {
    "google cpu": {
        "guestd": SlowScore(0.15, 0.01, 0.0009),
        AUTOPILOT: SlowScore(0.19, 0.009, 0.001),
        "mom": SlowScore(0.5, 0.0, 0.0, native=False),
        "oracle": SlowScore(0.1, 0.0, 0.0),
    },
    "another day": {"guestd": SlowScore(0.3, 0.0, 0.02), AUTOPILOT: SlowScore(0.2, 0.0, 0.01)},
}
TRACE = MemoryTrace("t", np.array([0.0, 500.0]), *(np.array([1.0, 2.0]) * GIB for _ in range(3)), np.full(2, 4.0 * GIB))
FLEET = Fleet("builds", (TRACE,), 2, 200.0)


def outcome(host_gib: int, unmet: float) -> Outcome:
    return Outcome(host_gib * GIB, unmet, 0.01, 36.0, GIB, 0.3, 12.0)


def results() -> list[Result]:
    example = np.full(round(200 / STEP_SECONDS), 3.0 * GIB)
    return [
        Result("guestd", outcome(32, 0.0), outcome(4, 0.0005), example),
        Result("mom", outcome(32, 0.25), None, example),
    ]


def text_of(table: object) -> str:
    console = Console(width=160, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(table)
    console.file.close()
    return console.export_text()


def test_verdicts_say_what_is_reached_and_what_is_not() -> None:
    found = {(one.data, one.what): one for one in report.verdicts(SLOW)}
    assert found["google cpu", "slack below autopilot-like"].reached
    assert found["google cpu", "unmet below autopilot-like"].reached
    assert not found["google cpu", "slack of 14% at most"].reached
    assert found["google cpu", "slack of 14% at most"].numbers == "15.00%"
    assert not found["another day", "slack below autopilot-like"].reached
    assert len(found) == 5, "no aim is known for other data"


def test_tables_hold_baselines_and_verdicts() -> None:
    slow = text_of(report.slow_table("google cpu", SLOW["google cpu"]))
    assert "19/0.9/0.1" in slow
    assert "mom (made for memory)" in slow
    assert slow.index("guestd") < slow.index("oracle")
    verdicts = text_of(report.verdict_table(list(report.verdicts(SLOW))))
    assert verdicts.count("NOT REACHED") == 3
    fast = text_of(report.fast_table(FLEET, results()))
    assert "32.0" in fast, "VMs per 64 GiB: 2 on 4 GiB"
    assert "never" in fast
    assert "25.000" in fast


def test_the_document_is_json_with_a_schema() -> None:
    shown = json.loads(json.dumps(report.document(SLOW, {"builds": (FLEET, results())}, "traces")))
    assert shown["schema"] == 1
    assert shown["slow"]["data"]["google cpu"]["guestd"]["slack"] == 0.15
    assert shown["slow"]["aims_slack"] == {"planetlab cpu": 0.4, "google cpu": 0.14, "google memory": 0.09}
    policies = shown["fast"]["data"]["builds"]["policies"]
    assert policies["guestd"]["vms_per_host"] == 32.0
    assert policies["mom"]["vms_per_host"] is None
    assert policies["mom"]["ample"]["unmet_share"] == 0.25


def test_pictures(tmp_path: Path) -> None:
    pictures.draw_slow(SLOW, tmp_path / "slow.svg")
    text = (tmp_path / "slow.svg").read_text()
    assert "autopilot-like" in text
    assert "mom" not in text, "not made for CPUs"
    pictures.draw_vms_per_host({"builds": (FLEET, results())}, tmp_path / "bars.svg")
    assert "never: 25.00% unmet" in (tmp_path / "bars.svg").read_text()
    pictures.draw_example(FLEET, FLEET.use()[0], results(), ["guestd", "neon", "mom"], tmp_path / "example.svg")
    text = (tmp_path / "example.svg").read_text()
    assert "guestd: slack 30%, short 36 s" in text
    assert "neon" not in text, "it has no result"
