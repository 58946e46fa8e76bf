"""The answers to orders: in whole, in part, or refused, with what was achieved and why not the rest.

The law:

1. A grant is done when it is online; at its deadline the answer says what is missing, and why.
2. CPUs are given back when they are offline. What may be given of memory is known from the need: never below its
   floor, and nothing while programs stall for want of it.
3. What can be given only later is said with the time after which it is worth asking again.
"""

from dataclasses import dataclass

from guestd.guest.core.hooks import Said, Verdict
from guestd.guest.core.need_memory import MemoryNeed
from guestd.guest.core.ops import BlockOp, CpuOp
from guestd.guest.core.others import Others, describe
from guestd.guest.core.setbacks import Setbacks
from guestd.model.guest import Capability, Inventory
from guestd.model.messages import Ack, AckStatus, Grant, Reclaim, RefusalReason, Usable
from guestd.model.resources import Kind
from guestd.model.units import MILLICORES_PER_VCPU, format_size

_RETRY_SECONDS = 5.0
_STILL_AT_IT_SECONDS = 10.0
_OP = {Kind.CPU: CpuOp, Kind.MEMORY: BlockOp}
_NEEDS = {Kind.CPU: Capability.CPU_ONLINE, Kind.MEMORY: Capability.MEMORY_ONLINE}


@dataclass(frozen=True, slots=True)
class Answers:
    """Makes answers from what is there now."""

    usable: Usable
    inventory: Inventory
    capabilities: frozenset[Capability]
    setbacks: Setbacks
    others: Others
    now: float

    def online(self, kind: Kind) -> int:
        """What is online, in millicores or bytes."""
        return (
            self.usable.vcpus_online * MILLICORES_PER_VCPU if kind is Kind.CPU else self.inventory.memory_online_bytes
        )

    def ack(
        self,
        order: Grant | Reclaim,
        status: AckStatus,
        refusal: RefusalReason | None = None,
        text: str = "",
        achieved: int | None = None,
        retry_seconds: float = 0.0,
        later_amount: int = 0,
    ) -> Ack:
        """An answer; without `achieved` it is what is online."""
        done = self.online(order.kind) if achieved is None else achieved
        return Ack(order.id, order.kind, status, done, self.usable, refusal, text, retry_seconds, later_amount)

    def stale(self, order: Grant | Reclaim) -> Ack:
        """Nothing is changed by an order that is obsolete."""
        return self.ack(order, AckStatus.REFUSED, RefusalReason.STALE, "an older epoch or revision")

    def dry_run(self, order: Grant | Reclaim) -> Ack:
        """Nothing is touched."""
        return self.ack(order, AckStatus.REFUSED, RefusalReason.DRY_RUN, "started with --dry-run")

    def unread(self, order: Grant | Reclaim) -> Ack:
        """What became of it nobody knows; what was online when it could last be read is said."""
        status = AckStatus.PARTIAL if isinstance(order, Grant) else AckStatus.REFUSED
        return self.ack(order, status, RefusalReason.FAILED, "CPUs and memory blocks cannot be read")

    # ---- more ------------------------------------------------------------------------------------

    def grant(self, order: Grant, late: bool) -> Ack | None:
        """None: it is still on its way."""
        kind = order.kind
        if kind is Kind.MEMORY and not self.inventory.block_bytes:  # its system takes what comes, and keeps no blocks
            return self.ack(order, AckStatus.DONE, achieved=self.usable.memory_total_bytes)
        missing = order.amount - self.online(kind)
        slack = 0 if kind is Kind.CPU else max(0, self.inventory.block_bytes - 1)
        if missing <= slack:
            return self.ack(order, AckStatus.DONE)
        if _NEEDS[kind] not in self.capabilities:
            return self.ack(order, AckStatus.PARTIAL, RefusalReason.UNSUPPORTED, "no way to bring it online here")
        held = {key for key in self.others.held if key[0] is _OP[kind]}
        unit = MILLICORES_PER_VCPU if kind is Kind.CPU else self.inventory.block_bytes
        if held and missing - len(held) * unit <= slack:
            text = f"{describe(held)} taken offline by something else: bring it online by hand, or leave it"
            return self.ack(order, AckStatus.PARTIAL, RefusalReason.OTHERS, text)
        if not late:
            return None
        failed = self.setbacks.last(_OP[kind], online=True)
        if failed is not None:
            return self.ack(order, AckStatus.PARTIAL, RefusalReason.FAILED, str(failed))
        return self.ack(order, AckStatus.PARTIAL, RefusalReason.TIMEOUT, f"{kind.show(missing)} did not come")

    # ---- less ------------------------------------------------------------------------------------

    def hooks_object(self, order: Reclaim, said: Said) -> Ack:
        """A hook said no or not yet, or has not answered in time."""
        if said.verdict is Verdict.VETO:
            retry = max(1.0, said.until - self.now)
            return self.ack(order, AckStatus.REFUSED, RefusalReason.VETO, f"hook {said.name} says no", None, retry)
        retry = max(1.0, said.until - self.now) if said.verdict is Verdict.WAIT else _STILL_AT_IT_SECONDS
        text = f"hook {said.name} asks for {retry:.0f} s" if said.name else "the hooks are still at it"
        return self.ack(order, AckStatus.REFUSED, RefusalReason.VETO, text, None, retry, order.amount)

    def not_done(self, order: Reclaim, left: int, had: int, reason: RefusalReason) -> Ack:
        """CPUs or blocks that the guest takes offline itself: so much is left."""
        failed = self.setbacks.last(_OP[order.kind], online=False)
        back_at = self.setbacks.back_at(_OP[order.kind], self.now)
        status = AckStatus.PARTIAL if left < had else AckStatus.REFUSED
        text = str(failed) if failed else f"{order.kind.show(left)} must stay"
        if back_at is None:
            return self.ack(order, status, reason, text, left)
        return self.ack(order, status, reason, text, left, back_at - self.now, order.amount)

    def memory(self, order: Reclaim, need: MemoryNeed, had: int) -> Ack:
        """What memory can go, for drivers that take it page by page.

        :param had: what the VM may have now, bytes.
        """
        lowest = max(order.amount, need.floor_bytes)
        if lowest <= order.amount:
            return self.ack(order, AckStatus.DONE, achieved=order.amount)
        text = f"{need.reason.text}; cannot go below {format_size(need.floor_bytes)}"
        if lowest >= had:
            return self.ack(order, AckStatus.REFUSED, RefusalReason.IN_USE, text, None, _RETRY_SECONDS)
        return self.ack(order, AckStatus.PARTIAL, RefusalReason.IN_USE, text, lowest)

    def pressure(self, order: Reclaim, need: MemoryNeed) -> Ack:
        """Programs stall for want of memory now."""
        return self.ack(order, AckStatus.REFUSED, RefusalReason.PRESSURE, need.reason.text, None, _RETRY_SECONDS)
