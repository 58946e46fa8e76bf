"""What the guest says of its needs, and when it is worth saying."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from guestd.guest.core import take
from guestd.guest.core.need_cpu import CpuNeed
from guestd.guest.core.need_memory import MemoryNeed
from guestd.model.guest import Inventory
from guestd.model.messages import Demand, Urgency, Usable, Welcome
from guestd.model.reason import Reason
from guestd.model.resources import Resources
from guestd.model.units import MIB, MILLICORES_PER_VCPU, round_up

_ANY_AMOUNT = 1 << 50
_MAX_REASONS = 8
_UNIT_WITHOUT_BLOCKS = 128 * MIB
_NEARLY_SECONDS = 0.25


@dataclass(slots=True)
class Link:
    """What was said on the present stream."""

    welcome: Welcome
    sequence: int = 0
    said: Demand | None = None
    said_at: float = 0.0

    @property
    def heartbeat_at(self) -> float:
        """When the silence was long enough."""
        return self.said_at + self.welcome.heartbeat_seconds if self.said is not None else math.inf

    def heartbeat_due(self, now: float) -> bool:
        """Whether it was long enough, or nearly so: who is awake for something else need not be woken soon after."""
        return now >= self.heartbeat_at - _NEARLY_SECONDS

    def is_news(self, demand: Demand, block_bytes: int) -> bool:
        """Whether the broker could decide otherwise than with what was said."""
        return self.said is None or _differs(self.said, demand, block_bytes or _UNIT_WITHOUT_BLOCKS)

    def note(self, demand: Demand, now: float) -> None:
        """It is said now."""
        self.sequence, self.said, self.said_at = demand.sequence, demand, now


def demand(
    sequence: int, cpu: CpuNeed, memory: MemoryNeed, usable: Usable, inventory: Inventory, more: Iterable[Reason]
) -> Demand:
    """All that is needed, with reasons; `more` are those beside the two estimators' own."""
    reasons = [cpu.reason, memory.reason]
    taking = take.acceptable(inventory) if inventory.block_bytes else take.Taking(inventory, _ANY_AMOUNT)
    if taking.acceptable_bytes < memory.needed_bytes:
        reasons.append(Reason("acceptable", taking.explain()))
    return Demand(
        sequence=sequence,
        needed=Resources(cpu.needed_millicores, memory.needed_bytes),
        floor=Resources(MILLICORES_PER_VCPU, memory.floor_bytes),
        acceptable_memory_bytes=taking.acceptable_bytes,
        urgency=max(cpu.urgency, memory.urgency, key=list(Urgency).index),
        reasons=tuple([*reasons, *more][:_MAX_REASONS]),
        usable=usable,
        memory_used_bytes=memory.used_bytes,
        cpu_used_millicores=cpu.used_millicores,
        under_memory_pressure=memory.pressure,
    )


def _differs(said: Demand, now: Demand, block_bytes: int) -> bool:
    """Other whole units, other urgency, another inventory, or reasons of another sort."""

    def units(demand: Demand) -> tuple[int, ...]:
        return (
            round_up(demand.needed.cpu_millicores, MILLICORES_PER_VCPU),
            round_up(demand.needed.memory_bytes, block_bytes),
            round_up(demand.floor.memory_bytes, block_bytes),
        )

    if units(said) != units(now) or said.under_memory_pressure != now.under_memory_pressure:
        return True
    if [reason.code for reason in said.reasons[2:]] != [reason.code for reason in now.reasons[2:]]:
        return True
    scarce = now.acceptable_memory_bytes < now.needed.memory_bytes + block_bytes
    taken = now.usable.memory_online_bytes + block_bytes > said.acceptable_memory_bytes  # all that it said it can take
    return said.usable != now.usable and (scarce or taken or said.usable.vcpus_online != now.usable.vcpus_online)
