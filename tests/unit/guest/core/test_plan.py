"""Which CPUs and blocks: pure functions of what is there."""

from hypothesis import given
from hypothesis import strategies as st

from guestd.guest.core import plan
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


def test_cpus_come_lowest_first_and_no_more_than_granted() -> None:
    assert plan.cpus_to_online(cpus(4, {0}), 3, ()) == [CpuOp(1, True), CpuOp(2, True)]
    assert plan.cpus_to_online(cpus(4, {0, 1, 2, 3}), 2, ()) == []
    assert plan.cpus_to_online(cpus(2, {0}), 9, ()) == [CpuOp(1, True)]


def test_a_cpu_that_is_busy_counts_as_coming() -> None:
    assert plan.cpus_to_online(cpus(4, {0}), 2, {1}) == []
    assert plan.cpus_to_online(cpus(4, {0}), 3, {1}) == [CpuOp(2, True)]
    assert plan.cpus_to_online(cpus(2, {0}), 2, {7}) == [CpuOp(1, True)]  # one that is not there helps nobody


def test_cpus_go_highest_first_never_0_never_the_last() -> None:
    assert plan.cpus_to_offline(cpus(4, {0, 1, 2, 3}), 2, ()) == [CpuOp(3, False), CpuOp(2, False)]
    assert plan.cpus_to_offline(cpus(4, {0, 1}), 0, ()) == [CpuOp(1, False)]
    assert plan.cpus_to_offline(cpus(4, {0}), 0, ()) == []
    assert plan.cpus_to_offline(cpus(4, {3}), 0, ()) == []


def test_what_is_pinned_ends_the_way_down() -> None:
    assert plan.cpus_to_offline(cpus(4, {0, 1, 2, 3}, {2}), 1, ()) == [CpuOp(3, False)]
    assert plan.cpus_to_offline(cpus(4, {0, 1, 2, 3}, {3}), 1, ()) == []


@given(st.sets(st.integers(0, 7)), st.sets(st.integers(0, 7)), st.integers(-3, 12), st.sets(st.integers(0, 7)))
def test_no_order_takes_what_must_stay(online: set[int], pinned: set[int], left: int, busy: set[int]) -> None:
    """Invariant 9."""
    ops = plan.cpus_to_offline(cpus(8, online, pinned), left, busy)
    gone = {op.number for op in ops}
    assert 0 not in gone
    assert not gone & (pinned | busy)
    assert len(online - gone) >= min(len(online), max(1, left))


def test_blocks_come_lowest_first_within_the_grant() -> None:
    ops = plan.blocks_to_online(memory(4, 4), 6 * BLOCK, ())
    assert ops == [BlockOp(4, BlockTarget.ONLINE_MOVABLE), BlockOp(5, BlockTarget.ONLINE_MOVABLE)]
    assert plan.blocks_to_online(memory(4, 4), 4 * BLOCK, ()) == []
    assert plan.blocks_to_online(memory(4, 4), 3 * BLOCK, ()) == []
    assert plan.blocks_to_online(Inventory(), GIB, ()) == []


def test_a_part_of_a_block_is_worth_the_block() -> None:
    assert len(plan.blocks_to_online(memory(4, 4), 4 * BLOCK + 1, ())) == 1


def test_blocks_that_are_busy_count_as_coming() -> None:
    assert plan.blocks_to_online(memory(4, 4), 6 * BLOCK, {4, 5}) == []
    assert [op.index for op in plan.blocks_to_online(memory(4, 4), 6 * BLOCK, {4})] == [5]


def test_memory_is_movable_until_the_kernel_would_starve() -> None:
    ops = plan.blocks_to_online(memory(4, 8, kernel=BLOCK, movable=2 * BLOCK), 12 * BLOCK, ())
    movable = [op.target for op in ops].count(BlockTarget.ONLINE_MOVABLE)
    kernel = [op.target for op in ops].count(BlockTarget.ONLINE_KERNEL)
    assert [op.target for op in ops[:3]] == [
        BlockTarget.ONLINE_MOVABLE,
        BlockTarget.ONLINE_MOVABLE,
        BlockTarget.ONLINE_KERNEL,
    ]
    assert movable + 2 <= plan.MAX_MOVABLE_RATIO * (kernel + 1)
    assert movable + kernel == 8


def test_what_is_acceptable_is_bounded_by_free_kernel_memory() -> None:
    assert plan.acceptable_bytes(memory(4, 0, free=16 * MIB)) == 4 * BLOCK + 8 * MIB * 64
    assert plan.acceptable_bytes(memory(4, 2, free=0)) == 6 * BLOCK


def test_a_vm_that_is_full_can_still_take_a_block() -> None:
    assert plan.acceptable_bytes(memory(4, 0, free=-5)) == 5 * BLOCK
    assert plan.acceptable_bytes(memory(4, 1, free=0)) == 5 * BLOCK, "one at a time"
