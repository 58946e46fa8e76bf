"""The broker's decisions, event by event."""

from dataclasses import replace

import pytest
from one_guest import ALL, BLOCK, BOOT, LIMITS, TIMING, USABLE, VM, One, hello, of, reclaim, sent, vm

from guestd.broker.core.actions import (
    Action,
    Log,
    Observe,
    Record,
    RequestMemory,
    RequestVcpus,
    Send,
    SettleMemory,
)
from guestd.broker.core.ledger import HostCapacity
from guestd.broker.core.machine import BrokerMachine
from guestd.broker.core.track import Phase, Timing
from guestd.model.errors import AdmissionError, NotFoundError, SupersededError, VersionError
from guestd.model.event import EventCode
from guestd.model.guest import Capability
from guestd.model.messages import (
    Ack,
    AckStatus,
    Demand,
    Grant,
    GrantStage,
    Heartbeat,
    OrderId,
    Reclaim,
    ReclaimStage,
    RefusalReason,
    Urgency,
    Usable,
)
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB, MIB
from guestd.model.vm import VmState, VmStatus

# ---- growing -------------------------------------------------------------------------------------


def test_growing_is_recorded_before_it_is_asked_for_and_then_offered() -> None:
    one = One()
    actions = one.demand(cpu=2500, memory=900 * MIB)
    cpu = [action for action in actions if not isinstance(action, Log)]
    assert cpu == [
        Record("a", Resources(3000, BOOT), 3),
        RequestVcpus("a", 3),
        Send("a", one.session, Grant(OrderId(7, 3, 3), Kind.CPU, 3000, GrantStage.OFFERED)),
        Record("a", Resources(3000, GIB), 4),
        RequestMemory("a", GIB),
        Send("a", one.session, Grant(OrderId(7, 4, 4), Kind.MEMORY, GIB, GrantStage.OFFERED)),
    ]
    assert one.step() == []


def test_a_grant_settles_when_the_hypervisor_has_it() -> None:
    one = One()
    one.demand(cpu=2000)
    [grant] = sent(one.is_now(vm(2)))
    assert (grant.kind, grant.amount) == (Kind.CPU, 2000)
    assert isinstance(grant, Grant)
    assert grant.stage is GrantStage.SETTLED
    assert one.track().counters.grows == 1


def test_progress_moves_the_deadline_and_its_lack_ends_the_growth_as_it_stands() -> None:
    one = One()
    one.demand(memory=GIB)
    one.step(8)
    one.is_now(vm(memory=BOOT + BLOCK, held=GIB))
    assert one.track(Kind.MEMORY).phase is Phase.PLUGGING
    one.step(8)
    assert one.track(Kind.MEMORY).phase is Phase.PLUGGING
    actions = one.step(3)
    assert of(SettleMemory, actions)
    assert of(Observe, actions)
    assert one.track(Kind.MEMORY).counters.failures == 1
    one.is_now(vm(memory=BOOT + BLOCK))
    assert one.reserved.memory_bytes == BOOT + BLOCK
    assert one.track(Kind.MEMORY).phase is Phase.IDLE
    actions = one.step(TIMING.retry_seconds + 0.1)
    assert of(RequestMemory, actions) == [RequestMemory("a", GIB)]


def test_nothing_is_granted_above_what_is_free() -> None:
    one = One(HostCapacity(Resources(5000, 8 * GIB)))
    one.machine.add_guest("b", LIMITS, Resources(3000, BOOT))
    assert of(RequestVcpus, one.demand(cpu=4000)) == [RequestVcpus("a", 2)]


def test_a_minimum_that_was_raised_waits_for_those_who_borrowed_from_it() -> None:
    """Invariant 2: even a minimum is granted only from what nobody holds."""
    one = One(HostCapacity(Resources(8000, 2 * GIB)))
    one.machine.add_guest("b", LIMITS, Resources(7000, 1536 * MIB))
    one.machine.set_limits("a", Limits(Resources(4000, GIB), LIMITS.max))
    actions = one.demand(cpu=4000, memory=GIB)
    assert of(RequestVcpus, actions) == []
    assert of(RequestMemory, actions) == []
    one.machine.on_vm_state("b", vm(3, GIB), one.now)
    actions = one.step()
    assert of(RequestVcpus, actions) == [RequestVcpus("a", 4)]
    assert of(RequestMemory, actions) == [RequestMemory("a", GIB)]


def test_a_guest_that_cannot_bring_cpus_online_gets_none() -> None:
    one = One()
    one.connect(hello(2, capabilities={Capability.MEMORY_ONLINE}))
    actions = one.demand(cpu=4000, memory=GIB)
    assert of(RequestVcpus, actions) == []
    assert of(RequestMemory, actions) == [RequestMemory("a", GIB)]


def test_a_guest_gets_no_more_memory_than_it_can_take() -> None:
    one = One()
    one.sequence += 1
    reasons = (Reason("test", "test"),)
    big = Demand(1, Resources(1000, 2 * GIB), Resources(1000, 0), 768 * MIB, Urgency.NOW, reasons, USABLE)
    one.machine.on_demand("a", one.session, big, one.now)
    assert of(RequestMemory, one.step()) == [RequestMemory("a", 768 * MIB)]


def test_a_minimum_comes_in_stages_that_the_guest_can_take_and_is_reserved_all_along() -> None:
    one = One()
    one.demand(acceptable=BOOT + 2 * BLOCK)
    one.machine.set_limits("a", Limits(Resources(1000, 2 * GIB), LIMITS.max))
    grown, stage = [], BOOT + 2 * BLOCK
    actions = one.step()
    assert one.machine.free(Kind.MEMORY) == 6 * GIB
    for _ in range(3):
        grown += of(RequestMemory, actions)
        assert one.reserved.memory_bytes == stage
        one.is_now(vm(memory=stage))
        stage = min(2 * GIB, 2 * stage)
        actions = one.demand(acceptable=stage)
    assert grown == [RequestMemory("a", size) for size in (768 * MIB, 1536 * MIB, 2 * GIB)]
    assert one.machine.free(Kind.MEMORY) == 6 * GIB


def test_a_stage_of_a_minimum_says_so() -> None:
    one = One()
    one.demand(acceptable=BOOT + 2 * BLOCK)
    one.machine.set_limits("a", Limits(Resources(1000, 2 * GIB), LIMITS.max))
    [log] = [log for log in of(Log, one.step()) if log.code is EventCode.GROWING]
    assert log.text == "growing to 768 MiB: needs 512 MiB, min is 2 GiB, takes 768 MiB of it now"


def test_what_a_guest_can_take_never_makes_it_shrink() -> None:
    one = One().grown(cpus=1, memory=2 * GIB)
    one.machine.set_limits("a", Limits(Resources(1000, 2 * GIB), LIMITS.max))
    one.demand(acceptable=BOOT)
    assert one.track(Kind.MEMORY).target == 2 * GIB


def test_a_guest_that_uses_only_a_part_is_heard_and_left_for_a_moment() -> None:
    one = One()
    [grant] = sent(one.demand(cpu=2000))
    one.answer(grant, AckStatus.PARTIAL, 1000, refusal=RefusalReason.FAILED)
    assert one.track().counters.refusals == 1
    assert one.track().phase is Phase.PLUGGING  # the hypervisor's word counts
    assert one.track().grow_after == one.now + TIMING.retry_seconds


# ---- shrinking -----------------------------------------------------------------------------------


def test_a_shrink_asks_then_unplugs_then_releases() -> None:
    one = One().grown(4)
    order = reclaim(one.demand(cpu=1500))
    assert (order.amount, order.stage, order.remaining_seconds) == (2000, ReclaimStage.ASK, TIMING.ask_seconds)
    assert one.reserved.cpu_millicores == 4000
    actions = one.answer(order, AckStatus.DONE, 2000)
    assert of(RequestVcpus, actions) == [RequestVcpus("a", 2)]
    assert one.reserved.cpu_millicores == 4000  # freed only when the hypervisor confirms
    actions = one.is_now(vm(3))
    assert one.reserved.cpu_millicores == 3000
    assert of(RequestVcpus, actions) == [RequestVcpus("a", 2)]  # one by one
    [settled] = sent(one.is_now(vm(2)))
    assert (settled.amount, one.reserved.cpu_millicores) == (2000, 2000)
    assert one.track().counters.shrinks == 1


def test_a_reclaim_goes_from_ask_to_urge_to_overdue_each_with_its_deadline() -> None:
    one = One().grown(4)
    first = reclaim(one.demand(cpu=1000))
    assert one.now < one.machine.wake_at(one.now) <= one.now + TIMING.ask_seconds
    assert sent(one.step(TIMING.ask_seconds - 0.1)) == []
    second = reclaim(one.step(0.1))
    assert (second.stage, second.remaining_seconds) == (ReclaimStage.URGE, TIMING.urge_seconds)
    third = reclaim(one.step(TIMING.urge_seconds))
    assert (third.stage, third.remaining_seconds) == (ReclaimStage.OVERDUE, TIMING.overdue_seconds)
    assert first.id == second.id == third.id
    assert not one.track().overdue
    actions = one.step(TIMING.overdue_seconds)
    assert one.track().overdue
    assert of(RequestVcpus, actions) == []  # nothing is taken by force
    assert one.reserved.cpu_millicores == 4000


def test_who_is_overdue_gets_nothing_more_until_it_gave() -> None:
    one = One().grown(3)
    one.demand(cpu=1000)
    for seconds in (TIMING.ask_seconds, TIMING.urge_seconds, TIMING.overdue_seconds):
        one.step(seconds)
    assert one.track().overdue
    one.demand(cpu=4000)
    assert not one.track().overdue  # its target is above what it has: it owes nothing any more
    one = One().grown(3)
    one.demand(cpu=1000)
    for seconds in (TIMING.ask_seconds, TIMING.urge_seconds, TIMING.overdue_seconds):
        one.step(seconds)
    order = reclaim(one.step(TIMING.retry_seconds))
    one.answer(order, AckStatus.DONE, 1000)
    one.is_now(vm(1))
    assert not one.track().overdue


def test_what_is_within_a_raised_minimum_is_overdue_no_more() -> None:
    one = One().grown(3)
    one.demand(cpu=1000)
    for seconds in (TIMING.ask_seconds, TIMING.urge_seconds, TIMING.overdue_seconds):
        one.step(seconds)
    assert one.track().overdue
    limits = one.machine.guests["a"].limits
    least = replace(limits, min=replace(limits.min, cpu_millicores=4000))
    one.machine.set_limits("a", least)
    one.step(TIMING.retry_max_seconds)
    assert not one.track().overdue
    assert one.reserved.cpu_millicores == 4000, "its minimum is always there"


def test_a_partial_answer_is_a_counter_offer() -> None:
    one = One().grown(1, 2 * GIB)
    order = reclaim(one.demand(memory=BOOT))
    offered = 1100 * MIB
    actions = one.answer(order, AckStatus.PARTIAL, offered, refusal=RefusalReason.IN_USE)
    assert of(RequestMemory, actions) == [RequestMemory("a", 1152 * MIB)]  # rounded up to blocks
    one.is_now(vm(memory=1152 * MIB))
    track = one.track(Kind.MEMORY)
    assert (track.counters.refusals, track.counters.shrinks, track.counters.failures) == (1, 1, 0)


def test_a_shrink_that_stops_short_commits_what_was_achieved() -> None:
    one = One().grown(1, 2 * GIB)
    order = reclaim(one.demand(memory=BOOT))
    one.answer(order, AckStatus.DONE, BOOT)
    one.is_now(vm(memory=GIB))
    assert one.reserved.memory_bytes == GIB
    one.step(TIMING.unplug_progress_seconds - 1)
    assert one.track(Kind.MEMORY).phase is Phase.UNPLUGGING
    actions = one.step(1.1)
    assert of(SettleMemory, actions) == [SettleMemory("a")]
    assert one.track(Kind.MEMORY).counters.partials == 1
    one.is_now(vm(memory=GIB))
    assert one.reserved.memory_bytes == GIB
    assert one.track(Kind.MEMORY).shrink_after > one.now


def test_a_refusal_backs_off_longer_each_time_and_is_no_failure() -> None:
    one = One().grown(4)
    order, waits = reclaim(one.demand(cpu=1000)), []
    for _ in range(5):
        actions = one.answer(order, AckStatus.REFUSED, 4000, refusal=RefusalReason.BUSY)
        assert sent(actions)[0].amount == 4000  # it hears that it keeps what it has
        assert of(RequestVcpus, actions) == []
        waits.append(one.track().shrink_after - one.now)
        assert not [one for one in sent(one.step(waits[-1] - 0.5)) if isinstance(one, Reclaim)]
        order = reclaim(one.step(0.6))
    assert waits == [5, 10, 20, 40, 60]
    assert (one.track().counters.refusals, one.track().counters.failures) == (5, 0)


def test_a_refusal_names_its_own_pause() -> None:
    one = One().grown(4)
    order = reclaim(one.demand(cpu=1000))
    one.answer(order, AckStatus.REFUSED, 4000, refusal=RefusalReason.BUSY, retry_after_seconds=33.0)
    assert one.track().shrink_after == one.now + 33


def test_no_shrink_soon_after_a_grow() -> None:
    one = One()
    one.demand(cpu=2000)
    one.is_now(vm(2))
    assert sent(one.demand(cpu=1000)) == []
    assert sent(one.step(TIMING.cool_down_seconds - 0.1)) == []
    assert reclaim(one.step(0.2)).amount == 1000


def test_stale_reports_never_shrink_and_never_grow() -> None:
    one = One().grown(4)
    one.sequence += 1
    reasons = (Reason("test", "test"),)
    low = Demand(one.sequence, Resources(1000, BOOT), Resources(1000, 0), 1 << 40, Urgency.NORMAL, reasons, USABLE)
    one.machine.on_demand("a", one.session, low, one.now)
    assert sent(one.machine.next_actions(one.now + 30.1)) == []
    one.machine.explain("a", one.now + 30.1)
    assert "silent" in one.track().reason.text
    one = One()
    one.machine.on_demand("a", one.session, replace(low, needed=Resources(4000, GIB), sequence=1), one.now)
    assert of(Record, one.machine.next_actions(one.now + 30.1)) == []


def test_under_memory_pressure_memory_never_shrinks() -> None:
    one = One().grown(1, 2 * GIB)
    assert sent(one.demand(memory=BOOT, pressure=True)) == []
    assert sent(one.step(60)) == []
    assert reclaim(one.demand(memory=BOOT, pressure=False)).kind is Kind.MEMORY


def test_pressure_ends_a_shrink_that_was_asked_for() -> None:
    one = One().grown(1, 2 * GIB)
    order = reclaim(one.demand(memory=BOOT))
    [grant] = sent(one.demand(memory=BOOT, pressure=True))
    assert isinstance(grant, Grant)
    assert grant.amount == 2 * GIB
    assert of(RequestMemory, one.answer(order, AckStatus.DONE, BOOT)) == []
    assert of(RequestMemory, one.step(30)) == []


def test_pressure_ends_a_shrink_under_way() -> None:
    one = One().grown(1, 2 * GIB)
    order = reclaim(one.demand(memory=BOOT))
    one.answer(order, AckStatus.DONE, BOOT)
    one.is_now(vm(memory=1536 * MIB, held=1536 * MIB))
    actions = one.demand(memory=BOOT, pressure=True)
    assert of(SettleMemory, actions) == [SettleMemory("a")]
    one.is_now(vm(memory=1536 * MIB))
    assert one.reserved.memory_bytes == 1536 * MIB
    assert one.track(Kind.MEMORY).counters.partials == 1
    assert of(RequestMemory, one.demand(memory=2 * GIB, pressure=True)) == [RequestMemory("a", 2 * GIB)]  # at once


def test_need_that_comes_back_stops_a_shrink_under_way_where_it_is_needed() -> None:
    one = One().grown(1, 2 * GIB)
    one.answer(reclaim(one.demand(memory=BOOT)), AckStatus.DONE, BOOT)
    one.is_now(vm(memory=1536 * MIB))
    assert of(RequestMemory, one.demand(memory=GIB)) == [RequestMemory("a", GIB)]  # it still holds more than that
    one.is_now(vm(memory=1280 * MIB, held=1280 * MIB))
    assert of(RequestMemory, one.demand(memory=896 * MIB)) == []  # less again: what is under way comes first
    assert of(RequestMemory, one.demand(memory=BOOT, floor=1152 * MIB)) == [RequestMemory("a", 1152 * MIB)]
    one.is_now(vm(memory=1152 * MIB))
    assert one.track(Kind.MEMORY).counters.shrinks == 1
    assert one.reserved.memory_bytes == 1152 * MIB


def test_an_answer_never_shrinks_below_the_floor_of_the_freshest_report() -> None:
    """Invariant 7: what the guest said after it was asked counts more than its answer."""
    one = One().grown(1, 2 * GIB)
    order = reclaim(one.demand(memory=BOOT))
    one.demand(memory=BOOT, floor=GIB)
    assert of(RequestMemory, one.answer(order, AckStatus.DONE, BOOT)) == [RequestMemory("a", GIB)]


def test_a_shrink_stops_at_a_minimum_that_was_raised_meanwhile() -> None:
    one = One().grown(1, 2 * GIB)
    order = reclaim(one.demand(memory=BOOT))
    one.machine.set_limits("a", Limits(Resources(1000, GIB), LIMITS.max))
    assert of(RequestMemory, one.answer(order, AckStatus.DONE, BOOT)) == [RequestMemory("a", GIB)]


def test_a_floor_above_the_target_is_asked_for_instead() -> None:
    one = One().grown(1, 2 * GIB)
    assert reclaim(one.demand(memory=BOOT, floor=700 * MIB)).amount == 768 * MIB


def test_need_that_comes_back_ends_the_asking() -> None:
    one = One().grown(4)
    order = reclaim(one.demand(cpu=1000))
    [grant] = sent(one.demand(cpu=4000))
    assert isinstance(grant, Grant)
    assert (grant.amount, one.track().phase) == (4000, Phase.IDLE)
    assert of(RequestVcpus, one.answer(order, AckStatus.DONE, 1000)) == []


def test_a_vcpu_that_does_not_go_is_asked_for_again_and_then_left() -> None:
    one = One().grown(2)
    order = reclaim(one.demand(cpu=1000))
    one.answer(order, AckStatus.DONE, 1000)
    one.is_now(vm(2))  # asked after the request
    again = sum(len(of(RequestVcpus, one.step(1.0))) for _ in range(7))
    assert again == 3
    one.step(2.0)
    assert (one.track().phase, one.track().counters.partials) == (Phase.IDLE, 1)
    assert one.reserved.cpu_millicores == 2000


def test_what_fits_no_more_is_asked_back_from_those_above_their_share() -> None:
    one = One(HostCapacity(Resources(4000, 8 * GIB))).grown(3)
    one.machine.add_guest("b", LIMITS)
    one.machine.on_vm_state("b", VM, one.now)
    session, _ = one.machine.on_connected("b", hello(), one.now)
    reasons = (Reason("test", "test"),)
    want = Demand(1, Resources(3000, BOOT), Resources(1000, 0), 1 << 40, Urgency.NORMAL, reasons, USABLE)
    one.machine.on_demand("b", session, want, one.now)
    actions = one.step()
    assert reclaim(actions).amount == 2000
    assert of(RequestVcpus, actions) == []
    one.answer(reclaim(actions), AckStatus.DONE, 2000)
    assert of(RequestVcpus, one.is_now(vm(2))) == [RequestVcpus("b", 2)]


# ---- exactly once --------------------------------------------------------------------------------


def test_answers_to_unknown_or_finished_orders_change_nothing() -> None:
    one = One().grown(4)
    order = reclaim(one.demand(cpu=2000))
    for stranger in (OrderId(7, 999, 999), OrderId(6, order.id.request_id, order.id.revision), OrderId(0, 0, 0)):
        for status in AckStatus:
            assert of(RequestVcpus, one.answer(replace(order, id=stranger), status, 1000)) == []
    assert one.track().phase is Phase.ASKING
    assert len(of(RequestVcpus, one.answer(order, AckStatus.DONE, 2000))) == 1
    assert of(RequestVcpus, one.answer(order, AckStatus.DONE, 2000)) == []  # a replay
    one.is_now(vm(2))
    counters = replace(one.track().counters)
    for status in AckStatus:
        assert one.answer(order, status, 2000) == []
    assert one.track().counters == counters


def test_an_answer_for_another_kind_changes_nothing() -> None:
    one = One().grown(4, 2 * GIB)
    messages = sent(one.demand(cpu=1000, memory=BOOT))
    cpu = next(message for message in messages if message.kind is Kind.CPU)
    crossed = Ack(cpu.id, Kind.MEMORY, AckStatus.DONE, BOOT, USABLE)
    one.machine.on_ack("a", one.session, crossed, one.now)
    assert of(RequestMemory, one.step()) == []


def test_a_session_that_is_over_is_not_heard() -> None:
    one = One().grown(4)
    order, old = reclaim(one.demand(cpu=1000)), one.session
    one.connect(hello(2))
    one.step()
    one.machine.on_ack("a", old, Ack(order.id, Kind.CPU, AckStatus.DONE, 1000, USABLE), one.now)
    one.machine.on_heartbeat("a", old, Heartbeat(Usable(9)), one.now)
    one.machine.on_disconnected("a", old)
    assert of(RequestVcpus, one.step()) == []
    assert one.machine.guests["a"].connected
    assert one.machine.guests["a"].usable == USABLE
    assert one.machine.guests["a"].demand is None


def test_an_older_demand_is_ignored() -> None:
    one = One()
    one.demand(cpu=1000)
    one.demand(cpu=2000)
    one.sequence = 0
    one.demand(cpu=4000)
    demand = one.machine.guests["a"].demand
    assert demand is not None
    assert demand.needed.cpu_millicores == 2000


def test_an_older_generation_is_refused_and_a_newer_takes_over() -> None:
    one = One()
    one.connect(hello(5))
    with pytest.raises(SupersededError, match="newer"):
        one.machine.on_connected("a", hello(4), one.now)
    before = one.session
    one.connect(hello(6))
    assert one.session > before
    one.connect(hello(1, boot=2))  # another boot: its clock begins anew


def test_an_older_generation_is_welcome_when_nobody_is_there() -> None:
    one = One()
    one.connect(hello(5))
    one.machine.on_disconnected("a", one.session)
    before = one.session
    one.connect(hello(4))
    assert one.session > before
    assert one.machine.guests["a"].connected


def test_protocols_must_meet() -> None:
    one = One()
    for low, high in ((2, 3), (0, 0)):
        with pytest.raises(VersionError, match=f"speaks protocol 1, the guest {low} to {high}"):
            one.machine.on_connected("a", replace(hello(), protocol_min=low, protocol_max=high), one.now)
    assert one.machine.on_connected("a", replace(hello(), protocol_max=9), one.now)[1].protocol == 1


def test_a_guest_of_no_name_is_refused() -> None:
    with pytest.raises(NotFoundError):
        One().machine.on_connected("nobody", hello(), 0.0)


def test_events_about_a_guest_that_is_gone_are_ignored() -> None:
    one = One().grown(2)
    order = reclaim(one.demand(cpu=1000))
    one.machine.remove_guest("a")
    one.answer(order, AckStatus.DONE, 1000)
    one.machine.on_vm_state("a", VM, one.now)
    one.machine.on_vm_failed("a", Observe("a"), "late", True, one.now)
    one.machine.on_disconnected("a", one.session)
    assert one.step() == []
    assert one.machine.wake_at(one.now) is None


# ---- after connecting ----------------------------------------------------------------------------


def test_after_hello_the_guest_hears_what_it_has() -> None:
    one = One(connect=False)
    one.machine.on_vm_state("a", vm(2, GIB), one.now)
    one.connect()
    grants = sent(one.step())
    assert [(grant.kind, grant.amount) for grant in grants] == [(Kind.CPU, 2000), (Kind.MEMORY, GIB)]
    assert all(isinstance(grant, Grant) and grant.stage is GrantStage.SETTLED for grant in grants)
    assert one.step() == []


def test_nothing_is_announced_before_the_hypervisor_spoke() -> None:
    one = One(connect=False)
    one.connect()
    assert sent(one.step()) == []
    assert len(sent(one.is_now(VM))) == 2


def test_a_daemon_that_comes_back_during_a_growth_hears_of_it_and_may_answer() -> None:
    one = One()
    one.demand(cpu=3000)
    one.machine.on_disconnected("a", one.session)
    one.connect(hello(2))
    grant = next(message for message in sent(one.step()) if message.kind is Kind.CPU)
    assert isinstance(grant, Grant)
    assert (grant.amount, grant.stage) == (3000, GrantStage.OFFERED)
    one.answer(grant, AckStatus.PARTIAL, 2000, refusal=RefusalReason.FAILED)
    assert one.track().counters.refusals == 1


def test_being_away_takes_nothing_and_ends_the_asking() -> None:
    one = One().grown(4)
    one.demand(cpu=1000)
    one.machine.on_disconnected("a", one.session)
    for _ in range(100):
        one.now += 60
        assert of(RequestVcpus, one.machine.next_actions(one.now)) == []
    assert one.reserved.cpu_millicores == 4000


# ---- fixed guests --------------------------------------------------------------------------------


def test_a_paused_guest_keeps_what_it_has() -> None:
    one = One().grown(3)
    one.machine.pause("a", True)
    for cpu in (1000, 4000):
        actions = one.demand(cpu=cpu)
        assert (sent(actions), of(RequestVcpus, actions)) == ([], [])
    one.machine.explain("a", one.now)
    assert one.track().reason.text == "keeps 3 CPU: paused by the operator"
    one.machine.pause("a", False)
    assert of(RequestVcpus, one.step()) == [RequestVcpus("a", 4)]


def test_a_pause_ends_a_shrink_that_was_asked_for() -> None:
    one = One().grown(3)
    order = reclaim(one.demand(cpu=1000))
    one.machine.pause("a", True)
    assert of(RequestVcpus, one.answer(order, AckStatus.DONE, 1000)) == []
    [grant] = sent(one.step()) or [Grant(order.id, Kind.CPU, 3000)]
    assert grant.amount == 3000
    assert sent(one.step(TIMING.ask_seconds + 1)) == []
    assert not one.track().overdue


def test_a_pause_ends_an_unplug_under_way_where_it_stands() -> None:
    one = One().grown(4)
    one.answer(reclaim(one.demand(cpu=1000)), AckStatus.DONE, 1000)
    one.machine.pause("a", True)
    actions = one.is_now(vm(3))  # the one vCPU that was on its way
    assert of(RequestVcpus, actions) == []
    assert of(Observe, actions), "a request may still be on its way"
    assert [grant.amount for grant in sent(one.is_now(vm(3)))] == [3000]
    assert (one.reserved.cpu_millicores, one.track().counters.partials) == (3000, 1)
    assert of(RequestVcpus, one.step(TIMING.unplug_repeat_seconds + 1)) == []


@pytest.mark.parametrize("status", [VmStatus.FROZEN, VmStatus.UNREACHABLE])
def test_nothing_is_decided_about_a_vm_that_does_not_plainly_run(status: VmStatus) -> None:
    one = One().grown(3)
    one.is_now(replace(vm(3), status=status))
    for cpu in (1000, 4000):
        actions = one.demand(cpu=cpu)
        assert (sent(actions), of(RequestVcpus, actions)) == ([], [])
    assert one.reserved.cpu_millicores == 3000
    one.is_now(vm(3))
    assert one.track().target == 4000


def test_an_answer_of_a_frozen_vm_changes_nothing() -> None:
    one = One().grown(3)
    order = reclaim(one.demand(cpu=1000))
    one.is_now(replace(vm(3), status=VmStatus.FROZEN))
    assert of(RequestVcpus, one.answer(order, AckStatus.DONE, 1000)) == []


def test_a_frozen_vm_is_charged_the_most_it_may_hold() -> None:
    one = One()
    one.demand(cpu=3000)
    one.is_now(replace(vm(2), status=VmStatus.FROZEN))
    assert one.reserved.cpu_millicores == 3000


def test_deadlines_begin_anew_after_a_freeze_and_a_reset() -> None:
    one = One()
    one.demand(memory=GIB)
    one.is_now(replace(vm(held=GIB), status=VmStatus.FROZEN))
    one.now += 1000
    one.machine.on_heartbeat("a", one.session, Heartbeat(), one.now)
    actions = one.is_now(vm(held=GIB))
    assert of(SettleMemory, actions) == []
    one.is_now(vm(held=GIB, resets=1))
    assert of(SettleMemory, one.step(TIMING.reboot_seconds - 1)) == []
    assert of(SettleMemory, one.step(2)) == [SettleMemory("a")]


def test_a_vm_that_is_gone_holds_nothing() -> None:
    one = One().grown(4, 2 * GIB)
    order = reclaim(one.demand(cpu=1000, memory=2 * GIB))
    actions = one.is_now(VmState(VmStatus.GONE))
    assert of(Record, actions)[-1].reserved == Resources(0, 0)
    assert of(RequestVcpus, one.answer(order, AckStatus.DONE, 1000)) == []


def test_a_dry_run_is_left_alone() -> None:
    one = One()
    one.connect(hello(2, capabilities=ALL | {Capability.DRY_RUN}))
    actions = one.demand(cpu=4000, memory=2 * GIB)
    assert (of(RequestVcpus, actions), of(RequestMemory, actions)) == ([], [])


# ---- hypervisor failures -------------------------------------------------------------------------


def test_an_unknown_outcome_asks_the_hypervisor_and_believes_it() -> None:
    for state, kept, phase in ((vm(1), 1000, Phase.IDLE), (vm(3), 3000, Phase.IDLE)):
        one = One()
        one.demand(cpu=3000)
        one.machine.on_vm_failed("a", RequestVcpus("a", 3), "cut", True, one.now)
        actions = one.step()
        assert of(Observe, actions) == [Observe("a")]
        assert of(RequestVcpus, actions) == []
        assert one.reserved.cpu_millicores == 3000  # until it is known
        one.is_now(state)
        assert (one.reserved.cpu_millicores, one.track().phase) in ((kept, phase), (3000, Phase.PLUGGING))


def test_a_lost_request_that_was_not_done_is_rolled_back_and_tried_again() -> None:
    one = One()
    one.demand(memory=GIB)
    one.machine.on_vm_failed("a", RequestMemory("a", GIB), "cut", True, one.now)
    one.step()
    actions = one.is_now(VM)
    records = of(Record, actions)
    assert records[0].reserved.memory_bytes == BOOT
    assert of(RequestMemory, actions) == [RequestMemory("a", GIB)]


def test_a_refused_request_is_rolled_back_and_waits() -> None:
    one = One()
    one.demand(cpu=3000)
    one.machine.on_vm_failed("a", RequestVcpus("a", 3), "no", False, one.now)
    one.step()
    actions = one.is_now(VM)
    assert one.reserved.cpu_millicores == 1000
    assert of(RequestVcpus, actions) == []
    assert one.track().counters.failures == 1
    assert of(RequestVcpus, one.step(TIMING.retry_seconds + 0.1)) == [RequestVcpus("a", 3)]


def test_while_the_hypervisor_is_asked_again_nothing_is_decided() -> None:
    one = One()
    one.machine.on_vm_failed("a", Observe("a"), "cut", True, one.now)
    actions = one.demand(cpu=4000)
    assert of(RequestVcpus, actions) == []
    assert of(RequestVcpus, one.is_now(VM)) == [RequestVcpus("a", 4)]


# ---- budget --------------------------------------------------------------------------------------


def test_resizes_have_a_budget() -> None:
    """Invariant 12: at most so many begin in a window, however the need jumps."""
    timing = Timing(cool_down_seconds=0, budget_grows=4, budget_shrinks=2, budget_window_seconds=60)
    one, begun = One(timing=timing), []
    for _ in range(100):
        one.now += 0.1
        actions = one.demand(cpu=2000 if one.track().reserved == 1000 else 1000)
        for order in sent(actions):
            if isinstance(order, Reclaim):
                begun.append(one.now)
                one.answer(order, AckStatus.DONE, 1000)
                one.is_now(vm(1))
            elif order.stage is GrantStage.OFFERED:
                begun.append(one.now)
                one.is_now(vm(2))
    assert 3 <= len(begun) <= 4 + 2
    at = one.machine.wake_at(one.now)
    assert at is not None
    assert at > one.now


# ---- admission and recovery ----------------------------------------------------------------------


def test_limits_that_do_not_fit_change_nothing() -> None:
    one = One()
    with pytest.raises(AdmissionError):
        one.machine.add_guest("b", Limits(Resources(8000, BOOT), Resources(8000, BOOT)))
    with pytest.raises(AdmissionError):
        one.machine.set_limits("a", Limits(Resources(9000, BOOT), Resources(9000, BOOT)))
    with pytest.raises(AdmissionError):
        one.machine.set_host(HostCapacity(Resources(500, GIB)), {"a": LIMITS})
    assert list(one.machine.guests) == ["a"]
    assert one.machine.guests["a"].limits == LIMITS
    assert one.machine.host.capacity.cpu_millicores == 8000


def test_names_must_be_known() -> None:
    one = One()
    for call in (one.machine.remove_guest, lambda name: one.machine.pause(name, True)):
        with pytest.raises(NotFoundError, match="'nobody'"):
            call("nobody")
    with pytest.raises(NotFoundError):
        one.machine.set_limits("nobody", LIMITS)


def test_a_smaller_host_takes_back_what_is_above_the_minimums() -> None:
    one = One().grown(4)
    one.demand(cpu=4000)
    one.machine.set_host(HostCapacity(Resources(2000, 8 * GIB)), {"a": LIMITS})
    assert reclaim(one.step()).amount == 2000


def test_recovery_trusts_the_journal_until_the_hypervisor_speaks() -> None:
    machine = BrokerMachine(HostCapacity(Resources(8000, 8 * GIB)), 9)
    machine.add_guest("a", LIMITS, Resources(4000, 2 * GIB), revision=41)
    assert machine.next_actions(0.0) == [Observe("a")]
    assert machine.free(Kind.CPU) == 4000
    machine.on_vm_state("a", vm(2, GIB), 1.0)
    actions = machine.next_actions(1.0)
    assert of(Record, actions)[-1] == Record("a", Resources(2000, GIB), 41)
    assert machine.free(Kind.CPU) == 6000
    machine.on_connected("a", hello(), 2.0)
    assert min(grant.id.revision for grant in sent(machine.next_actions(2.0))) == 42


def test_recovery_twice_is_recovery_once() -> None:
    """Whatever the journal says, and however often the broker starts on it (invariant 19)."""
    saved = (Resources(4000, 2 * GIB), 5)
    books = []
    for starts in (1, 2, 3):
        book = saved
        for epoch in range(starts):
            one = One(connect=False, epoch=epoch + 1)
            one.machine = BrokerMachine(HostCapacity(Resources(8000, 8 * GIB)), epoch + 1)
            one.machine.add_guest("a", LIMITS, *book)
            for action in [*one.step(), *one.is_now(vm(2, GIB))]:
                assert not isinstance(action, RequestVcpus | RequestMemory | SettleMemory)
                if isinstance(action, Record):
                    book = (action.reserved, action.revision)
        books.append(book)
    assert books == [(Resources(2000, GIB), 5)] * 3


def test_the_same_events_give_the_same_actions() -> None:
    def story() -> list[Action]:
        one = One()
        actions = one.demand(cpu=3500, memory=GIB) + one.is_now(vm(4, GIB)) + one.step(10)
        return actions + one.demand(cpu=1000, memory=BOOT) + one.step(5) + one.step(5) + one.step(10)

    assert story() == story()


def test_an_urged_reclaim_asks_for_no_more_than_the_freshest_report_can_give() -> None:
    one = One().grown(1, 2 * GIB)
    assert reclaim(one.demand(memory=BOOT)).amount == BOOT
    assert sent(one.demand(memory=BOOT, floor=GIB)) == []
    assert reclaim(one.step(TIMING.ask_seconds + 0.1)).amount == GIB
    one.demand(memory=BOOT, floor=2 * GIB)
    actions = one.step(TIMING.urge_seconds + 0.1)
    assert [type(message) for message in sent(actions)] == [Grant], "it needs all of it by now"
    assert one.track(Kind.MEMORY).phase is Phase.IDLE


def test_what_ended_short_is_not_released_before_the_hypervisor_was_asked_again() -> None:
    one = One()
    one.demand(cpu=4000)
    one.step(TIMING.plug_progress_seconds + 0.1)
    assert one.track().phase is Phase.IDLE
    assert one.reserved.cpu_millicores == 4000, "the request may still wait at the hypervisor"
    one.is_now(vm(1))
    assert one.reserved.cpu_millicores == 1000


def test_what_fell_by_itself_while_it_was_asked_for_is_not_asked_for_again() -> None:
    one = One().grown(1, 2 * GIB)
    order = reclaim(one.demand(memory=GIB))
    one.machine.on_vm_state("a", vm(1, GIB - BLOCK), one.now)
    actions = one.answer(order, AckStatus.DONE, GIB)
    assert of(RequestMemory, actions) == [], "that would be a grow"
    assert one.reserved.memory_bytes == GIB - BLOCK


def test_while_there_is_plenty_memory_goes_back_by_a_quarter_or_down_to_the_minimum() -> None:
    one = One().grown(1, 2 * GIB)
    assert sent(one.demand(memory=1664 * MIB)) == [], "less than a quarter"
    assert reclaim(one.demand(memory=1536 * MIB)).amount == 1536 * MIB
    small = One().grown(1, BOOT + BLOCK)
    assert reclaim(small.demand(memory=BOOT)).amount == BOOT, "the minimum"


def test_a_minimum_that_is_no_whole_block_is_reached_as_well() -> None:
    one = One().grown(1, BOOT + 3 * BLOCK)
    odd = Resources(1000, BOOT + BLOCK + BLOCK // 2)
    one.machine.set_limits("a", Limits(odd, Resources(4000, 2560 * MIB)))
    assert reclaim(one.demand(memory=BOOT)).amount == BOOT + 2 * BLOCK


def test_where_memory_is_scarce_every_block_counts() -> None:
    one = One(HostCapacity(Resources(8000, 2 * GIB + BLOCK))).grown(1, 2 * GIB)
    assert reclaim(one.demand(memory=2 * GIB - BLOCK)).amount == 2 * GIB - BLOCK
