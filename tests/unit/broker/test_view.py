"""What is shown is what is."""

from dataclasses import replace
from datetime import UTC, datetime

from guestd.broker.core.ledger import HostCapacity
from guestd.broker.core.machine import BrokerMachine
from guestd.broker.core.track import Phase
from guestd.broker.view import guest_view, host_view
from guestd.model.guest import Capability, Identity
from guestd.model.messages import Demand, Hello, Urgency, Usable
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB, MIB
from guestd.model.view import GuestView, LimitsOrigin, ResizePhase
from guestd.model.vm import VmState, VmStatus

LIMITS = Limits(Resources(1000, 512 * MIB), Resources(4000, 2 * GIB))
VM = VmState(VmStatus.RUNNING, 2, 1, 4, 512 * MIB, 640 * MIB, GIB, 512 * MIB, 2 * GIB, MIB)
BOTH = frozenset({Capability.CPU_ONLINE, Capability.MEMORY_ONLINE})
STARTED = datetime(2026, 1, 2, tzinfo=UTC)


def machine() -> BrokerMachine:
    host = HostCapacity(Resources(8000, 8 * GIB), Resources(1000, GIB), Resources(0, 128 * MIB))
    made = BrokerMachine(host, 5)
    made.add_guest("a", LIMITS)
    made.add_guest("b", LIMITS, Resources(3000, GIB))
    return made


def shown(made: BrokerMachine, now: float = 0.0) -> GuestView:
    return guest_view(made.guests["a"], now, LimitsOrigin.FILE, "broker.toml", "vsock", 3)


def connected(made: BrokerMachine, capabilities: frozenset[Capability] = BOTH) -> int:
    identity = Identity(bytes(16), 1, "0.1", "web", "6.1", capabilities)
    usable = Usable(1, 2, 512 * MIB, 460 * MIB, 128 * MIB)
    return made.on_connected("a", Hello(1, 1, identity, usable), 10.0)[0]


def test_the_host_adds_up() -> None:
    host = host_view(machine(), "1.2", STARTED)
    assert (host.capacity, host.reserve, host.overhead) == (
        Resources(8000, 8 * GIB),
        Resources(1000, GIB),
        Resources(0, 256 * MIB),
    )
    assert host.committed == Resources(3000, GIB)
    assert host.minimums == Resources(2000, GIB)
    assert host.free == Resources(3000, 8 * GIB - GIB - 256 * MIB - 512 * MIB - GIB)
    assert (host.epoch, host.version, host.started_at, host.guests, host.guests_connected) == (5, "1.2", STARTED, 2, 0)


def test_a_guest_that_was_never_heard_of() -> None:
    guest = shown(machine())
    assert (guest.vm_status, guest.connected, guest.last_seen_ago_seconds) == (None, False, None)
    assert (guest.limits_origin, guest.limits_origin_detail, guest.protocol_errors) == (
        LimitsOrigin.FILE,
        "broker.toml",
        3,
    )
    assert (guest.hostname, guest.demand_reasons) == ("", ())
    assert "QMP socket does not answer" in guest.degraded


def test_the_four_amounts_are_told_apart() -> None:
    made = machine()
    made.on_vm_state("a", VM, 10.0)
    session = connected(made)
    reasons = (Reason("cpu-used", "much"),)
    usable = Usable(1, 2, 512 * MIB, 460 * MIB, 128 * MIB)
    demand = Demand(
        1, Resources(1500, GIB), Resources(1000, 0), 1 << 40, Urgency.NORMAL, reasons, usable, 300 * MIB, 700
    )
    made.on_demand("a", session, demand, 10.0)
    made.next_actions(10.0)
    guest = shown(made, 12.5)
    cpu, memory = guest.resource(Kind.CPU), guest.resource(Kind.MEMORY)
    assert (cpu.demand, cpu.reserved, cpu.plugged, cpu.onlined, cpu.usable, cpu.used) == (
        1500,
        2000,
        2000,
        1000,
        1000,
        700,
    )
    assert (memory.reserved, memory.plugged, memory.onlined, memory.usable, memory.used) == (
        GIB,
        640 * MIB,
        512 * MIB,
        460 * MIB,
        300 * MIB,
    )
    assert (guest.hostname, guest.kernel, guest.agent_version) == ("web", "6.1", "0.1")
    assert (guest.demand_reasons, guest.last_seen_ago_seconds, guest.degraded) == (reasons, 2.5, "")
    assert guest.connected
    assert shown(made, 5.0).last_seen_ago_seconds == 0.0


def test_each_phase_has_its_word_and_counters_are_shown() -> None:
    made = machine()
    track = made.guests["a"].tracks[Kind.CPU]
    for phase in Phase:
        track.phase = phase
        assert shown(made).resource(Kind.CPU).phase is ResizePhase(phase.value)
    counters = track.counters
    counters.grows, counters.shrinks, counters.partials, counters.refusals, counters.failures = 1, 2, 3, 4, 5
    track.overdue = True
    cpu = shown(made).resource(Kind.CPU)
    assert (cpu.grows, cpu.shrinks, cpu.partials, cpu.refusals, cpu.failures, cpu.overdue) == (1, 2, 3, 4, 5, True)


def test_what_is_missing_is_named() -> None:
    made = machine()
    made.on_vm_state("a", VM, 10.0)
    connected(made, frozenset({Capability.CPU_ONLINE}))
    assert "cannot bring memory online" in shown(made).degraded
    connected(made, frozenset())
    assert "cannot bring cpu or memory online" in shown(made).degraded
    made.on_vm_state("a", replace(VM, status=VmStatus.UNREACHABLE), 10.0)
    assert "QMP socket" in shown(made).degraded
