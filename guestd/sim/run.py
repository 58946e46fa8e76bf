"""Both production cores over the load of a `Profile`, with hypervisor and guests that behave as described.

The law:

1. Decisions are `sim.world`'s, that is the cores'. Here is only load, behaviour and bookkeeping.
2. Chance is drawn from the seed, for each VM from its own numbers: the same arguments give the same run.
3. Amounts are kept exactly between the world's steps: load is a line from point to point, what a VM has a level.
   What programs want and the VM lacks is *unmet*. Memory that is lacking is swapped out and stays wanted.

Weak spots: work that waited for a CPU is not done later; a program that lacks memory does not slow down.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, cast

import numpy as np

from guestd.broker.core.ledger import HostCapacity, admit
from guestd.broker.core.track import Timing
from guestd.broker.hypervisor.fake import FakeVm, Fault
from guestd.guest.core.actions import Settings
from guestd.guest.core.ops import HandResult, HandStatus, Op
from guestd.model.guest import Inventory, Sample
from guestd.model.resources import Kind, Limits
from guestd.model.units import GIB, MIB, MILLICORES_PER_VCPU, round_up
from guestd.sim.guest import SimGuest
from guestd.sim.kernel import BLOCK_BYTES, GuestKernel, Load
from guestd.sim.load import Profile
from guestd.sim.watch import Watch
from guestd.sim.world import World

_EBUSY: Final = 16
_GLANCE_SECONDS: Final = 0.25  # as in `guest.glance`
_GLANCE_BYTES: Final = 4 * MIB
_TRIGGER_SECONDS: Final = 0.5  # a PSI trigger fires at most so often


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How hypervisors and guests behave: seconds, bytes per second, shares of 1.

    The latencies make a program that begins to take memory have more of it after the 0.4 s that `make bench`
    measured in a real VM; the rates are those of `sim.world`.

    :param plug_seconds: from a request to the first page, and to a vCPU.
    :param unplug_seconds: from a request until the guest begins to give memory.
    :param cpu_unplug_seconds: until a guest lets one vCPU go.
    :param refusals: of what its daemon asks of a guest's kernel, what fails with EBUSY; of the requests to shrink
        memory, those with which the guest stops half way.
    :param failures: of the requests to the hypervisor, those that it refuses.
    :param lost_answers: of the requests, those whose answer is lost; half of them were carried out.
    """

    plug_seconds: float = 0.1
    plug_rate: int = 4 * GIB
    unplug_seconds: float = 0.1
    unplug_rate: int = 512 * MIB
    cpu_unplug_seconds: float = 0.1
    refusals: float = 0.0
    failures: float = 0.0
    lost_answers: float = 0.0


class BehavedVm(FakeVm):
    """A `FakeVm` that needs a moment before it follows, and fails its share of requests."""

    def __init__(self, limits: Limits, behaviour: Behaviour, rng: np.random.Generator) -> None:
        boot_bytes = round_up(limits.min.memory_bytes, BLOCK_BYTES)
        ceiling = {kind: limits.ceiling(kind) for kind in Kind}
        super().__init__(
            boot_bytes=boot_bytes,
            device_bytes=max(0, round_up(ceiling[Kind.MEMORY], BLOCK_BYTES) - boot_bytes),
            vcpus=-(-limits.min.cpu_millicores // MILLICORES_PER_VCPU),
            vcpus_max=-(-ceiling[Kind.CPU] // MILLICORES_PER_VCPU),
            plug_rate=behaviour.plug_rate,
            unplug_rate=behaviour.unplug_rate,
            cpu_unplug_seconds=behaviour.cpu_unplug_seconds,
        )
        self.stubborn_bytes = 0  # what the guest refuses to go below
        self.resizes = dict.fromkeys(Kind, 0)
        self._behaviour, self._rng = behaviour, rng
        self._wait = 0.0  # until the guest moves memory
        self._late: tuple[float, int] | None = None  # seconds until so many vCPUs are there
        self._asked = {Kind.CPU: self.boot_vcpus, Kind.MEMORY: boot_bytes}

    @property
    def moving(self) -> bool:
        return super().moving or self._late is not None

    async def request_vcpus(self, count: int) -> None:
        self._count(Kind.CPU, count)
        await super().request_vcpus(count)

    async def request_memory(self, amount_bytes: int) -> None:
        self._count(Kind.MEMORY, amount_bytes)
        there, behaviour = self.guest_memory_bytes, self._behaviour
        self.stubborn_bytes = 0
        self._wait = behaviour.plug_seconds if amount_bytes > there else behaviour.unplug_seconds
        if amount_bytes < there and self._rng.random() < behaviour.refusals:
            self.stubborn_bytes = (there + amount_bytes) // 2
        await super().request_memory(amount_bytes)

    def advance(self, seconds: float) -> None:
        self._wait = max(0.0, self._wait - seconds)
        if self._late is not None:
            left, count = self._late[0] - seconds, self._late[1]
            self._late = (left, count) if left > 0 else None
            if self._late is None:
                super()._set_vcpus(count)
                self._changed()
        super().advance(seconds)

    def _count(self, kind: Kind, amount: int) -> None:
        """One request: whether it is a resize, and what becomes of it."""
        self.resizes[kind] += amount != self._asked[kind]
        self._asked[kind] = amount
        draw, behaviour = self._rng.random(), self._behaviour
        if draw < behaviour.failures:
            self.fail_next(Fault.REFUSED)
        elif draw < behaviour.failures + behaviour.lost_answers:
            done = draw < behaviour.failures + behaviour.lost_answers / 2
            self.fail_next(Fault.LOST_DONE if done else Fault.LOST_NOT_DONE)

    def _set_vcpus(self, count: int) -> None:
        growing = count > len(self._cpus)
        self._late = (self._behaviour.plug_seconds, count) if growing and self._behaviour.plug_seconds else None
        if self._late is None:
            super()._set_vcpus(count)

    def _grow(self, budget: int | None) -> None:
        if self._wait <= 0:
            super()._grow(budget)

    def _shrink(self, budget: int | None) -> None:
        if self._wait <= 0:
            super()._shrink(budget)


@dataclass(slots=True)
class Account:
    """What became of one VM's load, summed over seconds: CPUs or bytes, times seconds.

    `wanted` is what programs wanted, `unmet` what of it there was not; `given` what was usable, and
    `short_seconds` how long anything was lacking. `worst_short` is the most that was lacking at once.
    """

    seconds: float = 0.0
    wanted: float = 0.0
    unmet: float = 0.0
    given: float = 0.0
    short_seconds: float = 0.0
    worst_short: float = 0.0

    def add(self, seconds: float, before: float, after: float, level: float) -> None:
        """A stretch in which the wish went straight from `before` to `after`, with `level` there."""
        low, high = sorted((before - level, after - level))
        self.seconds += seconds
        self.wanted += seconds * (before + after) / 2
        self.given += seconds * level
        if high <= 0:
            return
        share = 1.0 if low >= 0 else high / (high - low)
        self.unmet += seconds * share * (high + max(low, 0.0)) / 2
        self.short_seconds += seconds * share
        self.worst_short = max(self.worst_short, high)


class ProfileKernel(GuestKernel):
    """A guest kernel whose programs follow a `Profile`, and that swaps out what does not fit."""

    def __init__(self, vm: BehavedVm, load: Load, profile: Profile, refusals: float, rng: np.random.Generator) -> None:
        self.accounts = {kind: Account() for kind in Kind}
        self._times: list[float] = [*profile.time_seconds.tolist(), float("inf")]
        self._tasks: list[float] = profile.tasks.tolist()
        self._memory: list[float] = profile.memory_bytes.tolist()
        self._refusals, self._rng, self._own_vm = refusals, rng, vm
        self._at, self._index = 0.0, 0
        self._glanced = (0.0, self._memory[0])
        self._triggered = 0.0
        self._counted: tuple[int, int, int] | None = None  # plugged, blocks online, MemTotal
        self._inventory: tuple[object, Inventory] | None = None
        load.tasks, load.memory_bytes = self._tasks[0], int(self._memory[0])
        super().__init__(vm, load)

    @property
    def memory_total(self) -> int:
        plugged, online = self.vm.guest_memory_bytes, len(self.online_blocks)
        if self._counted is None or self._counted[:2] != (plugged, online):
            self._counted = (plugged, online, super().memory_total)
        return self._counted[2]

    def inventory(self) -> Inventory:
        self._refresh()
        key = (self.memory_total, self.vm.guest_memory_bytes, self.vm.guest_cpus, frozenset(self.online_cpus))
        if self._inventory is None or self._inventory[0] != key:
            self._inventory = key, super().inventory()
        return self._inventory[1]

    def next_event(self) -> float:
        """Seconds until the load next changes so that somebody might look."""
        left = max(0.0, self._times[self._index + 1] - self._at)
        return min(left, _GLANCE_SECONDS) if self._slope > _GLANCE_BYTES / _GLANCE_SECONDS else left

    def step(self, seconds: float) -> None:
        end = self._at + seconds
        total, online = float(self.memory_total), float(len(self.online_cpus))
        while self._at < end:
            until = min(end, self._times[self._index + 1])
            before, tasks = self._use(), self._tasks[self._index]
            passed, self._at = until - self._at, until
            self.accounts[Kind.MEMORY].add(passed, before, self._use(), total)
            self.accounts[Kind.CPU].add(passed, tasks, tasks, online)
            if until == self._times[self._index + 1]:
                self._index += 1
        self.load.tasks, self.load.memory_bytes = self._tasks[self._index], int(self._use())
        super().step(seconds)

    def take_trigger(self) -> bool:
        """Whether a PSI trigger fires, or the glance at free memory sees it fall (as in `guest.glance`)."""
        memory, (at, before) = self.load.memory_bytes, self._glanced
        fell = False
        if self._at - at >= _GLANCE_SECONDS - 1e-6:
            fell, self._glanced = memory - before > _GLANCE_BYTES, (self._at, memory)
        short = self.load.tasks > len(self.online_cpus) or memory > self.memory_total
        if short and self._at - self._triggered >= _TRIGGER_SECONDS:
            self._triggered = self._at
            return True
        return fell

    def sample(self) -> Sample:
        seen = super().sample()
        swapped = max(0, self.load.memory_bytes - seen.memory_total_bytes)
        if not swapped:
            return seen
        fields = {name: getattr(seen, name) for name in Sample.__slots__}
        return Sample(**{**fields, "swap_used_bytes": swapped})

    def perform(self, op: Op) -> HandResult:
        if self._refusals and self._rng.random() < self._refusals:
            return HandResult(op, HandStatus.FAILED, _EBUSY, self.op_seconds)
        return super().perform(op)

    def _keep(self) -> None:
        super()._keep()
        stubborn = min(self.vm.guest_memory_bytes, self._own_vm.stubborn_bytes)
        self.vm.guest_keeps_bytes = max(self.vm.guest_keeps_bytes, stubborn)

    @property
    def _slope(self) -> float:
        """Bytes per second by which memory in use grows now."""
        index = self._index
        if index + 1 >= len(self._memory):
            return 0.0
        return (self._memory[index + 1] - self._memory[index]) / (self._times[index + 1] - self._times[index])

    def _use(self) -> float:
        return float(self._memory[self._index] + self._slope * (self._at - self._times[self._index]))


@dataclass(slots=True)
class Row:
    """One VM at one moment: CPUs, bytes. `needed` is what its daemon last said, `held` what it is charged."""

    tasks: float
    cpus_online: int
    cpus_needed: float
    cpus_held: float
    memory_used: int
    memory_usable: int
    memory_needed: int
    memory_held: int
    resizes: int


@dataclass(slots=True)
class SimVm:
    """A VM of a run."""

    name: str
    limits: Limits
    guest: SimGuest
    vm: BehavedVm
    kernel: ProfileKernel
    rows: list[Row] = field(default_factory=list)


class _Unwatched:
    """In the place of `invariants.Watch`: sees nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


class Run:
    """A host, its broker and VMs with load; time passes in `advance`.

    :param checked: whether the invariants are checked after every step: a third of the time.
    :raise AdmissionError: When the minimums do not fit the host.
    """

    def __init__(
        self,
        host: HostCapacity,
        vms: Sequence[tuple[Profile, Limits]],
        behaviour: Behaviour | None = None,
        seed: int = 0,
        timing: Timing | None = None,
        settings: Settings | None = None,
        step_seconds: float = 0.05,
        checked: bool = True,
    ) -> None:
        admit(host, {profile.name: limits for profile, limits in vms})
        behaviour = behaviour or Behaviour()
        self.world = World(host, timing, settings=settings, step_seconds=step_seconds)
        if not checked:
            self.world.watch = cast(Watch, _Unwatched())
        self.vms: list[SimVm] = []
        self.seconds = 0.0
        self.times: list[float] = []
        for number, (profile, limits) in enumerate(vms):
            rng = np.random.default_rng([seed, number])
            vm = BehavedVm(limits, behaviour, rng)
            guest = self.world.add(profile.name, limits, vm)
            kernel = ProfileKernel(vm, guest.load, profile, behaviour.refusals, rng)
            guest.kernel = kernel
            self.vms.append(SimVm(profile.name, limits, guest, vm, kernel))

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        end = self.seconds + seconds
        step = self.world.step_seconds
        while self.seconds < end - step / 2:
            quiet = min(vm.kernel.next_event() for vm in self.vms)
            steps = max(1, round(min(quiet, end - self.seconds) / step))
            self.world.run(steps * step)
            self.seconds += steps * step

    def record(self, seconds: float, every_seconds: float, progress: Callable[[float], None] = lambda _: None) -> None:
        """Let time pass, and keep a `Row` of each VM at the start and every so often.

        :param progress: hears the share of `seconds` that has passed.
        """
        count = max(1, round(seconds / every_seconds))
        for number in range(count + 1):
            if number:
                self.advance(number * seconds / count - self.seconds)
            self.times.append(self.seconds)
            for vm in self.vms:
                vm.rows.append(self._row(vm))
            progress(number / count)

    def _row(self, vm: SimVm) -> Row:
        broker = self.world.broker
        assert broker is not None, "a run has a broker"
        known = broker.guests[vm.name]
        held = known.reserved
        needed = known.demand.needed if known.demand is not None else held
        return Row(
            tasks=vm.kernel.load.tasks,
            cpus_online=len(vm.kernel.online_cpus),
            cpus_needed=needed.cpu_millicores / MILLICORES_PER_VCPU,
            cpus_held=held.cpu_millicores / MILLICORES_PER_VCPU,
            memory_used=vm.kernel.load.memory_bytes,
            memory_usable=vm.kernel.memory_total,
            memory_needed=needed.memory_bytes,
            memory_held=held.memory_bytes,
            resizes=sum(vm.vm.resizes.values()),
        )
