"""What goes, in which order, and what is done before."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from guestd.guest.core import give
from guestd.guest.core.ops import BlockOp, BlockTarget, CpuOp
from guestd.model.guest import BlockState, Inventory, MemoryBlock, Sample
from guestd.model.units import GIB, MIB

BLOCK = 128 * MIB
SAMPLE = Sample({}, {}, 0.0, 0, 0, 0, 0, 4 * GIB, 2 * GIB, 0, 0, memory_free_bytes=GIB)


def cpus(present: int, online: set[int], pinned: set[int] | None = None) -> Inventory:
    return Inventory(
        cpus_possible=frozenset(range(8)),
        cpus_present=frozenset(range(present)),
        cpus_online=frozenset(online),
        cpus_pinned=frozenset(pinned or set()),
    )


def test_cpus_go_highest_first_never_0_never_the_last() -> None:
    assert give.cpus_to_offline(cpus(4, {0, 1, 2, 3}), 2, ()) == [CpuOp(3, False), CpuOp(2, False)]
    assert give.cpus_to_offline(cpus(4, {0, 1}), 0, ()) == [CpuOp(1, False)]
    assert give.cpus_to_offline(cpus(4, {0}), 0, ()) == []
    assert give.cpus_to_offline(cpus(4, {3}), 0, ()) == []


def test_what_is_pinned_ends_the_way_down() -> None:
    assert give.cpus_to_offline(cpus(4, {0, 1, 2, 3}, {2}), 1, ()) == [CpuOp(3, False)]
    assert give.cpus_to_offline(cpus(4, {0, 1, 2, 3}, {3}), 1, ()) == []


@given(st.sets(st.integers(0, 7)), st.sets(st.integers(0, 7)), st.integers(-3, 12), st.sets(st.integers(0, 7)))
def test_no_order_takes_what_must_stay(online: set[int], pinned: set[int], left: int, busy: set[int]) -> None:
    """Invariant 9."""
    ops = give.cpus_to_offline(cpus(8, online, pinned), left, busy)
    gone = {op.number for op in ops}
    assert 0 not in gone
    assert not gone & (pinned | busy)
    assert len(online - gone) >= min(len(online), max(1, left))


def blocks(*movable: bool) -> Inventory:
    """Online blocks, movable or not, by their number."""
    found = (MemoryBlock(index, BlockState.ONLINE, one) for index, one in enumerate(movable))
    return Inventory(block_bytes=BLOCK, blocks=tuple(found))


def test_movable_blocks_go_first_then_those_that_failed_least_then_the_highest() -> None:
    inventory = blocks(False, True, True, True, False)
    ops = give.blocks_to_offline(inventory, 0, {3: 2}, ())
    assert [op.index for op in ops] == [2, 1, 3, 4], "one block always stays"
    assert {op.target for op in ops} == {BlockTarget.OFFLINE}
    assert give.blocks_to_offline(inventory, 3 * BLOCK, {3: 2}, {2}) == [
        BlockOp(1, BlockTarget.OFFLINE),
        BlockOp(3, BlockTarget.OFFLINE),
    ]


def test_only_whole_blocks_above_what_is_left_go() -> None:
    inventory = blocks(False, True, True, True)
    assert [op.index for op in give.blocks_to_offline(inventory, 2 * BLOCK + 1, {}, ())] == [3]
    assert give.blocks_to_offline(inventory, 4 * BLOCK, {}, ()) == []
    assert give.blocks_to_offline(Inventory(), 0, {}, ()) == []


def test_boot_memory_never_goes_in_the_place_of_what_fails() -> None:
    inventory = blocks(False, False, True, True, False, False)
    ops = give.blocks_to_offline(inventory, 4 * BLOCK, {}, {3, 5})
    assert [op.index for op in ops] == [2, 4]
    assert give.blocks_to_offline(inventory, 4 * BLOCK, {}, {2, 3, 4, 5}) == []


def test_what_is_offline_already_is_not_taken_again() -> None:
    inventory = blocks(False, True, True)
    first, second, third = inventory.blocks
    inventory = replace(inventory, blocks=(first, second, replace(third, state=BlockState.OFFLINE)))
    assert [op.index for op in give.blocks_to_offline(inventory, BLOCK, {}, ())] == [1]


def test_nothing_is_trimmed_where_enough_is_free() -> None:
    assert give.trim_bytes(SAMPLE, 960 * MIB, 64 * MIB) == 0


def test_so_much_is_trimmed_as_is_missing_and_no_more_than_there_is() -> None:
    assert give.trim_bytes(SAMPLE, GIB + 100 * MIB, 64 * MIB) == 164 * MIB
    assert give.trim_bytes(SAMPLE, 4 * GIB, 64 * MIB) == GIB, "what is available without being free"
    assert give.trim_bytes(replace(SAMPLE, memory_free_bytes=3 * GIB), 4 * GIB, 0) == 0
