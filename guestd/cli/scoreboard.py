"""`guestctl scoreboard`: guestd against its peers on load traces, in both regimes."""

import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from guestd.cli.simulate import PLAIN_WIDTH, exit_sim_missing
from guestd.model.errors import ConfigError, TraceError

if TYPE_CHECKING:
    from guestd.sim.scoreboard.fast import Result
    from guestd.sim.scoreboard.fleet import Fleet
    from guestd.sim.scoreboard.report import SlowScores

_FAST_VMS: Final = {"build-memory": 12, "three-vms": 18}
_FAST_SECONDS: Final = 1020.0
_EXAMPLE: Final = ("guestd", "neon", "hyper-v", "qmemman", "autopilot-like", "static peak")


def scoreboard(
    traces: Annotated[Path, typer.Option(help="Folder of load traces.", metavar="DIR")],
    output: Annotated[Path, typer.Option(help="Where scoreboard.json and pictures go.", metavar="DIR")] = Path(
        "build/scoreboard"
    ),
) -> None:
    """Compares guestd with its peers on load traces: how much it gives too much, and too little.

    (a) on 5-minute traces (planetlab/, google2011/): slack, violating samples, unmet demand. (b) on memory traces
    of a sample a second (build-memory/, three-vms/): VMs per host at equal unmet demand, resizes, OOM risk.
    """
    try:
        from guestd.sim.pictures import canvas
        from guestd.sim.scoreboard import report

        with canvas(1, 1):
            pass
    except ModuleNotFoundError as error:
        exit_sim_missing("scoreboard", error)
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    begun = time.monotonic()
    slow = _slow(traces)
    for data, scores in slow.items():
        console.print(report.slow_table(data, scores))
    found = list(report.verdicts(slow))
    if found:
        console.print(report.verdict_table(found))
    fast = _fast(traces)
    for fleet, results in fast.values():
        console.print(report.fast_table(fleet, results))
    if not slow and not fast:
        expected = "planetlab, google2011, build-memory or three-vms in it"
        raise TraceError(str(traces), 0, "no traces in this folder", expected)
    try:
        _write(output, slow, fast, str(traces))
    except OSError as error:
        raise ConfigError("scoreboard", "--output", str(output), f"cannot write there: {error.strerror}") from None
    print(f"took {time.monotonic() - begun:.0f} s; see {output}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_policy(fleet: str, policy: str) -> None:
    _say(f"(b) {fleet}: {policy}")


def _slow(root: Path) -> "SlowScores":
    """Regime (a) on what there is."""
    from guestd.sim.scoreboard import slow

    _say("(a) 5-minute traces")
    return slow.compare(root)


def _fast(root: Path) -> "dict[str, tuple[Fleet, Sequence[Result]]]":
    """Regime (b) on what there is."""
    from guestd.sim import traces
    from guestd.sim.scoreboard import fast
    from guestd.sim.scoreboard.fleet import Fleet

    fleets: dict[str, tuple[Fleet, Sequence[Result]]] = {}
    for name, measured in (("build-memory", traces.build_memory(root)), ("three-vms", traces.three_vms(root))):
        if measured:
            fleet = Fleet(name, tuple(measured), _FAST_VMS[name], _FAST_SECONDS)
            results = fast.compare(fleet, progress=partial(_say_policy, name))
            fleets[name] = (fleet, results)
    return fleets


def _write(output: Path, slow: "SlowScores", fast: "dict[str, tuple[Fleet, Sequence[Result]]]", traces: str) -> None:
    from guestd.sim.scoreboard import pictures, report

    output.mkdir(parents=True, exist_ok=True)
    (output / "scoreboard.json").write_text(json.dumps(report.document(slow, fast, traces), indent=1) + "\n")
    if slow:
        pictures.draw_slow(slow, output / "slow.svg")
    if fast:
        pictures.draw_vms_per_host(fast, output / "vms-per-host.svg")
    for name, (fleet, results) in fast.items():
        pictures.draw_example(fleet, fleet.use()[0], results, _EXAMPLE, output / f"example-{name}.png")
