"""Ramp: the fastest rate at which a program can take memory from 512 MiB to 2 GiB without an OOM kill or swap.

Rates are those of a ladder, each a half more than the one before. A rate counts when it went well twice in a row; the
search begins at a guess, climbs until it fails, or descends until it does not, by two after the first, and then halves
what lies between. guestd and the pollers take turns, each try in a VM of its own at its minimum. A try that is over
counts only when it held the rate (within a quarter): a program that the kernel makes wait for memory was not served at
that rate. What the VM can do with all memory there from the start is the end of the ladder for all.
"""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

from guestd.cli.bench.guest import report
from guestd.cli.bench.guest.rig import WORK, Rig
from guestd.cli.demo.run import GUEST_NAME
from guestd.model.units import MIB
from guestd.model.view import LimitsChange

GUESTD = "guestd"
ALL_THERE = "all there"
_STEP = 1.5
_FIRST_MIB = 4.0
_LATE = 1.25
_RUNGS = 14
LADDER = tuple(round(_FIRST_MIB * _STEP**rung) for rung in range(_RUNGS))
"""MiB/s."""

_GUESSES = {GUESTD: 10, "neon-utilisation": 4, "cpuplugd": 4, "proxmox": 1, ALL_THERE: 10}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is taken, and how sure it shall be."""

    total_bytes: int = 1536 * MIB  # with what the system uses: 512 MiB to 2 GiB need 1.5 GiB more
    tries: int = 2
    long_seconds: float = 60.0  # a ramp that takes so long has met every phase of a poller's interval: once is enough

    def seconds(self, rate_mib: int) -> float:
        """How long a ramp takes that holds its rate."""
        return self.total_bytes / MIB / rate_mib


@dataclass(frozen=True, slots=True)
class Try:
    """One ramp."""

    rate_mib: int
    seconds: float | None  # None: it did not end
    oom_kills: int
    swapped_pages: int
    total_bytes: int

    @property
    def well(self) -> bool:
        """It ended, nothing was killed or swapped, and the rate was held."""
        if self.seconds is None or self.oom_kills or self.swapped_pages:
            return False
        return self.seconds <= _LATE * self.total_bytes / MIB / self.rate_mib


@dataclass(slots=True)
class Search:
    """Which rung is next; finds the highest one that holds. Pure."""

    rung: int
    tries: int
    held: int = -1  # the highest that went well
    failed: int = _RUNGS  # the lowest that did not
    _well: int = 0
    _stride: int = 1

    @property
    def over(self) -> bool:
        """Nothing is left to be tried."""
        return self.failed - self.held <= 1

    def took(self, well: bool, long: bool = False) -> None:
        """One try of `rung` is over. `long`: once is enough."""
        if not well:
            self.failed, self._well = self.rung, 0
        else:
            self._well += 1
            if self._well < self.tries and not long:
                return
            self.held, self._well = self.rung, 0
        if self.over:
            return
        if self.held < 0:
            self.rung = max(0, self.failed - self._stride)
            self._stride = 2  # a longer one ends where a ramp takes minutes
        elif self.failed < _RUNGS:
            self.rung = (self.held + self.failed) // 2
        else:
            self.rung = self.held + 1


@dataclass(slots=True)
class Measured:
    """The tries of each daemon, and what came of them."""

    tries: dict[str, list[Try]] = field(default_factory=dict)
    best: dict[str, int] = field(default_factory=dict)  # MiB/s, 0 for none


async def measure(boot: Callable[[], AbstractAsyncContextManager[Rig]], plan: Plan) -> Measured:
    """The whole benchmark.

    :param boot: a new VM.
    """
    measured = Measured()
    searches = {name: Search(guess, plan.tries) for name, guess in _GUESSES.items()}
    while any(not search.over for search in searches.values()):
        for name, search in searches.items():
            if not search.over:
                async with boot() as rig:
                    await _ready(rig, name)
                    await _try(rig, plan, measured, name, search)
    measured.best = {name: LADDER[search.held] if search.held >= 0 else 0 for name, search in searches.items()}
    return measured


async def _ready(rig: Rig, name: str) -> None:
    """guestd or a poller with a VM at its minimum, or guestd with all memory there."""
    if name == ALL_THERE:
        limits = LimitsChange(memory_min_bytes=rig.machine.config.max_memory_bytes)
        await rig.broker.set_limits(GUEST_NAME, limits)
        await rig.until(lambda: _has(rig, rig.machine.config.virtio_mem_bytes), "all memory to be there")
        return
    if name != GUESTD:
        await rig.use(name)
    await rig.at_minimum()


async def _try(rig: Rig, plan: Plan, measured: Measured, name: str, search: Search) -> None:
    rate_mib = LADDER[search.rung]
    nominal = plan.seconds(rate_mib)
    words = [WORK, "ramp", rate_mib, plan.total_bytes // MIB]
    answer = await rig.agent.ask("run", limit_seconds=60.0 + 2 * nominal, words=words)
    took = float(str(answer["out"]).split()[0]) if answer["exit"] == 0 else None
    done = Try(rate_mib, took, int(answer["oom_kills"]), int(answer["swapped_pages"]), plan.total_bytes)
    measured.tries.setdefault(name, []).append(done)
    search.took(done.well, long=nominal > plan.long_seconds)
    shown = "no end" if took is None else f"{took:.1f} s"
    rig.say(f"ramp: {name} at {rate_mib} MiB/s: {shown}, {'well' if done.well else 'not well'}")


async def _has(rig: Rig, amount: int) -> bool:
    return await rig.plugged() == amount


def document(measured: Measured) -> dict[str, Any]:
    """Judged."""
    peers = {name: best for name, best in measured.best.items() if name not in (GUESTD, ALL_THERE)}
    best = max(peers.values(), default=0)
    limit = measured.best.get(ALL_THERE, 0)
    guestd = measured.best.get(GUESTD, 0)
    note = f"the VM's own limit is {limit} MiB/s: not more than {limit / best:.2g} times can be" if best else ""
    target = report.Target(
        "ramp: guestd's fastest rate against the best poller's", report.ratio(guestd, best), 3.0, note=note
    )
    tries = {
        name: [{"rate_mib": t.rate_mib, "seconds": t.seconds, "oom_kills": t.oom_kills, "well": t.well} for t in made]
        for name, made in measured.tries.items()
    }
    return {
        "best_mib_per_second": measured.best,
        "tries": tries,
        "ladder_mib": list(LADDER),
        "targets": [target.document()],
    }


def lines(part: dict[str, Any]) -> list[str]:
    """The table."""
    rows = []
    for name, best in part["best_mib_per_second"].items():
        tries = part["tries"].get(name, [])
        failed = [one["rate_mib"] for one in tries if not one["well"]]
        rows.append([name, f"{best} MiB/s", f"{min(failed)} MiB/s" if failed else "-", str(len(tries))])
    return [*report.grid(["Ramp to 2 GiB", "holds", "fails from", "tries"], rows), ""]
