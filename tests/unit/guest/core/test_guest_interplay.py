"""What one part of the guest does while another is at work: orders, samples, looks, hooks and failures together."""

import errno
from dataclasses import replace

import pytest
from one import ALL, BLOCK, SETTINGS, One, grant, hooks, of, ops, reclaim, said, sample_of

from guestd.guest.core.actions import Action, TakeSample
from guestd.guest.core.hooks import Hooks
from guestd.guest.core.ops import BlockOp, BlockTarget, CpuOp, HandStatus
from guestd.guest.core.setbacks import Setbacks
from guestd.guest.core.state import State
from guestd.model.guest import BlockState, Capability, Inventory, MemoryBlock
from guestd.model.messages import Ack, AckStatus, Demand, Grant, OrderId, RefusalReason, Usable
from guestd.model.resources import Kind
from guestd.model.units import GIB, MIB

KERNEL = 48 * MIB


def state(*capabilities: Capability, blocks: int = 0) -> State:
    one = State(frozenset(capabilities), SETTINGS, Setbacks(1.0, 10.0), Hooks(SETTINGS))
    online = tuple(MemoryBlock(index, BlockState.ONLINE) for index in range(blocks))
    one.inventory = Inventory(block_bytes=BLOCK if blocks else 0, blocks=online)
    return one


def granted(one: State, amount: int, epoch: int = 1) -> None:
    """The broker says so, and it is answered."""
    one.orders.begin_epoch(epoch)
    order = grant(Kind.MEMORY, amount, epoch=epoch)
    one.orders.take(order, 0, 100.0, 99.0)
    current = one.orders.of(Kind.MEMORY)
    assert current is not None
    current.answer = Ack(order.id, Kind.MEMORY, AckStatus.DONE, amount, Usable())


def sees(one: State, total_bytes: int) -> int | None:
    one.learn_kernel_bytes(sample_of(cpu_busy_seconds={0: 1.0}, memory_total_bytes=total_bytes))
    return one.kernel_bytes


# ---- what the kernel took ------------------------------------------------------------------------


def test_the_kernel_s_share_is_what_is_held_and_not_to_be_had() -> None:
    one = state(blocks=8)
    assert sees(one, 8 * BLOCK - KERNEL) == KERNEL
    granted(one, 8 * BLOCK)
    assert sees(one, 8 * BLOCK - KERNEL // 2) == KERNEL // 2, "the least that was seen"


def test_a_broker_that_is_new_in_the_middle_of_a_shrink_does_not_make_it_nothing() -> None:
    one = state(Capability.VIRTIO_MEM, blocks=8)
    granted(one, 8 * BLOCK)
    sees(one, 8 * BLOCK - KERNEL)
    one.orders.granted[Kind.MEMORY] = 5 * BLOCK  # what the guest answered last
    one.orders.begin_epoch(2)
    for blocks in (8, 7, 6, 5):
        one.inventory = replace(one.inventory, blocks=one.inventory.blocks[:blocks])
        assert sees(one, blocks * BLOCK - KERNEL) == KERNEL
        assert sees(one, blocks * BLOCK - KERNEL + BLOCK // 2) == KERNEL, "the driver takes page by page"


def test_memory_that_is_more_than_was_granted_says_nothing() -> None:
    one = state(Capability.VIRTIO_MEM, blocks=8)
    granted(one, 8 * BLOCK)
    sees(one, 8 * BLOCK - KERNEL)
    one.inventory = replace(one.inventory, blocks=(*one.inventory.blocks, MemoryBlock(8, BlockState.ONLINE)))
    assert sees(one, 9 * BLOCK - KERNEL) == KERNEL, "the kernel brought it online before the grant was heard"


def test_without_memory_blocks_it_is_known_by_what_was_granted() -> None:
    one = state(Capability.BALLOON)
    assert sees(one, 31 * GIB) is None
    granted(one, 32 * GIB)
    assert sees(one, 31 * GIB) == GIB


def test_what_a_balloon_holds_is_not_taken_for_the_kernel_s_by_a_daemon_that_is_new() -> None:
    one = state(Capability.BALLOON, blocks=8)
    assert sees(one, 5 * BLOCK - KERNEL) is None, "it may hold any of the eight"
    granted(one, 5 * BLOCK)
    assert sees(one, 5 * BLOCK - KERNEL) == KERNEL


def test_a_daemon_that_is_new_asks_for_no_more_than_there_is_beside_a_balloon() -> None:
    capabilities = {*ALL, Capability.BALLOON} - {Capability.VIRTIO_MEM}
    one = One(blocks=8, capabilities=capabilities, ballooned_bytes=3 * BLOCK)
    [demand] = said(Demand, one.welcome())
    assert demand.needed.memory_bytes <= 5 * BLOCK


def test_what_it_does_not_know_of_it_does_not_give_either() -> None:
    achieved = []
    for capabilities in (ALL, {*ALL, Capability.BALLOON}):
        one = One(blocks=8, capabilities=capabilities)
        one.welcome()
        answers = said(Ack, one.order(reclaim(Kind.MEMORY, 0, seconds=10.0)))
        while not answers:
            answers = said(Ack, one.step(0.1))
        assert answers[0].status is AckStatus.PARTIAL
        achieved.append(answers[0].achieved)
    assert achieved[1] == achieved[0], "a balloon that holds nothing, but who knows"


# ---- blocks --------------------------------------------------------------------------------------


def shrinking() -> One:
    """A guest from which virtio-mem takes the last of eight blocks."""
    one = One(blocks=8)
    one.welcome()
    one.order(grant(Kind.MEMORY, 8 * BLOCK))
    one.order(reclaim(Kind.MEMORY, 7 * BLOCK, request=2, revision=2))
    return one


def granted_again(one: One) -> list[Action]:
    """The host wants all of them to be there after all."""
    return one.order(grant(Kind.MEMORY, 8 * BLOCK, request=3, revision=3))


def gone_offline(one: One) -> list[Action]:
    """The last block is offline; an event says that something happened."""
    one.blocks.discard(7)
    one.machine.on_hotplug(one.now)
    return one.step()


def test_a_block_that_virtio_mem_took_and_brought_back_is_nobody_else_s() -> None:
    one = shrinking()
    one.blocks.discard(7)  # gone and back, offline, before anybody looked
    assert [op.index for op in ops(granted_again(one)) if isinstance(op, BlockOp)] == [7]
    assert one.machine.held == frozenset()


def test_a_block_that_virtio_mem_was_about_to_take_when_more_was_granted_is_nobody_else_s() -> None:
    one = shrinking()
    granted_again(one)
    assert [op.index for op in ops(gone_offline(one)) if isinstance(op, BlockOp)] == [7]


def test_what_is_taken_offline_long_after_a_shrink_is_somebody_else_s() -> None:
    one = shrinking()
    granted_again(one)
    one.step(10)
    assert not ops(gone_offline(one))
    assert one.machine.held == {(BlockOp, 7)}


def dimms() -> One:
    """A guest whose DIMMs, four blocks of eight, are taken offline by guestd."""
    one = One(blocks=8, capabilities=ALL - {Capability.VIRTIO_MEM})
    one.movable = {4, 5, 6, 7}
    one.welcome()
    one.order(grant(Kind.MEMORY, 8 * BLOCK))
    one.step(SETTINGS.calm_for_seconds)
    return one


def test_a_block_that_is_being_emptied_does_not_count_as_used() -> None:
    one = dimms()
    [block] = ops(one.order(reclaim(Kind.MEMORY, 4 * BLOCK, request=2, revision=2, seconds=60.0)))
    assert one.demand is not None
    before = one.demand
    one.used_bytes += BLOCK  # isolated: free no longer, and still a part of MemTotal
    actions = one.step(0.05)
    assert of(TakeSample, actions)
    assert not said(Demand, actions), "nothing is needed that was not before"
    one.used_bytes -= BLOCK
    actions = one.result(block)
    assert of(TakeSample, actions), "the next one is chosen by what is so now"
    assert len(ops(actions)) == 1
    while one.machine.settled is False:
        [block] = ops(actions)
        actions = one.result(block)
    [answer] = said(Ack, actions)
    assert (answer.status, answer.achieved) == (AckStatus.DONE, 4 * BLOCK)
    assert one.demand.floor == before.floor


# ---- orders --------------------------------------------------------------------------------------


def test_what_was_to_be_given_back_to_a_broker_that_went_away_is_kept() -> None:
    one = One(cpus=4)
    one.welcome()
    one.order(grant(Kind.CPU, 4000))
    one.step(1)
    one.hooks_say = None
    [asked] = hooks(one.order(reclaim(Kind.CPU, 1000, request=2, revision=2)))
    one.machine.on_disconnected()
    assert not ops(one.hooked(asked, "none"))
    assert not [op for _ in range(20) for op in ops(one.step(0.5))]
    assert one.cpus == {0, 1, 2, 3}
    assert one.machine.settled


def test_what_had_been_taken_already_comes_back() -> None:
    one = One(cpus=4)
    one.welcome()
    one.order(grant(Kind.CPU, 4000))
    begun = ops(one.order(reclaim(Kind.CPU, 1000, request=2, revision=2)))
    assert len(begun) == 3
    one.machine.on_disconnected()
    back = [op for done in begun for op in ops(one.result(done))]
    assert set(back) == {CpuOp(number, True) for number in (1, 2, 3)}


def test_many_blocks_under_way_hold_up_no_cpu() -> None:
    one = One(blocks=4, present=100)
    one.welcome()
    assert len(ops(one.order(grant(Kind.MEMORY, 100 * BLOCK)))) == SETTINGS.ops_at_once
    assert ops(one.order(grant(Kind.CPU, 2000, request=2, revision=2))) == [CpuOp(1, True)]


def test_a_cpu_that_could_not_be_tried_yet_is_no_try() -> None:
    one = One(cpus=4)
    one.welcome()
    one.order(grant(Kind.CPU, 4000))
    one.machine.settings = replace(SETTINGS, ops_at_once=0)
    answers = said(Ack, one.order(reclaim(Kind.CPU, 1000, request=2, revision=2, seconds=10.0)))
    for _ in range(10):
        answers += said(Ack, one.step(0.1))
    assert not answers, "nothing was tried, and there is time"


@pytest.mark.parametrize("kind", Kind)
def test_an_order_is_met_with_a_fresh_sample(kind: Kind) -> None:
    one = One(cpus=2)
    one.machine.on_watched(True)
    one.welcome()
    one.step(SETTINGS.calm_for_seconds + 1)
    one.step(SETTINGS.rest_seconds)
    assert not of(TakeSample, one.step(1.5)), "it rests"
    one.hooks_say = None  # what they do is a reason to look, too
    amount = 2000 if kind is Kind.CPU else 4 * BLOCK
    assert of(TakeSample, one.order(grant(kind, amount)))


def test_what_is_said_first_on_a_new_stream_is_so_now() -> None:
    one = One()
    one.machine.on_watched(True)
    one.welcome()
    one.step(SETTINGS.calm_for_seconds + 1)
    one.machine.on_disconnected()
    one.step(5.0)
    one.used_bytes += 200 * MIB
    one.step(10.0)
    one.used_bytes += 60 * MIB
    one.now += 20.0
    actions = one.welcome()
    [demand] = said(Demand, actions)
    assert demand.memory_used_bytes == one.used_bytes


def test_what_did_not_come_is_not_explained_by_what_once_did_not_go() -> None:
    one = One(blocks=8, capabilities=ALL - {Capability.VIRTIO_MEM})
    one.movable = {4, 5, 6, 7}
    one.welcome()
    one.order(grant(Kind.MEMORY, 8 * BLOCK))
    [block] = ops(one.order(reclaim(Kind.MEMORY, 7 * BLOCK, request=2, revision=2)))
    one.result(block, HandStatus.FAILED, errno.EBUSY)
    one.step(10.0)
    one.order(Grant(OrderId(3, 3, 3), Kind.MEMORY, 16 * BLOCK))
    [answer] = [ack for _ in range(60) for ack in said(Ack, one.step(0.5))]
    assert (answer.status, answer.refusal) == (AckStatus.PARTIAL, RefusalReason.TIMEOUT)
    assert "did not come" in answer.text


def test_the_target_of_an_offline_is_what_counts_as_isolating() -> None:
    one = state(blocks=8)
    assert not one.isolating
    one.doing = {BlockOp(3, BlockTarget.ONLINE_MOVABLE)}
    assert not one.isolating
    one.doing = {BlockOp(3, BlockTarget.OFFLINE)}
    assert one.isolating
