"""What something else did to CPUs and memory blocks: a person, a udev rule, another agent. Detect, don't fight, report.

The law:

1. Something that was online, is there, and is offline now without our doing, was taken offline by somebody else: it is
   left alone until it is online again, or gone.
2. What something else brings online is simply counted.
3. While memory is being given back, and a little longer, the kernel takes blocks offline by itself, and virtio-mem may
   bring the same ones back: that is nobody else's doing.
4. What was held before guestd was started anew, and is offline still, is held on.
"""

from collections.abc import Collection

from guestd.guest.core.ops import BlockOp, CpuOp
from guestd.guest.core.setbacks import Key
from guestd.model.guest import BlockState, Inventory
from guestd.model.reason import Reason

_SHOWN = 4


class Others:
    """Follows the inventories; `held` is what is to be left alone."""

    def __init__(self) -> None:
        self._online: set[Key] = set()
        self.held: set[Key] = set()

    def look(self, inventory: Inventory, ours: Collection[Key], memory_goes: bool) -> list[Key]:
        """Compare with the last look; what is newly held by others.

        :param ours: what we may have switched ourselves since then.
        :param memory_goes: a driver may have taken blocks offline since then.
        """
        online: set[Key] = {(CpuOp, number) for number in inventory.cpus_online}
        offline: set[Key] = {(CpuOp, number) for number in inventory.cpus_present - inventory.cpus_online}
        for block in inventory.blocks:
            (offline if block.state is BlockState.OFFLINE else online).add((BlockOp, block.index))
        new = (self._online & offline) - set(ours)
        if memory_goes:
            new = {key for key in new if key[0] is CpuOp}
        self.held = (self.held & offline) | new
        self._online = online
        return sorted(new, key=lambda key: (key[0] is BlockOp, key[1]))

    def reason(self) -> Reason | None:
        """What is held by others, in words."""
        if not self.held:
            return None
        return Reason("others", f"{describe(self.held)} taken offline by something else, left alone")


def describe(keys: Collection[Key]) -> str:
    """The CPUs and blocks in words, the first few of them."""
    parts = []
    for sort, name in ((CpuOp, "CPU"), (BlockOp, "memory block")):
        numbers = sorted(number for one, number in keys if one is sort)
        if numbers:
            more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
            parts.append(f"{name} {', '.join(str(number) for number in numbers[:_SHOWN])}{more}")
    return ", ".join(parts)
