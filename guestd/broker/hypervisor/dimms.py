"""Memory by DIMMs, for a VM without virtio-mem: of which size, how many, and which of them goes. Pure.

1. A DIMM that guestd added is called ``guestd-dimm-<N>`` and lies on ``guestd-mem-<N>``; by these names it is found
   again. All other DIMMs count as boot memory and are never removed.
2. What such a DIMM lies on is the host's memory, so it is held until it is deleted, DIMM or not.
3. All DIMMs are of one size, the unit in which the VM grows: whole memory blocks of the guest's, and a divisor
   of the boot memory, since amounts are whole units and the boot memory must be one of them. Of these the one
   that gets furthest with the slots there are, the smallest of equals.
4. Removals are asked for one at a time, the highest address first: the guest empties its blocks in this order.
   One that the guest refused or did not answer in time rests for a while, longer each time, and the next is tried.
5. A removal that was not answered may happen at any time later. Until it is refused or done the DIMM counts as gone
   when the next is chosen, so that never more is taken than was wanted.

Weak spots: where boot memory is no multiple of the guest's blocks, no amount in whole units is met exactly, and
every resize ends short. Few slots make large units, also for a balloon below the boot memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from guestd.broker.hypervisor.qmp_answers import (
    BACKEND_ID_PREFIX,
    DIMM_ID_PREFIX,
    Dimm,
    MemoryBackend,
    MemoryDevices,
    MemoryRoom,
)
from guestd.model.units import GIB, MIB

BLOCK_BYTES = 128 * MIB
LARGEST_BLOCK_BYTES = 2 * GIB
_LARGE_GUEST_BYTES = 60 * GIB
"""Linux on x86-64 takes larger blocks where memory *ends* at 64 GiB or more, up to 4 GiB of which is a hole below 4 GiB
(arch/x86/mm/init_64.c, probe_memory_block_size).
"""

ANSWER_SECONDS = 4.0
"""Less than what the broker allows for one step of a shrink (8 s), so that a second DIMM is tried within it."""
REST_SECONDS = 5.0
REST_MAX_SECONDS = 60.0


def guest_block_bytes(boot_bytes: int) -> int:
    """The memory block that a Linux guest with so much boot memory has: the largest power of two that it ends on."""
    block = LARGEST_BLOCK_BYTES if boot_bytes >= _LARGE_GUEST_BYTES else BLOCK_BYTES
    while block > BLOCK_BYTES and boot_bytes % block:
        block //= 2
    return block


@lru_cache(maxsize=64)
def unit_bytes(boot_bytes: int, room_bytes: int, slots: int) -> int:
    """The size of a DIMM by rule 3; 0 where none can be added.

    :param room_bytes: How much more there may be than the boot memory.
    :param slots: How many DIMMs there may be.
    """
    block = guest_block_bytes(boot_bytes)
    if slots <= 0 or room_bytes < block:
        return 0
    sizes = range(block, room_bytes + 1, block)[: max(1, boot_bytes // block)]
    fitting = [size for size in sizes if boot_bytes % size == 0]
    return max(fitting or sizes, key=lambda size: (min(slots, room_bytes // size) * size, -size))


@dataclass(frozen=True, slots=True)
class Bank:
    """All DIMMs of a VM, what they lie on, and the room for more; sizes in bytes."""

    base: int  # `-m`
    devices: MemoryDevices
    backends: tuple[MemoryBackend, ...]
    room: MemoryRoom

    @property
    def own(self) -> tuple[Dimm, ...]:
        """Those that guestd added, lowest address first."""
        return tuple(dimm for dimm in self.devices.dimms if dimm.ours)

    @property
    def boot(self) -> int:
        """What the VM has whatever guestd does."""
        return self.base + sum(dimm.size for dimm in self.devices.dimms if not dimm.ours)

    @property
    def plugged(self) -> int:
        """What guestd added and the guest can see."""
        return sum(dimm.size for dimm in self.own)

    @property
    def leftovers(self) -> tuple[MemoryBackend, ...]:
        """Backends of guestd's without a DIMM, from a removal or from an addition that was cut short."""
        used = {dimm.backend_id for dimm in self.devices.dimms}
        return tuple(
            one for one in self.backends if one.backend_id.startswith(BACKEND_ID_PREFIX) and one.backend_id not in used
        )

    @property
    def held(self) -> int:
        """What guestd added and the host has not got back (rule 2)."""
        return self.plugged + sum(one.size for one in self.leftovers)

    @property
    def shared(self) -> bool:
        """Whether the VM's memory is shared with other processes (vhost-user), which new memory must be then too."""
        return any(one.shared for one in self.backends if not one.backend_id.startswith(BACKEND_ID_PREFIX))

    @property
    def unit(self) -> int:
        """The size of a DIMM; 0 where none can be added."""
        return unit_bytes(self.boot, self._free_room, self._free_slots)

    @property
    def most(self) -> int:
        """What guestd can have added at most."""
        count = min(self._free_slots, self._free_room // self.unit) if self.unit else 0
        return max(self.plugged, count * self.unit)

    def missing(self, wanted: int) -> int:
        """How many DIMMs it takes for guestd to have added `wanted`, rounded down."""
        return max(0, wanted - self.plugged) // self.unit if self.unit else 0

    def next_number(self, first: int = 0) -> int:
        """The lowest N from `first` up by which neither a DIMM nor a backend is called."""
        taken = {dimm.device_id for dimm in self.devices.dimms} | {one.backend_id for one in self.backends}
        number = first
        while {device_id(number), backend_id(number)} & taken:
            number += 1
        return number

    @property
    def _free_slots(self) -> int:
        others = sum(not dimm.ours for dimm in self.devices.dimms)
        return self.room.slots - others - len(self.devices.nvdimms)

    @property
    def _free_room(self) -> int:
        return self.room.maximum - self.boot - sum(self.devices.nvdimms)


def device_id(number: int) -> str:
    """What the DIMM is called."""
    return f"{DIMM_ID_PREFIX}{number}"


def backend_id(number: int) -> str:
    """What it lies on is called."""
    return f"{BACKEND_ID_PREFIX}{number}"


@dataclass(slots=True)
class _Try:
    """The removals of one DIMM that were asked for since it last was there for good."""

    asked_at: float
    open: bool = True  # neither done nor refused
    failed: int = 0  # in a row
    rests_until: float = 0.0


@dataclass(slots=True)
class Removals:
    """Which removals are under way and which failed; times in seconds of one clock. Rules 4 and 5."""

    tries: dict[str, _Try] = field(default_factory=dict)

    def choose(self, own: Sequence[Dimm], wanted: int, now: float) -> Dimm | None:
        """The DIMM to remove next so that not less than `wanted` bytes stay of these; None: none now."""
        self._keep_only(own)
        if self.waits_until(now) is not None:
            return None
        there = sum(dimm.size for dimm in own)
        sure = sum(dimm.size for dimm in own if not self._may_still_go(dimm))
        for dimm in sorted(own, key=lambda dimm: dimm.address, reverse=True):
            known = self.tries.get(dimm.device_id)
            if known is not None and now < known.rests_until:
                continue
            left = sure if self._may_still_go(dimm) else sure - dimm.size
            if left >= wanted and there > wanted:
                return dimm
        return None

    def asked(self, device: str, now: float) -> None:
        """Its removal was asked for."""
        known = self.tries.setdefault(device, _Try(now))
        known.asked_at, known.open, known.rests_until = now, True, 0.0

    def refused(self, device: str, now: float) -> float | None:
        """The guest said no, or QEMU did; the seconds for which it is left alone. None: nobody had asked."""
        known = self.tries.get(device)
        if known is None or not known.open:
            return None
        rested = known.rests_until > 0.0  # its silence was counted already
        known.open = False
        return known.rests_until - now if rested else self._rest(known, now)

    def overdue(self, now: float) -> list[tuple[str, float]]:
        """Removals whose answer has just become overdue, each with the seconds for which it is left alone."""
        late = [
            (device, known)
            for device, known in self.tries.items()
            if known.open and not known.rests_until and now - known.asked_at >= ANSWER_SECONDS
        ]
        return [(device, self._rest(known, now)) for device, known in late]

    def waits_until(self, now: float) -> float | None:
        """Until when an answer is waited for and nothing else asked; None: for none."""
        ends = [one.asked_at + ANSWER_SECONDS for one in self.tries.values() if one.open and not one.rests_until]
        return min((end for end in ends if end > now), default=None)

    def wake_at(self, now: float) -> float | None:
        """When `overdue` or `choose` may say something else without an event; None: never."""
        ends = [one.rests_until for one in self.tries.values() if one.rests_until > now]
        if (waits := self.waits_until(now)) is not None:
            ends.append(waits)
        return min(ends, default=None)

    def forget_rests(self) -> None:
        """Another kernel runs in the guest: it may give what the one before refused."""
        for known in self.tries.values():
            known.failed, known.rests_until = 0, 0.0

    def _may_still_go(self, dimm: Dimm) -> bool:
        known = self.tries.get(dimm.device_id)
        return known is not None and known.open

    def _rest(self, known: _Try, now: float) -> float:
        pause = min(REST_MAX_SECONDS, REST_SECONDS * float(1 << min(known.failed, 10)))
        known.failed += 1
        known.rests_until = now + pause
        return pause

    def _keep_only(self, own: Sequence[Dimm]) -> None:
        there = {dimm.device_id for dimm in own}
        for device in self.tries.keys() - there:
            del self.tries[device]
