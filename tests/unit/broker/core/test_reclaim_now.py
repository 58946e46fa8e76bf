"""An operator takes what is spare, now: without pauses, and with all that protects the guest."""

from dataclasses import replace

import pytest
from one_guest import BLOCK, BOOT, LIMITS, TIMING, VM, One, of, reclaim, sent, vm

from guestd.broker.core.actions import RequestCpuQuota, RequestMemory, RequestVcpus
from guestd.broker.core.track import Phase
from guestd.model.errors import AdmissionError, NotFoundError
from guestd.model.explanation import ReclaimedResource, ReclaimRequest
from guestd.model.messages import AckStatus, Reclaim, ReclaimStage
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB, MIB
from guestd.model.vm import VmStatus

ALL = ReclaimRequest()


def taken(one: One, request: ReclaimRequest = ALL) -> tuple[ReclaimedResource, ReclaimedResource]:
    cpu, memory = one.machine.reclaim("a", request, one.now)
    return cpu, memory


def spare(memory: int = 2 * GIB) -> One:
    """It has 3 CPUs and much memory that it has just been given, and needs them no more."""
    one = One()
    one.demand(3000, memory)
    one.is_now(vm(3, memory))
    assert sent(one.demand(1000, GIB)) == [], "it has just grown"
    return one


def test_what_is_spare_is_asked_for_at_once() -> None:
    one = spare()
    cpu, memory = taken(one)
    assert (cpu.reserved, cpu.goal, cpu.reason.code) == (3000, 1000, "demand")
    assert (memory.reserved, memory.goal, memory.reason.text) == (2 * GIB, GIB, "needs 1 GiB")
    orders = [order for order in sent(one.step()) if isinstance(order, Reclaim)]
    assert [(order.kind, order.amount, order.stage) for order in orders] == [
        (Kind.CPU, 1000, ReclaimStage.ASK),
        (Kind.MEMORY, GIB, ReclaimStage.ASK),
    ]
    assert orders[0].reason.code == "reclaim"
    assert of(RequestVcpus, one.answer(orders[0], AckStatus.DONE, 1000)) == [RequestVcpus("a", 1)]
    assert of(RequestMemory, one.answer(orders[1], AckStatus.DONE, GIB)) == [RequestMemory("a", GIB)]
    one.is_now(vm(1, GIB))
    assert one.reserved == Resources(1000, GIB)


def test_a_dry_run_says_the_same_and_changes_nothing() -> None:
    one = spare()
    before = [replace(track) for track in one.machine.guests["a"].tracks.values()]
    said = taken(one, ReclaimRequest(dry_run=True))
    assert list(one.machine.guests["a"].tracks.values()) == before
    assert one.step() == []
    assert said == taken(one)


def test_no_more_is_asked_for_than_was_said() -> None:
    one = spare()
    cpu, memory = taken(one, ReclaimRequest(cpu_millicores=0, memory_bytes=300 * MIB))
    assert (cpu.goal, cpu.reason.code) == (3000, "not-asked")
    assert (memory.goal, memory.reason.code) == (2 * GIB - 2 * BLOCK, "asked")
    order = reclaim(one.step())
    assert (order.kind, order.amount) == (Kind.MEMORY, 2 * GIB - 2 * BLOCK)


def test_never_below_the_minimum_or_what_it_cannot_do_without() -> None:
    one = spare()
    one.machine.set_limits("a", Limits(Resources(2000, BOOT), LIMITS.max))
    one.demand(200, 600 * MIB, floor=GIB + 1)
    cpu, memory = taken(one)
    assert (cpu.goal, cpu.reason.code, cpu.reason.text) == (2000, "min", "needs 0.2 CPU, min is 2 CPU")
    assert (memory.goal, memory.reason.code) == (GIB + BLOCK, "floor")


def test_what_it_would_not_go_below_is_asked_for_again() -> None:
    one = spare()
    one.step(TIMING.cool_down_seconds + 1)
    track = one.track(Kind.MEMORY)
    assert track.phase is Phase.ASKING
    asked = one.track(Kind.MEMORY).order
    assert asked is not None
    refused = Reclaim(asked, Kind.MEMORY, GIB, ReclaimStage.ASK, 5.0, track.reason)
    one.answer(refused, AckStatus.REFUSED, 2 * GIB, retry_after_seconds=30.0)
    assert track.kept == 2 * GIB
    _, memory = taken(one)
    assert memory.goal == GIB
    assert reclaim(one.step()).amount == GIB


def test_what_it_is_likely_to_need_soon_is_asked_for() -> None:
    one = spare()
    track = one.track(Kind.MEMORY)
    track.expected = 2 * GIB
    one.step(60)
    assert track.phase is Phase.IDLE
    assert taken(one)[1].goal == GIB
    assert reclaim([action for action in one.step() if "memory" in repr(action)]).amount == GIB
    assert track.phase is Phase.ASKING, "and it goes on"


def test_a_repeated_call_changes_nothing() -> None:
    one = spare()
    taken(one)
    one.step()
    deadline = one.track().deadline
    one.now += 2
    cpu, memory = taken(one)
    assert (cpu.goal, cpu.reason.code) == (1000, "asking")
    assert (memory.goal, memory.reason.code) == (GIB, "asking")
    assert sent(one.step()) == []
    assert one.track().deadline == deadline


def test_nothing_is_taken_under_pressure_while_growing_or_beyond_the_budget() -> None:
    one = spare()
    one.demand(1000, GIB, pressure=True)
    cpu, memory = taken(one, ReclaimRequest(dry_run=True))
    assert (memory.goal, memory.reason.code) == (2 * GIB, "pressure")
    assert cpu.goal == 1000
    one.track().shrunk_at.extend([one.now] * TIMING.budget_shrinks)
    cpu, _ = taken(one)
    assert (cpu.goal, cpu.reason.code) == (3000, "budget")
    assert "again in 60 s" in cpu.reason.text
    one.demand(4000, GIB)
    cpu, _ = taken(one)
    assert (cpu.goal, cpu.reason.code) == (4000, "growing")


def test_cpu_time_is_taken_by_quota_at_once() -> None:
    one = One(state=vm(4, cpu_enforced=True, cpu_quota_millicores=4000))
    one.track().shrink_after = one.now + 60
    one.demand(1000)
    one.machine.guests["a"].usable = replace(one.machine.guests["a"].usable, vcpus_online=1)
    assert taken(one)[0].goal == 1000
    assert RequestCpuQuota("a", 1000) in one.step()
    one.is_now(vm(4, cpu_enforced=True, cpu_quota_millicores=2000))
    assert taken(one)[0].reason.code == "taking"


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (lambda one: one.machine.pause("a", True), "paused by the operator"),
        (lambda one: one.machine.on_disconnected("a", one.session), "guest daemon is away"),
        (lambda one: setattr(one, "now", one.now + 31), "guest has been silent"),
        (lambda one: one.machine.on_vm_state("a", replace(VM, status=VmStatus.FROZEN), one.now), "VM is frozen"),
    ],
)
def test_why_nothing_can_be_decided_is_told(trouble: object, said: str) -> None:
    one = spare()
    trouble(one)  # type: ignore[operator]
    for dry_run in (True, False):
        with pytest.raises(AdmissionError, match=f"nothing can be reclaimed from guest 'a' now: {said}"):
            one.machine.reclaim("a", ReclaimRequest(dry_run=dry_run), one.now)


def test_an_unknown_guest_is_an_error() -> None:
    with pytest.raises(NotFoundError):
        One().machine.reclaim("nobody", ALL, 0.0)
