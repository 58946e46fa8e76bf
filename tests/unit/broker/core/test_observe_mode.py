"""A guest that is only observed: decided about, shown, and never touched."""

from dataclasses import replace

import pytest
from one_guest import BLOCK, BOOT, LIMITS, TIMING, One, hello, of, reclaim, sent, vm

from guestd.broker.core.actions import Action, Log, Observe, Record, RequestMemory, RequestVcpus
from guestd.broker.core.ledger import HostCapacity
from guestd.broker.core.machine import BrokerMachine
from guestd.model.errors import AdmissionError, NotFoundError
from guestd.model.event import EventCode
from guestd.model.explanation import ReclaimRequest
from guestd.model.messages import Ack, AckStatus, Grant, GrantStage
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB, MIB
from guestd.model.vm import VmStatus


def observed(host: HostCapacity | None = None) -> One:
    """One guest that is observed from the start."""
    one = One(host, connect=False)
    one.machine.remove_guest("a")
    one.machine.add_guest("a", LIMITS, observe=True)
    one.machine.on_vm_state("a", vm(), one.now)
    one.connect()
    assert touching(one.step()) == []
    return one


def touching(actions: list[Action]) -> list[Action]:
    """What does more than to look and to tell."""
    return [action for action in actions if not isinstance(action, Log | Observe)]


def told(actions: list[Action]) -> list[str]:
    assert touching(actions) == []
    assert {log.code for log in of(Log, actions)} <= {EventCode.WOULD}
    return [log.text for log in of(Log, actions)]


def test_what_would_be_done_is_said_once_and_nothing_is_done() -> None:
    one = observed()
    assert told(one.demand(3000)) == ["would grow to 3 CPU: needs 3 CPU"]
    assert told(one.demand(3000)) == []
    assert told(one.step(30)) == []
    assert told(one.demand(2500)) == [], "still three whole CPUs"
    assert told(one.demand(4000, 2 * BOOT)) == [
        "would grow to 4 CPU: needs 4 CPU",
        "would grow to 1 GiB: needs 1 GiB",
    ]
    assert one.reserved == Resources(1000, BOOT)
    assert one.track().target == 4000


def test_a_log_of_what_would_be_done_has_its_numbers() -> None:
    one = observed()
    [log] = of(Log, one.demand(3000))
    assert (log.code, log.before, log.after, log.kind) == (EventCode.WOULD, 1000, 3000, Kind.CPU)
    assert log.inputs is not None
    assert (log.inputs.demand, log.inputs.reserved, log.inputs.target) == (3000, 1000, 3000)


def test_what_it_would_give_back_is_said_with_the_usual_pauses() -> None:
    one = observed()
    one.demand(4000)
    one.is_now(vm(4))  # somebody else has plugged them
    assert told(one.demand(4000)) == []
    assert told(one.demand(1000)) == [], "it would have grown just now"
    assert told(one.step(TIMING.cool_down_seconds + 1)) == ["would shrink to 1 CPU: needs 1 CPU, min is 1 CPU"]
    assert told(one.step(60)) == []


def test_a_need_that_goes_to_and_fro_is_no_storm() -> None:
    one = observed()
    lines = 0
    for turn in range(200):
        lines += len(told(one.demand(1000 + 2000 * (turn % 2))))
        one.now += 0.1
    assert lines <= 2 * (20 / TIMING.cool_down_seconds + 1)


def test_no_report_of_it_makes_anybody_touch_it() -> None:
    one = observed()
    for state in (vm(3), vm(1, cpu_enforced=True), vm(1, cpu_enforced=True, cpu_throttled_permille=500), vm(2, GIB)):
        assert touching(one.is_now(state)) == []
        assert one.reserved == Resources(state.held(Kind.CPU), state.held(Kind.MEMORY))
    one.connect(hello(2))
    assert touching(one.step(1)) == []
    ballooned = vm(1, BOOT // 2, memory_ballooned_bytes=BOOT // 2, memory_min_bytes=BLOCK)
    assert touching(one.is_now(ballooned)) == []
    assert one.reserved.memory_bytes == BOOT // 2


def test_what_it_holds_is_no_others_until_it_is_known_all_that_it_may_hold() -> None:
    one = One(HostCapacity(Resources(8000, 4 * GIB)))
    one.machine.add_guest("watched", Limits(Resources(1000, BOOT), Resources(6000, 2 * GIB)), observe=True)
    one.demand(4000)
    assert one.reserved.cpu_millicores == 2000, "six may be the other's"
    one.machine.on_vm_state("watched", vm(5), one.now)
    one.is_now(vm(2))
    assert one.reserved.cpu_millicores == 3000, "five are"
    one.machine.on_vm_state("watched", vm(2), one.now)
    one.is_now(vm(3))
    assert one.reserved.cpu_millicores == 4000


def test_nobody_is_shrunk_for_what_an_observed_guest_would_get() -> None:
    one = One(HostCapacity(Resources(4000, 8 * GIB)))
    one.grown(3)
    other = One(connect=False)
    other.machine, other.now = one.machine, one.now
    one.machine.add_guest("watched", LIMITS, observe=True)
    one.machine.on_vm_state("watched", vm(), one.now)
    session, _ = one.machine.on_connected("watched", hello(), one.now)
    demand = one.machine.guests["a"].demand
    assert demand is not None
    one.machine.on_demand("watched", session, replace(demand, needed=Resources(4000, BOOT)), one.now)
    actions = one.step()
    assert touching([action for action in actions if action.guest == "a"]) == []
    assert one.track().target == 3000
    assert one.machine.guests["watched"].tracks[Kind.CPU].target == 2000, "its share, were it served"
    assert not one.machine.scarce(Kind.CPU)
    assert one.machine.inputs("watched", Kind.CPU).scarce
    assert not one.machine.inputs("a", Kind.CPU).scarce


def test_a_grow_under_way_is_let_go_of() -> None:
    one = One()
    one.demand(3000)
    one.machine.observe("a", True)
    assert touching(one.step()) == []
    assert touching(one.is_now(vm(1))) == [], "the request may have been refused by then"
    assert one.reserved.cpu_millicores == 1000


def test_who_was_being_asked_hears_once_what_it_has() -> None:
    one = One().grown()
    order = reclaim(one.demand(1000))
    one.machine.observe("a", True)
    assert sent(one.step()) == [], "what it has is not known before the hypervisor was asked"
    [grant] = sent(one.is_now(vm(4)))
    assert isinstance(grant, Grant)
    assert (grant.amount, grant.stage, grant.kind) == (4000, GrantStage.SETTLED, Kind.CPU)
    assert touching(one.answer(order, AckStatus.DONE, 1000)) == []
    assert touching(one.step(60)) == []


def test_what_was_about_to_be_asked_of_the_hypervisor_is_not() -> None:
    one = One().grown()
    order = reclaim(one.demand(1000))
    ack = Ack(order.id, order.kind, AckStatus.DONE, 1000, one.machine.guests["a"].usable)
    one.machine.on_ack("a", one.session, ack, one.now)
    one.machine.observe("a", True)
    assert touching(one.step()) == []


def test_memory_that_a_balloon_may_still_give_stays_charged() -> None:
    small = vm(1, BOOT // 2, memory_ballooned_bytes=BOOT // 2, memory_min_bytes=BLOCK)
    one = One(state=small)
    one.machine.set_limits("a", Limits(Resources(1000, BLOCK), LIMITS.max))
    one.demand(1000, BOOT)
    assert one.track(Kind.MEMORY).amount == BOOT
    one.machine.observe("a", True)
    one.is_now(small)
    one.step(600)
    assert one.reserved.memory_bytes == BOOT
    one.is_now(vm())
    one.is_now(small)
    assert one.reserved.memory_bytes == BOOT // 2, "it was there, and is somebody else's doing now"


def test_one_that_is_served_again_is_recorded_and_hears_what_it_has() -> None:
    one = observed()
    one.is_now(vm(2))
    one.demand(3000)
    one.machine.observe("a", False)
    actions = one.step()
    assert of(Record, actions)[0].reserved == Resources(2000, BOOT)
    assert of(RequestVcpus, actions) == [], "not before the hypervisor was asked"
    actions = one.is_now(vm(2))
    assert of(RequestVcpus, actions) == [RequestVcpus("a", 3)]
    assert {type(message) for message in sent(actions)} == {Grant}


def test_a_host_of_observed_guests_shares_out_among_all_of_them() -> None:
    machine = BrokerMachine(HostCapacity(Resources(6000, 8 * GIB)), 1)
    sessions = {}
    one = One()
    template = one.machine.guests["a"]
    one.demand(4000)
    assert template.demand is not None
    for name in ("x", "y"):
        machine.add_guest(name, LIMITS, observe=True)
        machine.on_vm_state(name, vm(), 1000.0)
        sessions[name], _ = machine.on_connected(name, hello(), 1000.0)
        machine.on_demand(name, sessions[name], template.demand, 1000.0)
    actions = machine.next_actions(1000.0)
    assert touching(actions) == []
    assert [log.after for log in of(Log, actions)] == [3000, 3000]
    machine.remove_guest("y")
    [log] = of(Log, machine.next_actions(1000.0))
    assert (log.guest, log.after) == ("x", 4000)


def test_nothing_is_reclaimed_from_it_but_in_words() -> None:
    one = observed()
    one.is_now(vm(3, 2 * GIB))
    one.demand(1000)
    with pytest.raises(AdmissionError, match="only observed"):
        one.machine.reclaim("a", ReclaimRequest(), one.now)
    cpu, memory = one.machine.reclaim("a", ReclaimRequest(dry_run=True), one.now)
    assert (cpu.reserved, cpu.goal, memory.goal) == (3000, 1000, 512 * MIB)
    assert touching(one.step()) == []


def test_a_failure_of_its_hypervisor_only_makes_it_be_asked_again() -> None:
    one = observed()
    one.machine.on_vm_failed("a", RequestMemory("a", GIB), "refused: only observed", False, one.now)
    assert one.step() == [Observe("a")]
    assert one.track(Kind.MEMORY).counters.failures == 0


def test_an_unknown_guest_cannot_be_observed() -> None:
    with pytest.raises(NotFoundError):
        One().machine.observe("nobody", True)


def test_one_that_is_frozen_is_charged_what_it_holds() -> None:
    one = One(connect=False)
    one.machine.remove_guest("a")
    one.machine.add_guest("a", LIMITS, observe=True)
    assert touching(one.step()) == []
    assert one.reserved == LIMITS.max, "nobody has told what it holds"
    one.is_now(replace(vm(2), status=VmStatus.UNREACHABLE))
    assert one.reserved == LIMITS.max
    one.is_now(replace(vm(2), status=VmStatus.FROZEN))
    assert one.reserved == Resources(2000, BOOT)
    one.is_now(replace(vm(2), status=VmStatus.GONE))
    assert one.reserved == Resources()
