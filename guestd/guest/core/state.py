"""What the guest's machine knows: shared by those who decide about taking, giving and answering."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field

from guestd.guest.core.actions import Settings
from guestd.guest.core.answers import Answers
from guestd.guest.core.hooks import Hooks
from guestd.guest.core.need_cpu import CpuNeed
from guestd.guest.core.need_memory import MemoryNeed
from guestd.guest.core.ops import BlockOp, BlockTarget, CpuOp, Op
from guestd.guest.core.orders import Orders
from guestd.guest.core.others import Others
from guestd.guest.core.setbacks import Key, Setbacks, key_of
from guestd.model.guest import Capability, Inventory, Sample
from guestd.model.messages import AckStatus, Grant, Reclaim, Usable
from guestd.model.resources import Kind
from guestd.model.units import MIB, MILLICORES_PER_VCPU

_STEP_WITHOUT_BLOCKS = 128 * MIB
_GOING_ON_SECONDS = 5.0


@dataclass(slots=True)
class State:
    """One guest, as far as it is known."""

    capabilities: frozenset[Capability]
    settings: Settings
    setbacks: Setbacks
    hooks: Hooks
    orders: Orders = field(default_factory=Orders)
    others: Others = field(default_factory=Others)
    inventory: Inventory = field(default_factory=Inventory)
    first_blocks: frozenset[int] | None = None  # memory blocks that were there at every look, online or not
    sample: Sample | None = None
    sample_is_old: bool = True  # something has changed what a sample would say
    cpu: CpuNeed | None = None
    memory: MemoryNeed | None = None
    kernel_bytes: int | None = None  # what the kernel took at boot
    usable: Usable = field(default_factory=Usable)
    doing: set[Op] = field(default_factory=set)
    touched: set[Key] = field(default_factory=set)  # CPUs and blocks that we switched since the last look
    memory_went_at: float = -math.inf  # when a driver was last known to take blocks

    @property
    def settled(self) -> bool:
        """No order is open and nothing is being done."""
        return not self.doing and not self.orders.open

    @property
    def shrinking_memory(self) -> bool:
        """The broker was told how low it can go, and has not said yet that it is done."""
        current = self.orders.of(Kind.MEMORY)
        if current is None or not isinstance(current.order, Reclaim) or current.answer is None:
            return False
        return current.answer.status is not AckStatus.REFUSED

    def answers(self, now: float) -> Answers:
        """What answers are made from."""
        return Answers(self.usable, self.inventory, self.capabilities, self.setbacks, self.others, now)

    def busy(self, sort: type, now: float) -> set[int]:
        """Numbers of CPUs or blocks being worked on, or to be left alone."""
        doing = {key_of(op) for op in self.doing if isinstance(op, CpuOp | BlockOp)}
        left_alone = self.setbacks.resting(now) | self.others.held
        return {number for one, number in doing | left_alone if one is sort}

    @property
    def isolating(self) -> bool:
        """Whether a block's pages may look used because it is just being taken away."""
        ours = any(isinstance(op, BlockOp) and op.target is BlockTarget.OFFLINE for op in self.doing)
        return ours or self.shrinking_memory

    def is_doing(self, *sorts: type) -> bool:
        """Whether an operation of one of these sorts is under way."""
        return any(isinstance(op, sorts) for op in self.doing)

    def ours(self, now: float) -> Collection[Key]:
        """CPUs and blocks that we may have switched ourselves since the last look."""
        doing = {key_of(op) for op in self.doing if isinstance(op, CpuOp | BlockOp)}
        return self.touched | doing | self.setbacks.resting(now) | self.setbacks.stuck().keys()

    def step(self, kind: Kind) -> int:
        """A vCPU in millicores, or a memory block in bytes."""
        return MILLICORES_PER_VCPU if kind is Kind.CPU else self.inventory.block_bytes or _STEP_WITHOUT_BLOCKS

    def refresh_usable(self) -> None:
        """From the newest inventory and sample."""
        self.usable = Usable(
            len(self.inventory.cpus_online) or (len(self.sample.cpu_busy_seconds) if self.sample else 0),
            len(self.inventory.cpus_present),
            self.inventory.memory_online_bytes,
            self.sample.memory_total_bytes if self.sample else 0,
            self.inventory.block_bytes,
        )

    def learn_kernel_bytes(self, sample: Sample) -> None:
        """What the kernel took at boot: the least of (memory held - MemTotal) seen at rest.

        At rest, because blocks and MemTotal do not change in the same instant, and a virtio-mem block
        or the balloon holds pages back while it is being emptied. So what is said to be held must be so: by an answered
        grant, or by blocks that nobody has said anything of yet and no balloon empties. Once too low it would stay so,
        and the floor with it.
        """
        held = self._memory_held
        if held is None or held <= sample.memory_total_bytes:
            return
        taken = held - sample.memory_total_bytes
        self.kernel_bytes = taken if self.kernel_bytes is None else min(self.kernel_bytes, taken)

    def unknown_bytes(self, sample: Sample) -> int:
        """What the kernel may have taken, while nobody knows what a balloon holds: not to be given, and not needed."""
        online = self.inventory.memory_online_bytes
        return max(0, online - sample.memory_total_bytes) if self.kernel_bytes is None else 0

    @property
    def _memory_held(self) -> int | None:
        """Bytes that the VM holds, where that is known for sure."""
        current, granted = self.orders.of(Kind.MEMORY), self.orders.granted.get(Kind.MEMORY)
        online, block = self.inventory.memory_online_bytes, self.inventory.block_bytes
        ballooned = Capability.BALLOON in self.capabilities  # which no block shows
        if not self.settled:
            return None
        if granted is None:
            return online if block and not ballooned else None
        if current is None or not isinstance(current.order, Grant):
            return None
        if not block:  # its system keeps none
            return granted
        return min(online, granted) if ballooned or online < granted + block else None

    def see_memory_go(self, now: float) -> bool:
        """Whether a driver takes blocks offline, or was seen to so short a time ago that it may still be at it.
        To be called before an order is replaced, too.
        """
        if self.shrinking_memory:
            self.memory_went_at = now
        return now - self.memory_went_at < _GOING_ON_SECONDS
