"""One VM of a comparison: it has what was asked for, `PLUG_SECONDS` later, and counts what a kernel counts.

A toy: memory that is missing makes every task stall and grows nothing; files that do not fit are read again in the
share that is missing, 8,000 pages a second at most; a stream fills what is free with cache.
"""

import math
from collections import deque

from guestd.model.guest import Sample
from guestd.model.messages import Throttle
from guestd.model.units import MIB, MILLICORES_PER_VCPU
from guestd.sim.estimators.shapes import Want

PLUG_SECONDS = 0.3
CPUS = 64
LEAST_BYTES, MOST_BYTES = 512 * MIB, 8192 * MIB
_REREAD_PAGES = 8000.0
_PAGE = 4096
_CGROUP_CPUS = 0.7


class ToyVm:
    """Time exists as what `step` is told."""

    def __init__(self, quota_millicores: int = 0) -> None:
        self.cpus, self.memory_bytes, self.want = 1, LEAST_BYTES, Want()
        self.quota_millicores, self.throttled = quota_millicores, False
        self.load1 = 0.0
        self.busy_seconds: dict[int, float] = {}
        self.idle_seconds: dict[int, float] = {}
        self.used_cpu_seconds = 0.0
        self._cpu_some = self._memory_some = self._io_some = self._refaults = 0.0
        self._cache = 0.0
        self._coming: deque[tuple[float, int, int]] = deque()

    def ask(self, cpus: int, memory_bytes: int, now: float) -> None:
        """What is to come; whole CPUs, bytes."""
        most = (max(1, min(CPUS, cpus)), max(LEAST_BYTES, min(MOST_BYTES, memory_bytes)))
        self._coming.append((now + PLUG_SECONDS, *most))

    def step(self, want: Want, seconds: float, now: float) -> None:
        """Programs want that for a while."""
        self.want = want
        while self._coming and self._coming[0][0] <= now:
            _, self.cpus, self.memory_bytes = self._coming.popleft()
        self._run(want, seconds)
        missing = want.memory_bytes - self.memory_bytes
        free = max(0.0, self.memory_bytes - want.memory_bytes)
        wanted = min(free, want.files_bytes) if want.files_bytes else self._cache
        wanted += want.stream_pages_per_second * _PAGE * seconds
        self._cache = min(free * 0.98, wanted)
        memory_cgroup = want.cgroup and want.tasks < 1
        share = max(0.0, 1 - self._cache / want.files_bytes) if want.files_bytes else 0.0
        again = 0.5 if memory_cgroup else share if share > 0.03 else 0.0
        self._refaults += again * _REREAD_PAGES * seconds
        self._io_some += (min(1.0, again) if again else 0.5 if want.stream_pages_per_second else 0.0) * seconds
        self._memory_some += (1.0 if missing > 0 else 0.5 * again) * seconds

    def _run(self, want: Want, seconds: float) -> None:
        held = want.cgroup and want.tasks >= 1
        running = min(_CGROUP_CPUS if held else want.tasks, self.cpus)
        quota = self.quota_millicores / MILLICORES_PER_VCPU
        self.throttled = bool(quota) and running > quota
        pace = quota / running if self.throttled else 1.0
        for number in range(self.cpus):
            share = running / self.cpus
            self.busy_seconds[number] = self.busy_seconds.get(number, 0.0) + share * pace * seconds
            self.idle_seconds[number] = self.idle_seconds.get(number, 0.0) + (1 - share) * seconds
        self.used_cpu_seconds += running * pace * seconds
        if (want.tasks > self.cpus or held) and not self.throttled:
            self._cpu_some += seconds
        self.load1 += (want.tasks - self.load1) * (1 - math.exp(-seconds / 60))

    @property
    def alarmed(self) -> float:
        """Seconds of stall so far, of any kind: what PSI triggers fire on."""
        return self._cpu_some + self._memory_some

    @property
    def throttle(self) -> Throttle | None:
        """What the broker would say."""
        return Throttle(self.quota_millicores, 900) if self.throttled else None

    def sample(self) -> Sample:
        """As `guestd.guest.sensors` would read it."""
        available = max(0, self.memory_bytes - self.want.memory_bytes)
        return Sample(
            {number: self.busy_seconds.get(number, 0.0) for number in range(self.cpus)},
            {number: self.idle_seconds.get(number, 0.0) for number in range(self.cpus)},
            *(0.0, round(self.want.tasks), round(self._cpu_some * 1e6), round(self._memory_some * 1e6), 0),
            *(self.memory_bytes, available, 0, round(self._refaults)),
            memory_free_bytes=max(0, round(available - self._cache)),
            io_some_us=round(self._io_some * 1e6),
        )
