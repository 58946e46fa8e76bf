"""Taking what was granted: which CPUs and memory blocks to bring online, and how much more can be taken at all.

The law:

1. Only what the broker granted is brought online, and only while it is not online already; whatever
   else onlines things (a udev rule, the kernel, a person) is not fought.
2. Memory goes to ZONE_MOVABLE, where it can be taken back, until MOVABLE : KERNEL would exceed
   `MAX_MOVABLE_RATIO`, in all or on the block's NUMA node; the rest goes to the kernel's zones. The kernel's own
   auto-movable policy looks at both as well, with a default of 301 % (mm/memory_hotplug.c, auto_movable_ratio);
   its documentation calls up to 3:1 or 4:1 usually fine. The kernel's zones count in whole blocks: what firmware keeps
   of the memory at boot is a fraction of one, and virtio-mem gives a kernel block back last of all, so one that is not
   needed makes every reclaim slower.
3. A VM can take only so much memory at once: the memmap of what arrives (1/64 of it) comes out of
   free *kernel* memory, of which half is left alone. One block always: a VM that is full would
   never get any more else, and what the kernel cannot take virtio-mem offers again. As kernel blocks come
   online there is more for the next stage.
"""

from collections.abc import Collection
from dataclasses import dataclass

from guestd.guest.core.ops import BlockOp, BlockTarget, CpuOp
from guestd.model.guest import BlockState, Inventory, MemoryBlock
from guestd.model.units import format_size, round_up

MAX_MOVABLE_RATIO = 4.0
_MEMMAP_SHARE = 64  # struct page is 64 bytes for each 4096


def cpus_to_online(inventory: Inventory, granted_vcpus: int, busy: Collection[int]) -> list[CpuOp]:
    """CPUs to bring online, lowest first. `busy`: being worked on, or to be left alone for now."""
    missing = granted_vcpus - len(inventory.cpus_online | (set(busy) & inventory.cpus_present))
    offline = sorted(inventory.cpus_present - inventory.cpus_online - set(busy))
    return [CpuOp(number, True) for number in offline[: max(0, missing)]]


def blocks_to_online(
    inventory: Inventory, granted_bytes: int, busy: Collection[int], under_way: Collection[BlockOp] = ()
) -> list[BlockOp]:
    """Offline memory blocks to bring online within the grant, lowest first, each with its zone.

    :param busy: blocks that are being worked on, or to be left alone for now.
    :param under_way: what is being brought online: it counts for the zones before it is there.
    """
    if not inventory.block_bytes:
        return []
    all_offline = [block for block in inventory.blocks if block.state is BlockState.OFFLINE]
    offline = [block for block in all_offline if block.index not in busy]
    coming = len(all_offline) - len(offline)
    room = granted_bytes - inventory.memory_online_bytes - inventory.block_bytes * coming
    count = max(0, -(-room // inventory.block_bytes))
    zones = _Zones(inventory)
    targets = {op.index: op.target for op in under_way}
    for block in all_offline:
        if block.index in targets:
            zones.count(block, targets[block.index])
    return [BlockOp(block.index, zones.place(block)) for block in sorted(offline, key=_index)[:count]]


@dataclass(frozen=True, slots=True)
class Taking:
    """How much memory can be taken: `more_bytes` beside what is there, online or not."""

    inventory: Inventory
    more_bytes: int

    @property
    def acceptable_bytes(self) -> int:
        """In all."""
        return self.inventory.memory_online_bytes + self.inventory.memory_offline_bytes + self.more_bytes

    def explain(self) -> str:
        """What bounds it, in words."""
        inventory, free = self.inventory, format_size(self.inventory.kernel_free_bytes)
        now, after = _Zones(inventory), _Zones(inventory)
        after.add(inventory.memory_offline_bytes + self.more_bytes)
        return (
            f"{format_size(self.more_bytes)} more can be taken now: its memmap comes out of {free} that the kernel has "
            f"free; MOVABLE : KERNEL is {now.ratio:.1f}, then {after.ratio:.1f}"
        )


def acceptable(inventory: Inventory) -> Taking:
    """The most memory in all that can be plugged now without starving the kernel (rule 3)."""
    spare = max(0, inventory.kernel_free_bytes // 2)
    return Taking(inventory, max(spare * _MEMMAP_SHARE, 0 if inventory.memory_offline_bytes else inventory.block_bytes))


class _Zones:
    """How much of the memory is movable, as blocks are added; in all and on each NUMA node."""

    def __init__(self, inventory: Inventory) -> None:
        self._block_bytes = inventory.block_bytes
        self._kernel = {
            zones.node: round_up(zones.kernel_present_bytes, max(1, inventory.block_bytes)) for zones in inventory.zones
        }
        self._movable = {zones.node: zones.movable_present_bytes for zones in inventory.zones}

    @property
    def ratio(self) -> float:
        """MOVABLE : KERNEL in all."""
        return sum(self._movable.values()) / max(1, sum(self._kernel.values()))

    def place(self, block: MemoryBlock) -> BlockTarget:
        """The zone for one more block, which is counted there."""
        movable = self._movable.get(block.node, 0) + self._block_bytes
        in_all = sum(self._movable.values()) + self._block_bytes
        fits_node = movable <= MAX_MOVABLE_RATIO * self._kernel.get(block.node, 0)
        if fits_node and in_all <= MAX_MOVABLE_RATIO * sum(self._kernel.values()):
            target = BlockTarget.ONLINE_MOVABLE
        else:
            target = BlockTarget.ONLINE_KERNEL
        self.count(block, target)
        return target

    def count(self, block: MemoryBlock, target: BlockTarget) -> None:
        """One more block, which goes where that was decided."""
        zone = self._movable if target is BlockTarget.ONLINE_MOVABLE else self._kernel
        zone[block.node] = zone.get(block.node, 0) + self._block_bytes

    def add(self, added_bytes: int) -> None:
        """As if so much were brought online, as far as the ratio allows in the movable zone."""
        node = next(iter(self._kernel), 0)
        kernel, movable = sum(self._kernel.values()), sum(self._movable.values())
        whole = kernel + movable + added_bytes
        more_kernel = max(0, min(added_bytes, round(whole / (1 + MAX_MOVABLE_RATIO)) - kernel))
        self._kernel[node] = self._kernel.get(node, 0) + more_kernel
        self._movable[node] = self._movable.get(node, 0) + added_bytes - more_kernel


def _index(block: MemoryBlock) -> int:
    return block.index
