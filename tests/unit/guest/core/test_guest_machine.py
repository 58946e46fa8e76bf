"""The guest's decisions, event by event."""

import errno
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

import pytest

from guestd.guest.core.machine import Action, Do, GuestMachine, Rescan, Say, Settings, TakeSample
from guestd.guest.core.ops import BlockOp, BlockTarget, CpuOp, HandResult, HandStatus, Op
from guestd.model.guest import BlockState, Capability, Identity, Inventory, MemoryBlock, NodeZones, Sample
from guestd.model.messages import (
    Ack,
    AckStatus,
    Demand,
    Grant,
    Heartbeat,
    OrderId,
    Reason,
    Reclaim,
    ReclaimStage,
    RefusalReason,
    Urgency,
    Usable,
    Welcome,
)
from guestd.model.resources import Kind, Resources
from guestd.model.units import GIB, MIB

T = TypeVar("T")
BLOCK = 128 * MIB
ALL = frozenset({Capability.CPU_ONLINE, Capability.MEMORY_ONLINE, Capability.PSI})
SETTINGS = Settings()
HEARTBEAT_SECONDS = 10.0


def of(kind: type[T], actions: Iterable[Action]) -> list[T]:
    return [action for action in actions if isinstance(action, kind)]


def said(kind: type[T], actions: Iterable[Action]) -> list[T]:
    return [action.message for action in actions if isinstance(action, Say) and isinstance(action.message, kind)]


def ops(actions: Iterable[Action]) -> list[Op]:
    return [op for action in of(Do, actions) for op in action.ops]


class One:
    """A guest of 4 present CPUs and 8 present blocks, of which some are online."""

    def __init__(self, cpus: int = 1, blocks: int = 4, capabilities: Iterable[Capability] = ALL) -> None:
        self.now = 100.0
        self.cpus, self.blocks, self.pinned = set(range(cpus)), set(range(blocks)), frozenset[int]()
        self.used_bytes, self.memory_some_us, self.refaults, self.epoch = 100 * MIB, 0, 0, 3
        self.machine = GuestMachine(Identity(bytes(16), 1, capabilities=frozenset(capabilities)), self.now)
        self.look()

    def look(self) -> list[Action]:
        """Feed it what is there."""
        blocks = tuple(
            MemoryBlock(index, BlockState.ONLINE if index in self.blocks else BlockState.OFFLINE) for index in range(8)
        )
        numbers = frozenset(range(4))
        zones = (NodeZones(0, GIB, GIB, 0),)
        inventory = Inventory(numbers, numbers, frozenset(self.cpus), self.pinned, BLOCK, blocks, zones)
        self.machine.on_inventory(inventory, self.now)
        self.sample()
        return self.machine.next_actions(self.now)

    def sample(self) -> None:
        total = len(self.blocks) * BLOCK - 48 * MIB
        busy = dict.fromkeys(self.cpus, 1.0)
        fields = {"cpu_busy_seconds": busy, "memory_total_bytes": total, "refaults": self.refaults}
        sample = _sample(**fields, memory_available_bytes=total - self.used_bytes, memory_some_us=self.memory_some_us)
        self.machine.on_sample(sample, self.now)

    def welcome(self, epoch: int = 3) -> list[Action]:
        self.epoch = epoch
        limits = Resources(1000, 512 * MIB), Resources(4000, 2 * GIB)
        self.machine.on_welcome(Welcome(1, "a", epoch, HEARTBEAT_SECONDS, *limits), self.now)
        return self.step()

    def step(self, seconds: float = 0.0) -> list[Action]:
        """What it does, now or a while later, with samples and scans as it asks for them."""
        self.now += seconds
        done: list[Action] = []
        for _ in range(4):
            actions = self.machine.next_actions(self.now)
            done += actions
            if of(Rescan, actions):
                done += self.look()
            elif of(TakeSample, actions):
                self.sample()
        return done

    def order(self, order: Grant | Reclaim) -> list[Action]:
        self.machine.on_order(order, self.now)
        return self.step()

    def result(self, op: Op, status: HandStatus = HandStatus.OK, number: int = 0) -> list[Action]:
        """The helper says what became of an operation, and the kernel shows it."""
        if status is HandStatus.OK:
            if isinstance(op, CpuOp):
                (self.cpus.add if op.online else self.cpus.discard)(op.number)
            else:
                self.blocks.add(op.index)
        self.machine.on_result(HandResult(op, status, number, 0.01), self.now)
        return self.step()


def _sample(**fields: object) -> Sample:
    busy = fields["cpu_busy_seconds"]
    assert isinstance(busy, dict)
    base = {
        "cpu_idle_seconds": dict.fromkeys(busy, 0.0),
        "cpu_steal_seconds": 0.0,
        "runnable": 0,
        "cpu_some_us": 0,
        "memory_some_us": 0,
        "memory_full_us": 0,
        "memory_total_bytes": GIB,
        "memory_available_bytes": GIB,
        "swap_used_bytes": 0,
        "refaults": 0,
    }
    return Sample(**{**base, **fields})  # type: ignore[arg-type]


def grant(kind: Kind, amount: int, request: int = 1, revision: int = 1, epoch: int = 3) -> Grant:
    return Grant(OrderId(epoch, request, revision), kind, amount)


def reclaim(kind: Kind, amount: int, request: int = 1, revision: int = 1, seconds: float = 5.0) -> Reclaim:
    return Reclaim(OrderId(3, request, revision), kind, amount, ReclaimStage.ASK, seconds, Reason("t", "t"))


# ---- grants --------------------------------------------------------------------------------------


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
    one.memory_some_us += 900_000
    one.refaults += 5000
    [demand] = said(Demand, one.step(0.3))
    assert (demand.under_memory_pressure, demand.urgency) == (True, Urgency.NOW)


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
    looks = sum(len(of(Rescan, one.step(0.5))) for _ in range(100))
    assert looks == 50 / SETTINGS.reconcile_seconds


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
