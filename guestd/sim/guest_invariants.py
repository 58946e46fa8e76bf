"""The promises to guests, each a small function that raises `AssertionError` with the promise's number and the numbers
of the case. Numbers as in the list of invariants in the design.
"""

from typing import TYPE_CHECKING

from guestd.broker.core import actions as broker_actions
from guestd.broker.core.guest import GuestState
from guestd.broker.core.machine import BrokerMachine
from guestd.broker.core.track import Phase, Track
from guestd.guest.core.ops import BlockOp, BlockTarget, CpuOp, Op
from guestd.model.messages import Ack, Grant, Reclaim, RefusalReason
from guestd.model.resources import Kind
from guestd.model.units import MILLICORES_PER_VCPU
from guestd.model.vm import VmStatus
from guestd.sim import evidence

if TYPE_CHECKING:
    from guestd.sim.guest import SimGuest
    from guestd.sim.watch import Seen
    from guestd.sim.world import World

SLACK_SECONDS = 5.0
"""How much later than its deadlines a phase may end: a step of the world, a report, an observation."""


def reclaims_leave_enough(world: "World", broker: BrokerMachine, actions: evidence.Actions) -> None:
    """(7) No reclaim and no unplug goes below the minimum, or below what the freshest report says is needed."""
    for action in actions:
        if isinstance(action, broker_actions.Send) and isinstance(action.message, Reclaim):
            state, kind, wanted = broker.guests[action.guest], action.message.kind, action.message.amount
        elif isinstance(action, broker_actions.RequestMemory):
            state, kind, wanted = broker.guests[action.guest], Kind.MEMORY, action.amount_bytes
        elif isinstance(action, broker_actions.RequestCpuQuota):
            state, kind, wanted = broker.guests[action.guest], Kind.CPU, action.millicores
        elif isinstance(action, broker_actions.RequestVcpus) and not broker.guests[action.guest].bounded:
            state, kind, wanted = broker.guests[action.guest], Kind.CPU, action.count * MILLICORES_PER_VCPU
        else:
            continue
        if wanted >= evidence.observed(state, kind):
            continue
        low = evidence.lowest(state, kind)
        assert wanted >= low, f"(7) {state.name} {kind}: {wanted} asked for, its minimum is {low}"
        if kind is Kind.MEMORY and state.demand is not None:
            floor = min(state.demand.floor.memory_bytes, evidence.observed(state, kind))
            assert wanted >= floor, f"(7) {state.name} {kind}: {wanted} asked for, it needs {floor}: {action}"


def asks_are_fair(world: "World", broker: BrokerMachine, actions: evidence.Actions) -> None:
    """(8, 11) Nobody is asked who is silent, away, paused or not running, under pressure, or has just grown."""
    now = world.broker_now
    for name, order in evidence.asks(actions):
        state, seen, where = broker.guests[name], world.watch.seen[name], f"{name} {order.kind}"
        limit = broker.timing.stale_heartbeats * broker.heartbeat_seconds
        heard = seen.heard_at
        assert heard is not None and now - heard <= limit, f"(8) {where}: asked, last heard at {heard}, it is {now}"
        assert state.session == world.guests[name].session, f"(8) {where}: asked while away"
        assert not state.paused, f"(8) {where}: asked while paused"
        assert state.vm is not None and state.vm.status is VmStatus.RUNNING, f"(8) {where}: asked, VM does not run"
        pressed = order.kind is Kind.MEMORY and state.demand is not None and state.demand.under_memory_pressure
        assert not pressed, f"(11) {where}: asked under memory pressure"
        grown_at = seen.lines[order.kind].grown_at
        if grown_at is not None and order.reason.code != "reclaim":
            passed = now - grown_at
            assert passed >= broker.timing.cool_down_seconds, f"(11) {where}: asked {passed:.2f} s after it grew"


def observed_are_left_alone(world: "World", broker: BrokerMachine, actions: evidence.Actions) -> None:
    """(24) Of an observed guest nothing is recorded, asked of its hypervisor but how it is, or said to it; only when it
    was served until now, it hears once what it has.
    """
    for action in actions:
        if isinstance(action, broker_actions.Log | broker_actions.Observe) or action.guest not in world.observed:
            continue
        message = action.message if isinstance(action, broker_actions.Send) else None
        farewell = world.watch.seen[action.guest].farewell
        allowed = isinstance(message, Grant) and message.kind in farewell
        assert allowed, f"(24) {action.guest} is only observed: {action}"
        farewell -= {message.kind} if isinstance(message, Grant) else set()


def resizes_within_budget(world: "World", broker: BrokerMachine, actions: evidence.Actions) -> None:
    """(12) So many grows and so many shrinks per window."""
    timing = broker.timing
    for name, _, kind, track in evidence.tracks(broker):
        line = world.watch.seen[name].lines[kind]
        asked = evidence.asked(actions, name, kind)
        for word, times, new, allowed in (
            ("shrink", line.shrunk_at, evidence.shrinks_begun(line, asked), timing.budget_shrinks),
            ("grow", line.began_to_grow_at, evidence.grows_begun(line, track), timing.budget_grows),
        ):
            while times and times[0] <= world.broker_now - timing.budget_window_seconds:
                times.popleft()
            count, window = len(times) + new, timing.budget_window_seconds
            assert not new or count <= allowed, f"(12) {name} {kind}: {word} {count} in {window} s, {allowed} allowed"


def cpus_that_must_stay(guest: "SimGuest", seen: "Seen", op: Op) -> None:
    """(9) CPU 0 and pinned CPUs are never taken offline, nor memory blocks."""
    if isinstance(op, CpuOp) and not op.online:
        pinned = op.number in seen.inventory.cpus_pinned
        assert op.number != 0 and not pinned, f"(9) {guest.name}: takes CPU {op.number} offline, which must stay"
    if isinstance(op, BlockOp):
        assert op.target is not BlockTarget.OFFLINE, f"(9) {guest.name}: takes block {op.index} offline"


def cpu_0_is_online(world: "World") -> None:
    """(9) There is always a CPU."""
    for name, guest in world.guests.items():
        assert 0 in guest.kernel.online_cpus, f"(9) {name}: CPU 0 is offline"


def stored_answer(guest: "SimGuest", seen: "Seen", ack: Ack) -> None:
    """(13, 17) The same request is answered the same way however often it comes, an obsolete one is refused."""
    if ack.refusal is RefusalReason.STALE:
        return
    assert ack.id not in seen.obsolete, f"(17) {guest.name}: obeys an obsolete order: {ack}, newest {seen.newest}"
    first = seen.answers.setdefault(ack.id, ack)
    assert ack == first, f"(13) {guest.name}: two answers to one request: {first} and {ack}"


def newest_order_only(guest: "SimGuest", seen: "Seen", op: Op) -> None:
    """(13, 17) What a daemon does to its machine follows from the newest order of its broker."""
    if not isinstance(op, CpuOp):
        return
    order, online = seen.newest.get(Kind.CPU), len(guest.kernel.online_cpus)
    wanted = -(-order.amount // MILLICORES_PER_VCPU) if order is not None else 0
    if op.online:
        offered = isinstance(order, Grant) and op.number not in guest.kernel.online_cpus
        assert not offered or online < wanted, f"(17) {guest.name}: {op}, {online} online, granted {wanted}"
        return
    assert isinstance(order, Reclaim), f"(17) {guest.name}: {op}, but its newest order is {order}"
    assert online > wanted, f"(13) {guest.name}: {op}, {online} online, asked down to {wanted}"


def what_is_known(state: GuestState, stream: bool) -> tuple[object, ...]:
    """All that an obsolete message could spoil; one on an older stream says not even that the guest lives."""
    tracks = [
        (t.phase, t.amount, t.reserved, t.target, t.order, t.deadline, t.overdue, t.counters.refusals)
        for t in state.tracks.values()
    ]
    return (*tracks, state.demand, *(() if stream else (state.last_seen, state.usable)))


def phases_end(world: "World", broker: BrokerMachine, seconds: float) -> None:
    """(18) What is pending ends or gets on in bounded time, as long as its VM runs and can be observed."""
    timing = broker.timing
    bounds = {
        Phase.ASKING: timing.ask_seconds + timing.urge_seconds + timing.overdue_seconds,
        Phase.PLUGGING: timing.plug_progress_seconds,
        Phase.UNPLUGGING: timing.unplug_progress_seconds,
    }
    for name, state, kind, track in evidence.tracks(broker):
        if state.observed:
            continue
        guest, line = world.guests[name], world.watch.seen[name].lines[kind]
        seen_well = state.vm_fresh and state.vm is not None and state.vm.status is VmStatus.RUNNING
        mark = _mark(track, guest)
        if track.phase is Phase.IDLE or mark != line.mark:
            line.mark, line.age_seconds = mark, 0.0
        elif seen_well and world.now >= guest.hung_until:
            line.age_seconds += seconds
        if state.vm is not None and state.vm.resets > line.resets and track.phase is not Phase.IDLE:
            line.age_seconds -= timing.reboot_seconds
        line.resets = state.vm.resets if state.vm is not None else 0
        bound = bounds.get(track.phase, 0.0) + SLACK_SECONDS
        assert line.age_seconds <= bound, (
            f"(18) {name} {kind}: {track.phase} to {track.amount} for {line.age_seconds:.1f} s, bound {bound:.1f}, "
            f"deadline in {track.deadline - world.broker_now:.1f} s"
        )


def _mark(track: Track, guest: "SimGuest") -> tuple[object, ...]:
    """What changes when a resize gets on; asking has one bound for all its stages."""
    if track.phase is Phase.ASKING:
        return (track.phase, track.order, guest.vm.status)
    return (track.phase, track.amount, track.progress, guest.vm.status)
