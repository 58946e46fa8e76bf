"""Regime (b): many VMs on one host, their use known to the second, grants that take their time.

A `Fleet` is made from a few measured VMs: VM i runs trace ``i % count``, begun at another place and run
round. The places follow the golden ratio, so they are spread evenly for any number of VMs.

The law, for every policy alike:

1. What a VM needs is what its programs use and what its kernel keeps beside that (`KERNEL_BYTES`). What it
   lacks is *unmet*; it is swapped out, stays wanted, and a policy can see it (`used` above `limit`).
2. A decision reaches the guest after `REACTION_SECONDS`. Then memory comes at `PLUG_RATE` and goes at `UNPLUG_RATE`; a
   guest never gives what it uses.
3. Host memory is never overcommitted: what comes waits for what goes, and shares in proportion to what would come.
4. All VMs begin with what they need then, and the first `WARM_UP_SECONDS` are not scored.

Weak spots: peers are at their best here, every decision is carried out and none refused; a build that lacks memory
would slow down and want less at once, here use goes on as if nothing lacked; page cache costs nothing when it is
dropped.
"""

from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from guestd.model.resources import Kind
from guestd.model.units import GIB, MIB
from guestd.sim.load import Profile, from_memory
from guestd.sim.peers.base import HostSample, Policy
from guestd.sim.traces import MemoryTrace

Array = npt.NDArray[np.float64]

KERNEL_BYTES: Final = 48 * MIB
"""Of a VM's memory that MemTotal does not show; as in `sim.kernel`."""
REACTION_SECONDS: Final = 0.1
"""From a decision to the first page: message, record, QMP and the driver's wake-up. With it, a program that begins
to take memory in `sim` has more of it after the 0.4 s that `make bench` measured in a real VM (README)."""
PLUG_RATE: Final = 4 * GIB
"""Bytes per second that a guest takes from virtio-mem, as in `sim.world`."""
UNPLUG_RATE: Final = 512 * MIB
"""Bytes per second that a guest gives back, as in `sim.world`."""
WARM_UP_SECONDS: Final = 120.0
STEP_SECONDS: Final = 0.25
SUMMARY_SECONDS: Final = 60.0
"""A policy that decides at least so seldom is told the highest use since it last did, others the use of the moment."""
RESIZE_BYTES: Final = MIB
"""A decision that differs by less is none."""
_GOLDEN: Final = 0.6180339887498949


@dataclass(frozen=True, slots=True)
class Fleet:
    """VMs of one host.

    :param seconds: length of a run, warm-up included.
    """

    name: str
    traces: tuple[MemoryTrace, ...]
    vms: int
    seconds: float
    minimum_bytes: int = GIB
    maximum_bytes: int = 16 * GIB

    def shift(self, number: int) -> float:
        """Where in its trace a VM begins, in seconds."""
        times = self._trace(number).time_seconds
        return float((number * _GOLDEN) % 1.0 * (times[-1] - times[0]))

    def profiles(self) -> list[Profile]:
        """The load of each VM."""
        return [
            from_memory(self._trace(number), f"vm-{number:02}", self.shift(number)) for number in range(self.vms)
        ]  # fmt: skip

    def use(self, begin: float = 0.0, end: float | None = None) -> tuple[Array, Array]:
        """Memory used and cached, (steps, VMs) bytes each, every `STEP_SECONDS`; without `end` of the whole run, below
        0 what was before it.
        """
        grid = np.arange(begin, self.seconds if end is None else end, STEP_SECONDS)
        used, cached = np.empty((len(grid), self.vms)), np.empty((len(grid), self.vms))
        for number in range(self.vms):
            trace = self._trace(number)
            times = trace.time_seconds - trace.time_seconds[0]
            length = float(times[-1] + np.median(np.diff(times)))
            at = grid + self.shift(number)
            used[:, number] = np.interp(at, times, trace.used_bytes, period=length)
            cached[:, number] = np.interp(at, times, trace.cached_bytes, period=length)
        return used, cached

    @property
    def ample_bytes(self) -> int:
        """A host on which every VM can have its maximum."""
        return self.vms * self.maximum_bytes

    def _trace(self, number: int) -> MemoryTrace:
        return self.traces[number % len(self.traces)]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a policy served a fleet on a host of `host_bytes`. Shares of 1; a sample is one step of one VM.

    :param unmet_share: Σ what lacked / Σ used.
    :param short_share: samples in which anything lacked: when the kernel would swap, or kill.
    :param short_seconds_per_vm_hour: the same in seconds.
    :param worst_short_bytes: the most that one VM lacked.
    :param slack_share: 1 - Σ min(needed, given) / Σ given.
    :param resizes_per_vm_hour: requests to the hypervisor for another amount.
    """

    host_bytes: int
    unmet_share: float
    short_share: float
    short_seconds_per_vm_hour: float
    worst_short_bytes: int
    slack_share: float
    resizes_per_vm_hour: float

    def as_json(self) -> dict[str, float]:
        """All fields, rounded so that they compare."""
        return {key: round(value, 6) for key, value in asdict(self).items()}


def score(host_bytes: int, used: Array, given: Array, resizes: int) -> Outcome:
    """From what was used and what each VM had, (steps, VMs) bytes each, from the start of the run, and the resizes
    begun after the warm-up.
    """
    first = round(WARM_UP_SECONDS / STEP_SECONDS)
    used, given = used[first:], given[first:]
    lacking = np.maximum(used + KERNEL_BYTES - given, 0.0)
    short_share = float((lacking > 0).mean())
    return Outcome(
        host_bytes=host_bytes,
        unmet_share=float(lacking.sum() / used.sum()),
        short_share=short_share,
        short_seconds_per_vm_hour=short_share * 3600,
        worst_short_bytes=round(float(lacking.max())),
        slack_share=float(1 - np.minimum(used + KERNEL_BYTES, given).sum() / given.sum()),
        resizes_per_vm_hour=resizes / (used.size * STEP_SECONDS / 3600),
    )


def play(policy: Policy, fleet: Fleet, host_bytes: int, used: Array, cached: Array) -> tuple[Array, int]:
    """What each VM had, (steps, VMs) bytes, and how many resizes were begun after the warm-up.

    :param used: as is `cached`, of `Fleet.use`.
    """
    steps, vms = used.shape
    minimum, maximum = np.full(vms, float(fleet.minimum_bytes)), np.full(vms, float(fleet.maximum_bytes))
    every = max(1, round(policy.interval_seconds / STEP_SECONDS))
    first = round(WARM_UP_SECONDS / STEP_SECONDS)
    host = _Memory(float(host_bytes), np.clip(used[0] + KERNEL_BYTES, minimum, maximum))
    given = np.empty_like(used)
    resizes = 0
    for start in range(0, steps, every):
        seen = used[start]
        if policy.interval_seconds >= SUMMARY_SECONDS:
            seen = used[max(0, start - every) : start + 1].max(axis=0)
        sample = HostSample(Kind.MEMORY, seen, cached[start], host.held, minimum, maximum, host.capacity, float(GIB))
        begun = host.ask(sample.bounded(policy.decide(start * STEP_SECONDS, sample)))
        resizes += begun if start >= first else 0
        for step in range(start, min(start + every, steps)):
            if host.moving:
                host.move(used[step] + KERNEL_BYTES)
            given[step] = host.held
    return given, resizes


class _Memory:
    """Memory of one host's VMs on its way from what they have to what was decided (rules 2 and 3)."""

    def __init__(self, capacity: float, held: Array) -> None:
        self.capacity = capacity
        self.held = held * min(1.0, capacity / held.sum())
        self.target = self.held.copy()
        self._waits = np.zeros(len(held))  # seconds until the guest hears of it
        self.moving = False

    def ask(self, target: Array) -> int:
        """Another decision; returns for how many VMs it is another one."""
        changed = np.abs(target - self.target) >= RESIZE_BYTES
        self.target = np.where(changed, target, self.target)
        self._waits = np.where(changed, REACTION_SECONDS, self._waits)
        self.moving = self.moving or bool(changed.any())
        return int(changed.sum())

    def move(self, needed: Array) -> None:
        """One step."""
        seconds = np.maximum(STEP_SECONDS - self._waits, 0.0)
        self._waits = np.maximum(self._waits - STEP_SECONDS, 0.0)
        missing = self.target - self.held
        down = np.minimum(np.maximum(-missing, 0.0), seconds * UNPLUG_RATE)
        held = self.held - np.minimum(down, np.maximum(self.held - needed, 0.0))
        up = np.minimum(np.maximum(missing, 0.0), seconds * PLUG_RATE)
        wanted, free = float(up.sum()), max(0.0, self.capacity - float(held.sum()))
        self.held = held + (up if wanted <= free else up * (free / wanted))
        self.moving = bool((self.held != self.target).any())
