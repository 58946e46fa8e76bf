"""The broker's decisions: events in, actions out, no clock and no I/O.

The law:

1. Every event only changes what is known; `next_actions(now)` compares it with what should be and returns
   what to do, in order. Losing an action or an answer only delays: a deadline asks the hypervisor again.
2. The hypervisor's word wins over the journal's, the journal's over the guest's.
3. What is reserved never falls before the hypervisor confirmed, and rises durably before anything is
   plugged (`Record` precedes the request in the list).
4. Nothing is decided about a guest that is paused, silent, away, or whose VM does not plainly run; it
   keeps what it has, and that is charged. Only CPU time above its maximum ends with its burst.
5. Only what is free is granted above a minimum; what others are to give back counts when it is back.
6. Only guests that something happened to, whose alarm rang, or whose target moved are looked at: the cost of
   a decision does not grow with the number of guests, but for the allocation itself.
7. A guest that is only observed is decided about and shown, and nothing of it is touched but to ask its hypervisor.

Weak spots: a guest that promises memory and does not let go of it costs one progress deadline each
time it is asked, with growing pauses between. A CPU that refuses to go is asked for again likewise.
"""

from guestd.broker.core import judge, lend
from guestd.broker.core.actions import Action, HypervisorAction, Observe, RequestCpuQuota, RequestVcpus
from guestd.broker.core.expect import PLENTY_SHARE
from guestd.broker.core.explain import explain_target
from guestd.broker.core.guest import GuestState
from guestd.broker.core.room import share_room
from guestd.broker.core.roster import Roster
from guestd.broker.core.track import Phase, Track
from guestd.model.errors import SupersededError, VersionError
from guestd.model.event import EventCode
from guestd.model.messages import Ack, AckStatus, Demand, Heartbeat, Hello, Welcome
from guestd.model.resources import Kind
from guestd.model.vm import VmState, VmStatus

PROTOCOL = 1


class BrokerMachine(Roster):
    """All guests of one host; see `Roster` for how it is made."""

    # ---- the hypervisor --------------------------------------------------------------------------

    def on_vm_state(self, name: str, state: VmState, now: float) -> None:
        """The hypervisor's answer. Answers about one VM arrive in the order they were given."""
        guest = self.guests.get(name)
        if guest is None:
            return
        thawed = guest.vm is None or guest.vm.status is not VmStatus.RUNNING
        rebooted = guest.vm is not None and state.resets > guest.vm.resets
        guest.vm = state
        guest.vm_fresh = state.status is not VmStatus.UNREACHABLE
        guest.look_at_bounds()
        self._touched.add(name)
        for track in guest.tracks.values():
            if state.status is VmStatus.GONE:
                track.end()
                track.overdue = False
            elif rebooted:  # a virtio-mem device is empty until the guest's driver is back (14 s when measured)
                track.deadline = max(track.deadline, now + self.timing.reboot_seconds)
            elif thawed:
                track.deadline = max(track.deadline, now + self.timing.plug_progress_seconds)

    def on_vm_failed(self, name: str, action: HypervisorAction, text: str, unknown: bool, now: float) -> None:
        """A command failed, or its outcome is unknown: nothing is believed until the VM was asked again."""
        guest = self.guests.get(name)
        if guest is None:
            return
        guest.vm_fresh = False
        self._touched.add(name)
        self._resizer.out.append(Observe(name))
        if isinstance(action, Observe) or guest.observed:
            return
        kind = Kind.CPU if isinstance(action, RequestVcpus | RequestCpuQuota) else Kind.MEMORY
        track = guest.tracks[kind]
        track.counters.failures += 1
        lost = "lost the answer to" if unknown else "refused"
        text = f"hypervisor {lost} a request: {text}"
        self._resizer.log(guest, track, EventCode.FAILED, text, track.before, track.reserved)
        track.doubtful = unknown
        track.settled = False
        if not unknown and track.phase in (Phase.PLUGGING, Phase.UNPLUGGING):
            self._resizer.withdraw(track)
            track.set_back(now, self.timing)

    # ---- the guest -------------------------------------------------------------------------------

    def on_connected(self, name: str, hello: Hello, now: float) -> tuple[int, Welcome]:
        """A guest said hello on a stream of its own. Returns the stream's session number and the answer.

        :raise NotFoundError: When the operator knows no such guest.
        :raise VersionError: When the protocol ranges don't meet.
        :raise SupersededError: When a newer daemon of this guest is there.
        """
        guest = self._guest(name)
        if not hello.protocol_min <= PROTOCOL <= hello.protocol_max:
            raise VersionError(
                f"this broker speaks protocol {PROTOCOL}, the guest {hello.protocol_min} to {hello.protocol_max}"
            )
        known = guest.identity
        same_boot = guest.connected and known is not None and known.boot_id == hello.identity.boot_id
        if same_boot and known is not None and hello.identity.generation < known.generation:
            raise SupersededError("a newer guest daemon of this VM has the floor")
        self._last_session += 1
        guest.session, guest.identity, guest.demand = self._last_session, hello.identity, None
        guest.throttled_permille = 0
        self._heard(guest, now)
        guest.usable = hello.usable
        for track in guest.tracks.values():
            track.announce = track.announce or not guest.observed
            if track.phase is Phase.ASKING:
                track.end()
        welcome = Welcome(PROTOCOL, name, self.epoch, self.heartbeat_seconds, guest.limits.min, guest.limits.max)
        return guest.session, welcome

    def on_disconnected(self, name: str, session: int) -> None:
        """The stream is gone. Nothing is taken from the guest for that."""
        guest = self.guests.get(name)
        if guest is None or guest.session != session:
            return
        guest.session = 0
        self._touched.add(name)
        for expectation in self._expectations.values():
            expectation.note(name, None, self._resizer.now)
        for track in guest.tracks.values():
            if track.phase is Phase.ASKING:
                track.end()

    def on_demand(self, name: str, session: int, demand: Demand, now: float) -> None:
        """What the guest needs; an older one than seen is ignored."""
        guest = self._speaking(name, session)
        if guest is None or (guest.demand is not None and demand.sequence <= guest.demand.sequence):
            return
        self._heard(guest, now)
        guest.demand, guest.usable = demand, demand.usable
        for kind, expectation in self._expectations.items():
            expectation.note(name, min(demand.needed.get(kind), guest.limits.ceiling(kind)), now)

    def on_heartbeat(self, name: str, session: int, heartbeat: Heartbeat, now: float) -> None:
        """A sign of life."""
        guest = self._speaking(name, session)
        if guest is not None:
            self._heard(guest, now)
            guest.usable = heartbeat.usable or guest.usable
            guest.throttled_permille = 0  # where it is held back it hears of it again
            for track in guest.tracks.values() if heartbeat.usable and not guest.observed else ():  # a grant was lost?
                track.announce = track.announce or judge.has_not_taken(guest, track)

    def on_ack(self, name: str, session: int, ack: Ack, now: float) -> None:
        """The guest's answer to an order. One to any but the current order changes nothing."""
        guest = self._speaking(name, session)
        if guest is None:
            return
        self._heard(guest, now)
        guest.usable = ack.usable
        track = guest.tracks[ack.kind]
        if track.order is None or ack.id != track.order:
            return
        self._resizer.now = now
        if track.phase is Phase.ASKING:
            self._resizer.answer(guest, track, ack)
        elif ack.status is not AckStatus.DONE:
            text = f"guest could use only {ack.kind.show(ack.achieved)}: {ack.refusal} {ack.text}"
            self._resizer.refused(guest, track, ack, text, min(ack.achieved, track.reserved))
            track.grow_after = max(track.grow_after, now + self.timing.retry_seconds)

    # ---- decisions -------------------------------------------------------------------------------

    def next_actions(self, now: float) -> list[Action]:
        """What to do now, in this order. Calling again at once returns nothing new."""
        self._resizer.now = now
        self._touched.update(self._alarms.ring(now))
        self._expect(now)
        looked_at = sorted(self._touched)
        self._touched.clear()
        for name in looked_at:
            self._see(self.guests[name])
        concerned = set(looked_at)
        for kind in Kind:
            concerned.update(self._balance(kind, looked_at))
        for name in sorted(concerned):
            guest = self.guests[name]
            for track in guest.tracks.values():
                self._resizer.announce(guest, track)
            self._alarms.set(name, min(judge.alarms(guest, self.timing, self._stale_seconds, now), default=None))
        actions, self._resizer.out = self._resizer.out, []
        return actions

    def wake_at(self, now: float) -> float | None:
        """When to call `next_actions` again if nothing happens before."""
        if self._touched:
            return now
        times = [self._alarms.next_at, *(one.next_at for one in self._expectations.values())]
        return min((at for at in times if at is not None), default=None)

    def _expect(self, now: float) -> None:
        """What guests are likely to need in the next interval, when one is over."""
        for kind, expectation in self._expectations.items():
            for name, amount in expectation.step(now).items():
                track = self.guests[name].tracks[kind]
                if amount != track.expected and max(amount, track.expected) > track.target:
                    self._touched.add(name)
                track.expected = amount

    def _see(self, guest: GuestState) -> None:
        """Follow what is under way with one guest, and have it claim what it is to compete for."""
        now = self._resizer.now
        guest.look_at_bounds()
        for kind, track in guest.tracks.items():
            self._resizer.follow(guest, track)
            text = lend.tend(guest, track, self.timing, now)
            if text is not None:
                self._resizer.log(guest, track, EventCode.OVERDUE, text, track.reserved, guest.sustained(kind))
            recorded = track.lend.recorded_at if track.lend else now
            if now - recorded >= self.timing.credit_record_seconds and guest.burst_held(kind):
                self._resizer.record(guest)
        for kind in Kind:
            self._shares[kind].put(guest, now, self._stale_seconds, self._plenty[kind])
        self._resizer.tell_throttled(guest)

    def _balance(self, kind: Kind, looked_at: list[str]) -> set[str]:
        """Decide the targets of one kind and begin what leads there: free first, then grow. Whom it concerned."""
        host, count, now = self.host, len(self.guests), self._resizer.now
        capacity = host.for_guests(kind, count)
        shares = self._shares[kind]
        backed = host.backed(kind, count) if kind is Kind.MEMORY else capacity
        concerned = {*looked_at, *shares.solve(capacity, backed, self._observed)}
        plenty = not shares.scarce and self.free(kind) * PLENTY_SHARE >= capacity
        if self._plenty[kind] and not plenty:  # needs alone count now
            for guest in self.guests.values():
                if guest.tracks[kind].expected:
                    shares.put(guest, now, self._stale_seconds, plenty)
            concerned.update(shares.solve(capacity, backed, self._observed))
        self._plenty[kind], self._resizer.pools[kind] = plenty, self._facts(kind)
        for name in sorted(concerned):
            self._decide(self.guests[name], kind, shares.target(self.guests[name]))
        growing = [
            guest
            for guest in (self.guests[name] for name in self._hungry[kind])
            if judge.may_grow(guest, guest.tracks[kind], self.timing, self._stale_seconds, now)
        ]
        concerned.update(guest.name for guest in growing)
        for name, amount in share_room(growing, kind, self._resizer.books[kind], capacity, backed).items():
            self._grow(self.guests[name], self.guests[name].tracks[kind], amount)
        return concerned

    def _decide(self, guest: GuestState, kind: Kind, target: int) -> None:
        """What one guest's target means for it."""
        track, now, stale = guest.tracks[kind], self._resizer.now, self._stale_seconds
        track.target = target
        track.overdue = track.overdue and judge.holds_too_much(guest, track)
        if guest.observed:
            self._would(guest, track)
            return
        forced = judge.must_force(guest, track)
        if forced is not None:
            track.counters.forced += 1
            track.end()
            track.reason = explain_target(guest, track, stale, now)
            text = f"taking CPU time by quota: {track.reason.text}"
            self._resizer.log(guest, track, EventCode.SHRINKING, text, track.reserved, forced)
            self._resizer.force(guest, track, forced)
        elif judge.may_shrink(guest, track, self.timing, stale, now, self._plenty[kind]):
            track.reason = explain_target(guest, track, stale, now)
            self._resizer.shrink(guest, track, judge.shrink_amount(guest, track))
        elif judge.takes_too_much(guest, track, stale, now):
            self._resizer.force(guest, track, min(judge.shrink_amount(guest, track), track.reserved))
        elif judge.must_park(guest, track, self.timing, stale, now):
            track.reason = explain_target(guest, track, stale, now)
            self._resizer.shrink(guest, track, track.reserved)
        aim = track.amount if track.phase is Phase.PLUGGING else track.reserved
        wants = target > aim or judge.is_asked_in_vain(track)
        wants = wants and guest.why_fixed(now, stale) is None  # else an event comes first: nobody looks in vain
        wants = wants and not (self._shares[kind].scarce and judge.is_slight(guest, track, target - aim))
        (self._hungry[kind].add if wants else self._hungry[kind].discard)(guest.name)

    def _would(self, guest: GuestState, track: Track) -> None:
        """Say what would begin, were the guest served."""
        now, stale, plenty = self._resizer.now, self._stale_seconds, self._plenty[track.kind]
        scarce = self._shares[track.kind].scarce_if_served
        amount = judge.would_resize(guest, track, self.timing, stale, now, plenty, scarce)
        if amount is not None:
            track.reason = explain_target(guest, track, stale, now)
            self._resizer.rehearse(guest, track, amount)

    def _grow(self, guest: GuestState, track: Track, amount: int) -> None:
        """Have the guest grow to so much; a guest that is asked in vain is left in peace at least."""
        if track.phase is Phase.ASKING:
            self._resizer.withdraw(track)
        slight = amount < track.target and judge.is_slight(guest, track, amount - track.reserved)
        if amount > track.reserved and not slight:
            track.reason = explain_target(guest, track, self._stale_seconds, self._resizer.now)
            self._resizer.grow(guest, track, amount)
        if track.amount >= track.target and track.phase is Phase.PLUGGING:
            self._hungry[track.kind].discard(guest.name)

    # ---- small parts -----------------------------------------------------------------------------

    def _heard(self, guest: GuestState, now: float) -> None:
        guest.last_seen = now
        self._touched.add(guest.name)

    def _speaking(self, name: str, session: int) -> GuestState | None:
        guest = self.guests.get(name)
        return guest if guest is not None and session and guest.session == session else None
