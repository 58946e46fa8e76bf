"""What a guest kernel shows, on top of a `FakeVm`: CPUs and blocks arrive offline, counters count.

Programs get what is online, at most as much CPU time as the host's quota gives; what they want above that
waits, and tasks that wait show up in the stall counters, as with PSI.
"""

from dataclasses import dataclass

from guestd.broker.hypervisor.fake import FakeVm
from guestd.guest.core.ops import BlockOp, BlockTarget, CpuOp, HandResult, HandStatus, HookOp, Op, TrimOp
from guestd.model.guest import BlockState, Inventory, MemoryBlock, NodeZones, Sample
from guestd.model.units import MIB, MILLICORES_PER_VCPU

BLOCK_BYTES = 128 * MIB
_KERNEL_BYTES = 48 * MIB
_RISE_BYTES = 64 * MIB  # so much more is free: the glance tells
_TRIGGER_SECONDS = 0.5  # a trigger fires at most so often


@dataclass(slots=True)
class Load:
    """What a VM's programs want: so many runnable tasks, so much memory in use (bytes). `unmovable_bytes` look
    free and cannot be given back.
    """

    tasks: float = 0.1
    memory_bytes: int = 120 * MIB
    unmovable_bytes: int = 0


class GuestKernel:
    """One guest kernel; time exists only as what `step` is told."""

    def __init__(self, vm: FakeVm, load: Load) -> None:
        self.vm, self.load = vm, load
        self.online_cpus: set[int] = set(vm.guest_cpus)
        self.online_blocks: set[int] = set(range(vm.boot_bytes // BLOCK_BYTES))
        self.pinned: frozenset[int] = frozenset()
        self.failing: dict[Op, int] = {}  # operations that fail, and with which errno
        self.op_seconds = 0.0  # how long an operation takes
        self.hook_says = "none"  # what its hooks come to: see `HookOp`
        self.busy_seconds: dict[int, float] = {}
        self.idle_seconds: dict[int, float] = {}
        self.cpu_some_us = 0
        self.memory_some_us = 0
        self.short_of_memory = 0  # steps in which programs wanted more than there was
        self.had_cpu_seconds = 0.0
        self._quiet_seconds = _TRIGGER_SECONDS
        self._memory_before = load.memory_bytes
        self._shape = self._present()
        self._refresh()

    def step(self, seconds: float) -> None:
        """Let programs run for a while."""
        self._refresh()
        online = len(self.online_cpus)
        running = min(self.load.tasks, online)
        pace = min(1.0, self._quota / running) if running else 1.0  # a vCPU held back loses ticks, it does not idle
        share = running / online
        for number in self.online_cpus:
            self.busy_seconds[number] = self.busy_seconds.get(number, 0.0) + share * pace * seconds
            self.idle_seconds[number] = self.idle_seconds.get(number, 0.0) + (1 - share) * seconds
        self.had_cpu_seconds += running * pace * seconds
        if self.load.tasks > online:
            self.cpu_some_us += round(seconds * 1e6)
        if self.load.memory_bytes > self.memory_total:
            self.memory_some_us += round(seconds * 1e6)
            self.short_of_memory += 1
        self._quiet_seconds += seconds
        self._keep()

    def take_trigger(self) -> bool:
        """Whether a PSI trigger or the glance at free memory fires now."""
        grown = self.load.memory_bytes - self._memory_before
        self._memory_before = self.load.memory_bytes
        short = self.load.tasks > len(self.online_cpus) or self.load.memory_bytes > self.memory_total
        moved = grown > 0 or grown < -_RISE_BYTES
        if self._quiet_seconds < _TRIGGER_SECONDS or not (moved or short):
            return False
        self._quiet_seconds = 0.0
        return True

    def take_hotplug(self) -> bool:
        """Whether CPUs or whole blocks came or went since the last call: a kernel event."""
        before, self._shape = self._shape, self._present()
        return self._shape != before

    @property
    def present_blocks(self) -> int:
        return -(-self.vm.guest_memory_bytes // BLOCK_BYTES)

    @property
    def memory_total(self) -> int:
        self._refresh()
        return max(0, min(self.vm.guest_memory_bytes, len(self.online_blocks) * BLOCK_BYTES) - _KERNEL_BYTES)

    def sample(self) -> Sample:
        """As `guestd.guest.sensors` would read it."""
        total = self.memory_total
        busy = {number: self.busy_seconds.get(number, 0.0) for number in sorted(self.online_cpus)}
        idle = {number: self.idle_seconds.get(number, 0.0) for number in sorted(self.online_cpus)}
        available = max(0, total - self.load.memory_bytes)
        return Sample(
            *(busy, idle, 0.0, round(self.load.tasks), self.cpu_some_us, self.memory_some_us, 0),
            *(total, available, 0, 0, available),
        )

    def inventory(self) -> Inventory:
        """As `guestd.guest.sysfs` would read it."""
        self._refresh()
        kernel, present = self.vm.boot_bytes, self.present_blocks
        online = frozenset(self.online_cpus)
        movable = max(0, self.memory_total - kernel)
        states = (BlockState.ONLINE if index in self.online_blocks else BlockState.OFFLINE for index in range(present))
        return Inventory(
            cpus_possible=frozenset(range(self.vm.vcpus_max)),
            cpus_present=self.vm.guest_cpus,
            cpus_online=online,
            cpus_pinned=self.pinned,
            block_bytes=BLOCK_BYTES,
            blocks=tuple(MemoryBlock(index, state, index >= 4) for index, state in enumerate(states)),
            zones=(NodeZones(0, kernel, kernel // 4, movable),),
        )

    def perform(self, op: Op) -> HandResult:
        """As the root helper would do it."""
        if op in self.failing:
            return HandResult(op, HandStatus.FAILED, self.failing[op], self.op_seconds)
        match op:
            case CpuOp(number, online):
                if number not in self.vm.guest_cpus:
                    return HandResult(op, HandStatus.GONE)
                if not online and (number == 0 or number in self.pinned):
                    return HandResult(op, HandStatus.REFUSED)
                (self.online_cpus.add if online else self.online_cpus.discard)(number)
            case BlockOp(index, target):
                if index >= self.present_blocks:
                    return HandResult(op, HandStatus.GONE)
                (self.online_blocks.discard if target is BlockTarget.OFFLINE else self.online_blocks.add)(index)
            case TrimOp():
                return HandResult(op, HandStatus.OK, 0, self.op_seconds, "0")
            case HookOp():
                return HandResult(op, HandStatus.OK, 0, self.op_seconds, self.hook_says)
        return HandResult(op, HandStatus.OK, 0, self.op_seconds)

    def reboot(self) -> None:
        """A new kernel: all CPUs that are plugged are online, hot-added memory is offline."""
        self.online_cpus = set(self.vm.guest_cpus)
        self.online_blocks = set(range(self.vm.boot_bytes // BLOCK_BYTES))
        self.busy_seconds.clear()
        self.idle_seconds.clear()
        self.cpu_some_us = self.memory_some_us = 0

    @property
    def _quota(self) -> float:
        """CPUs that the host lets the VM use."""
        quota = self.vm.truth().cpu_quota_millicores if self.vm.cpu_enforced else 0
        return quota / MILLICORES_PER_VCPU if quota else float("inf")

    def _present(self) -> tuple[frozenset[int], int]:
        return self.vm.guest_cpus, self.present_blocks

    def _keep(self) -> None:
        """Tell the VM below what its guest cannot go."""
        kept = self.load.memory_bytes + self.load.unmovable_bytes + _KERNEL_BYTES
        self.vm.guest_keeps_bytes = min(self.vm.guest_memory_bytes, kept)

    def _refresh(self) -> None:
        if len(self.online_cpus) > 1:
            self.online_cpus &= self.vm.guest_cpus
        present = self.present_blocks
        if self.online_blocks and max(self.online_blocks) >= present:
            self.online_blocks = {index for index in self.online_blocks if index < present}
