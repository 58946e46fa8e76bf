"""Which CPUs and memory blocks to bring online or take offline: pure functions of what is there.

The law:

1. Only what the broker granted is brought online, and only while it is not online already; whatever
   else onlines things (a udev rule, the kernel, a person) is not fought.
2. CPUs are taken offline only for a reclaim, from the highest number downwards (the hypervisor unplugs
   in that order), never CPU 0, never one that is pinned, and never the last.
3. Memory goes to ZONE_MOVABLE, where it can be taken back, until MOVABLE : KERNEL would exceed
   `MAX_MOVABLE_RATIO`; the rest goes to the kernel's zones. The kernel's own default for its
   auto-movable policy is 301 % (mm/memory_hotplug.c, auto_movable_ratio), and its documentation calls
   up to 3:1 or 4:1 usually fine.
4. A VM can take only so much memory at once: the memmap of what arrives (1/64 of it) comes out of
   free *kernel* memory, of which half is left alone. One block always: a VM that is full would
   never get any more else, and what the kernel cannot take virtio-mem offers again.
"""

from collections.abc import Collection

from guestd.guest.core.ops import BlockOp, BlockTarget, CpuOp
from guestd.model.guest import BlockState, Inventory, MemoryBlock

MAX_MOVABLE_RATIO = 4.0
_MEMMAP_SHARE = 64  # struct page is 64 bytes for each 4096


def cpus_to_online(inventory: Inventory, granted_vcpus: int, busy: Collection[int]) -> list[CpuOp]:
    """CPUs to bring online, lowest first. `busy`: being worked on, or to be left alone for now."""
    missing = granted_vcpus - len(inventory.cpus_online | (set(busy) & inventory.cpus_present))
    offline = sorted(inventory.cpus_present - inventory.cpus_online - set(busy))
    return [CpuOp(number, True) for number in offline[: max(0, missing)]]


def cpus_to_offline(inventory: Inventory, left_vcpus: int, busy: Collection[int]) -> list[CpuOp]:
    """CPUs to take offline so that `left_vcpus` stay, highest first; stops at the first that must stay."""
    ops: list[CpuOp] = []
    surplus = len(inventory.cpus_online) - max(1, left_vcpus)
    for number in sorted(inventory.cpus_online, reverse=True)[: max(0, surplus)]:
        if number == 0 or number in inventory.cpus_pinned:
            break
        if number not in busy:
            ops.append(CpuOp(number, False))
    return ops


def blocks_to_online(inventory: Inventory, granted_bytes: int, busy: Collection[int]) -> list[BlockOp]:
    """Offline memory blocks to bring online within the grant, lowest first, each with its zone."""
    if not inventory.block_bytes:
        return []
    room = granted_bytes - inventory.memory_online_bytes - inventory.block_bytes * len(busy)
    offline = [block for block in inventory.blocks if block.state is BlockState.OFFLINE and block.index not in busy]
    count = max(0, -(-room // inventory.block_bytes))
    movable, kernel = inventory.movable_zone_bytes, inventory.kernel_zone_bytes
    ops = []
    for block in sorted(offline, key=_index)[:count]:
        if movable + inventory.block_bytes <= MAX_MOVABLE_RATIO * kernel:
            movable += inventory.block_bytes
            ops.append(BlockOp(block.index, BlockTarget.ONLINE_MOVABLE))
        else:
            kernel += inventory.block_bytes
            ops.append(BlockOp(block.index, BlockTarget.ONLINE_KERNEL))
    return ops


def acceptable_bytes(inventory: Inventory) -> int:
    """The most memory in all that can be plugged now without starving the kernel (rule 4)."""
    spare = max(0, inventory.kernel_free_bytes // 2)
    offline = sum(1 for block in inventory.blocks if block.state is BlockState.OFFLINE)
    more = max(spare * _MEMMAP_SHARE, inventory.block_bytes if offline == 0 else 0)
    return inventory.memory_online_bytes + offline * inventory.block_bytes + more


def _index(block: MemoryBlock) -> int:
    return block.index
