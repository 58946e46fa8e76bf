"""The promises about the book, each a small function that raises `AssertionError` with the promise's number and the
numbers of the case.

Numbers as in the list of invariants in the design. What a decision is told by events from outside (a VM that took more
than it was given, a host that lost memory, a minimum that was raised while others hold what backs it) is nobody's
fault: then nothing more may be granted until it fits again.
"""

from typing import TYPE_CHECKING

from guestd.broker.core import actions as broker_actions
from guestd.broker.core.machine import BrokerMachine
from guestd.broker.core.track import Phase
from guestd.model.event import EventCode
from guestd.model.messages import Grant
from guestd.model.resources import Kind, Resources
from guestd.model.units import MILLICORES_PER_VCPU, round_up
from guestd.model.vm import VmStatus
from guestd.sim import evidence

if TYPE_CHECKING:
    from guestd.sim.world import World

MICRO = 1_000_000
CLOCK_MICROSECONDS = 5
"""What two readings of a clock may lose by rounding."""


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


def grants_fit(world: "World", broker: BrokerMachine, actions: evidence.Actions) -> None:
    """(2, 6) Nothing is granted that is not there; above a minimum only what backs no other's."""
    for name, state, track in evidence.risers(world, broker):
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


def grants_keep_to_limits(world: "World", broker: BrokerMachine, actions: evidence.Actions) -> None:
    """(3, 23) Nothing is granted above the maximum but a burst with credit, and nothing above that."""
    for name, state, track in evidence.risers(world, broker):
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


def overdue_gets_nothing(world: "World", broker: BrokerMachine, actions: evidence.Actions) -> None:
    """(3) Who is overdue receives nothing more."""
    for name, _, track in evidence.risers(world, broker):
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
    for name, state, kind, track in evidence.tracks(world.broker):
        cap = state.limits.burst_credit.get(kind) * MICRO
        credit = track.lend.bucket.credit_microseconds if track.lend else 0
        assert 0 <= credit <= cap, f"(4) {name} {kind}: credit {credit}, cap {cap} (x microseconds)"


def credit_is_spent(world: "World", broker: BrokerMachine, actions: evidence.Actions) -> None:
    """(4) Holding more than the maximum costs credit; only time without that gives it back, and no restart does."""
    for name, state, kind, track in evidence.tracks(broker):
        line = world.watch.seen[name].lines[kind]
        bucket = track.lend.bucket if track.lend is not None else None
        same = state.limits is line.limits and line.sustained in (None, state.sustained(kind))
        if bucket is None or line.credit is None or not same:
            continue
        if bucket.at_microseconds == line.bucket_at:  # not looked at
            continue
        gained = bucket.credit_microseconds - line.credit
        passed = round((world.watch.forward - line.flowed_at) * MICRO)
        if line.burst:
            due = 0 if world.watch.backs > line.backs else max(-line.burst * passed, -line.credit)
        else:
            due = state.limits.burst_refill.get(kind) * passed
        due += max(line.burst, state.limits.burst_refill.get(kind)) * CLOCK_MICROSECONDS
        assert gained <= due, (
            f"(4) {name} {kind}: credit moved by {gained} (x microseconds) in {passed} us, {line.burst} above max held"
        )


def reserved_covers_truth(world: "World") -> None:
    """(5) What is reserved is at least what the VM holds or was told to take, and what its hypervisor still has to
    be told; while no broker runs, by its journal.
    """
    for name, guest in world.guests.items():
        if world.watch.seen[name].surprised or (world.broker is None and name in world.observed):
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
            held = evidence.observed(state, kind)
            deflating = kind is Kind.MEMORY and 0 < held < state.vm.boot_memory_bytes and track.reserved > held
            left = track.reserved == held or track.phase is not Phase.IDLE or deflating
            assert left, f"(16) {name} {kind}: idle, {held} is held, {track.reserved} is reserved"


def records_come_first(world: "World", broker: BrokerMachine, actions: evidence.Actions) -> None:
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
            wanted = evidence.amount(action, kind)
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


def grants_tell_the_book(world: "World", broker: BrokerMachine, actions: evidence.Actions) -> None:
    """(10) What a guest is told that it has is what is charged for it."""
    last: dict[tuple[str, Kind], Grant] = {}
    for action in actions:
        if isinstance(action, broker_actions.Send) and isinstance(action.message, Grant):
            last[action.guest, action.message.kind] = action.message
    for (name, kind), grant in last.items():
        reserved = broker.guests[name].tracks[kind].reserved
        assert grant.amount == reserved, f"(10) {name} {kind}: told {grant.amount}, {reserved} is reserved"


def decisions_are_told(world: "World", broker: BrokerMachine, actions: evidence.Actions) -> None:
    """(20) What is said of a decision agrees with what it was made from, and what began with where it leads."""
    for action in actions:
        if not isinstance(action, broker_actions.Log):
            continue
        where = f"(20) {action.guest} {action.kind}: {action.code}: {action.text}"
        inputs = action.inputs
        assert inputs is not None, f"{where}: without its inputs"
        assert min(action.before, action.after, inputs.free) >= 0, f"{where}: {action.before} to {action.after}"
        match action.code:
            case EventCode.GROWING | EventCode.ASKING | EventCode.SHRINKING | EventCode.WOULD:
                assert action.before == inputs.reserved, f"{where}: before {action.before}, reserved {inputs.reserved}"
        match action.code:
            case EventCode.GROWING:
                assert action.after > action.before, f"{where}: from {action.before} to {action.after}"
            case EventCode.ASKING | EventCode.SHRINKING:
                assert action.after <= action.before, f"{where}: from {action.before} to {action.after}"
            case EventCode.WOULD:
                assert action.after != action.before, f"{where}: would do nothing"
                assert broker.guests[action.guest].observed, f"{where}: it is served"


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


def recovery_takes_nothing(broker: BrokerMachine, actions: evidence.Actions) -> None:
    """(16) A start grants nothing and takes nothing; only CPU time above the maximum without credit may go."""
    for action in actions:
        assert not isinstance(action, broker_actions.RequestMemory), f"(16) a start does more than look: {action}"
        if isinstance(action, broker_actions.RequestVcpus | broker_actions.RequestCpuQuota):
            held, wanted = evidence.observed(broker.guests[action.guest], Kind.CPU), evidence.amount(action, Kind.CPU)
            assert wanted <= held, f"(16) a start grants: {action}, {held} is held"
    for name, state, kind, track in evidence.tracks(broker):
        lent = state.limits.burst.get(kind) >= track.reserved and track.lend is not None
        credit = track.lend.bucket.credit if track.lend is not None else 0
        kept = not (lent and credit > 0 and track.overdue)
        assert kept, f"(16) {name} {kind}: a start ended a burst that has credit for {credit} (x seconds)"
