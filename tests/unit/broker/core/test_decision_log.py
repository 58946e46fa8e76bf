"""Every decision is told in numbers: its code, what was there, where it leads, why, and from what it was made."""

import re
from pathlib import Path

from one_guest import BLOCK, BOOT, LIMITS, TIMING, One, of, reclaim, vm

from guestd.broker.core.actions import Action, Log, RequestMemory, RequestVcpus
from guestd.broker.core.ledger import HostCapacity
from guestd.broker.core.track import Phase
from guestd.model.event import EventCode
from guestd.model.messages import AckStatus, RefusalReason
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB


def numbers(actions: list[Action]) -> list[tuple[EventCode, int, int]]:
    return [(log.code, log.before, log.after) for log in of(Log, actions)]


def test_a_grow_is_told_when_it_begins_and_when_it_is_there() -> None:
    one = One()
    [log] = of(Log, one.demand(3000))
    assert (log.code, log.before, log.after) == (EventCode.GROWING, 1000, 3000)
    assert (log.guest, log.kind, log.reason) == ("a", Kind.CPU, one.track().reason)
    assert numbers(one.is_now(vm(2))) == []
    assert numbers(one.is_now(vm(3))) == [(EventCode.GROWN, 1000, 3000)]


def test_the_inputs_are_those_of_the_moment_before() -> None:
    one = One(HostCapacity(Resources(8000, 8 * GIB), Resources(1000, 0), idle_tax=0.5))
    one.machine.add_guest("b", LIMITS, Resources(2000, BOOT))
    cpu, memory = of(Log, one.demand(3000, GIB))
    assert cpu.inputs is not None
    assert memory.inputs is not None
    assert (cpu.inputs.demand, cpu.inputs.reserved, cpu.inputs.plugged, cpu.inputs.target) == (3000, 1000, 1000, 3000)
    assert (cpu.inputs.capacity, cpu.inputs.free, cpu.inputs.scarce) == (7000, 4000, False)
    assert (cpu.inputs.limits, cpu.inputs.idle_tax_permille) == (LIMITS, 0)
    assert memory.inputs.idle_tax_permille == 500
    assert one.machine.inputs("a", Kind.CPU).free == 2000


def test_a_shrink_is_told_from_the_asking_to_its_end() -> None:
    one = One().grown(4)
    actions = one.demand(1000)
    assert numbers(actions) == [(EventCode.ASKING, 4000, 1000)]
    assert numbers(one.answer(reclaim(actions), AckStatus.DONE, 1000)) == []
    one.is_now(vm(3))
    assert numbers(one.is_now(vm(1))) == [(EventCode.SHRUNK, 4000, 1000)]


def test_a_refusal_has_the_guests_own_reason_and_what_it_could_do() -> None:
    one = One().grown(4)
    order = reclaim(one.demand(1000))
    said = {"refusal": RefusalReason.PINNED, "text": "CPU 2 is isolated"}
    [log] = of(Log, one.answer(order, AckStatus.PARTIAL, 3000, **said))
    assert (log.code, log.before, log.after) == (EventCode.REFUSED, 4000, 3000)
    assert log.reason is not None
    assert (log.reason.code, log.reason.text) == ("pinned", "CPU 2 is isolated")


def test_a_guest_that_says_it_could_do_more_than_it_has_is_not_believed() -> None:
    one = One().grown(4)
    [log] = of(Log, one.answer(reclaim(one.demand(1000)), AckStatus.REFUSED, 1 << 60))
    assert (log.before, log.after) == (4000, 4000)


def test_what_it_could_not_bring_online_is_told_as_a_refusal() -> None:
    one = One()
    one.demand(3000)
    order = one.track().order
    assert order is not None
    grant = type("Order", (), {"id": order, "kind": Kind.CPU})()
    assert numbers(one.answer(grant, AckStatus.PARTIAL, 2000)) == [(EventCode.REFUSED, 3000, 2000)]


def test_silence_is_told_as_overdue() -> None:
    one = One().grown(4)
    one.demand(1000)
    one.step(TIMING.ask_seconds)
    one.step(TIMING.urge_seconds)
    assert numbers(one.step(TIMING.overdue_seconds)) == [(EventCode.OVERDUE, 4000, 4000)]


def test_what_ends_short_is_told_with_what_was_achieved() -> None:
    one = One()
    one.demand(memory=GIB)
    one.is_now(vm(memory=BOOT + BLOCK, held=GIB))
    assert numbers(one.step(11)) == [(EventCode.ENDED_SHORT, BOOT, BOOT + BLOCK)]


def test_a_lost_request_and_a_failed_one_are_told() -> None:
    one = One()
    one.demand(2000, GIB)
    one.machine.on_vm_failed("a", RequestVcpus("a", 2), "the answer was lost", True, one.now)
    one.machine.on_vm_failed("a", RequestMemory("a", GIB), "no", False, one.now)
    assert numbers(one.step()) == [(EventCode.FAILED, 1000, 2000), (EventCode.FAILED, BOOT, GIB)]
    assert numbers(one.is_now(vm()))[0] == (EventCode.ENDED_SHORT, 1000, 1000)


def test_asking_that_is_given_up_is_told() -> None:
    one = One().grown(1, GIB)
    one.demand(memory=BOOT)
    assert one.track(Kind.MEMORY).phase is Phase.ASKING
    assert numbers(one.demand(memory=BOOT, pressure=True)) == [(EventCode.ENDED_SHORT, GIB, GIB)]


def test_cpu_time_that_is_taken_by_quota_is_told() -> None:
    one = One(state=vm(4, cpu_enforced=True, cpu_quota_millicores=4000))
    one.demand(4000)
    one.step(TIMING.cool_down_seconds + 1)
    one.machine.guests["a"].usable = type(one.machine.guests["a"].usable)(1, 4, BOOT, BOOT, BLOCK)
    assert numbers(one.demand(1000)) == [(EventCode.SHRINKING, 4000, 1000)]


def test_a_burst_is_told_when_it_begins_is_about_to_end_and_is_over() -> None:
    one = One()
    burst = Resources(4000, 0)
    one.machine.set_limits(
        "a", Limits(LIMITS.min, Resources(2000, BOOT), burst=burst, burst_credit=Resources(40_000, 0))
    )
    assert numbers(one.demand(4000)) == [(EventCode.BURST, 1000, 4000)]
    one.is_now(vm(4))
    assert numbers(one.step(12)) == [(EventCode.BURST, 4000, 2000)]
    codes = numbers(one.step(9))
    assert codes[0] == (EventCode.OVERDUE, 4000, 2000)
    assert codes[1] == (EventCode.ASKING, 4000, 2000)


def test_memory_that_nobody_granted_is_told() -> None:
    one = One()
    assert numbers(one.is_now(vm(memory=GIB)))[0] == (EventCode.VM, BOOT, GIB)


def test_every_code_that_the_core_says_is_looked_at_here_or_in_observe_mode() -> None:
    core = Path(__file__).parents[4] / "guestd" / "broker" / "core"
    said = {code for path in core.glob("*.py") for code in re.findall(r"EventCode\.([A-Z_]+)", path.read_text())}
    here = Path(__file__).read_text() + Path(__file__).with_name("test_observe_mode.py").read_text()
    assert said == set(re.findall(r"EventCode\.([A-Z_]+)", here))
    assert len(said) >= 11
