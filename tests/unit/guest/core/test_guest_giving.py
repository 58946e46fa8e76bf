"""Giving back, event by event: hooks, room for what moves, CPUs and blocks, answers."""

import errno
from dataclasses import replace

import pytest
from one import ALL, BLOCK, SETTINGS, One, grant, hooks, of, ops, reclaim, said, trims

from guestd.guest.core.actions import Rescan
from guestd.guest.core.ops import BlockOp, BlockTarget, CpuOp, HandStatus, HookEvent, HookOp, TrimOp
from guestd.model.guest import Capability
from guestd.model.messages import (
    Ack,
    AckStatus,
    Demand,
    Grant,
    GrantStage,
    OrderId,
    RefusalReason,
)
from guestd.model.resources import Kind
from guestd.model.units import MIB


def test_cpus_are_taken_offline_before_the_answer() -> None:
    one = One(cpus=4)
    one.welcome()
    actions = one.order(reclaim(Kind.CPU, 2000))
    assert ops(actions) == [CpuOp(3, False), CpuOp(2, False)]
    assert said(Ack, actions) == []
    one.result(CpuOp(3, False))
    [ack] = said(Ack, one.result(CpuOp(2, False)))
    assert (ack.status, ack.achieved) == (AckStatus.DONE, 2000)
    assert ops(one.step(10)) == []  # and stay offline


def test_cpus_that_stay_make_a_partial_answer_and_are_left_alone() -> None:
    one = One(cpus=4)
    one.welcome()
    one.order(grant(Kind.CPU, 4000))
    one.order(reclaim(Kind.CPU, 1000, 2, 2))
    one.result(CpuOp(3, False))
    one.result(CpuOp(2, False), HandStatus.FAILED, errno.EBUSY)
    [ack] = said(Ack, one.result(CpuOp(1, False), HandStatus.FAILED, errno.EBUSY))
    assert (ack.status, ack.achieved, ack.refusal) == (AckStatus.PARTIAL, 3000, RefusalReason.BUSY)
    assert "EBUSY" in ack.text


def test_pinned_cpus_are_refused() -> None:
    one = One(cpus=2)
    one.pinned = frozenset({1})
    one.look()
    one.welcome()
    actions = one.order(reclaim(Kind.CPU, 1000))
    assert ops(actions) == []
    [ack] = said(Ack, actions)
    assert (ack.status, ack.achieved, ack.refusal) == (AckStatus.REFUSED, 2000, RefusalReason.PINNED)


def test_a_reclaim_that_hangs_is_answered_at_its_deadline() -> None:
    one = One(cpus=2)
    one.welcome()
    one.order(reclaim(Kind.CPU, 1000, seconds=5))
    assert said(Ack, one.step(4.9)) == []
    [ack] = said(Ack, one.step(0.2))
    assert (ack.status, ack.refusal) == (AckStatus.REFUSED, RefusalReason.TIMEOUT)


def test_memory_says_how_low_it_can_go() -> None:
    one = One(blocks=8)
    one.welcome()
    one.order(grant(Kind.MEMORY, 8 * BLOCK))
    [ack] = said(Ack, one.order(reclaim(Kind.MEMORY, 4 * BLOCK, 2, 2)))
    assert (ack.status, ack.achieved) == (AckStatus.DONE, 4 * BLOCK)


def test_blocks_that_go_as_they_should_are_not_each_looked_at() -> None:
    one = One(blocks=8)
    one.welcome()
    one.order(grant(Kind.MEMORY, 8 * BLOCK))
    one.order(reclaim(Kind.MEMORY, 4 * BLOCK, 2, 2))
    looks = 0
    for _ in range(20):  # one event each 50 ms, for a second
        one.machine.on_hotplug(one.now)
        looks += len(of(Rescan, one.step(0.05)))
    assert 1 <= looks <= 1 / SETTINGS.reconcile_moving_seconds
    one.order(grant(Kind.MEMORY, 4 * BLOCK, 3, 3))  # it is over
    one.machine.on_hotplug(one.now)
    assert len(of(Rescan, one.step())) == 1


def test_memory_in_use_makes_a_counter_offer_or_a_refusal() -> None:
    one = One(blocks=8)
    one.used_bytes = 600 * MIB
    one.look()
    one.welcome()
    one.order(grant(Kind.MEMORY, 8 * BLOCK))
    actions = one.order(reclaim(Kind.MEMORY, 2 * BLOCK, 2, 2))
    [ack] = said(Ack, actions)
    assert (ack.status, ack.refusal) == (AckStatus.PARTIAL, RefusalReason.IN_USE)
    assert 600 * MIB < ack.achieved < 8 * BLOCK
    one.used_bytes = 900 * MIB
    one.look()
    [ack] = said(Ack, one.order(reclaim(Kind.MEMORY, 2 * BLOCK, 3, 3)))
    assert (ack.status, ack.refusal) == (AckStatus.REFUSED, RefusalReason.IN_USE)
    assert ack.retry_after_seconds > 0


def test_under_pressure_no_memory_is_given() -> None:
    one = One(blocks=8)
    one.welcome()
    one.order(grant(Kind.MEMORY, 8 * BLOCK))
    one.free_bytes = 0  # where plenty is free, a cgroup stalls at its own limit
    one.memory_some_us += 900_000
    one.refaults += 5000
    one.step(0.3)
    [ack] = said(Ack, one.order(reclaim(Kind.MEMORY, 4 * BLOCK, 2, 2)))
    assert (ack.status, ack.refusal) == (AckStatus.REFUSED, RefusalReason.PRESSURE)


def test_memory_blocks_are_never_taken_offline_by_the_daemon() -> None:
    one = One(blocks=8)
    one.welcome()
    assert ops(one.order(reclaim(Kind.MEMORY, BLOCK))) == []


# ---- exactly once --------------------------------------------------------------------------------


def test_hooks_are_asked_before_anything_is_taken() -> None:
    one = One(cpus=2)
    one.welcome()
    one.hooks_say = None
    actions = one.order(reclaim(Kind.CPU, 1000))
    assert hooks(actions) == [HookOp(HookEvent.BEFORE_SHRINK, Kind.CPU, 2000, 1000, 30)]
    assert ops(actions) == []
    assert hooks(one.step(0.5)) == [], "they are asked once"
    done = one.hooked(HookOp(HookEvent.BEFORE_SHRINK, Kind.CPU, 2000, 1000, 30), "done")
    assert ops(done) == [CpuOp(1, False)]


def test_hooks_never_hear_that_nothing_will_be_left() -> None:
    one = One(cpus=2, blocks=8)
    one.welcome()
    one.order(grant(Kind.CPU, 2000))
    one.order(grant(Kind.MEMORY, 8 * BLOCK, 2))
    [cpu] = hooks(one.order(reclaim(Kind.CPU, 0, 3, 2)))
    [memory] = hooks(one.order(reclaim(Kind.MEMORY, 0, 4, 2)))
    assert (cpu.after, memory.after) == (1000, BLOCK)


def test_a_veto_is_a_refusal_with_the_name_of_the_hook_and_holds_for_a_while() -> None:
    one = One(blocks=8)
    one.welcome()
    one.order(grant(Kind.MEMORY, 8 * BLOCK))
    one.hooks_say = "veto:50-database"
    [ack] = said(Ack, one.order(reclaim(Kind.MEMORY, 4 * BLOCK, 2, 2)))
    assert (ack.status, ack.refusal) == (AckStatus.REFUSED, RefusalReason.VETO)
    assert "50-database" in ack.text
    assert ack.retry_after_seconds == pytest.approx(10.0)
    actions = one.order(reclaim(Kind.MEMORY, 4 * BLOCK, 3, 3))
    assert hooks(actions) == [], "not asked again so soon"
    assert said(Ack, actions)[0].refusal is RefusalReason.VETO
    one.step(11.0)
    one.hooks_say = "done"
    actions = one.order(reclaim(Kind.MEMORY, 4 * BLOCK, 4, 4))
    assert len(hooks(actions)) == 1
    assert said(Ack, actions)[0].status is AckStatus.DONE


def test_a_hook_that_asks_for_time_says_when_and_how_much() -> None:
    one = One(blocks=8)
    one.welcome()
    one.order(grant(Kind.MEMORY, 8 * BLOCK))
    one.hooks_say = "wait:40:50-jvm"
    [ack] = said(Ack, one.order(reclaim(Kind.MEMORY, 4 * BLOCK, 2, 2)))
    assert (ack.status, ack.refusal) == (AckStatus.REFUSED, RefusalReason.VETO)
    assert ack.retry_after_seconds == pytest.approx(40.0)
    assert ack.later_amount == 4 * BLOCK


def test_hooks_that_are_still_at_it_do_not_keep_the_broker_waiting() -> None:
    one = One(cpus=2)
    one.welcome()
    one.hooks_say = None
    one.order(reclaim(Kind.CPU, 1000, seconds=5))
    assert said(Ack, one.step(3.9)) == []
    [ack] = said(Ack, one.step(0.2))
    assert (ack.status, ack.later_amount) == (AckStatus.REFUSED, 1000)
    assert "still at it" in ack.text
    # Their answer is known when the broker asks again.
    one.hooked(HookOp(HookEvent.BEFORE_SHRINK, Kind.CPU, 2000, 1000, 30), "done")
    actions = one.order(reclaim(Kind.CPU, 1000, 2, 2))
    assert hooks(actions) == []
    assert ops(actions) == [CpuOp(1, False)]


def test_a_hook_that_fails_is_counted_and_said_and_the_shrink_goes_on() -> None:
    one = One(cpus=2)
    one.welcome()
    one.hooks_say = None
    [op] = hooks(one.order(reclaim(Kind.CPU, 1000)))
    actions = one.hooked(op, "failed:50-broken", HandStatus.FAILED)
    assert ops(actions) == [CpuOp(1, False)]
    assert one.machine.counters["failed-hooks"] == 1
    [demand] = said(Demand, actions)
    assert "hook-failed" in [reason.code for reason in demand.reasons]


@pytest.mark.parametrize(
    "status", [HandStatus.TIMEOUT, HandStatus.STUCK, HandStatus.FAILED, HandStatus.REFUSED, HandStatus.OK]
)
def test_a_run_of_hooks_that_came_to_nothing_is_a_failure_too(status: HandStatus) -> None:
    one = One(cpus=2)
    one.welcome()
    one.hooks_say = None
    [op] = hooks(one.order(reclaim(Kind.CPU, 1000)))
    actions = one.hooked(op, "", status)
    assert ops(actions) == [CpuOp(1, False)]
    assert one.machine.counters["failed-hooks"] == 1
    [demand] = said(Demand, actions)
    assert f"hook for cpu failed: {status}" in [reason.text for reason in demand.reasons]


def test_a_dry_run_of_hooks_is_no_failure() -> None:
    one = One(cpus=2)
    one.welcome()
    one.hooks_say = None
    [op] = hooks(one.order(reclaim(Kind.CPU, 1000)))
    one.hooked(op, "", HandStatus.DRY_RUN)
    assert one.machine.counters["failed-hooks"] == 0


def test_hooks_hear_of_more_when_it_is_there_and_only_of_whole_steps() -> None:
    one = One(cpus=1)
    one.welcome()
    one.hooks_say = "done"
    actions = one.order(grant(Kind.CPU, 2000))
    assert hooks(actions) == [], "it is not there yet"
    assert hooks(one.result(CpuOp(1, True))) == [HookOp(HookEvent.AFTER_GROW, Kind.CPU, 0, 2000, 60)]
    assert hooks(one.order(grant(Kind.CPU, 1400, 2, 2))) == [], "still two vCPUs"


def test_a_shrink_that_stops_short_is_told_as_a_grow() -> None:
    one = One(blocks=8)
    one.welcome()
    one.hooks_say = "done"
    one.order(grant(Kind.MEMORY, 8 * BLOCK))
    one.used_bytes = 700 * MIB
    one.step(0.3)
    actions = one.order(reclaim(Kind.MEMORY, 2 * BLOCK, 2, 2))
    assert [op.after for op in hooks(actions)] == [2 * BLOCK]
    actions = one.order(grant(Kind.MEMORY, 7 * BLOCK, 3, 3))
    assert hooks(actions) == [HookOp(HookEvent.AFTER_GROW, Kind.MEMORY, 2 * BLOCK, 7 * BLOCK, 60)]


def test_hooks_hear_that_a_burst_ends() -> None:
    one = One(cpus=2)
    one.welcome()
    one.hooks_say = "none"
    ending = replace(grant(Kind.CPU, 2000), stage=GrantStage.ENDING, remaining_seconds=9.7, burst=1000)
    events = [(op.event, op.before, op.after, op.seconds) for op in hooks(one.order(ending))]
    assert (HookEvent.BURST_ENDING, 2000, 1000, 9) in events


def test_hooks_that_were_at_something_else_hear_afterwards_that_a_burst_ends() -> None:
    one = One(cpus=2)
    one.welcome()
    one.hooks_say = None
    [grown] = hooks(one.order(grant(Kind.CPU, 2000)))
    ending = replace(grant(Kind.CPU, 2000, 2, 2), stage=GrantStage.ENDING, remaining_seconds=9.7, burst=1000)
    assert hooks(one.order(ending)) == []
    one.now += 3.0
    one.order(replace(ending, id=OrderId(3, 3, 3), stage=GrantStage.SETTLED))  # said again, for another reason
    told = HookOp(HookEvent.BURST_ENDING, Kind.CPU, 2000, 1000, 6)
    assert hooks(one.hooked(grown, "done")) == [told]
    assert hooks(one.hooked(told, "done")) == [], "once"


@pytest.mark.parametrize("newer", [None, grant(Kind.CPU, 2000, 3, 3)])
def test_hooks_hear_nothing_of_a_burst_that_is_over(newer: Grant | None) -> None:
    one = One(cpus=2)
    one.welcome()
    one.hooks_say = None
    [grown] = hooks(one.order(grant(Kind.CPU, 2000)))
    one.order(replace(grant(Kind.CPU, 2000, 2, 2), stage=GrantStage.ENDING, remaining_seconds=9.7, burst=1000))
    if newer is None:
        one.now += 10.0
    else:
        one.order(newer)
    assert hooks(one.hooked(grown, "done")) == []


def test_room_is_made_in_chunks_before_a_balloon_takes_it() -> None:
    one = One(blocks=8, capabilities=ALL - {Capability.VIRTIO_MEM} | {Capability.BALLOON})
    one.welcome()
    one.order(grant(Kind.MEMORY, 8 * BLOCK))
    one.free_bytes = 100 * MIB
    one.step(0.3)
    actions = one.order(reclaim(Kind.MEMORY, 4 * BLOCK, 2, 2))
    assert trims(actions) == [TrimOp(256 * MIB)]
    assert said(Ack, actions) == []
    one.free_bytes += 256 * MIB
    actions = one.result(TrimOp(256 * MIB))
    [last] = trims(actions)
    assert last.bytes == (4 * BLOCK + 64 * MIB) - one.free_bytes
    one.free_bytes += last.bytes
    [ack] = said(Ack, one.result(last))
    assert (ack.status, ack.achieved) == (AckStatus.DONE, 4 * BLOCK)


def test_virtio_mem_needs_but_a_little_room() -> None:
    """It has the kernel free what it takes piece by piece."""
    one = One(blocks=8)
    one.welcome()
    one.order(grant(Kind.MEMORY, 8 * BLOCK))
    one.free_bytes = 10 * MIB
    one.step(0.3)
    [trim] = trims(one.order(reclaim(Kind.MEMORY, 4 * BLOCK, 2, 2)))
    assert trim.bytes == 64 * MIB - one.free_bytes
    one.free_bytes += trim.bytes
    [ack] = said(Ack, one.result(trim))
    assert (ack.status, ack.achieved) == (AckStatus.DONE, 4 * BLOCK)


def test_a_trim_that_fails_or_hangs_does_not_hold_the_answer_up() -> None:
    one = One(blocks=8)
    one.welcome()
    one.order(grant(Kind.MEMORY, 8 * BLOCK))
    one.free_bytes = 10 * MIB
    one.step(0.3)
    [trim] = trims(one.order(reclaim(Kind.MEMORY, 4 * BLOCK, 2, 2, seconds=5)))
    assert said(Ack, one.step(3.9)) == []
    [ack] = said(Ack, one.step(0.2))
    assert ack.status is AckStatus.DONE, "how low it can go does not depend on the trim"
    one.result(trim, HandStatus.FAILED, errno.EIO)
    assert one.machine.counters["failed-trims"] == 1


@pytest.mark.parametrize(
    ("status", "number"), [(HandStatus.OK, 0), (HandStatus.GONE, errno.ENOENT), (HandStatus.FAILED, errno.EIO)]
)
def test_a_trim_that_frees_nothing_is_the_last_and_blocks_go(status: HandStatus, number: int) -> None:
    """The kernel found nothing that it could give up (which is no failure), or has no memory.reclaim."""
    one = One(blocks=8, capabilities=ALL - {Capability.VIRTIO_MEM})
    one.welcome()
    one.order(grant(Kind.MEMORY, 8 * BLOCK))
    one.movable = {4, 5, 6, 7}
    one.free_bytes = 100 * MIB
    one.step(0.3)
    [trim] = trims(one.order(reclaim(Kind.MEMORY, 4 * BLOCK, 2, 2, seconds=30)))
    actions = one.result(trim, status, number)
    assert trims(actions) == []
    assert ops(actions) == [BlockOp(7, BlockTarget.OFFLINE)]


def test_a_trim_that_frees_nothing_holds_no_balloon_up() -> None:
    one = One(blocks=8, capabilities=ALL - {Capability.VIRTIO_MEM} | {Capability.BALLOON})
    one.welcome()
    one.order(grant(Kind.MEMORY, 8 * BLOCK))
    one.free_bytes = 100 * MIB
    one.step(0.3)
    [trim] = trims(one.order(reclaim(Kind.MEMORY, 4 * BLOCK, 2, 2, seconds=30)))
    actions = one.result(trim)
    assert trims(actions) == []
    [ack] = said(Ack, actions)
    assert (ack.status, ack.achieved) == (AckStatus.DONE, 4 * BLOCK)


def test_a_trim_that_took_too_long_goes_on_where_it_got_somewhere() -> None:
    one = One(blocks=8, capabilities=ALL - {Capability.VIRTIO_MEM} | {Capability.BALLOON})
    one.welcome()
    one.order(grant(Kind.MEMORY, 8 * BLOCK))
    one.free_bytes = 100 * MIB
    one.step(0.3)
    [trim] = trims(one.order(reclaim(Kind.MEMORY, 4 * BLOCK, 2, 2, seconds=30)))
    one.free_bytes += 128 * MIB
    assert len(trims(one.result(trim, HandStatus.TIMEOUT))) == 1


def test_without_a_driver_that_takes_pages_blocks_go_one_by_one() -> None:
    one = One(blocks=8, capabilities=ALL - {Capability.VIRTIO_MEM})
    one.welcome()
    one.order(grant(Kind.MEMORY, 8 * BLOCK))
    one.movable = {4, 5, 6, 7}
    one.look()
    assert ops(one.order(reclaim(Kind.MEMORY, 6 * BLOCK, 2, 2))) == [BlockOp(7, BlockTarget.OFFLINE)]
    actions = one.result(BlockOp(7, BlockTarget.OFFLINE))
    assert ops(actions) == [BlockOp(6, BlockTarget.OFFLINE)]
    actions = one.result(BlockOp(6, BlockTarget.OFFLINE), HandStatus.FAILED, errno.EBUSY)
    assert ops(actions) == [BlockOp(5, BlockTarget.OFFLINE)], "the next best"
    [ack] = said(Ack, one.result(BlockOp(5, BlockTarget.OFFLINE)))
    assert (ack.status, ack.achieved) == (AckStatus.DONE, 6 * BLOCK)


def test_blocks_that_fail_make_a_partial_answer_that_says_when_to_ask_again() -> None:
    one = One(blocks=8, capabilities=ALL - {Capability.VIRTIO_MEM})
    one.welcome()
    one.order(grant(Kind.MEMORY, 8 * BLOCK))
    actions = one.order(reclaim(Kind.MEMORY, 4 * BLOCK, 2, 2, seconds=60))
    one.result(ops(actions)[0])
    acks: list[Ack] = []
    for index in (6, 5, 4):  # never what is to stay: boot memory is there
        acks += said(Ack, one.result(BlockOp(index, BlockTarget.OFFLINE), HandStatus.FAILED, errno.EBUSY))
    [ack] = acks
    assert (ack.status, ack.refusal, ack.achieved) == (AckStatus.PARTIAL, RefusalReason.BUSY, 7 * BLOCK)
    assert ack.later_amount == 4 * BLOCK
    assert 0 < ack.retry_after_seconds <= 2.0


def with_dimms_and_a_balloon() -> One:
    """Booted with four blocks; four came by DIMMs since."""
    one = One(blocks=4, capabilities=ALL - {Capability.VIRTIO_MEM} | {Capability.BALLOON}, present=4)
    one.welcome()
    one.present = set(range(8))
    one.movable = {2, 5, 6, 7}  # 2: boot memory may be, where the kernel was told so
    actions = one.order(grant(Kind.MEMORY, 8 * BLOCK))
    for op in ops(actions):
        actions = one.result(op)
    assert said(Ack, actions)[-1].achieved == 8 * BLOCK
    return one


def test_dimms_go_before_a_balloon_takes_pages() -> None:
    one = with_dimms_and_a_balloon()
    actions = one.order(reclaim(Kind.MEMORY, 6 * BLOCK, 2, 2))
    assert ops(actions) == [BlockOp(7, BlockTarget.OFFLINE)]
    assert said(Ack, actions) == []
    assert ops(one.result(BlockOp(7, BlockTarget.OFFLINE))) == [BlockOp(6, BlockTarget.OFFLINE)]
    [ack] = said(Ack, one.result(BlockOp(6, BlockTarget.OFFLINE)))
    assert (ack.status, ack.achieved) == (AckStatus.DONE, 6 * BLOCK)


def test_below_the_boot_memory_the_balloon_takes_the_rest() -> None:
    one = with_dimms_and_a_balloon()
    actions, gone = one.order(reclaim(Kind.MEMORY, 3 * BLOCK, 2, 2, seconds=60)), []
    while ops(actions):
        gone += ops(actions)
        actions = one.result(gone[-1])
    assert [op.index for op in gone if isinstance(op, BlockOp)] == [7, 6, 5, 4], "never of the boot memory"
    [ack] = said(Ack, actions)
    assert (ack.status, ack.achieved) == (AckStatus.DONE, 3 * BLOCK)
    # With the DIMMs gone there are no blocks to give.
    actions = one.order(reclaim(Kind.MEMORY, 2 * BLOCK, 3, 3))
    assert ops(actions) == []
    assert said(Ack, actions)[0].achieved == 2 * BLOCK


def test_a_dimm_that_stays_is_said_and_the_balloon_is_not_asked_to_make_up_for_it() -> None:
    one = with_dimms_and_a_balloon()
    one.order(reclaim(Kind.MEMORY, 3 * BLOCK, 2, 2, seconds=60))
    for index in (7, 6, 5):
        one.result(BlockOp(index, BlockTarget.OFFLINE))
    [ack] = said(Ack, one.result(BlockOp(4, BlockTarget.OFFLINE), HandStatus.FAILED, errno.EBUSY))
    assert (ack.status, ack.refusal, ack.achieved) == (AckStatus.PARTIAL, RefusalReason.BUSY, 5 * BLOCK)


def test_what_was_there_from_the_start_is_left_to_the_balloon() -> None:
    """A DIMM that the VM was started with the host never takes: it has the balloon take as much."""
    one = One(blocks=8, capabilities=ALL - {Capability.VIRTIO_MEM} | {Capability.BALLOON})
    one.movable = {4, 5, 6, 7}
    one.welcome()
    one.order(grant(Kind.MEMORY, 8 * BLOCK))
    actions = one.order(reclaim(Kind.MEMORY, 4 * BLOCK, 2, 2))
    assert ops(actions) == []
    assert said(Ack, actions)[0].achieved == 4 * BLOCK


def test_a_dimm_that_was_there_from_the_start_counts_once_it_went_and_came() -> None:
    one = One(blocks=8, capabilities=ALL - {Capability.VIRTIO_MEM} | {Capability.BALLOON})
    one.welcome()
    one.order(grant(Kind.MEMORY, 8 * BLOCK))
    one.present, one.blocks = set(range(7)), set(range(7))
    one.look()
    one.present, one.blocks, one.movable = set(range(8)), set(range(8)), {7}
    one.look()
    assert ops(one.order(reclaim(Kind.MEMORY, 4 * BLOCK, 2, 2))) == [BlockOp(7, BlockTarget.OFFLINE)]


def test_an_impossible_order_is_answered_and_nothing_goes_below_the_floor() -> None:
    one = One(blocks=8)
    one.welcome()
    one.order(grant(Kind.MEMORY, 8 * BLOCK))
    [ack] = said(Ack, one.order(reclaim(Kind.MEMORY, 0, 2, 2)))
    assert ack.achieved >= one.used_bytes
    assert ack.refusal is RefusalReason.IN_USE
    assert one.machine.counters["refused-in-use"] == 1
    huge = grant(Kind.MEMORY, 1 << 60, 3, 3)
    one.order(huge)
    [ack] = said(Ack, one.step(SETTINGS.grant_answer_seconds + 0.1))
    assert (ack.status, ack.achieved) == (AckStatus.PARTIAL, 8 * BLOCK)


def test_what_hooks_do_themselves_is_no_load_of_the_guest() -> None:
    one = One(cpus=2)
    one.welcome()
    one.hooks_say = "done"
    one.order(grant(Kind.CPU, 2000))  # there are hooks
    one.hooks_say = None
    [op] = hooks(one.order(reclaim(Kind.CPU, 1000, 2, 2)))
    one.runnable = 9
    for _ in range(8):
        one.step(0.25)
    assert one.needed_millicores() <= 2000
    one.hooked(op, "done")
    for _ in range(12):
        one.step(0.25)
    assert one.needed_millicores() == 9000, "a load that goes on is one"


def test_what_hooks_agreed_to_too_late_holds_for_the_next_time() -> None:
    """The grant in between is no news to them, or they would be asked for ever."""
    one = One(blocks=8)
    one.welcome()
    one.hooks_say = "done"
    one.order(grant(Kind.MEMORY, 8 * BLOCK))
    one.hooks_say = None
    [op] = hooks(one.order(reclaim(Kind.MEMORY, 4 * BLOCK, 2, 2, seconds=5)))
    [ack] = said(Ack, one.step(4.5))
    assert ack.refusal is RefusalReason.VETO
    one.order(grant(Kind.MEMORY, 8 * BLOCK, 3, 3))
    actions = one.hooked(op, "failed:10-hang", HandStatus.FAILED)
    assert hooks(actions) == []
    actions = one.step(20.0) + one.order(reclaim(Kind.MEMORY, 4 * BLOCK, 4, 4))
    assert hooks(actions) == []
    assert said(Ack, actions)[-1].status is AckStatus.DONE
