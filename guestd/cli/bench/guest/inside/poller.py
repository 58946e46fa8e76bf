"""A guest daemon that looks at fixed intervals, as others do: guestd's own, with nothing but the sensing replaced.

Runs in the guest with guestd's environment, speaks guestd's protocol to the same broker, and carries out orders with
guestd's own machine and helper. What differs: when it samples, and which law makes a demand of the samples.

    neon-load1        CPU load1 / 0.9 each 5 s; memory each 100 ms, the mean of 5: above 85 % one unit (1 GiB) more, at
                      most once a second; each 5 s max(used / 0.75, (used + cache) / 0.9), down one unit at a time
                      and not where 0.85 x (target - 100 MiB) < mean + 100 MiB
    neon-utilisation  the same, with the CPUs in use over the last 5 s in load1's place
    cpuplugd          each 1 s; one CPU more when (1 - active) x online < 0.08, one less when idle x online > 1.15;
                      MemTotal / 40 more when pages are scanned for want of memory or free + cache < MemTotal / 10,
                      MemFree / 40 less when it is above that
    proxmox           each 10 s, memory only: 100 MiB more when a quarter of the minimum or less is available, else
                      100 MiB less

Sources: the projects' own (neon autoscaling, s390-tools' sample cpuplugd.conf, Proxmox' pvestatd). Memory that they
count in units is counted from what the VM had at boot. Where a law leaves something open, what is quicker was taken.
"""

import os
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from guestd.guest.core.actions import Settings
from guestd.guest.core.machine import GuestMachine
from guestd.guest.core.need_cpu import CpuEstimator, CpuNeed
from guestd.guest.core.need_memory import MemoryEstimator, MemoryNeed
from guestd.model.guest import Identity, Sample
from guestd.model.messages import Urgency
from guestd.model.reason import Reason

MIB = 1 << 20
GIB = 1 << 30

Numbers = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Cpus:
    """What a CPU law looks at."""

    used: float  # CPUs, over the last interval
    online: int
    load1: float


@dataclass(frozen=True, slots=True)
class Memory:
    """What a memory law looks at; bytes."""

    total: int  # MemTotal
    used: int  # what MemAvailable leaves
    free: int
    cache: int  # Cached without Shmem
    scanned: int  # pages, cumulative, by tasks that wait for them


class NeonCpu:
    """5 s."""

    interval_seconds = 5.0

    def __init__(self, by_load: bool) -> None:
        self._by_load = by_load

    def need(self, now: Cpus) -> float:
        return (now.load1 if self._by_load else now.used) / 0.9


class CpuplugdCpu:
    """1 s, one CPU at a time."""

    interval_seconds = 1.0

    def need(self, now: Cpus) -> float:
        idle = max(0.0, now.online - now.used)  # (1 - active) x online, and idle x online: idle CPUs both
        if idle < 0.08:
            return now.online + 1
        return now.online - 1 if idle > 1.15 else now.online


class NoCpu:
    """Has no law for CPUs: one is enough."""

    interval_seconds = 1.0

    def need(self, now: Cpus) -> float:
        return 1.0


class NeonMemory:
    """100 ms. Amounts are MemTotal's."""

    interval_seconds = 0.1

    def __init__(self) -> None:
        self._used: deque[int] = deque(maxlen=5)
        self._boot = 0
        self._target = 0
        self._asked_at = self._sized_at = float("-inf")

    def need(self, now: Memory, at: float) -> int:
        self._boot = self._boot or now.total
        self._target = self._target or now.total
        self._used.append(now.used)
        mean = sum(self._used) / len(self._used)
        if at - self._sized_at >= 5.0:
            self._sized_at = at
            self._size(max(now.used / 0.75, (now.used + now.cache) / 0.9), mean, now.total)
        if len(self._used) == 5 and mean > 0.85 * now.total and at - self._asked_at >= 1.0:
            self._asked_at = at
            self._target = max(self._target, now.total + GIB)
        return self._target

    def _size(self, wanted: float, mean: float, total: int) -> None:
        goal = self._boot + -(-max(0, round(wanted) - self._boot) // GIB) * GIB
        if goal >= total:
            self._target = max(goal, total)
            return
        less = max(goal, total - GIB)
        if 0.85 * (less - 100 * MIB) >= mean + 100 * MIB:
            self._target = less


class CpuplugdMemory:
    """1 s."""

    interval_seconds = 1.0

    def __init__(self) -> None:
        self._target = 0.0
        self._scanned: int | None = None

    def need(self, now: Memory, at: float) -> int:
        scanned, self._scanned = now.scanned - (self._scanned or now.scanned), now.scanned
        self._target = self._target or float(now.total)
        if scanned > 20 * 100 or now.free + now.cache < now.total / 10:  # 20 pages per tick of 10 ms
            self._target = max(self._target, now.total) + now.total / 40
        else:
            self._target = max(0.0, min(self._target, now.total) - now.free / 40)
        return round(self._target)


class ProxmoxMemory:
    """10 s."""

    interval_seconds = 10.0

    def __init__(self) -> None:
        self._boot = 0
        self._target = 0

    def need(self, now: Memory, at: float) -> int:
        self._boot = self._boot or now.total
        self._target = self._target or now.total
        if now.total - now.used <= self._boot / 4:
            self._target = now.total + 100 * MIB
        else:
            self._target = max(self._boot, min(self._target, now.total) - 100 * MIB)
        return self._target


CpuLaw = NeonCpu | CpuplugdCpu | NoCpu
MemoryLaw = NeonMemory | CpuplugdMemory | ProxmoxMemory

LAWS: dict[str, Callable[[], tuple[CpuLaw, MemoryLaw]]] = {
    "neon-load1": lambda: (NeonCpu(by_load=True), NeonMemory()),
    "neon-utilisation": lambda: (NeonCpu(by_load=False), NeonMemory()),
    "cpuplugd": lambda: (CpuplugdCpu(), CpuplugdMemory()),
    "proxmox": lambda: (NoCpu(), ProxmoxMemory()),
}


def cpus_used(before: Sample, after: Sample) -> float:
    """CPUs in use between two samples: the busy share of the time that was accounted for, per CPU."""
    used = 0.0
    for number, busy_after in after.cpu_busy_seconds.items():
        busy = busy_after - before.cpu_busy_seconds.get(number, busy_after)
        idle_after = after.cpu_idle_seconds.get(number, 0.0)
        idle = idle_after - before.cpu_idle_seconds.get(number, idle_after)
        used += busy / (busy + idle) if busy + idle > 0 else 0.0
    return used


class PollingCpu(CpuEstimator):
    """guestd's estimator, with a law's need in place of its own at the law's interval."""

    def __init__(self, law: CpuLaw, load1: Callable[[], float] = lambda: os.getloadavg()[0]) -> None:
        super().__init__()
        self._law, self._load1 = law, load1
        self._last: tuple[float, Sample] | None = None
        self._need: float | None = None

    def update(self, sample: Sample, online: int, now: float, *more: Any, **others: Any) -> CpuNeed:
        inner = super().update(sample, online, now, *more, **others)
        if self._last is None:
            self._last, self._need = (now, sample), float(online)
        elif now - self._last[0] >= self._law.interval_seconds - 0.02:
            self._need = self._law.need(Cpus(cpus_used(self._last[1], sample), online, self._load1()))
            self._last = (now, sample)
        needed = round((self._need or 0.0) * 1000)
        reason = Reason("cpu-polled", f"{needed / 1000:.2f} CPUs")
        return replace(inner, needed_millicores=needed, waiting=False, urgency=Urgency.NORMAL, reason=reason)


class PollingMemory(MemoryEstimator):
    """The same for memory. Floor and pressure stay guestd's: a shrink must not hurt."""

    def __init__(self, law: MemoryLaw, numbers: Callable[[], Numbers]) -> None:
        super().__init__()
        self._law, self._numbers = law, numbers
        self._at: float | None = None
        self._need = 0

    def update(self, sample: Sample, kernel_bytes: int, isolated_bytes: int, now: float) -> MemoryNeed:
        inner = super().update(sample, kernel_bytes, isolated_bytes, now)
        if self._at is None or now - self._at >= self._law.interval_seconds - 0.02:
            self._at = now
            self._need = self._law.need(look(sample, self._numbers()), now)
        needed = kernel_bytes + self._need
        reason = Reason("memory-polled", f"{needed // MIB} MiB")
        return replace(inner, needed_bytes=needed, moving=False, urgency=Urgency.NORMAL, reason=reason)


def look(sample: Sample, numbers: Numbers) -> Memory:
    """What a memory law looks at. `numbers`: /proc/meminfo in bytes and /proc/vmstat."""
    return Memory(
        total=sample.memory_total_bytes,
        used=sample.memory_total_bytes - sample.memory_available_bytes,
        free=numbers.get("MemFree", 0),
        cache=max(0, numbers.get("Cached", 0) - numbers.get("Shmem", 0)),
        scanned=numbers.get("pgscan_direct", 0),
    )


def kernel_numbers(root: Path = Path("/")) -> dict[str, int]:
    """/proc/meminfo in bytes and /proc/vmstat, in one."""
    numbers = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        numbers[name] = int(rest.split()[0]) << 10
    for line in (root / "proc/vmstat").read_text().splitlines():
        name, _, value = line.partition(" ")
        numbers[name] = int(value)
    return numbers


class PollingMachine(GuestMachine):
    """guestd's decisions on a law's demands. Nothing wakes it for a look at the load but its own interval."""

    law = ""

    def __init__(self, identity: Identity, now: float, settings: Settings | None = None) -> None:
        cpu, memory = LAWS[self.law]()
        pace = min(cpu.interval_seconds, memory.interval_seconds)
        paced = replace(settings or Settings(), quick_seconds=pace, calm_seconds=pace)
        super().__init__(identity, now, replace(paced, rest_seconds=pace, deep_rest_seconds=pace))
        self.cpu_estimator = PollingCpu(cpu)
        self.memory_estimator = PollingMemory(memory, kernel_numbers)

    def on_watched(self, watched: bool) -> None:
        """The kernel's triggers are not listened to."""

    def on_pressure(self, now: float) -> None:
        """Likewise."""


def main(law: str) -> None:
    """Be guestd with the machine above; its helper is forked before anything large is imported, as always."""
    from guestd.guest import main as guestd_main

    PollingMachine.law = law
    be_the_daemon = guestd_main._be_the_daemon

    def with_the_law(*words: Any) -> None:
        from guestd.guest import app

        vars(app).update(GuestMachine=PollingMachine)
        be_the_daemon(*words)

    vars(guestd_main).update(_be_the_daemon=with_the_law)
    sys.argv = ["guestd", "run"]
    guestd_main.main()


if __name__ == "__main__":
    main(sys.argv[1])
