"""A reclaim, step by step: hooks, room for what must move, CPUs or blocks offline, and the answer.

The law:

1. Hooks are asked first; while they have not agreed nothing is touched (`hooks`).
2. Memory is made free where what must move has no place to go (`give.trim_bytes`), in chunks, a second before the
   order's deadline at the latest: all that is to go, for a balloon and for blocks, which have to find it free; a little
   for virtio-mem, which has the kernel free what it needs piece by piece (all of it first was measured to be slower).
   A chunk that fails, or of which next to nothing came free, is the last: what follows does not wait for more.
3. What takes pages (virtio-mem, balloon) then does it by itself, on the host's word: the answer says how low it may go.
   Blocks of DIMMs are taken offline here, one by one, each with a deadline of its own. Where there is a balloon as well
   the DIMMs go first, and it takes what is asked for below the boot memory; so does the host.
4. Pressure ends it all: nothing more is given.

Weak spot: beside a balloon a block counts as a DIMM's when it came after guestd's first look. Nothing in the guest
tells a DIMM that the host will remove from one that the VM was started with, for which the host has the balloon take
as much: memory that went twice could end a program. So DIMMs that were there before guestd was are emptied by the
kernel, when the host removes them.
"""

from collections.abc import Collection

from guestd.guest.core import give
from guestd.guest.core.hooks import Said, Verdict
from guestd.guest.core.need_memory import MemoryNeed
from guestd.guest.core.ops import BlockOp, CpuOp, HandResult, HandStatus, HookOp, TrimOp
from guestd.guest.core.orders import Order
from guestd.guest.core.state import State
from guestd.model.guest import BlockState, Capability
from guestd.model.messages import Ack, AckStatus, Reclaim, RefusalReason
from guestd.model.resources import Kind
from guestd.model.units import MIB, MILLICORES_PER_VCPU

_SPARE_CHUNKS = 4  # of a chunk, a quarter is to stay free
_PROGRESS_CHUNKS = 16  # of a chunk, so much at least has come free where it is worth going on


class Giving:
    """Carries out reclaims on what is known (`state`)."""

    def __init__(self, state: State) -> None:
        self._state = state

    # ---- what to do ------------------------------------------------------------------------------

    def next_hook(self, current: Order, order: Reclaim, now: float) -> HookOp | None:
        """How to ask the hooks, where they are to be asked."""
        if current.answer is not None or not self._has_something_to_give(order):
            return None
        state = self._state
        step = state.step(order.kind)
        return state.hooks.ask(order.kind, current.before, max(order.amount, step), step, now)

    def next_cpus(self, current: Order, order: Reclaim, now: float) -> list[CpuOp]:
        """CPUs to take offline now."""
        state = self._state
        if (
            current.answer is not None
            or current.tries >= state.settings.reclaim_tries
            or not self._agreed(current, order, now)
        ):
            return []
        return give.cpus_to_offline(state.inventory, vcpus(order.amount), state.busy(CpuOp, now))

    def next_trim(self, current: Order, order: Reclaim, now: float) -> TrimOp | None:
        """Memory that the kernel is to give up now, so that there is room."""
        state, need = self._state, self._state.memory
        if current.answer is not None or current.trimmed or self._late(current, now) or state.sample_is_old:
            return None
        if state.sample is None or need is None or need.pressure or state.is_doing(TrimOp):
            return None
        if not self._agreed(current, order, now):
            return None
        given = current.before - max(order.amount, need.floor_bytes)
        chunk, free = state.settings.trim_chunk_bytes, state.sample.memory_free_bytes
        if current.free_before is not None and free < current.free_before + chunk // _PROGRESS_CHUNKS:
            current.trimmed = True
            return None
        gone_first = 0 if Capability.VIRTIO_MEM in state.capabilities else given
        wanted = give.trim_bytes(state.sample, gone_first, chunk // _SPARE_CHUNKS) if given > 0 else 0
        current.trimmed, current.free_before = wanted <= chunk, free  # not more than a chunk: then it is the last one
        return TrimOp(min(wanted, chunk)) if wanted >= MIB and self._may_switch_memory else None

    def on_trim(self, result: HandResult) -> None:
        """What became of a trim. One that took too long may have freed a lot: the next sample tells."""
        current = self._state.orders.of(Kind.MEMORY)
        if current is not None and not result.ok and result.status is not HandStatus.TIMEOUT:
            current.trimmed = True

    def next_block(self, current: Order, order: Reclaim, now: float) -> list[BlockOp]:
        """The block to take offline now, where that is the guest's to do."""
        state, need = self._state, self._state.memory
        if (
            current.answer is not None
            or not self._gives_blocks
            or state.is_doing(BlockOp, TrimOp)
            or self._late(current, now)
        ):
            return []
        if need is None or need.pressure or not current.trimmed or not self._agreed(current, order, now):
            return []
        if state.sample_is_old:  # what the last block took along shows in the next one
            return []
        failures = state.setbacks.counts(BlockOp)
        return give.blocks_to_offline(state.inventory, self._lowest(order, need), failures, self._not_now(now))[:1]

    # ---- answers ---------------------------------------------------------------------------------

    def cpu_answer(self, order: Reclaim, current: Order, now: float) -> Ack | None:
        """None: not yet."""
        state, answers = self._state, self._state.answers(now)
        left, late = answers.online(Kind.CPU), now >= current.deadline
        if left <= order.amount:
            return answers.ack(order, AckStatus.DONE)
        if Capability.CPU_ONLINE not in state.capabilities:
            return answers.ack(order, AckStatus.REFUSED, RefusalReason.UNSUPPORTED, "CPUs cannot be taken offline here")
        if not self._agreed(current, order, now):
            return self._objection(order, current, now)
        if state.is_doing(CpuOp):
            return answers.not_done(order, left, current.before, RefusalReason.TIMEOUT) if late else None
        if not give.cpus_to_offline(state.inventory, vcpus(order.amount), ()):
            return answers.not_done(order, left, current.before, RefusalReason.PINNED)
        out_of_tries = current.tries >= state.settings.reclaim_tries
        if out_of_tries or late or state.setbacks.last(CpuOp, online=False) is not None:
            return answers.not_done(order, left, current.before, RefusalReason.BUSY)
        return None

    def memory_answer(self, order: Reclaim, current: Order, now: float) -> Ack | None:
        """None: not yet."""
        state, answers, need = self._state, self._state.answers(now), self._state.memory
        if need is None:  # no sample yet, or none to be had
            had = current.before
            return answers.not_done(order, had, had, RefusalReason.FAILED) if self._late(current, now) else None
        if need.pressure:
            return answers.pressure(order, need)
        if not self._agreed(current, order, now):
            return self._objection(order, current, now)
        if (not current.trimmed or state.is_doing(TrimOp, BlockOp) or state.sample_is_old) and not self._late(
            current, now
        ):
            return None
        return (
            self._block_answer(order, current, need, now)
            if self._gives_blocks
            else answers.memory(order, need, current.before)
        )

    def _block_answer(self, order: Reclaim, current: Order, need: MemoryNeed, now: float) -> Ack | None:
        state, answers = self._state, self._state.answers(now)
        late = self._late(current, now)
        lowest = self._lowest(order, need)
        if not late and give.blocks_to_offline(state.inventory, lowest, {}, self._not_now(now)):
            return None  # `next_block` takes them, one after the other
        left = answers.online(Kind.MEMORY)
        if left <= self._balloon_bytes:
            return answers.memory(order, need, current.before)
        if left <= order.amount:
            return answers.ack(order, AckStatus.DONE)
        if order.amount < need.floor_bytes and left < lowest + state.inventory.block_bytes:
            return answers.memory(order, need, left)
        return answers.not_done(order, left, current.before, RefusalReason.TIMEOUT if late else RefusalReason.BUSY)

    def _objection(self, order: Reclaim, current: Order, now: float) -> Ack | None:
        """What the hooks have against it, when they have said so or the time is nearly over."""
        said = self._said(current, order, now)
        if said.verdict is Verdict.ASKED and not self._late(current, now):
            return None
        return self._state.answers(now).hooks_object(order, said)

    # ---- small parts -----------------------------------------------------------------------------

    def _said(self, current: Order, order: Reclaim, now: float) -> Said:
        step = self._state.step(order.kind)  # less than one is not for anybody to have, whatever the order says
        return self._state.hooks.say(order.kind, current.before, max(order.amount, step), step, now)

    def _agreed(self, current: Order, order: Reclaim, now: float) -> bool:
        return self._said(current, order, now).verdict is Verdict.GO

    def _late(self, current: Order, now: float) -> bool:
        """Whether it is time for the answer to be on its way."""
        return now >= current.late_at

    @property
    def _gives_blocks(self) -> bool:
        """Memory is taken offline here: there is no driver that takes pages, or only a balloon, and DIMMs beside it."""
        if Capability.VIRTIO_MEM in self._state.capabilities or not self._may_switch_memory:
            return False
        inventory = self._state.inventory
        return not self._balloon_blocks or self._balloon_bytes < inventory.memory_online_bytes

    @property
    def _balloon_blocks(self) -> frozenset[int]:
        """Blocks of which a balloon takes pages."""
        has_one = Capability.BALLOON in self._state.capabilities
        return (self._state.first_blocks or frozenset()) if has_one else frozenset()

    @property
    def _balloon_bytes(self) -> int:
        """What is online of them."""
        blocks, inventory = self._balloon_blocks, self._state.inventory
        online = (block for block in inventory.blocks if block.state is not BlockState.OFFLINE)
        return inventory.block_bytes * sum(block.index in blocks for block in online) if blocks else 0

    def _lowest(self, order: Reclaim, need: MemoryNeed) -> int:
        """What is to stay online."""
        return max(order.amount, need.floor_bytes, self._balloon_bytes)

    def _not_now(self, now: float) -> Collection[int]:
        """Blocks that are not to be taken offline here, or not now."""
        return self._state.busy(BlockOp, now) | self._balloon_blocks

    @property
    def _may_switch_memory(self) -> bool:
        return Capability.MEMORY_ONLINE in self._state.capabilities

    def _has_something_to_give(self, order: Reclaim) -> bool:
        """Whether hooks are worth asking: not for what the answer is clear of already."""
        state = self._state
        if order.kind is Kind.MEMORY:
            return state.memory is not None and not state.memory.pressure
        online = state.usable.vcpus_online * MILLICORES_PER_VCPU
        return Capability.CPU_ONLINE in state.capabilities and online > order.amount


def vcpus(millicores: int) -> int:
    """Whole vCPUs for so much."""
    return -(-millicores // MILLICORES_PER_VCPU)
