"""Who asks for CPUs and memory of a `ToyVm`: guestd's estimators at their own pace, and peers' rules at theirs.

The peers' rules are those of `guestd.sim.peers`, with what they look at inside a VM instead of a host's books:
Neon reads the load of the last minute, utilisation is that of the interval.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from guestd.guest.core.actions import Settings
from guestd.guest.core.need_cpu import CpuEstimator
from guestd.guest.core.need_memory import MemoryEstimator
from guestd.guest.core.pace import Pace
from guestd.model.resources import Kind
from guestd.model.units import GIB, MIB, MILLICORES_PER_VCPU, round_up
from guestd.sim.estimators.vm import CPUS, LEAST_BYTES, MOST_BYTES, ToyVm
from guestd.sim.peers.base import HostSample, Policy
from guestd.sim.peers.cpuplugd import Cpuplugd
from guestd.sim.peers.hyperv import HyperV
from guestd.sim.peers.neon import Neon
from guestd.sim.peers.proxmox import Proxmox

BLOCK_BYTES = 128 * MIB
_TRIGGER_SECONDS = 0.1  # of stall: when a PSI trigger fires
_GLANCE_SECONDS = 0.25


class Asker(Protocol):
    """Decides when to look, and what to ask for."""

    name: str

    def look(self, vm: ToyVm, now: float) -> int | None:
        """CPUs or bytes to ask for from now on; None: no change. Called every 50 ms."""
        ...


class Guestd:
    """The production estimators, sampled as the daemon samples."""

    name = "guestd"

    def __init__(self, kind: Kind, now: float) -> None:
        self._kind = kind
        self._cpu, self._memory = CpuEstimator(), MemoryEstimator()
        self._settings = Settings()
        self._pace = Pace(self._settings, now)
        self._pace.watched = True
        self._stalled = self._glanced_at = 0.0
        self._free = self._used = 0
        self.reason = ""

    def look(self, vm: ToyVm, now: float) -> int | None:
        if vm.alarmed - self._stalled > _TRIGGER_SECONDS:
            self._stalled = vm.alarmed
            self._pace.alarm(now)
        if now - self._glanced_at >= _GLANCE_SECONDS - 1e-6:
            free = vm.sample().memory_free_bytes
            if self._free - free > self._settings.stir_bytes:
                self._pace.alarm(now)
            self._free, self._glanced_at = free, now
        if self._pace.due(now, True, vm.cpus <= 1) is None:
            return None
        sample = vm.sample()
        cpu = self._cpu.update(sample, vm.cpus, now, vm.throttle)
        memory = self._memory.update(sample, 0, 0, now)
        stirred = abs(memory.used_bytes - self._used) > self._settings.stir_bytes
        self._used = memory.used_bytes
        if cpu.waiting or memory.moving or memory.pressure or stirred:
            self._pace.moved(now)
        if self._kind is Kind.CPU:
            self.reason = cpu.reason.code
            return -(-cpu.needed_millicores // MILLICORES_PER_VCPU)
        self.reason = memory.reason.code
        return round_up(memory.needed_bytes, BLOCK_BYTES)


class Polling:
    """A peer's policy on a host of one VM, at the peer's interval.

    :param used: what it takes for the CPUs in use, from the VM and the seconds since the last look.
    """

    def __init__(self, policy: Policy, name: str, kind: Kind, now: float, load: bool = False) -> None:
        self._policy, self.name, self._kind, self._load = policy, name, kind, load
        self._next, self._before, self._cpu_seconds = now + 0.37 * policy.interval_seconds, now, 0.0

    def look(self, vm: ToyVm, now: float) -> int | None:
        if now < self._next:
            return None
        self._next += self._policy.interval_seconds
        if self._kind is Kind.CPU:
            used = (vm.used_cpu_seconds - self._cpu_seconds) / max(1e-9, now - self._before)
            self._cpu_seconds, self._before = vm.used_cpu_seconds, now
            seen = vm.load1 if self._load else used
            limits, standard = (float(vm.cpus), 1.0, float(CPUS)), 1.0
        else:
            seen, standard = float(vm.want.memory_bytes), float(GIB)
            limits = (float(vm.memory_bytes), float(LEAST_BYTES), float(MOST_BYTES))
        limit, least, most = (np.array([value]) for value in limits)
        capacity = 1.25 * float(most[0])
        sample = HostSample(self._kind, np.array([seen]), np.zeros(1), limit, least, most, capacity, standard)
        wanted = float(self._policy.decide(now, sample)[0])
        return int(np.ceil(wanted - 1e-9)) if self._kind is Kind.CPU else round(wanted)


class Utilisation:
    """A fifth above what was used in the interval, 90 % of all: one more."""

    name = "utilisation"
    interval_seconds = 5.0

    def decide(self, now: float, host: HostSample) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
        full = host.used > 0.9 * host.limit
        return host.bounded(np.where(full, host.limit + host.standard, np.ceil(host.used * 1.2)))


def askers(kind: Kind, now: float) -> list[Asker]:
    """All that ask for this kind; guestd first."""
    ours: list[Asker] = [Guestd(kind, now)]
    if kind is Kind.CPU:
        makers: list[Callable[[], Asker]] = [
            lambda: Polling(Neon(), "Neon, load1 / 0.9, 5 s", kind, now, load=True),
            lambda: Polling(Utilisation(), "utilisation, 5 s", kind, now),
            lambda: Polling(Cpuplugd(), "cpuplugd, 1 s", kind, now),
        ]
    else:
        makers = [
            lambda: Polling(Neon(), "Neon, 5 s", kind, now),
            lambda: Polling(Cpuplugd(), "cpuplugd, 1 s", kind, now),
            lambda: Polling(HyperV(), "Hyper-V, 1 s", kind, now),
            lambda: Polling(Proxmox(), "Proxmox, 10 s", kind, now),
        ]
    return ours + [make() for make in makers]
