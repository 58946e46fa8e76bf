"""What a guest has and why in one sentence, and what it would take to get more: with numbers and commands."""

from dataclasses import replace

import pytest
from one_guest import ALL, BOOT, LIMITS, TIMING, USABLE, VM, One, hello, reclaim, vm

from guestd.broker.core.ledger import HostCapacity
from guestd.model.errors import NotFoundError
from guestd.model.explanation import ResourceExplanation
from guestd.model.guest import Capability
from guestd.model.messages import Demand, Urgency
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB, MIB
from guestd.model.vm import VmStatus


def explained(one: One, kind: Kind = Kind.CPU, name: str = "a") -> ResourceExplanation:
    return one.machine.explain_resource(name, kind, one.now)


def advice(one: One, kind: Kind = Kind.CPU) -> dict[str, str]:
    return {reason.code: reason.text for reason in explained(one, kind).to_get_more}


def online(one: One, cpus: int, memory: int = BOOT) -> None:
    """The guest has so much online."""
    state = one.machine.guests["a"]
    state.usable = replace(USABLE, vcpus_online=cpus, memory_online_bytes=memory)


def another(one: One, name: str, cpus: int, needs: int, weight: int = 100) -> None:
    limits = replace(LIMITS, weight=Resources(weight, weight))
    one.machine.add_guest(name, limits, Resources(cpus * 1000, BOOT))
    one.machine.on_vm_state(name, vm(cpus), one.now)
    session, _ = one.machine.on_connected(name, hello(), one.now)
    reasons = (Reason("cpu-used", "x"),)
    demand = Demand(1, Resources(needs, BOOT), Resources(1000, BOOT), 1 << 40, Urgency.NORMAL, reasons, USABLE)
    one.machine.on_demand(name, session, demand, one.now)


def test_one_that_has_what_it_asks_for_needs_no_advice() -> None:
    one = One().grown(3)
    online(one, 3)
    found = explained(one)
    assert found.summary == "has 3 CPU because it needs 3 CPU; max is 4 CPU"
    assert found.to_get_more == ()
    assert found.events == ()
    assert found.inputs == one.machine.inputs("a", Kind.CPU)


def test_what_is_not_worth_taking_is_said_and_is_rest() -> None:
    one = One().grown(1, 1536 * MIB)
    one.demand(memory=1280 * MIB)
    assert one.track(Kind.MEMORY).target == 1280 * MIB
    assert explained(one, Kind.MEMORY).summary == (
        "has 1.5 GiB because it needs 1.2 GiB, keeps 1.5 GiB: less than a quarter is not taken while there is plenty; "
        "max is 2.5 GiB"
    )
    assert explained(one, Kind.MEMORY).reason.code == "slight"
    assert all(one.machine.at_rest("a", kind) for kind in Kind)
    one.demand(memory=1024 * MIB)
    assert not one.machine.at_rest("a", Kind.MEMORY), "it is asked"
    assert explained(one, Kind.MEMORY).reason.code == "demand"


def test_a_step_of_a_quota_that_is_too_small_is_said_and_is_rest() -> None:
    one = One(HostCapacity(Resources(3900, 8 * GIB)), state=vm(4, cpu_enforced=True, cpu_quota_millicores=3800))
    one.demand(4000)
    assert (one.track().reserved, one.track().target) == (3800, 3900)
    assert explained(one).summary.endswith(
        "keeps 3.8 CPU: less than a tenth is not worth a change of its CPU time; max is 4 CPU"
    )
    assert one.machine.at_rest("a", Kind.CPU)


def test_what_the_guest_cannot_go_below_is_said_and_is_rest() -> None:
    one = One().grown(4)
    state = one.machine.guests["a"]
    assert state.demand is not None
    one.demand(4000)
    state.demand = replace(state.demand, floor=Resources(4000, BOOT), needed=Resources(1000, BOOT))
    one.step(1)
    assert (
        explained(one).summary
        == "has 4 CPU because it needs 1 CPU, keeps 4 CPU: it cannot go below 4 CPU now; max is 4 CPU"
    )
    assert one.machine.at_rest("a", Kind.CPU)


def test_what_waits_or_has_not_been_decided_yet_is_no_rest() -> None:
    one = One().grown(4)
    one.track().shrink_after = one.now + 10
    one.demand(1000)
    assert one.track().target < one.track().reserved
    assert not one.machine.at_rest("a", Kind.CPU)
    assert "is to have 1 CPU" in explained(one).summary
    still = One()
    assert still.machine.at_rest("a", Kind.CPU)
    still.machine.set_limits("a", LIMITS)
    assert not still.machine.at_rest("a", Kind.CPU)


def test_the_guests_own_reason_is_quoted_and_bounded() -> None:
    one = One()
    state = one.machine.guests["a"]
    one.demand(1000)
    assert state.demand is not None
    reasons = (Reason("cpu-used", "0.9 CPUs used" + "!" * 5000), Reason("memory-used", "m"), Reason("others", "o"))
    state.demand = replace(state.demand, reasons=reasons)
    found = explained(one)
    assert found.demand_reasons == (reasons[0], reasons[2])
    assert found.summary.startswith("has 1 CPU because it needs 1 CPU (0.9 CPUs used!!!")
    assert len(found.summary) < 250
    assert explained(one, Kind.MEMORY).demand_reasons == reasons[1:]


def test_at_its_maximum_the_command_is_named() -> None:
    one = One(state=replace(VM, vcpus_max=8)).grown(4)
    online(one, 4)
    one.is_now(vm(4, vcpus_max=8))
    one.demand(5500)
    assert explained(one).summary == "has 4 CPU because it needs 5.5 CPU, max is 4 CPU"
    assert explained(one).to_get_more[0] == Reason("max", "its max is 4 CPU: guestctl set-limits a --cpu-max 6")


def test_memory_limits_are_named_in_whole_mebibytes() -> None:
    one = One(state=replace(VM, memory_max_bytes=8 * GIB))
    one.demand(1000, 3 * GIB + 1)
    text = advice(one, Kind.MEMORY)["max"]
    assert text == "its max is 2.5 GiB: guestctl set-limits a --memory-max 3200MiB"


def test_what_the_hypervisor_has_no_room_for_needs_another_vm() -> None:
    one = One().grown(4)
    one.demand(6000, 4 * GIB)
    assert "the VM has slots for 4 vCPUs" in advice(one)["vcpus-max"]
    assert "max" not in advice(one), "it would not help"
    found = advice(one, Kind.MEMORY)
    assert "--memory-max" not in found.get("memory-max", "")
    assert "the VM has room for 2.5 GiB" in found["memory-max"]


def test_in_a_scarce_pool_it_says_who_holds_most_and_what_would_help() -> None:
    one = One(HostCapacity(Resources(8000, 8 * GIB)))
    another(one, "greedy", 4, 2000)
    another(one, "modest", 3, 2000)
    one.demand(4000)
    one.machine.guests["greedy"].tracks[Kind.CPU].shrink_after = one.now + 100
    another(one, "wanting", 1, 4000)
    one.step()
    found = [reason.code for reason in explained(one).to_get_more]
    assert found[:2] == ["holder", "holder"] or found[:1] == ["not-free"]
    texts = advice(one)
    if "weight" in texts:
        assert "guestctl set-limits a --cpu-weight " in texts["weight"]
        assert texts["min"] == "only a minimum is guaranteed: guestctl set-limits a --cpu-min 4"
        assert "the host has 8 CPU for all guests" in texts["capacity"]


def test_what_is_promised_and_not_free_yet_says_so() -> None:
    one = One(HostCapacity(Resources(5000, 8 * GIB)))
    one.machine.add_guest("b", LIMITS, Resources(4000, BOOT))
    one.machine.on_vm_state("b", vm(4), one.now)
    one.step()
    one.demand(4000)
    found = advice(one)
    assert found, "it lacks three"
    assert set(found) <= {"not-free", "weight", "min", "capacity"}


@pytest.mark.parametrize(
    ("trouble", "code", "said"),
    [
        (lambda one: one.machine.pause("a", True), "paused", "guestctl resume a"),
        (lambda one: one.machine.observe("a", True), "observed", 'mode = "observe"'),
        (lambda one: one.machine.on_disconnected("a", one.session), "away", "guestd check"),
        (lambda one: setattr(one, "now", one.now + 40), "stale", "not heard of for 40 s"),
        (lambda one: one.is_now(replace(VM, status=VmStatus.FROZEN)), "vm-frozen", "paused or migrating"),
        (lambda one: one.is_now(replace(VM, status=VmStatus.UNREACHABLE)), "vm-unreachable", "QMP socket"),
        (lambda one: one.is_now(replace(VM, status=VmStatus.GONE)), "vm-gone", "start it"),
        (lambda one: one.connect(hello(2)), "no-demand", "not said yet"),
        (lambda one: one.connect(hello(2, capabilities={*ALL, Capability.DRY_RUN})), "dry-run", "--dry-run"),
    ],
)
def test_what_stands_in_the_way_comes_first(trouble: object, code: str, said: str) -> None:
    one = One()
    one.demand(3000)
    trouble(one)  # type: ignore[operator]
    first = explained(one).to_get_more[0]
    assert said in advice(one)[code]
    assert first.code in (code, "no-demand")


def test_one_that_is_overdue_gets_nothing_before_it_gave_back() -> None:
    one = One().grown(4)
    reclaim(one.demand(1000))
    for seconds in (TIMING.ask_seconds, TIMING.urge_seconds, TIMING.overdue_seconds):
        one.step(seconds)
    assert one.track().overdue
    one.machine.guests["a"].demand = None
    assert advice(one)["overdue"] == "it holds 4 CPU and did not give back in time: nothing more until it has"


def test_a_burst_without_credit_says_when() -> None:
    one = One(state=replace(VM, vcpus_max=8))
    limits = Limits(
        LIMITS.min, Resources(2000, BOOT), burst=Resources(4000, 0), burst_credit=Resources(60_000, 0),
        burst_refill=Resources(1000, 0),
    )  # fmt: skip
    one.machine.set_limits("a", limits)
    one.demand(4000)
    one.is_now(vm(4, vcpus_max=8))
    one.step(29)
    one.step(2)
    found = advice(one)
    assert "burst-credit" not in found, "it holds all that it asks for, still"
    one.is_now(vm(2, vcpus_max=8))
    online(one, 2)
    text = advice(one)["burst-credit"]
    assert text.startswith("its burst credit is used up: it may burst again in ")
    assert advice(one)["max"] == "its max is 2 CPU: guestctl set-limits a --cpu-max 4"


def test_pauses_and_budgets_say_how_long() -> None:
    one = One()
    one.track().grow_after = one.now + 7
    one.demand(3000)
    assert advice(one)["retry"] == "the last try failed: the next one is in 7 s"
    one.track().grow_after = 0.0
    one.track().grown_at.extend([one.now] * TIMING.budget_grows)
    assert "the next one is in 60 s" in advice(one)["budget"]


def test_growing_takes_time() -> None:
    one = One()
    one.demand(3000)
    assert one.track().reserved == 3000, "reserved before it is there"
    assert explained(one).summary == "has 1 CPU, growing to 3 CPU, because it needs 3 CPU; max is 4 CPU"
    assert advice(one) == {"growing": "it is growing to 3 CPU: wait"}


def test_what_it_cannot_bring_online_is_named() -> None:
    one = One().grown(3)
    found = advice(one)
    assert found == {
        "not-online": "it has been given 3 CPU, but has 1 CPU online; the guest's log and `guestd check` there say why"
    }
    one.connect(hello(2, capabilities={Capability.MEMORY_ONLINE}))
    one.demand(3000)
    assert "cannot bring cpu online" in advice(one)["cannot-online"]


def test_an_unknown_guest_is_an_error() -> None:
    with pytest.raises(NotFoundError):
        explained(One(), name="nobody")


def test_an_observed_guests_summary_says_what_it_would_have() -> None:
    one = One()
    one.machine.observe("a", True)
    one.is_now(vm())
    one.demand(3000)
    assert explained(one).summary == (
        "has 1 CPU, is only observed and would have 3 CPU because it needs 3 CPU; max is 4 CPU"
    )
