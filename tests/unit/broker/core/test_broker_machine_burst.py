"""Bursts, event by event: lent, said to end, preempted, expired, overdue."""

from dataclasses import replace

import pytest
from one_guest import BLOCK, BOOT, LIMITS, TIMING, USABLE, One, hello, of, reclaim, sent, vm

from guestd.broker.core.actions import Log, Record
from guestd.broker.core.ledger import HostCapacity
from guestd.broker.core.machine import BrokerMachine
from guestd.model.guest import Capability
from guestd.model.messages import AckStatus, Demand, Grant, GrantStage, Heartbeat, Reclaim, Urgency
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB, MIB

MAX = 1024 * MIB
BURST_LIMITS = Limits(
    Resources(1000, BOOT),
    Resources(2000, MAX),
    burst=Resources(4000, 2 * GIB),
    burst_credit=Resources(2000 * 60, GIB * 60),
    burst_refill=Resources(200, 128 * MIB),
)


class Bursting(One):
    """The guest has limits with a burst: 4 CPUs for 60 s above 2, 2 GiB for 60 s above 1."""

    def __init__(self, host: HostCapacity | None = None) -> None:
        super().__init__(host)
        self.machine.set_limits("a", BURST_LIMITS)
        self.step()

    def grown_to(self, memory: int) -> "Bursting":
        """It needs and has so much from now on."""
        self.demand(memory=memory)
        self.burst_began = self.now
        self.is_now(vm(1, memory))
        return self

    def shrunk_to(self, memory: int) -> None:
        """It needs and has so little from now on."""
        order = reclaim(self.demand(memory=memory))
        self.answer(order, AckStatus.DONE, memory)
        self.is_now(vm(1, memory))

    def keep_alive(self) -> None:
        """A heartbeat."""
        self.machine.on_heartbeat("a", self.session, Heartbeat(), self.now)

    @property
    def credit(self) -> Resources:
        lends = {kind: self.track(kind).lend for kind in Kind}
        assert all(lends.values())
        return Resources(*(lends[kind].bucket.credit for kind in Kind))  # type: ignore[union-attr]


def test_a_burst_is_granted_above_max_and_says_so() -> None:
    one = Bursting()
    [grant] = sent(one.demand(memory=2 * GIB))
    assert isinstance(grant, Grant)
    assert (grant.amount, grant.burst) == (2 * GIB, GIB)
    assert grant.remaining_seconds == pytest.approx(60)
    assert one.track(Kind.MEMORY).counters.bursts == 1


def test_what_is_within_max_is_no_burst() -> None:
    [grant] = sent(Bursting().demand(memory=MAX))
    assert isinstance(grant, Grant)
    assert (grant.amount, grant.burst, grant.remaining_seconds) == (MAX, 0, None)


def test_the_credit_drains_by_what_is_held_above_max_and_flows_back() -> None:
    one = Bursting().grown_to(2 * GIB)
    one.step(20)
    assert one.credit.memory_bytes == pytest.approx(40 * GIB, rel=1e-6)
    one.shrunk_to(MAX)
    before = one.credit.memory_bytes
    one.step(8)
    assert one.credit.memory_bytes == before + 8 * 128 * MIB


def test_the_end_is_announced_then_asked_for_then_overdue() -> None:
    one = Bursting().grown_to(2 * GIB)
    assert not sent(one.step(49))
    [notice] = sent(one.step(1.5))
    assert isinstance(notice, Grant)
    assert (notice.stage, notice.amount, notice.burst) == (GrantStage.ENDING, 2 * GIB, GIB)
    assert notice.remaining_seconds is not None and 0 < notice.remaining_seconds <= TIMING.burst_notice_seconds
    assert not sent(one.step(4)), "said once"
    actions = one.step(6)
    order = reclaim(actions)
    assert (order.amount, order.reason.code) == (MAX, "burst-over")
    assert one.track(Kind.MEMORY).overdue
    assert any("its burst credit is used up: overdue" in log.text for log in of(Log, actions))
    assert not sent(one.demand(cpu=1000, memory=2 * GIB))[1:], "and gets nothing more"


def test_the_wake_up_is_in_time_for_notice_and_end() -> None:
    one = Bursting().grown_to(2 * GIB)
    for what in (GrantStage.ENDING, Reclaim):
        messages: list[Grant | Reclaim] = []
        for _ in range(100):
            at = one.machine.wake_at(one.now)
            assert at is not None
            one.now = max(one.now + 0.001, at)
            one.keep_alive()
            messages = sent(one.machine.next_actions(one.now))
            if messages:
                break
        assert len(messages) == 1, what
    assert one.now == pytest.approx(one.burst_began + 60, abs=0.1)


def test_an_overdue_guest_gets_nothing_more_until_it_gave_back() -> None:
    one = Bursting().grown_to(2 * GIB)
    order = reclaim(one.step(61))
    one.answer(order, AckStatus.REFUSED, 2 * GIB)
    assert one.track(Kind.MEMORY).overdue
    assert not sent(one.demand(memory=4 * GIB))
    again = reclaim(one.step(TIMING.retry_seconds + 0.1))
    one.answer(again, AckStatus.DONE, MAX)
    one.is_now(vm(1, MAX))
    assert not one.track(Kind.MEMORY).overdue
    assert one.reserved.memory_bytes == MAX


def test_after_its_end_a_burst_begins_again_only_with_credit_for_a_while() -> None:
    one = Bursting().grown_to(2 * GIB)
    order = reclaim(one.step(61))
    one.answer(order, AckStatus.DONE, MAX)
    one.is_now(vm(1, MAX))
    one.demand(memory=2 * GIB)
    seconds = 0
    while one.reserved.memory_bytes == MAX:
        one.step(1)
        seconds += 1
        assert seconds < 1000
    # 30 s of 1 GiB at an eighth of a GiB per second
    assert seconds == pytest.approx(8 * TIMING.burst_least_seconds, abs=3)


def test_others_needs_within_their_max_preempt_a_burst() -> None:
    one = Bursting(HostCapacity(Resources(8000, 3 * GIB)))
    one.machine.add_guest("b", Limits(Resources(1000, BOOT), Resources(4000, 2 * GIB)))
    one.machine.on_vm_state("b", vm(), one.now)
    session, _ = one.machine.on_connected("b", hello(boot=2), one.now)
    one.grown_to(2 * GIB)
    needed = Resources(1000, 2 * GIB)
    reasons = (Reason("test", "test"),)
    one.machine.on_demand(
        "b",
        session,
        Demand(1, needed, Resources(1000, BOOT), 1 << 40, Urgency.NOW, reasons, USABLE),
        one.now,
    )
    order = reclaim([*one.step(), *one.step(TIMING.cool_down_seconds + 0.1)])
    assert order.kind is Kind.MEMORY
    assert order.amount == MAX, "the burst goes, what is within max stays"
    assert not one.track(Kind.MEMORY).overdue, "preempted is not overdue"


def test_memory_is_lent_only_from_what_is_really_there() -> None:
    host = HostCapacity(Resources(8000, 4 * GIB), physical=Resources(8000, 1536 * MIB))
    one = Bursting(host)
    one.demand(memory=2 * GIB)
    assert one.reserved.memory_bytes == 1536 * MIB
    without = One(host)
    without.demand(memory=2 * GIB)
    assert without.reserved.memory_bytes == 2 * GIB, "within max, overcommit counts"


def test_the_credit_is_recorded_while_it_is_used_and_restored() -> None:
    one = Bursting().grown_to(2 * GIB)
    records = of(Record, one.step(TIMING.credit_record_seconds + 0.1))
    assert records and records[-1].credit is not None
    credit = records[-1].credit
    assert credit.memory_bytes < GIB * 60 - 9 * GIB
    again = BrokerMachine(one.machine.host, 8, 10.0, TIMING)
    again.add_guest("a", BURST_LIMITS, records[-1].reserved, 3, credit)
    again.next_actions(5.0)
    lend = again.guests["a"].tracks[Kind.MEMORY].lend
    assert lend is not None
    assert lend.bucket.credit == credit.memory_bytes


@pytest.mark.parametrize("step", [-5000.0, 1e9])
def test_no_step_of_the_clock_takes_the_credit_out_of_bounds(step: float) -> None:
    one = Bursting().grown_to(2 * GIB)
    one.now += step
    one.step()
    assert 0 <= one.credit.memory_bytes <= 60 * GIB
    assert 0 <= one.credit.cpu_millicores <= 120_000


def test_a_max_that_is_lowered_below_what_is_held_is_asked_for() -> None:
    one = One().grown(1, 2 * GIB)
    one.machine.set_limits("a", replace(LIMITS, max=Resources(4000, GIB)))
    order = reclaim(one.step())
    assert order.amount == GIB
    assert one.track(Kind.MEMORY).overdue
    assert order.amount % BLOCK == 0


def test_a_guest_that_cannot_take_more_gets_no_burst() -> None:
    one = Bursting()
    one.connect(hello(generation=2, capabilities={Capability.CPU_ONLINE}))
    one.demand(memory=2 * GIB)
    assert one.reserved.memory_bytes == BOOT


def test_credit_flows_while_the_daemon_is_away_and_cpu_time_is_forced_down() -> None:
    bounded = {"cpu_enforced": True, "cpu_quota_millicores": 4000}
    one = Bursting()
    one.is_now(vm(1, BOOT, cpu_enforced=True, cpu_quota_millicores=1000))
    one.demand(cpu=4000)
    one.is_now(vm(4, BOOT, **bounded))
    assert one.track().counters.bursts == 1
    one.machine.on_disconnected("a", one.session)
    one.now += 61
    one.machine.next_actions(one.now)
    assert one.track().counters.forced == 1
    assert one.track().amount == 2000
    one.is_now(vm(2, BOOT, cpu_enforced=True, cpu_quota_millicores=2000))
    assert one.reserved.cpu_millicores == 2000
