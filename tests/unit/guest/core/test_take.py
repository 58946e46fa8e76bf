"""Which CPUs and blocks: pure functions of what is there."""

from guestd.guest.core import take
from guestd.guest.core.ops import BlockOp, BlockTarget, CpuOp
from guestd.model.guest import BlockState, Inventory, MemoryBlock, NodeZones
from guestd.model.units import GIB, MIB

BLOCK = 128 * MIB


def cpus(present: int, online: set[int], pinned: set[int] | None = None) -> Inventory:
    return Inventory(
        cpus_possible=frozenset(range(8)),
        cpus_present=frozenset(range(present)),
        cpus_online=frozenset(online),
        cpus_pinned=frozenset(pinned or set()),
    )


def memory(online: int, offline: int, kernel: int = GIB, movable: int = 0, free: int = GIB) -> Inventory:
    blocks = [MemoryBlock(index, BlockState.ONLINE) for index in range(online)]
    blocks += [MemoryBlock(index, BlockState.OFFLINE) for index in range(online, online + offline)]
    return Inventory(
        block_bytes=BLOCK,
        blocks=tuple(reversed(blocks)),
        zones=(NodeZones(0, kernel, free, movable),),
    )


def accepts(inventory: Inventory) -> int:
    return take.acceptable(inventory).acceptable_bytes


def test_cpus_come_lowest_first_and_no_more_than_granted() -> None:
    assert take.cpus_to_online(cpus(4, {0}), 3, ()) == [CpuOp(1, True), CpuOp(2, True)]
    assert take.cpus_to_online(cpus(4, {0, 1, 2, 3}), 2, ()) == []
    assert take.cpus_to_online(cpus(2, {0}), 9, ()) == [CpuOp(1, True)]


def test_a_block_that_would_not_go_offline_is_counted_once() -> None:
    ops = take.blocks_to_online(memory(online=4, offline=2), 6 * BLOCK, busy={2, 3})
    assert [op.index for op in ops] == [4, 5]
    assert [op.index for op in take.blocks_to_online(memory(online=4, offline=2), 5 * BLOCK, busy={4})] == []


def test_a_cpu_that_is_busy_counts_as_coming() -> None:
    assert take.cpus_to_online(cpus(4, {0}), 2, {1}) == []
    assert take.cpus_to_online(cpus(4, {0}), 3, {1}) == [CpuOp(2, True)]
    assert take.cpus_to_online(cpus(2, {0}), 2, {7}) == [CpuOp(1, True)]  # one that is not there helps nobody


def test_blocks_come_lowest_first_within_the_grant() -> None:
    ops = take.blocks_to_online(memory(4, 4), 6 * BLOCK, ())
    assert ops == [BlockOp(4, BlockTarget.ONLINE_MOVABLE), BlockOp(5, BlockTarget.ONLINE_MOVABLE)]
    assert take.blocks_to_online(memory(4, 4), 4 * BLOCK, ()) == []
    assert take.blocks_to_online(memory(4, 4), 3 * BLOCK, ()) == []
    assert take.blocks_to_online(Inventory(), GIB, ()) == []


def test_a_part_of_a_block_is_worth_the_block() -> None:
    assert len(take.blocks_to_online(memory(4, 4), 4 * BLOCK + 1, ())) == 1


def test_blocks_that_are_busy_count_as_coming() -> None:
    assert take.blocks_to_online(memory(4, 4), 6 * BLOCK, {4, 5}) == []
    assert [op.index for op in take.blocks_to_online(memory(4, 4), 6 * BLOCK, {4})] == [5]


def test_memory_is_movable_until_the_kernel_would_starve() -> None:
    ops = take.blocks_to_online(memory(4, 8, kernel=BLOCK, movable=2 * BLOCK), 12 * BLOCK, ())
    movable = [op.target for op in ops].count(BlockTarget.ONLINE_MOVABLE)
    kernel = [op.target for op in ops].count(BlockTarget.ONLINE_KERNEL)
    assert [op.target for op in ops[:3]] == [
        BlockTarget.ONLINE_MOVABLE,
        BlockTarget.ONLINE_MOVABLE,
        BlockTarget.ONLINE_KERNEL,
    ]
    assert movable + 2 <= take.MAX_MOVABLE_RATIO * (kernel + 1)
    assert movable + kernel == 8


def test_what_is_acceptable_is_bounded_by_free_kernel_memory() -> None:
    assert accepts(memory(4, 0, free=16 * MIB)) == 4 * BLOCK + 8 * MIB * 64
    assert accepts(memory(4, 2, free=0)) == 6 * BLOCK


def test_a_vm_that_is_full_can_still_take_a_block() -> None:
    assert accepts(memory(4, 0, free=-5)) == 5 * BLOCK
    assert accepts(memory(4, 1, free=0)) == 5 * BLOCK, "one at a time"


def test_what_is_acceptable_comes_with_its_numbers() -> None:
    text = take.acceptable(memory(4, 0, kernel=GIB, movable=2 * GIB, free=16 * MIB)).explain()
    assert "512 MiB more" in text
    assert "16 MiB that the kernel has free" in text
    assert "MOVABLE : KERNEL is 2.0, then 2.5" in text


def test_what_firmware_keeps_of_a_block_is_not_held_against_it() -> None:
    four_to_one = memory(online=4, offline=16, kernel=4 * BLOCK - MIB)
    ops = take.blocks_to_online(four_to_one, 20 * BLOCK, ())
    assert {op.target for op in ops} == {BlockTarget.ONLINE_MOVABLE}
    one_more = memory(online=4, offline=17, kernel=4 * BLOCK - MIB)
    ops = take.blocks_to_online(one_more, 21 * BLOCK, ())
    assert [op.index for op in ops if op.target is BlockTarget.ONLINE_KERNEL] == [20]


def test_the_ratio_holds_on_each_numa_node() -> None:
    """A node of nothing but hot-added memory needs kernel memory of its own, whatever the others have."""
    blocks = tuple(MemoryBlock(index, BlockState.OFFLINE, node=1) for index in range(6))
    zones = (NodeZones(0, 8 * GIB, 8 * GIB, 0), NodeZones(1, 0, 0, 0))
    ops = take.blocks_to_online(Inventory(block_bytes=BLOCK, blocks=blocks, zones=zones), 6 * BLOCK, ())
    targets = [op.target for op in ops]
    assert targets == [BlockTarget.ONLINE_KERNEL, *[BlockTarget.ONLINE_MOVABLE] * 4, BlockTarget.ONLINE_KERNEL]


def test_blocks_that_are_on_their_way_count_for_the_zones() -> None:
    inventory = memory(1, 8, kernel=BLOCK, movable=0)
    under_way = [BlockOp(index, BlockTarget.ONLINE_MOVABLE) for index in (1, 2, 3, 4)]
    [op] = take.blocks_to_online(inventory, 6 * BLOCK, {1, 2, 3, 4}, under_way)
    assert op == BlockOp(5, BlockTarget.ONLINE_KERNEL), "four movable ones for one of the kernel's are enough"
