"""The scoreboard's results as JSON and tables, and what is reached and what is not.

Baselines and aims are the project's own, for the traces that it was tuned on; shares of 1. Other files of the same
layout have other baselines: the verdicts compare with Autopilot-like *as measured on the same files*.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import guestd
from guestd.model.units import GIB
from guestd.sim.scoreboard import fast as fast_regime
from guestd.sim.scoreboard.fast import GUESTD, HOST_BYTES, PRECISION_BYTES, UNMET_SHARE, Result
from guestd.sim.scoreboard.fleet import KERNEL_BYTES, PLUG_RATE, REACTION_SECONDS, UNPLUG_RATE, Fleet

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA: Final = 1
AUTOPILOT: Final = "autopilot-like"
ORACLE: Final = "oracle"


@dataclass(frozen=True, slots=True)
class SlowScore:
    """One policy on one slow data set; shares of 1."""

    slack: float
    violating: float
    unmet: float
    native: bool = True  # made for this kind of resource


SlowScores = Mapping[str, Mapping[str, SlowScore]]
"""Scores by data set and policy."""

BASELINES: Final[Mapping[str, Mapping[str, SlowScore]]] = {
    "planetlab cpu": {
        AUTOPILOT: SlowScore(0.574, 0.048, 0.032),
        "static p95": SlowScore(0.518, 0.041, 0.030),
        "static peak": SlowScore(0.76, 0.0, 0.0),
    },
    "google cpu": {"static peak": SlowScore(0.337, 0.0, 0.0), AUTOPILOT: SlowScore(0.19, 0.009, 0.001)},
    "google memory": {"static peak": SlowScore(0.145, 0.0, 0.0), AUTOPILOT: SlowScore(0.12, 0.003, 0.001)},
}
AIMS: Final[Mapping[str, float]] = {"planetlab cpu": 0.40, "google cpu": 0.14, "google memory": 0.09}


@dataclass(frozen=True, slots=True)
class Verdict:
    """One thing that guestd is to reach, with what it came to."""

    data: str
    what: str
    reached: bool
    numbers: str


def verdicts(slow: SlowScores) -> Iterator[Verdict]:
    """What guestd is to reach in regime (a), for each data set."""
    for data, scores in slow.items():
        ours, theirs = scores.get(GUESTD), scores.get(AUTOPILOT)
        if ours is None or theirs is None:
            continue
        for name in ("slack", "unmet"):
            mine, other = getattr(ours, name), getattr(theirs, name)
            yield Verdict(data, f"{name} below {AUTOPILOT}", mine < other, f"{mine:.2%} against {other:.2%}")
        if data in AIMS:
            aim = AIMS[data]
            yield Verdict(data, f"slack of {aim:.0%} at most", ours.slack <= aim, f"{ours.slack:.2%}")


def document(slow: SlowScores, fast: Mapping[str, tuple[Fleet, Sequence[Result]]], traces: str) -> dict[str, Any]:
    """Everything, for ``scoreboard.json``: schema 1, shares of 1, bytes, seconds."""
    return {
        "schema": SCHEMA,
        "guestd": guestd.__version__,
        "traces": traces,
        "slow": {
            "data": {
                data: {policy: _rounded(asdict(score)) for policy, score in scores.items()}
                for data, scores in slow.items()
            },
            "baselines": {
                data: {policy: asdict(score) for policy, score in scores.items()} for data, scores in BASELINES.items()
            },
            "aims_slack": dict(AIMS),
            "verdicts": [asdict(verdict) for verdict in verdicts(slow)],
        },
        "fast": {
            "host_bytes": HOST_BYTES,
            "unmet_share": UNMET_SHARE,
            "precision_bytes": PRECISION_BYTES,
            "reaction_seconds": REACTION_SECONDS,
            "plug_bytes_per_second": PLUG_RATE,
            "unplug_bytes_per_second": UNPLUG_RATE,
            "kernel_bytes": KERNEL_BYTES,
            "data": {name: fast_regime.as_json(fleet, results) for name, (fleet, results) in fast.items()},
        },
    }


def slow_table(data: str, scores: Mapping[str, SlowScore]) -> "Table":
    """Regime (a) on one data set, with the baseline where there is one."""
    from rich.table import Table

    table = Table(title=f"(a) {data}: 5-minute samples, one sample of lag", title_justify="left")
    table.add_column("policy")
    for heading in ("slack %", "violating %", "unmet %", "baseline"):
        table.add_column(heading, justify="right")
    for policy, one in sorted(scores.items(), key=lambda entry: (entry[0] != GUESTD, entry[1].slack)):
        known = BASELINES.get(data, {}).get(policy)
        baseline = f"{100 * known.slack:g}/{100 * known.violating:g}/{100 * known.unmet:g}" if known else ""
        style = "bold" if policy == GUESTD else None
        name = policy if one.native else f"{policy} (made for memory)"
        table.add_row(
            name, f"{one.slack:.1%}"[:-1], f"{one.violating:.2%}"[:-1], f"{one.unmet:.3%}"[:-1], baseline, style=style
        )
    return table


def verdict_table(found: Sequence[Verdict]) -> "Table":
    """What is reached, and what is not."""
    from rich.table import Table

    table = Table(title="What guestd is to reach in (a)", title_justify="left")
    for heading in ("data", "aim", "came to", ""):
        table.add_column(heading)
    for one in found:
        table.add_row(one.data, one.what, one.numbers, "reached" if one.reached else "NOT REACHED")
    return table


def fast_table(fleet: Fleet, results: Sequence[Result]) -> "Table":
    """Regime (b) on one fleet."""
    from rich.table import Table

    title = f"(b) {fleet.name}: {fleet.vms} VMs, at most {UNMET_SHARE:.1%} of the demand unmet"
    table = Table(title=title, title_justify="left")
    table.add_column("policy")
    for heading in (
        f"VMs per {HOST_BYTES // GIB} GiB",
        "host GiB",
        "resizes/VM·h",
        "slack %",
        "short % of samples",
        "short s/VM·h",
        "worst GiB",
        "unmet % if memory for all",
    ):
        table.add_column(heading, justify="right")
    for one in sorted(results, key=lambda entry: -(entry.vms_per_host(fleet.vms) or 0.0)):
        density, outcome = one.vms_per_host(fleet.vms), one.fitting or one.ample
        table.add_row(
            one.policy,
            "never" if density is None else f"{density:.1f}",
            f"{outcome.host_bytes / GIB:.0f}",
            f"{outcome.resizes_per_vm_hour:,.0f}",
            f"{outcome.slack_share:.1%}"[:-1],
            f"{outcome.short_share:.2%}"[:-1],
            f"{outcome.short_seconds_per_vm_hour:.0f}",
            f"{outcome.worst_short_bytes / GIB:.2f}",
            f"{one.ample.unmet_share:.3%}"[:-1],
            style="bold" if one.policy == GUESTD else None,
        )
    return table


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {key: round(value, 6) for key, value in values.items()}
