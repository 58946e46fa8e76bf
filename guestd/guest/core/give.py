"""Giving back: what to do before memory goes, which CPUs and blocks go, in which order.

The law:

1. CPUs are taken offline only for a reclaim, from the highest number downwards (the hypervisor unplugs
   in that order), never CPU 0, never one that is pinned, and never the last.
2. virtio-mem and the balloon take pages, not blocks: their drivers do the offlining. What is in use where
   memory goes has to move to what stays, and that takes free pages: so when there are not enough, the kernel is first
   made to give up what it uses least (`trim_bytes`), in chunks, within the order's time.
3. Blocks of a DIMM go as wholes and the guest takes them offline itself, one after the other: those in ZONE_MOVABLE
   first, those that have failed least often, from the highest number downwards. The lowest ones, as many as are to
   stay, go only where they are movable: boot memory, which no host takes back, is among them, and it is not.

Weak spot: which pages are in the way only the kernel knows; `removable` of a block says 1 always.
"""

from collections.abc import Collection, Mapping

from guestd.guest.core.ops import BlockOp, BlockTarget, CpuOp
from guestd.model.guest import BlockState, Inventory, Sample


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


def blocks_to_offline(
    inventory: Inventory, left_bytes: int, failures: Mapping[int, int], busy: Collection[int]
) -> list[BlockOp]:
    """Memory blocks to take offline so that `left_bytes` stay online, the best first (rule 3).

    :param failures: how often a block has failed.
    :param busy: blocks that are being worked on, or left alone.
    """
    if not inventory.block_bytes:
        return []
    surplus = (inventory.memory_online_bytes - max(left_bytes, inventory.block_bytes)) // inventory.block_bytes
    here = sorted(block.index for block in inventory.blocks if block.state is not BlockState.OFFLINE)
    stay = set(here[: len(here) - max(0, surplus)])
    online = [b for b in inventory.blocks if b.state is BlockState.ONLINE and b.index not in busy]
    online = [block for block in online if block.movable or block.index not in stay]
    ranked = sorted(online, key=lambda block: (not block.movable, failures.get(block.index, 0), -block.index))
    return [BlockOp(block.index, BlockTarget.OFFLINE) for block in ranked[: max(0, surplus)]]


def trim_bytes(sample: Sample, given_bytes: int, spare_bytes: int) -> int:
    """How much the kernel has to give up so that `given_bytes` can go and `spare_bytes` stay free (rule 2).

    Never more than it can: what is available without being free.
    """
    short = given_bytes + spare_bytes - sample.memory_free_bytes
    return max(0, min(short, sample.memory_available_bytes - sample.memory_free_bytes))
