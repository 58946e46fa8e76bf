"""Regime (b) of the scoreboard: how much host memory a fleet needs under each policy.

Every policy serves the same `Fleet`. By bisection the smallest host is found on which no more than a given
share of the demand stays unmet: "VMs per host at equal unmet demand" is ``HOST_BYTES / (that host / VMs)``. The fleet
stays the same and the host varies, because whole VMs would be too coarse a measure and other VMs other load.

guestd is not modelled: the production cores run in `sim.world`, and all the rest is as `fleet` says.

What cannot be had: a policy that leaves more than the given share unmet even where every VM could have its
maximum has no such host.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from guestd.broker.core.ledger import HostCapacity
from guestd.guest.core.actions import Settings
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB, MILLICORES_PER_VCPU
from guestd.sim.peers import static
from guestd.sim.peers.autopilot import Autopilot
from guestd.sim.peers.base import HostSample, Policy
from guestd.sim.peers.cpuplugd import Cpuplugd
from guestd.sim.peers.hyperv import HyperV
from guestd.sim.peers.mom import Mom
from guestd.sim.peers.neon import Neon
from guestd.sim.peers.proxmox import Proxmox
from guestd.sim.peers.qmemman import Qmemman
from guestd.sim.peers.squeezed import Squeezed
from guestd.sim.run import Behaviour, Run
from guestd.sim.scoreboard.fleet import (
    KERNEL_BYTES,
    PLUG_RATE,
    REACTION_SECONDS,
    STEP_SECONDS,
    UNPLUG_RATE,
    WARM_UP_SECONDS,
    Fleet,
    Outcome,
    play,
    score,
)

Array = npt.NDArray[np.float64]

HOST_BYTES: Final = 64 * GIB
UNMET_SHARE: Final = 0.001
"""The common level of unmet demand."""
PRECISION_BYTES: Final = GIB
GUESTD: Final = "guestd"
EXAMPLE: Final = 1
"""The VM of a fleet that pictures show."""
_QUICK_SECONDS: Final = 0.125
"""Samples of a busy guest and steps of the world. Production takes 0.05 s; this takes half the time to compute and
makes guestd slower than it is, never faster: memory is there 0.47 s after the onset instead of 0.40."""

PEERS: Final[Sequence[Callable[[], Policy]]] = (Neon, Cpuplugd, Mom, HyperV, Proxmox, Squeezed, Qmemman)
"""Those that decide about memory from what they see."""

Player = Callable[[int], tuple[Array, int]]
"""Serves a fleet on a host of so many bytes: what each VM had, (steps, VMs) bytes, and the resizes."""


@dataclass(frozen=True, slots=True)
class Result:
    """One policy on one fleet.

    :param ample: on a host where every VM can have its maximum.
    :param fitting: on the smallest host that is enough; None: there is none.
    :param example: what VM `EXAMPLE` had on that host, or else on the ample one; bytes, every `STEP_SECONDS`.
    """

    policy: str
    ample: Outcome
    fitting: Outcome | None
    example: Array = field(repr=False)
    tried: tuple[Outcome, ...] = field(default=(), repr=False)

    def vms_per_host(self, vms: int) -> float | None:
        """VMs on a host of `HOST_BYTES`, from so many VMs on the host that was enough for them."""
        return None if self.fitting is None else HOST_BYTES / (self.fitting.host_bytes / vms)


class Clairvoyant:
    """Knows what each VM will use until a later decision could help, and gives use / 0.9; where the host has less, all
    give the same share of their margins.
    """

    name = "oracle"
    interval_seconds = 0.5

    def __init__(self, used: Array) -> None:
        ahead = round((2 * self.interval_seconds + REACTION_SECONDS) / STEP_SECONDS) + 1
        padded = np.concatenate([used, np.repeat(used[-1:], ahead, axis=0)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, ahead, axis=0)
        self._needed: Array = windows[: len(used)].max(axis=2) + KERNEL_BYTES

    def decide(self, now: float, host: HostSample) -> Array:
        needed: Array = self._needed[round(now / STEP_SECONDS)]
        margins = host.bounded(needed / 0.9) - needed
        over = float((needed + margins).sum()) - host.capacity
        return needed + margins * max(0.0, 1 - max(0.0, over) / float(margins.sum()))


def warm_autopilot(fleet: Fleet) -> Autopilot:
    """Autopilot-like after an hour: it has seen the highest use of each 5 minutes before the run."""
    policy = Autopilot()
    steps = round(policy.interval_seconds / STEP_SECONDS)
    before, _ = fleet.use(-12 * policy.interval_seconds, 0.0)
    nothing = np.zeros(fleet.vms)
    for start in range(0, len(before), steps):
        highest = before[start : start + steps].max(axis=0)
        seen = HostSample(Kind.MEMORY, highest, nothing, nothing, nothing, nothing, 0.0, float(GIB))
        policy.decide(start * STEP_SECONDS, seen)
    return policy


def guestd_player(fleet: Fleet, used: Array) -> Player:
    """The production cores on a fleet."""
    limits = Limits(
        Resources(MILLICORES_PER_VCPU, fleet.minimum_bytes), Resources(MILLICORES_PER_VCPU, fleet.maximum_bytes)
    )
    behaviour = Behaviour(REACTION_SECONDS, PLUG_RATE, REACTION_SECONDS, UNPLUG_RATE)

    def serve(host_bytes: int) -> tuple[Array, int]:
        host = HostCapacity(Resources(fleet.vms * MILLICORES_PER_VCPU, host_bytes))
        vms = [(profile, limits) for profile in fleet.profiles()]
        settings = Settings(quick_seconds=_QUICK_SECONDS)
        run = Run(host, vms, behaviour, settings=settings, step_seconds=_QUICK_SECONDS, checked=False)
        given = np.empty_like(used)
        before = 0
        for step in range(len(used)):
            run.advance(step * STEP_SECONDS - run.seconds)
            given[step] = [vm.kernel.memory_total + KERNEL_BYTES for vm in run.vms]
            if step * STEP_SECONDS < WARM_UP_SECONDS:
                before = sum(sum(vm.vm.resizes.values()) for vm in run.vms)
        return given, sum(sum(vm.vm.resizes.values()) for vm in run.vms) - before

    return serve


def peer_players(fleet: Fleet, used: Array, cached: Array, peers: Sequence[Callable[[], Policy]]) -> dict[str, Player]:
    """Those that know the past, and those that know it all, by name."""
    makers: dict[str, Callable[[], Policy]] = {
        "static peak": lambda: static.peak((used + KERNEL_BYTES).T),
        "static p95": lambda: static.p95((used + KERNEL_BYTES).T),
        "autopilot-like": lambda: warm_autopilot(fleet),
        **{make().name: make for make in peers},
        "oracle": lambda: Clairvoyant(used),
    }

    def player(make: Callable[[], Policy]) -> Player:
        return lambda host_bytes: play(make(), fleet, host_bytes, used, cached)

    return {name: player(make) for name, make in makers.items()}


def search(name: str, serve: Player, fleet: Fleet, used: Array, around: int | None = None) -> Result:
    """Find the smallest host that is enough.

    :param around: where to look first, in bytes; only saves time.
    """
    tried: dict[int, Outcome] = {}
    examples: dict[int, Array] = {}

    def result(fitting: Outcome | None) -> Result:
        example = examples[(fitting or ample).host_bytes]
        return Result(name, ample, fitting, example, tuple(tried.values()))

    def outcome(host_bytes: int) -> Outcome:
        if host_bytes not in tried:
            given, resizes = serve(host_bytes)
            tried[host_bytes] = score(host_bytes, used, given, resizes)
            examples[host_bytes] = given[:, EXAMPLE].copy()
        return tried[host_bytes]

    def enough(units: int) -> bool:
        return outcome(units * PRECISION_BYTES).unmet_share <= UNMET_SHARE

    ample = outcome(fleet.ample_bytes)
    if ample.unmet_share > UNMET_SHARE:
        return result(None)
    least, most = fleet.vms * fleet.minimum_bytes // PRECISION_BYTES, fleet.ample_bytes // PRECISION_BYTES
    low, high = (least, most) if around is None else _bracket(enough, least, most, around // PRECISION_BYTES)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return result(outcome(high * PRECISION_BYTES))


def _bracket(enough: Callable[[int], bool], least: int, most: int, guess: int) -> tuple[int, int]:
    """Two hosts near the guess, the smaller of which is not enough (or the least), the larger is (or the most)."""
    step = max(1, guess // 24)
    low = high = max(least, min(most, guess))
    if enough(guess):
        while low > least and enough(low):
            low, high, step = max(least, low - step), low, 2 * step
    else:
        while high < most and not enough(high):
            low, high, step = high, min(most, high + step), 2 * step
    return low, high


def compare(
    fleet: Fleet, peers: Sequence[Callable[[], Policy]] = PEERS, progress: Callable[[str], None] = lambda _: None
) -> list[Result]:
    """Every policy on a fleet; guestd is first.

    :param progress: hears the name of each policy before its turn.
    """
    used, cached = fleet.use()
    results = []
    for name, player in peer_players(fleet, used, cached, peers).items():
        progress(name)
        results.append(search(name, player, fleet, used))
    known = [result.fitting.host_bytes for result in results if result.fitting and result.policy == "oracle"]
    progress(GUESTD)
    around = round(known[0] * 1.15) if known else None
    return [search(GUESTD, guestd_player(fleet, used), fleet, used, around), *results]


def as_json(fleet: Fleet, results: Sequence[Result]) -> dict[str, Any]:
    """A fleet's results, as `scoreboard.json` holds them."""
    return {
        "vms": fleet.vms,
        "traces": [trace.name for trace in fleet.traces],
        "seconds": fleet.seconds,
        "policies": {
            result.policy: {
                "vms_per_host": _rounded(result.vms_per_host(fleet.vms)),
                "fitting": result.fitting.as_json() if result.fitting else None,
                "ample": result.ample.as_json(),
            }
            for result in results
        },
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
