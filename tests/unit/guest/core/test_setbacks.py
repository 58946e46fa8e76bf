"""What failed, and what hangs in the kernel."""

import errno

import pytest
from one import ALL, BLOCK, One, grant, ops, reclaim, said

from guestd.guest.core.ops import BlockOp, BlockTarget, CpuOp, HandResult, HandStatus
from guestd.guest.core.setbacks import Setbacks, key_of
from guestd.model.guest import BlockState, Capability, Inventory, MemoryBlock
from guestd.model.messages import Ack, AckStatus
from guestd.model.resources import Kind

OFFLINE = BlockOp(7, BlockTarget.OFFLINE)


def with_a_stuck_block() -> One:
    """Block 7 was to go offline, and hangs."""
    one = One(blocks=8, capabilities=ALL - {Capability.VIRTIO_MEM})
    one.welcome()
    one.order(grant(Kind.MEMORY, 8 * BLOCK))
    one.movable = {4, 5, 6, 7}
    one.look()
    assert ops(one.order(reclaim(Kind.MEMORY, 7 * BLOCK, 2, 2))) == [OFFLINE]
    one.result(OFFLINE, HandStatus.STUCK, errno.EBUSY)
    one.step(20.0)
    one.order(grant(Kind.MEMORY, 8 * BLOCK, 3, 3))
    return one


def reasons(one: One) -> set[str]:
    assert one.demand is not None
    return {reason.code for reason in one.demand.reasons}


def test_what_lands_late_is_our_own_doing_and_ends_the_quarantine() -> None:
    one = with_a_stuck_block()
    for _ in range(40):
        one.step(10.0)
    assert "quarantined" in reasons(one)
    one.blocks.discard(7)
    actions = one.step(30.0)
    assert reasons(one) & {"quarantined", "others"} == set()
    assert one.machine.counters["taken-by-others"] == 0
    assert [op.index for op in ops(actions) if isinstance(op, BlockOp)] == [7], "it is granted, so it comes back"
    [ack] = said(
        Ack, one.result(BlockOp(7, BlockTarget.ONLINE_MOVABLE)) + one.order(grant(Kind.MEMORY, 8 * BLOCK, 4, 4))
    )
    assert ack.status is AckStatus.DONE


@pytest.mark.parametrize(
    ("op", "inventory", "forgotten"),
    [
        (CpuOp(1, True), Inventory(cpus_present=frozenset({0, 1}), cpus_online=frozenset({0})), False),
        (CpuOp(1, True), Inventory(cpus_present=frozenset({0, 1}), cpus_online=frozenset({0, 1})), True),
        (CpuOp(1, False), Inventory(cpus_present=frozenset({0, 1}), cpus_online=frozenset({0, 1})), False),
        (CpuOp(1, True), Inventory(cpus_present=frozenset({0}), cpus_online=frozenset({0})), True),
        (OFFLINE, Inventory(blocks=(MemoryBlock(7, BlockState.ONLINE),)), False),
        (OFFLINE, Inventory(blocks=(MemoryBlock(7, BlockState.GOING_OFFLINE),)), False),
        (OFFLINE, Inventory(blocks=(MemoryBlock(7, BlockState.OFFLINE),)), True),
        (OFFLINE, Inventory(), True),
        (BlockOp(7, BlockTarget.ONLINE_KERNEL), Inventory(blocks=(MemoryBlock(7, BlockState.OFFLINE),)), False),
        (BlockOp(7, BlockTarget.ONLINE_KERNEL), Inventory(blocks=(MemoryBlock(7, BlockState.ONLINE),)), True),
    ],
)
def test_what_is_gone_or_as_it_was_to_be_has_failed_no_longer(
    op: CpuOp | BlockOp, inventory: Inventory, forgotten: bool
) -> None:
    setbacks = Setbacks(2.0, 300.0)
    setbacks.failed(key_of(op), HandResult(op, HandStatus.FAILED, errno.EIO), 100.0)
    setbacks.look(inventory)
    assert (setbacks.resting(100.0) == set()) == forgotten
