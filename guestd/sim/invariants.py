"""The promises, each as one small function that raises `AssertionError` with its number and the numbers of the case.

Numbers as in the list of invariants in the design. Those of a decision are judged on the list of actions before any
of it is done, those of a state after every step, the rest where the thing happens. What a decision is told by events
from outside (a VM that took more than it was given, a host that lost memory, a minimum that was raised while others
hold what backs it) is nobody's fault: then nothing more may be granted until it fits again.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from guestd.broker.core import actions as broker_actions
from guestd.broker.core.guest import GuestState
from guestd.broker.core.machine import BrokerMachine
from guestd.broker.core.track import Phase, Track
from guestd.guest.core.ops import BlockOp, BlockTarget, CpuOp, Op
from guestd.model.messages import Ack, Grant, Reclaim, ReclaimStage, RefusalReason
from guestd.model.resources import Kind, Resources
from guestd.model.units import MILLICORES_PER_VCPU, round_up
from guestd.model.vm import VmStatus

if TYPE_CHECKING:
    from guestd.sim.guest import SimGuest
    from guestd.sim.watch import Line, Seen
    from guestd.sim.world import World

Actions = Sequence[broker_actions.Action]
MICRO = 1_000_000
CLOCK_MICROSECONDS = 5
"""What two readings of a clock may lose by rounding."""
SLACK_SECONDS = 5.0
"""How much later than its deadlines a phase may end: a step of the world, a report, an observation."""


# ---- what a list of actions says ---------------------------------------------------------------


def asks(actions: Actions) -> Iterator[tuple[str, Reclaim]]:
    """The reclaims that begin, with their guests."""
    for action in actions:
        message = action.message if isinstance(action, broker_actions.Send) else None
        if isinstance(message, Reclaim) and message.stage is ReclaimStage.ASK:
            yield action.guest, message


def amount(action: broker_actions.Action | None, kind: Kind) -> int:
    """What a request asks for, in millicores or bytes; 0 for what is none of that kind."""
    match action:
        case broker_actions.RequestVcpus(count=count) if kind is Kind.CPU:
            return count * MILLICORES_PER_VCPU
        case broker_actions.RequestCpuQuota(millicores=millicores) if kind is Kind.CPU:
            return millicores
        case broker_actions.RequestMemory(amount_bytes=amount_bytes) if kind is Kind.MEMORY:
            return amount_bytes
    return 0


def _tracks(broker: BrokerMachine) -> Iterator[tuple[str, GuestState, Kind, Track]]:
    for name, state in broker.guests.items():
        for kind, track in state.tracks.items():
            yield name, state, kind, track


def _observed(state: GuestState, kind: Kind) -> int:
    """What the broker knows that the VM holds."""
    known = state.vm is not None and state.vm.status in (VmStatus.RUNNING, VmStatus.FROZEN)
    return state.vm.held(kind) if known and state.vm is not None else 0


def _risers(world: "World", broker: BrokerMachine) -> Iterator[tuple[str, GuestState, Track]]:
    """Whom this decision granted more than it had and than it took itself."""
    for name, state, kind, track in _tracks(broker):
        if track.reserved > max(world.watch.seen[name].lines[kind].reserved, _observed(state, kind)):
            yield name, state, track


def _lowest(state: GuestState, kind: Kind) -> int:
    """The guest's minimum, as far as its VM can be that small or that big."""
    low = state.limits.min.get(kind)
    if state.vm is None or state.vm.status is not VmStatus.RUNNING:
        return low
    most = state.vm.vcpus_max * MILLICORES_PER_VCPU if kind is Kind.CPU else state.vm.memory_max_bytes
    return min(low, most)


# ---- capacity ----------------------------------------------------------------------------------


def minimums_fit(world: "World") -> None:
    """(1) What was admitted fits."""
    for kind in Kind:
        room = world.host.backed(kind, len(world.guests))
        total = sum(limits.min.get(kind) for limits in world.limits.values())
        assert total <= room, f"(1) {kind}: the minimums are {total}, there is {room}"


def book_fits(world: "World") -> None:
    """(2) What is charged fits, but for what nobody decided."""
    watch = world.watch
    if world.broker is None:
        return
    for kind in Kind:
        capacity = world.host.for_guests(kind, len(world.guests))
        charged = sum(max(s.tracks[kind].reserved, s.limits.min.get(kind)) for s in world.broker.guests.values())
        if charged <= capacity and not any(seen.surprised for seen in watch.seen.values()):
            watch.excused.discard(kind)
        assert charged <= capacity or kind in watch.excused, f"(2) {kind}: {charged} charged, {capacity} there"


def grants_fit(world: "World", broker: BrokerMachine, actions: Actions) -> None:
    """(2, 6) Nothing is granted that is not there; above a minimum only what backs no other's."""
    for name, state, track in _risers(world, broker):
        kind = track.kind
        capacity = broker.host.for_guests(kind, len(broker.guests))
        lines = [(s.tracks[kind].reserved, s.limits.min.get(kind)) for s in broker.guests.values()]
        reserved, charged = sum(line[0] for line in lines), sum(max(line) for line in lines)
        backed = broker.host.backed(kind, len(broker.guests))
        if track.reserved <= state.limits.min.get(kind):
            assert reserved <= capacity, f"(6) {name} {kind}: granted {track.reserved}, {reserved} of {capacity} is out"
            continue
        assert charged <= capacity, f"(2) {name} {kind}: granted {track.reserved}, {charged} of {capacity} is charged"
        if kind is Kind.MEMORY and track.reserved > state.sustained(kind):
            assert charged <= backed, f"(3) {name}: burst memory out of overcommit: {charged} charged, {backed} there"


def grants_keep_to_limits(world: "World", broker: BrokerMachine, actions: Actions) -> None:
    """(3, 23) Nothing is granted above the maximum but a burst with credit, and nothing above that."""
    for name, state, track in _risers(world, broker):
        kind, limits = track.kind, state.limits
        most = round_up(max(limits.min.get(kind), 1), state.unit(kind))
        most = max(most, limits.max.get(kind), state.bounds(kind)[0])
        if track.reserved <= most:
            continue
        assert track.reserved <= limits.burst.get(kind), (
            f"(23) {name} {kind}: granted {track.reserved}, max {limits.max.get(kind)}, burst {limits.burst.get(kind)}"
        )
        credit = track.lend.bucket.credit_microseconds if track.lend else 0
        assert credit > 0, f"(3) {name} {kind}: granted {track.reserved} above max {most} without credit"


def overdue_gets_nothing(world: "World", broker: BrokerMachine, actions: Actions) -> None:
    """(3) Who is overdue receives nothing more."""
    for name, _, track in _risers(world, broker):
        was = world.watch.seen[name].lines[track.kind].overdue
        assert not (was and track.overdue), f"(3) {name} {track.kind}: overdue and granted {track.reserved}"


def credit_within_cap(world: "World") -> None:
    """(4) Credit stays within 0 and its cap, and never falls below 0 in the journal either."""
    for name, entry in world.journal.items():
        for kind in Kind:
            saved = entry.credit.get(kind) if entry.credit else 0
            assert saved >= 0, f"(4) {name} {kind}: credit {saved} in the journal"
    if world.broker is None or world.pending:
        return
    for name, state, kind, track in _tracks(world.broker):
        cap = state.limits.burst_credit.get(kind) * MICRO
        credit = track.lend.bucket.credit_microseconds if track.lend else 0
        assert 0 <= credit <= cap, f"(4) {name} {kind}: credit {credit}, cap {cap} (x microseconds)"


def credit_is_spent(world: "World", broker: BrokerMachine, actions: Actions) -> None:
    """(4) Holding more than the maximum costs credit; only time without that gives it back, and no restart does."""
    for name, state, kind, track in _tracks(broker):
        line = world.watch.seen[name].lines[kind]
        bucket = track.lend.bucket if track.lend is not None else None
        same = state.limits is line.limits and line.sustained in (None, state.sustained(kind))
        if bucket is None or line.credit is None or not same:
            continue
        if bucket.at_microseconds == line.bucket_at:  # not looked at
            continue
        gained = bucket.credit_microseconds - line.credit
        passed = max(0, round((world.broker_now - line.flowed_at) * MICRO))
        rate = -line.burst if line.burst else state.limits.burst_refill.get(kind)
        due = max(rate * passed, -line.credit) + abs(rate) * CLOCK_MICROSECONDS
        assert gained <= due, (
            f"(4) {name} {kind}: credit moved by {gained} (x microseconds) in {passed} us, {line.burst} above max held"
        )


def reserved_covers_truth(world: "World") -> None:
    """(5) What is reserved is at least what the VM holds or was told to take, and what its hypervisor still has to
    be told; while no broker runs, by its journal.
    """
    for name, guest in world.guests.items():
        if world.watch.seen[name].surprised:
            continue
        for kind in Kind:
            held = guest.to_come(kind)
            if world.broker is not None:
                book = world.broker.guests[name].tracks[kind].reserved
            else:
                book = world.journal[name].reserved.get(kind) if name in world.journal else 0
            assert book >= held, f"(5) {name} {kind}: {held} is held or on its way, {book} is reserved"


def nothing_is_left_over(world: "World") -> None:
    """(10, 16) While nothing is under way, what is reserved is what is there: nothing lost, nothing doubled. A balloon
    may deflate further than it shows, and is charged so.
    """
    if world.broker is None or world.pending:
        return
    for name, state in world.broker.guests.items():
        guest = world.guests[name]
        running = state.vm is not None and state.vm.status is VmStatus.RUNNING and state.vm_fresh
        if state.vm is None or not running or guest.commands or state.vm != guest.vm.truth():
            continue
        for kind, track in state.tracks.items():
            held = _observed(state, kind)
            deflating = kind is Kind.MEMORY and 0 < held < state.vm.boot_memory_bytes and track.reserved > held
            left = track.reserved == held or track.phase is not Phase.IDLE or deflating
            assert left, f"(16) {name} {kind}: idle, {held} is held, {track.reserved} is reserved"


# ---- what is asked of guests -------------------------------------------------------------------


def reclaims_leave_enough(world: "World", broker: BrokerMachine, actions: Actions) -> None:
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
        if wanted >= _observed(state, kind):
            continue
        low = _lowest(state, kind)
        assert wanted >= low, f"(7) {state.name} {kind}: {wanted} asked for, its minimum is {low}"
        if kind is Kind.MEMORY and state.demand is not None:
            floor = min(state.demand.floor.memory_bytes, _observed(state, kind))
            assert wanted >= floor, f"(7) {state.name} {kind}: {wanted} asked for, it needs {floor}: {action}"


def asks_are_fair(world: "World", broker: BrokerMachine, actions: Actions) -> None:
    """(8, 11) Nobody is asked who is silent, away, paused or not running, under pressure, or has just grown."""
    now = world.broker_now
    for name, order in asks(actions):
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
        if grown_at is not None:
            passed = now - grown_at
            assert passed >= broker.timing.cool_down_seconds, f"(11) {where}: asked {passed:.2f} s after it grew"


def ended(track: Track) -> int:
    """How many resizes came to an end, as far as that is counted for sure."""
    counters = track.counters
    return counters.grows + counters.shrinks + counters.partials


def starts(line: "Line", track: Track, asked: int) -> int:
    """How many resizes a decision began, as far as one can tell from outside: a grow that goes further is none, nor
    is asking for less of what was asked for already.
    """
    grew = track.phase is Phase.PLUGGING and track.reserved > line.reserved
    anew = line.phase in (Phase.IDLE, Phase.ASKING) or ended(track) != line.ended
    return (asked if line.phase is not Phase.ASKING else 0) + (grew and anew)


def asked(actions: Actions, name: str, kind: Kind) -> int:
    """How many shrinks of a guest a decision begins."""
    return sum(1 for guest, order in asks(actions) if guest == name and order.kind is kind)


def resizes_within_budget(world: "World", broker: BrokerMachine, actions: Actions) -> None:
    """(12) So many resizes per window, and half of it for shrinks."""
    timing = broker.timing
    for name, _, kind, track in _tracks(broker):
        line = world.watch.seen[name].lines[kind]
        while line.begun and line.begun[0] <= world.broker_now - timing.budget_window_seconds:
            line.begun.popleft()
        asks_now = asked(actions, name, kind)
        allowed = timing.budget_resizes // 2 if asks_now else timing.budget_resizes
        if starts(line, track, asks_now):
            count = len(line.begun) + 1
            window = timing.budget_window_seconds
            assert count <= allowed, f"(12) {name} {kind}: resize {count} in {window} s, {allowed} are allowed"


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


# ---- exactly once ------------------------------------------------------------------------------


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


def records_come_first(world: "World", broker: BrokerMachine, actions: Actions) -> None:
    """(14) Nothing is asked of a hypervisor or told a guest before the journal holds what it may come to."""
    book = {name: entry.reserved for name, entry in world.journal.items()}
    vcpus = {n: len(g.vm.guest_cpus) * MILLICORES_PER_VCPU for n, g in world.guests.items()}
    for action in actions:
        if isinstance(action, broker_actions.Record):
            book[action.guest] = action.reserved
            continue
        if isinstance(action, broker_actions.Log):
            continue
        state, known = broker.guests[action.guest], book.get(action.guest, Resources())
        for kind in Kind:
            wanted = amount(action, kind)
            if isinstance(action, broker_actions.RequestVcpus) and state.vm is not None:
                vcpus[action.guest] = max(vcpus[action.guest], wanted)
                wanted = min(wanted, state.vm.cpu_quota_millicores or wanted)
            if isinstance(action, broker_actions.RequestCpuQuota):
                wanted = min(wanted, vcpus[action.guest])
            if isinstance(action, broker_actions.Send) and isinstance(action.message, Grant):
                wanted = action.message.amount if action.message.kind is kind else 0
            if wanted > world.watch.seen[action.guest].held[kind]:
                have = known.get(kind)
                assert have >= wanted, f"(14) {action.guest} {kind}: {wanted} before its record, {have} is recorded"


def grants_tell_the_book(world: "World", broker: BrokerMachine, actions: Actions) -> None:
    """(10) What a guest is told that it has is what is charged for it."""
    last: dict[tuple[str, Kind], Grant] = {}
    for action in actions:
        if isinstance(action, broker_actions.Send) and isinstance(action.message, Grant):
            last[action.guest, action.message.kind] = action.message
    for (name, kind), grant in last.items():
        reserved = broker.guests[name].tracks[kind].reserved
        assert grant.amount == reserved, f"(10) {name} {kind}: told {grant.amount}, {reserved} is reserved"


def recovery_is_idempotent(world: "World") -> None:
    """(19) A second start from what the first recorded comes to the same."""
    journal = dict(world.journal)
    try:
        books = []
        for _ in range(2):
            broker = world.restored()
            for name, guest in world.guests.items():
                broker.on_vm_state(name, guest.vm.truth(), world.broker_now)
            actions = broker.next_actions(world.broker_now)
            recovery_takes_nothing(broker, actions)
            for action in actions:
                if isinstance(action, broker_actions.Record):
                    world.record(action)
            books.append({name: (state.reserved, world.journal.get(name)) for name, state in broker.guests.items()})
        assert books[0] == books[1], f"(19) two starts in a row differ: {books[0]} and {books[1]}"
    finally:
        world.journal.clear()
        world.journal.update(journal)


def recovery_takes_nothing(broker: BrokerMachine, actions: Actions) -> None:
    """(16) A start grants nothing and takes nothing; only CPU time above the maximum without credit may go."""
    for action in actions:
        assert not isinstance(action, broker_actions.RequestMemory), f"(16) a start does more than look: {action}"
        if isinstance(action, broker_actions.RequestVcpus | broker_actions.RequestCpuQuota):
            held, wanted = _observed(broker.guests[action.guest], Kind.CPU), amount(action, Kind.CPU)
            assert wanted <= held, f"(16) a start grants: {action}, {held} is held"
    for name, state, kind, track in _tracks(broker):
        lent = state.limits.burst.get(kind) >= track.reserved and track.lend is not None
        credit = track.lend.bucket.credit if track.lend is not None else 0
        kept = not (lent and credit > 0 and track.overdue)
        assert kept, f"(16) {name} {kind}: a start ended a burst that has credit for {credit} (x seconds)"


# ---- time --------------------------------------------------------------------------------------


def phases_end(world: "World", broker: BrokerMachine, seconds: float) -> None:
    """(18) What is pending ends or gets on in bounded time, as long as its VM runs and can be observed."""
    timing = broker.timing
    bounds = {
        Phase.ASKING: timing.ask_seconds + timing.urge_seconds + timing.overdue_seconds,
        Phase.PLUGGING: timing.plug_progress_seconds,
        Phase.UNPLUGGING: timing.unplug_progress_seconds,
    }
    for name, state, kind, track in _tracks(broker):
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


STATE_CHECKS: tuple[Callable[["World"], None], ...] = (
    minimums_fit, book_fits, credit_within_cap, reserved_covers_truth, nothing_is_left_over, cpu_0_is_online,
)  # fmt: skip
DECISION_CHECKS: tuple[Callable[["World", BrokerMachine, Actions], None], ...] = (
    records_come_first, grants_fit, grants_keep_to_limits, overdue_gets_nothing, credit_is_spent,
    reclaims_leave_enough, asks_are_fair, resizes_within_budget, grants_tell_the_book,
)  # fmt: skip
