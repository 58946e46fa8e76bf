"""What a world remembers, so that the invariants can be judged: what was asked of whom, who was heard when, what each
decision found. It watches and never acts.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from guestd.broker.core import actions as broker_actions
from guestd.broker.core.guest import GuestState
from guestd.broker.core.machine import BrokerMachine
from guestd.broker.core.track import Phase, Track
from guestd.guest.core.ops import Op
from guestd.model.guest import Inventory
from guestd.model.messages import Ack, Demand, Grant, GuestMessage, OrderId, Reclaim
from guestd.model.resources import Kind, Limits
from guestd.sim import book_invariants, evidence, guest_invariants

if TYPE_CHECKING:
    from guestd.sim.guest import SimGuest
    from guestd.sim.world import World

Check = Callable[["World", BrokerMachine, evidence.Actions], None]
STATE_CHECKS: tuple[Callable[["World"], None], ...] = (
    book_invariants.minimums_fit,
    book_invariants.book_fits,
    book_invariants.credit_within_cap,
    book_invariants.reserved_covers_truth,
    book_invariants.nothing_is_left_over,
    guest_invariants.cpu_0_is_online,
)
DECISION_CHECKS: tuple[Check, ...] = (
    book_invariants.records_come_first,
    book_invariants.grants_fit,
    book_invariants.grants_keep_to_limits,
    book_invariants.overdue_gets_nothing,
    book_invariants.credit_is_spent,
    book_invariants.grants_tell_the_book,
    guest_invariants.reclaims_leave_enough,
    guest_invariants.asks_are_fair,
    guest_invariants.observed_are_left_alone,
    book_invariants.decisions_are_told,
    guest_invariants.resizes_within_budget,
)
_COUNTED = {"grows": "grow", "shrinks": "shrink", "partials": "partial", "refusals": "refusal",
            "failures": "failure", "overdue": "overdue", "bursts": "burst", "forced": "forced"}  # fmt: skip


@dataclass(slots=True)
class Line:
    """One kind of one guest as the last decision left it."""

    reserved: int = 0
    overdue: bool = False
    phase: Phase = Phase.IDLE
    ended: int = 0  # resizes that came to an end
    began_to_grow_at: deque[float] = field(default_factory=deque)  # in the broker's clock
    shrunk_at: deque[float] = field(default_factory=deque)  # began to, likewise
    grown_at: float | None = None  # when the last grow ended, likewise
    grows: int = 0
    mark: tuple[object, ...] = ()  # what of the phase under way must not stay the same for ever
    age_seconds: float = 0.0  # for how long it has
    resets: int = 0
    credit: int | None = None  # burst credit, resource x microseconds
    bucket_at: int = 0  # up to when it counts
    burst: int = 0  # what was held above the maximum
    flowed_at: float = 0.0  # when the credit last moved: see `Watch.forward`
    backs: int = 0  # how often the clock had been set back by then
    limits: Limits | None = None
    sustained: int | None = None  # the most that could be held for good
    counted: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Seen:
    """One guest as the watch knows it."""

    heard_at: float | None = None  # in the broker's clock
    held: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(Kind, 0))
    surprised: bool = True  # holds more than anybody asked for, and the broker cannot know yet
    told: bool = False  # the hypervisor was asked since
    resets: int = 0
    epoch: int = 0
    inventory: Inventory = field(default_factory=Inventory)
    newest: dict[Kind, Grant | Reclaim] = field(default_factory=dict)
    answers: dict[OrderId, Ack] = field(default_factory=dict)
    farewell: set[Kind] = field(default_factory=set)  # served until just now: may be told what it has, once each
    obsolete: set[OrderId] = field(default_factory=set)  # orders that came too late, and were not answered before
    lines: dict[Kind, Line] = field(default_factory=lambda: {kind: Line() for kind in Kind})


class Watch:
    """The memory of a world."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.seen: dict[str, Seen] = {}
        self.excused: set[Kind] = set()  # more is charged than there is, by no decision of the broker
        self.backs = 0  # how often the broker's clock was set back
        self._ahead_seconds = 0.0  # how far it was set ahead, in all
        self._before: tuple[object, ...] | None = None

    @property
    def forward(self) -> float:
        """The broker's clock, had it never been set back."""
        return self.world.now + self._ahead_seconds

    def add(self, name: str) -> None:
        """A guest is there from now on."""
        self.seen[name] = Seen()
        self.on_outside_cause()

    # ---- the hypervisor --------------------------------------------------------------------------

    def on_observed(self, guest: "SimGuest") -> None:
        """The hypervisor answered the broker."""
        self.seen[guest.name].told = True

    def look(self, guest: "SimGuest", action: broker_actions.HypervisorAction | None = None) -> None:
        """A VM that may hold more than before, and than it was just asked to take, is a surprise."""
        seen = self.seen[guest.name]
        for kind in Kind:
            held = guest.vm.promised(kind)
            if held > max(seen.held[kind], evidence.amount(action, kind)):
                seen.surprised, seen.told = True, False
                self.excused.add(kind)
            seen.held[kind] = held

    # ---- guests ----------------------------------------------------------------------------------

    def on_heard(self, guest: "SimGuest") -> None:
        """The broker heard the guest on its present stream."""
        self.seen[guest.name].heard_at = self.world.broker_now

    def on_welcome(self, guest: "SimGuest", epoch: int) -> None:
        """The guest is served by this broker now."""
        seen = self.seen[guest.name]
        if seen.epoch != epoch:
            seen.epoch = epoch
            seen.newest.clear()

    def on_new_daemon(self, guest: "SimGuest") -> None:
        """A daemon that knows nothing of the past."""
        seen = self.seen[guest.name]
        seen.epoch, seen.inventory = 0, Inventory()
        seen.newest.clear()
        seen.answers.clear()
        seen.obsolete.clear()

    def on_inventory(self, guest: "SimGuest", inventory: Inventory) -> None:
        """What the daemon was shown last."""
        self.seen[guest.name].inventory = inventory

    def on_order(self, guest: "SimGuest", order: Grant | Reclaim) -> None:
        """An order reached the daemon."""
        seen = self.seen[guest.name]
        newest = seen.newest.get(order.kind)
        if order.id.epoch == seen.epoch and (newest is None or order.id.revision >= newest.id.revision):
            seen.newest[order.kind] = order
        elif order.id not in seen.answers:
            seen.obsolete.add(order.id)

    def on_op(self, guest: "SimGuest", op: Op) -> None:
        """The daemon has something done to its machine."""
        guest_invariants.cpus_that_must_stay(guest, self.seen[guest.name], op)
        guest_invariants.newest_order_only(guest, self.seen[guest.name], op)

    def on_said(self, guest: "SimGuest", message: GuestMessage) -> None:
        """The daemon says something."""
        if isinstance(message, Ack):
            guest_invariants.stored_answer(guest, self.seen[guest.name], message)

    def before_message(self, guest: "SimGuest", session: int, message: GuestMessage) -> None:
        """A message is about to reach the broker."""
        self._before = None
        if self.world.broker is None:
            return
        state = self.world.broker.guests[guest.name]
        stream = state.session == session
        old = isinstance(message, Ack) and message.id != state.tracks[message.kind].order
        late = isinstance(message, Demand) and state.demand is not None and message.sequence <= state.demand.sequence
        if not stream or old or late:
            self._before = guest_invariants.what_is_known(state, stream)

    def after_message(self, guest: "SimGuest", session: int, message: GuestMessage) -> None:
        """It did."""
        broker = self.world.broker
        if broker is None:
            return
        state = broker.guests[guest.name]
        for kind, line in self.seen[guest.name].lines.items():
            line.phase = state.tracks[kind].phase  # an answer may have moved it
        if state.session == session:
            self.on_heard(guest)
        if self._before is not None:
            after = guest_invariants.what_is_known(state, state.session == session)
            assert after == self._before, f"(17) {guest.name}: an obsolete message changed something: {message}"

    # ---- the broker ------------------------------------------------------------------------------

    def on_mode(self, name: str) -> None:
        """A guest is only observed from now on, or served. Nothing was recorded of it while it was observed, and
        nothing is followed up that was under way.
        """
        seen = self.seen[name]
        seen.surprised, seen.told = True, False
        ending = (Phase.ASKING, Phase.UNPLUGGING)
        seen.farewell = {kind for kind, line in seen.lines.items() if line.phase in ending}
        self.on_outside_cause()

    def on_outside_cause(self) -> None:
        """The host changed, or what was promised to guests: more may be charged than there is."""
        self.excused.update(Kind)

    def on_death(self) -> None:
        """The broker is gone, and with it what it counted."""
        for seen in self.seen.values():
            seen.heard_at, seen.told = None, False
            for kind, line in seen.lines.items():
                seen.lines[kind] = Line(line.reserved)

    def on_start(self) -> None:
        """A broker was started from the journal."""
        for name, seen in self.seen.items():
            entry = self.world.journal.get(name)
            for kind, line in seen.lines.items():
                line.reserved = entry.reserved.get(kind) if entry else 0
                if entry is not None and entry.credit is not None:
                    line.credit = entry.credit.get(kind) * book_invariants.MICRO
                line.flowed_at, line.backs, line.limits = self.forward, self.backs, self.world.limits[name]
            if name in self.world.observed:
                self.on_mode(name)
        book_invariants.recovery_is_idempotent(self.world)

    def on_clock_step(self, seconds: float) -> None:
        """The broker's clock was set; set back, it has its deadlines so much later."""
        self.backs += seconds < 0
        self._ahead_seconds += max(0.0, seconds)
        for seen in self.seen.values():
            for line in seen.lines.values():
                line.age_seconds += min(0.0, seconds)

    def check_actions(self, broker: BrokerMachine, actions: Sequence[broker_actions.Action]) -> None:
        """Judge a decision before anything of it is done, and remember what it left."""
        for check in DECISION_CHECKS:
            check(self.world, broker, actions)
        for name, state in broker.guests.items():
            seen = self.seen[name]
            for kind, track in state.tracks.items():
                line = seen.lines[kind]
                self._count(line, track)
                self._remember(line, track, evidence.asked(actions, name, kind))
                self._remember_credit(line, state, track)

    def on_done(self, broker: BrokerMachine) -> None:
        """All of a decision was done: the broker and its journal know what its hypervisors had said before."""
        for name, state in broker.guests.items():
            seen = self.seen[name]
            if seen.told and state.vm_fresh:
                seen.surprised = False

    def _remember(self, line: Line, track: Track, asked: int) -> None:
        now = self.world.broker_now
        line.shrunk_at.extend([now] * evidence.shrinks_begun(line, asked))
        line.began_to_grow_at.extend([now] * evidence.grows_begun(line, track))
        if track.counters.grows > line.grows:
            line.grows, line.grown_at = track.counters.grows, now
        line.reserved, line.overdue, line.phase = track.reserved, track.overdue, track.phase
        line.ended = evidence.ended(track)

    def _remember_credit(self, line: Line, state: GuestState, track: Track) -> None:
        bucket, burst = track.lend.bucket if track.lend else None, state.burst_held(track.kind)
        if bucket is None or bucket.at_microseconds != line.bucket_at:
            line.flowed_at, line.backs = self.forward, self.backs
        line.credit, line.bucket_at = (bucket.credit_microseconds, bucket.at_microseconds) if bucket else (None, 0)
        line.burst, line.limits, line.sustained = burst, state.limits, state.sustained(track.kind)

    def _count(self, line: Line, track: Track) -> None:
        for name, word in _COUNTED.items():
            value = getattr(track.counters, name)
            self.world.happened[word] += value - line.counted.get(name, 0)
            line.counted[name] = value

    def check_state(self, seconds: float) -> None:
        """Judge the state that a step left."""
        for check in STATE_CHECKS:
            check(self.world)
        if self.world.broker is not None:
            guest_invariants.phases_end(self.world, self.world.broker, seconds)
