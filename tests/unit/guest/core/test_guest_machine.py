"""The guest's decisions, event by event."""

import errno
from dataclasses import replace
from itertools import pairwise

import pytest
from one import BLOCK, HEARTBEAT_SECONDS, SETTINGS, One, grant, of, ops, reclaim, said

from guestd.guest.core.actions import Do, Log, Rescan, Say, TakeSample
from guestd.guest.core.ops import BlockOp, BlockTarget, CpuOp, HandResult, HandStatus
from guestd.model.guest import BlockState, Capability, Inventory, MemoryBlock, NodeZones
from guestd.model.messages import (
    Ack,
    AckStatus,
    Demand,
    Grant,
    Heartbeat,
    OrderId,
    Reclaim,
    ReclaimStage,
    RefusalReason,
    Throttle,
    Urgency,
    Usable,
)
from guestd.model.resources import Kind
from guestd.model.units import GIB, MIB


def test_a_grant_of_cpus_is_brought_online_and_answered() -> None:
    one = One()
    one.welcome()
    actions = one.order(grant(Kind.CPU, 3000))
    assert ops(actions) == [CpuOp(1, True), CpuOp(2, True)]
    assert said(Ack, actions) == []
    one.result(CpuOp(1, True))
    [ack] = said(Ack, one.result(CpuOp(2, True)))
    assert (ack.id, ack.status, ack.achieved) == (OrderId(3, 1, 1), AckStatus.DONE, 3000)
    assert ack.usable.vcpus_online == 3


def test_a_grant_of_memory_is_brought_online_and_answered() -> None:
    one = One()
    one.welcome()
    actions = one.order(grant(Kind.MEMORY, 6 * BLOCK))
    assert ops(actions) == [BlockOp(4, BlockTarget.ONLINE_MOVABLE), BlockOp(5, BlockTarget.ONLINE_MOVABLE)]
    one.result(BlockOp(4, BlockTarget.ONLINE_MOVABLE))
    [ack] = said(Ack, one.result(BlockOp(5, BlockTarget.ONLINE_MOVABLE)))
    assert (ack.status, ack.achieved) == (AckStatus.DONE, 6 * BLOCK)


def test_a_thousand_blocks_come_in_batches() -> None:
    one = One()
    one.welcome()
    states = [BlockState.ONLINE] * 4 + [BlockState.OFFLINE] * 1000
    blocks = tuple(MemoryBlock(index, state) for index, state in enumerate(states))
    numbers = frozenset(range(4))
    zones = (NodeZones(0, GIB, GIB, 0),)
    one.machine.on_order(grant(Kind.MEMORY, len(blocks) * BLOCK), one.now)
    one.machine.next_actions(one.now)
    one.machine.on_inventory(Inventory(numbers, numbers, frozenset({0}), frozenset(), BLOCK, blocks, zones), one.now)
    [first] = of(Do, one.machine.next_actions(one.now))
    assert [op.index for op in first.ops if isinstance(op, BlockOp)] == [*range(4, 4 + SETTINGS.ops_at_once)]
    assert of(Do, one.machine.next_actions(one.now)) == []
    one.machine.on_result(HandResult(first.ops[0], HandStatus.TIMEOUT), one.now)
    one.machine.next_actions(one.now)  # a look is asked for
    one.machine.on_inventory(Inventory(numbers, numbers, frozenset({0}), frozenset(), BLOCK, blocks, zones), one.now)
    [second] = of(Do, one.machine.next_actions(one.now))
    assert [op.index for op in second.ops if isinstance(op, BlockOp)] == [4 + SETTINGS.ops_at_once]


def test_a_grant_of_what_is_there_is_done_at_once() -> None:
    one = One(cpus=4, blocks=8)
    one.welcome()
    for kind, amount in ((Kind.CPU, 2000), (Kind.MEMORY, 4 * BLOCK)):
        actions = one.order(grant(kind, amount))
        assert ops(actions) == []  # a grant never takes anything away
        assert said(Ack, actions)[0].status is AckStatus.DONE


def test_a_grant_that_does_not_come_is_answered_in_part_at_its_deadline() -> None:
    one = One()
    one.welcome()
    one.order(grant(Kind.CPU, 9000))
    for number in (1, 2, 3):
        one.result(CpuOp(number, True))
    assert said(Ack, one.step(SETTINGS.grant_answer_seconds - 1)) == []
    [ack] = said(Ack, one.step(1.1))
    assert (ack.status, ack.achieved, ack.refusal) == (AckStatus.PARTIAL, 4000, RefusalReason.TIMEOUT)


def test_a_grant_that_failed_says_why() -> None:
    one = One()
    one.welcome()
    one.order(grant(Kind.CPU, 2000))
    one.result(CpuOp(1, True), HandStatus.FAILED, errno.EIO)
    answers = [ack for _ in range(25) for ack in said(Ack, one.step(1.0))]
    [ack] = answers
    assert (ack.status, ack.refusal) == (AckStatus.PARTIAL, RefusalReason.FAILED)
    assert "EIO" in ack.text


def test_without_the_means_a_grant_is_answered_at_once() -> None:
    one = One(capabilities=())
    one.welcome()
    actions = one.order(grant(Kind.CPU, 2000))
    assert ops(actions) == []
    assert said(Ack, actions)[0].refusal is RefusalReason.UNSUPPORTED


# ---- reclaims ------------------------------------------------------------------------------------


def test_an_older_epoch_or_revision_is_answered_stale_and_changes_nothing() -> None:
    one = One()
    one.welcome()
    one.order(grant(Kind.CPU, 1000, request=5, revision=5))
    for old in (
        grant(Kind.CPU, 4000, request=6, revision=4),
        grant(Kind.CPU, 4000, request=9, revision=9, epoch=2),
        grant(Kind.CPU, 4000, request=5, revision=5, epoch=2),
        grant(Kind.CPU, 4000, request=9, revision=9, epoch=4),
    ):
        actions = one.order(old)
        assert ops(actions) == []
        [ack] = said(Ack, actions)
        assert (ack.id, ack.status, ack.refusal) == (old.id, AckStatus.REFUSED, RefusalReason.STALE)
    assert ops(one.step(10)) == []


def test_revisions_are_counted_per_kind() -> None:
    one = One()
    one.welcome()
    one.order(grant(Kind.CPU, 1000, request=9, revision=9))
    [ack] = said(Ack, one.order(grant(Kind.MEMORY, 4 * BLOCK, request=2, revision=2)))
    assert ack.status is AckStatus.DONE


def test_the_same_request_gets_the_stored_answer_and_is_not_done_again() -> None:
    one = One(cpus=4)
    one.welcome()
    order = reclaim(Kind.CPU, 2000)
    one.order(order)
    one.result(CpuOp(3, False))
    [first] = said(Ack, one.result(CpuOp(2, False)))
    one.cpus.add(3)  # somebody onlined it since
    one.look()
    for again in (order, replace(order, stage=ReclaimStage.URGE)):
        actions = one.order(again)
        assert ops(actions) == []
        assert said(Ack, actions) == [first]


def test_nothing_is_decided_on_what_was_there_before_the_last_operation() -> None:
    one = One()
    one.welcome()
    one.order(grant(Kind.CPU, 3000))
    assert ops(one.result(CpuOp(1, True))) == []
    assert ops(one.result(CpuOp(2, True))) == []


def test_a_repeated_open_order_does_not_start_twice() -> None:
    one = One()
    one.welcome()
    order = grant(Kind.CPU, 2000)
    assert ops(one.order(order)) == [CpuOp(1, True)]
    assert ops(one.order(order)) == []
    assert len(said(Ack, one.result(CpuOp(1, True)))) == 1


@pytest.mark.parametrize("epoch", [4, 1])
def test_another_epoch_counts_anew(epoch: int) -> None:
    """Also a lower one: a broker that lost its journal is still the broker."""
    one = One()
    one.welcome()
    one.order(grant(Kind.CPU, 1000, request=50, revision=50))
    one.machine.on_disconnected()
    one.welcome(epoch)
    actions = one.order(grant(Kind.CPU, 2000, request=1, revision=1, epoch=epoch))
    assert ops(actions) == [CpuOp(1, True)]
    assert one.machine.hello().last_revision == 1


# ---- failures ------------------------------------------------------------------------------------


def test_what_fails_is_left_alone_longer_each_time() -> None:
    one, tries = One(), []
    one.welcome()
    one.order(grant(Kind.CPU, 2000))
    tries.append(one.now)
    for _ in range(4):
        one.result(CpuOp(1, True), HandStatus.FAILED, errno.EIO)
        while not ops(one.step(0.25)):
            assert one.now - tries[-1] < 60
        tries.append(one.now)
    pauses = [later - before for before, later in pairwise(tries)]
    assert pauses == pytest.approx([2, 4, 8, 16], abs=0.3)


def test_a_block_that_fails_gives_way_to_the_next_best() -> None:
    one = One()
    one.welcome()
    one.order(grant(Kind.MEMORY, 5 * BLOCK))
    one.result(BlockOp(4, BlockTarget.ONLINE_MOVABLE), HandStatus.FAILED, errno.ENOMEM)
    assert len(one.blocks) == 4
    later = [op for _ in range(12) for op in ops(one.step(0.25))]
    assert BlockOp(4, BlockTarget.ONLINE_MOVABLE) in later


def test_what_is_gone_or_there_already_is_no_setback() -> None:
    for status in (HandStatus.GONE, HandStatus.ALREADY):
        one = One()
        one.welcome()
        one.order(grant(Kind.CPU, 2000))
        assert ops(one.result(CpuOp(1, True), status)) == [CpuOp(1, True)]  # it is still not online: again, at once


# ---- no broker, dry run --------------------------------------------------------------------------


def test_without_a_broker_nothing_is_done_and_nothing_said() -> None:
    one = One(cpus=2)
    for _ in range(100):
        actions = one.step(0.5)
        assert not of(Do, actions)
        assert not of(Say, actions)


def test_a_broker_that_goes_away_leaves_everything_as_it_is() -> None:
    one = One(cpus=2)
    one.welcome()
    one.order(grant(Kind.CPU, 2000))
    one.machine.on_disconnected()
    for _ in range(100):
        actions = one.step(0.5)
        assert not of(Do, actions)
        assert not of(Say, actions)


def test_what_was_granted_stays_granted_while_the_broker_is_away() -> None:
    one = One()
    one.welcome()
    one.order(grant(Kind.CPU, 2000))
    one.machine.on_disconnected()
    one.result(CpuOp(1, True), HandStatus.FAILED, errno.EIO)
    assert CpuOp(1, True) in [op for _ in range(12) for op in ops(one.step(0.25))]


def test_a_dry_run_refuses_everything() -> None:
    one = One(cpus=2, capabilities=(Capability.PSI, Capability.DRY_RUN))
    one.welcome()
    for number, order in enumerate((grant(Kind.CPU, 4000), reclaim(Kind.CPU, 1000), grant(Kind.MEMORY, GIB)), 1):
        numbered = replace(order, id=OrderId(3, number, number))
        actions = one.order(numbered)
        assert not of(Do, actions)
        [ack] = said(Ack, actions)
        assert (ack.status, ack.refusal) == (AckStatus.REFUSED, RefusalReason.DRY_RUN)


# ---- what is said --------------------------------------------------------------------------------


def test_a_demand_is_said_at_once_and_again_only_when_it_differs() -> None:
    one = One()
    [first] = said(Demand, one.welcome())
    assert (first.sequence, first.usable) == (1, Usable(1, 4, 4 * BLOCK, 4 * BLOCK - 48 * MIB, BLOCK))
    assert said(Demand, one.step(0.3)) == []
    one.used_bytes += 2 * MIB
    assert said(Demand, one.step(0.3)) == []  # still the same whole units
    one.used_bytes = 440 * MIB
    demands = [demand for _ in range(4) for demand in said(Demand, one.step(0.3))]
    assert demands[0].sequence == 2
    assert demands[-1].needed.memory_bytes > 4 * BLOCK
    assert demands[-1].floor.memory_bytes > 440 * MIB


def test_pressure_is_said_at_once() -> None:
    one = One()
    one.welcome()
    one.free_bytes = 0  # where plenty is free, a cgroup stalls at its own limit
    one.memory_some_us += 900_000
    one.refaults += 5000
    [demand] = said(Demand, one.step(0.3))
    assert (demand.under_memory_pressure, demand.urgency) == (True, Urgency.NOW)


def test_what_holds_it_back_is_forgotten_unless_it_is_said_again() -> None:
    def codes(seconds: float) -> set[str]:
        found = [demand.reasons[0].code for _ in range(int(seconds)) for demand in said(Demand, one.step(1.0))]
        return set(found)

    one = One()
    one.welcome()
    one.machine.on_throttle(Throttle(500, 900), one.now)
    assert "cpu-throttled" in codes(HEARTBEAT_SECONDS + 1)
    one.machine.on_throttle(Throttle(500, 900), one.now)
    assert codes(2 * HEARTBEAT_SECONDS) == {"cpu-throttled"}
    codes(HEARTBEAT_SECONDS)
    assert codes(HEARTBEAT_SECONDS + 1) == {"cpu-used"}  # that it was over had been lost
    one.machine.on_throttle(Throttle(500, 900), one.now)
    one.machine.on_disconnected()
    one.welcome()
    assert codes(HEARTBEAT_SECONDS + 1) == {"cpu-used"}


def test_what_holds_it_back_is_looked_at_at_once_also_at_rest() -> None:
    one = One()
    one.welcome()
    one.machine.on_watched(True)
    one.step(SETTINGS.calm_for_seconds + 1)
    assert not of(TakeSample, one.step(3)), "it rests"
    one.machine.on_throttle(Throttle(500, 900), one.now)
    assert of(TakeSample, one.step())
    one.step(HEARTBEAT_SECONDS)
    assert one.demand is not None and one.demand.reasons[0].code == "cpu-throttled"
    one.step(SETTINGS.calm_for_seconds + 1)
    one.machine.on_throttle(Throttle(500, 800), one.now)
    assert not of(TakeSample, one.step()), "no news"
    one.machine.on_throttle(Throttle(500, 0), one.now)
    assert of(TakeSample, one.step())


def test_a_heartbeat_breaks_the_silence() -> None:
    one = One()
    one.welcome()
    beats = [one.now for _ in range(100) if said(Heartbeat, one.step(0.5))]
    assert 4 <= len(beats) <= 5
    assert beats[1] - beats[0] == pytest.approx(HEARTBEAT_SECONDS, abs=0.5)


def test_each_stream_counts_its_demands_anew() -> None:
    one = One()
    one.welcome()
    one.machine.on_disconnected()
    [demand] = said(Demand, one.welcome())
    assert demand.sequence == 1


def test_hello_names_the_last_revision_and_what_is_usable() -> None:
    one = One(cpus=2)
    one.welcome()
    one.order(grant(Kind.CPU, 2000, request=4, revision=8))
    hello = one.machine.hello()
    assert (hello.last_revision, hello.usable.vcpus_online) == (8, 2)


# ---- looking -------------------------------------------------------------------------------------


def test_events_are_hints_and_a_timer_looks_anyway() -> None:
    one = One()
    one.welcome()
    one.step(1)
    assert not of(Rescan, one.step(1))
    one.machine.on_hotplug(one.now)
    assert len(of(Rescan, one.step())) == 1
    looks = sum(len(of(Rescan, one.step(0.5))) for _ in range(120))
    assert looks == 60 / SETTINGS.reconcile_seconds


def test_samples_come_often_only_while_something_moves() -> None:
    one = One()
    one.welcome()
    one.step(2)
    calm = one.machine.wake_at(one.now) - one.now
    one.machine.on_pressure(one.now)
    one.step()
    quick = one.machine.wake_at(one.now) - one.now
    assert (calm, quick) == pytest.approx((SETTINGS.calm_seconds, SETTINGS.quick_seconds))


def test_asking_again_at_once_brings_nothing_new() -> None:
    one = One()
    one.welcome()
    one.order(grant(Kind.CPU, 4000))
    assert one.machine.next_actions(one.now) == []
    assert one.machine.wake_at(one.now) > one.now


# ---- CPUs and blocks that cannot be read -----------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "status"),
    [
        (reclaim(Kind.CPU, 1000, seconds=5.0), AckStatus.REFUSED),
        (reclaim(Kind.MEMORY, 2 * BLOCK, seconds=5.0), AckStatus.REFUSED),
        (grant(Kind.CPU, 4000), AckStatus.PARTIAL),
    ],
)
def test_what_cannot_be_read_is_answered_with_that_in_time_and_looked_at_again(
    order: Grant | Reclaim, status: AckStatus
) -> None:
    one = One(cpus=2)
    one.welcome()
    one.machine.on_order(order, one.now)
    seconds = order.remaining_seconds if isinstance(order, Reclaim) else SETTINGS.grant_answer_seconds
    began, acks, looks, wakings = one.now, [], [], 0
    while one.now < began + seconds + 3.0:
        actions = one.machine.next_actions(one.now)
        acks += [(ack, one.now - began) for ack in said(Ack, actions)]
        looks += [one.now for _ in of(Rescan, actions)]  # which fail
        if of(TakeSample, actions):
            one.sample()
        wake_at = one.machine.wake_at(one.now)
        assert wake_at > one.now, "a shell that is woken by the past never sleeps"
        one.now, wakings = wake_at, wakings + 1
    [(ack, after)] = acks
    assert (ack.status, ack.refusal) == (status, RefusalReason.FAILED)
    assert 0.8 * seconds <= after <= seconds
    assert looks[1] - looks[0] == pytest.approx(SETTINGS.reconcile_moving_seconds)
    assert ops(one.step(SETTINGS.reconcile_seconds)) == (
        [] if isinstance(order, Reclaim) else [CpuOp(2, True), CpuOp(3, True)]
    )


def test_an_order_that_is_late_when_a_look_is_due_is_answered_by_what_is_seen() -> None:
    one = One(cpus=2)
    one.welcome()
    one.order(reclaim(Kind.CPU, 1000, seconds=5.0))
    one.cpus = {0}
    [ack] = said(Ack, one.step(5.0))
    assert ack.status is AckStatus.DONE


def test_a_driver_that_came_later_counts_from_then_on() -> None:
    one = One(capabilities={Capability.CPU_ONLINE})
    one.welcome()
    [ack] = said(Ack, one.order(grant(Kind.MEMORY, 6 * BLOCK)))
    assert ack.refusal is RefusalReason.UNSUPPORTED
    more = frozenset({Capability.CPU_ONLINE, Capability.MEMORY_ONLINE})
    one.machine.on_identity(replace(one.machine.identity, generation=2, capabilities=more))
    assert one.machine.hello().identity.generation == 2
    actions = one.order(grant(Kind.MEMORY, 6 * BLOCK, 2, 2))
    assert [op.index for op in ops(actions) if isinstance(op, BlockOp)] == [4, 5]
    assert any("from now on: memory-online; no longer: nothing" in log.text for log in of(Log, actions))


def test_what_more_it_can_take_is_said_when_it_has_taken_what_it_said() -> None:
    """A minimum may be far above the need: then nothing else would be said until the next heartbeat."""
    one = One(blocks=4, present=4)
    one.kernel_free = 4 * MIB
    one.look()
    one.welcome()
    one.step(1.0)
    assert one.demand is not None
    acceptable = one.demand.acceptable_memory_bytes
    assert acceptable == 5 * BLOCK
    one.present = set(range(5))
    [op] = ops(one.order(grant(Kind.MEMORY, acceptable)))
    [demand] = said(Demand, one.result(op))
    assert demand.acceptable_memory_bytes == 6 * BLOCK
