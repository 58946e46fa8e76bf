"""The scoreboard's slow regime: 5-minute samples with one sample of lag.

The law:

1. The limit for sample t is decided from the samples before t only. A policy whose own interval is shorter sees the
   last sample's mean as constant load for 5 minutes and decides as often as it would, until its limits rest.
2. Policies see what VMs wanted, also above their limits; all see the same.
3. A VM's maximum, and its size before the first decision, is its peak in the whole trace; there is no minimum. The
   host's capacity, for peers that need one, is the sum of the peaks. 100 % is a VM of 4 vCPUs or 16 GiB, for peers
   with absolute constants. Page cache is not in these traces.
4. ``slack = 1 - sum min(use, limit) / sum limit``; ``violating`` is the share of (VM, sample) with use > limit;
   ``unmet = sum max(use - limit, 0) / sum use``; all after 24 samples of warm-up. Several days are averaged.

What this does not show: how quickly a policy reacts within 5 minutes. Peers that react in seconds look worse here
than they are, and peers made for memory alone are shown on CPU as well, marked as not native.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guestd.model.resources import Kind
from guestd.sim import traces
from guestd.sim.peers import static
from guestd.sim.peers.autopilot import Autopilot
from guestd.sim.peers.base import Array, HostSample, Policy
from guestd.sim.peers.cpuplugd import Cpuplugd
from guestd.sim.peers.forecaster import Guestd
from guestd.sim.peers.hyperv import HyperV
from guestd.sim.peers.mom import Mom
from guestd.sim.peers.neon import Neon
from guestd.sim.peers.oracle import Oracle
from guestd.sim.peers.proxmox import Proxmox
from guestd.sim.peers.qmemman import Qmemman
from guestd.sim.peers.squeezed import Squeezed
from guestd.sim.scoreboard.report import SlowScore
from guestd.sim.traces import SAMPLE_SECONDS, WARM_UP_SAMPLES

VM_VCPUS, VM_GIB = 4, 16
"""What 100 % stands for."""
_RESTING = 12
"""Decisions without a change after which a policy has come to rest; the longest memory of a peer is 10 samples."""

BOTH = frozenset(Kind)
MEMORY_ONLY = frozenset({Kind.MEMORY})


@dataclass(frozen=True, slots=True)
class Row:
    """How one policy did on one set of traces; shares from 0 to 1.

    :param data: ``planetlab cpu``, ``google cpu`` or ``google memory``.
    :param day: one file of several, or empty for the mean of all.
    :param native: whether the policy is made for this kind of resource.
    """

    data: str
    day: str
    policy: str
    native: bool
    slack: float
    violating: float
    unmet: float


@dataclass(frozen=True, slots=True)
class Entrant:
    """A policy to run, made anew for each trace from (use of the whole trace)."""

    make: Callable[[Array], Policy]
    kinds: frozenset[Kind] = BOTH


ENTRANTS = (
    Entrant(lambda use: Guestd(len(use))),
    Entrant(lambda use: Autopilot()),
    Entrant(static.peak),
    Entrant(static.p95),
    Entrant(lambda use: Neon()),
    Entrant(lambda use: Cpuplugd()),
    Entrant(lambda use: Mom(), MEMORY_ONLY),
    Entrant(lambda use: HyperV(), MEMORY_ONLY),
    Entrant(lambda use: Proxmox(), MEMORY_ONLY),
    Entrant(lambda use: Squeezed(), MEMORY_ONLY),
    Entrant(lambda use: Qmemman(), MEMORY_ONLY),
    Entrant(lambda use: Oracle(use, SAMPLE_SECONDS)),
)


@dataclass(frozen=True, slots=True)
class Part:
    """One file of traces."""

    data: str
    day: str
    kind: Kind
    use: Array


def read(root: Path) -> list[Part]:
    """All slow traces in a folder; what is not there is left out.

    :raise TraceError: When a file cannot be used.
    """
    parts = [Part("planetlab cpu", day, Kind.CPU, use) for day, use in traces.planetlab(root).items()]
    for name, use in traces.google(root).items():
        kind = Kind.CPU if name == "cpu" else Kind.MEMORY
        parts.append(Part(f"google {kind}", "", kind, use))
    return parts


def compare(root: Path) -> dict[str, dict[str, SlowScore]]:
    """Scores by data set and policy, days averaged; empty when there are no slow traces.

    :raise TraceError: When a file cannot be used.
    """
    scores: dict[str, dict[str, SlowScore]] = {}
    for row in run(read(root)):
        if not row.day:
            scores.setdefault(row.data, {})[row.policy] = SlowScore(row.slack, row.violating, row.unmet, row.native)
    return scores


def run(parts: Iterable[Part], entrants: Iterable[Entrant] = ENTRANTS) -> list[Row]:
    """Every policy on every trace, then the means of data sets of several days, in the given order."""
    parts, entrants, rows = list(parts), list(entrants), list[Row]()
    for part in parts:
        for entrant in entrants:
            policy = entrant.make(part.use)
            slack, violating, unmet = score(part.use, play(policy, part.use, part.kind))
            rows.append(Row(part.data, part.day, policy.name, part.kind in entrant.kinds, slack, violating, unmet))
    return rows + _means(rows)


def play(policy: Policy, use: Array, kind: Kind) -> Array:
    """The limit of each VM in each sample, (VMs, samples); the peak in the first, before there is a decision."""
    peak = use.max(axis=1)
    limits = np.empty_like(use)
    limits[:, 0] = peak
    nothing = np.zeros_like(peak)
    standard = 100.0 / (VM_VCPUS if kind is Kind.CPU else VM_GIB)
    decisions = max(1, round(SAMPLE_SECONDS / policy.interval_seconds))
    for sample in range(use.shape[1] - 1):
        limit, resting = limits[:, sample], 0
        for decision in range(1, decisions + 1):
            now = sample * SAMPLE_SECONDS + decision * SAMPLE_SECONDS / decisions
            seen = HostSample(kind, use[:, sample], nothing, limit, nothing, peak, float(peak.sum()), standard)
            before, limit = limit, policy.decide(now, seen)
            resting = resting + 1 if np.array_equal(before, limit) else 0
            if resting == _RESTING:
                break
        limits[:, sample + 1] = limit
    return limits


def score(use: Array, limits: Array) -> tuple[float, float, float]:
    """Slack, violating samples and unmet demand, as shares, after the warm-up."""
    used, limit = use[:, WARM_UP_SAMPLES:], limits[:, WARM_UP_SAMPLES:]
    short = np.maximum(used - limit, 0.0)
    given, wanted = float(limit.sum()), float(used.sum())
    slack = 1 - float(np.minimum(used, limit).sum()) / given if given > 0 else 0.0
    return slack, float(np.mean(short > 0)), float(short.sum()) / wanted if wanted > 0 else 0.0


def _means(rows: list[Row]) -> list[Row]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.day:
            found.setdefault((row.data, row.policy), []).append(row)
    return [
        Row(
            data,
            "",
            policy,
            days[0].native,
            float(np.mean([row.slack for row in days])),
            float(np.mean([row.violating for row in days])),
            float(np.mean([row.unmet for row in days])),
        )
        for (data, policy), days in found.items()
    ]
