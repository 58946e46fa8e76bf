"""The broker's decisions: events in, actions out, no clock and no I/O.

The law:

1. Every event only changes what is known; `next_actions(now)` compares it with what should be and returns
   what to do, in order. Losing an action or an answer only delays: a deadline asks the hypervisor again.
2. The hypervisor's word wins over the journal's, the journal's over the guest's.
3. What is reserved never falls before the hypervisor confirmed, and rises durably before anything is
   plugged (`Record` precedes the request in the list).
4. Nothing is decided about a guest that is paused, silent, away, or whose VM does not plainly run; it
   keeps what it has, and that is charged.
5. Only what is free is granted above a minimum; what others are to give back counts when it is back.

Weak spots: a guest that promises memory and does not let go of it costs one progress deadline each
time it is asked, with growing pauses between. A CPU that refuses to go is asked for again likewise.
"""

from collections.abc import Callable, Mapping

from guestd.broker.core import judge, ledger
from guestd.broker.core.actions import (
    Action,
    HypervisorAction,
    Log,
    Observe,
    Record,
    RequestMemory,
    RequestVcpus,
    Send,
    SettleMemory,
)
from guestd.broker.core.allocate import allocate
from guestd.broker.core.guest import GuestState
from guestd.broker.core.track import Phase, Timing, Track
from guestd.model.errors import NotFoundError, SupersededError, VersionError
from guestd.model.messages import (
    Ack,
    AckStatus,
    Demand,
    Grant,
    GrantStage,
    Heartbeat,
    Hello,
    OrderId,
    Reclaim,
    ReclaimStage,
    Welcome,
)
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import MILLICORES_PER_VCPU, round_down, round_up
from guestd.model.vm import VmState, VmStatus

PROTOCOL = 1
_NEXT_STAGE = {ReclaimStage.ASK: ReclaimStage.URGE, ReclaimStage.URGE: ReclaimStage.OVERDUE}


class BrokerMachine:
    """All guests of one host.

    :param epoch: number of this start of the broker, higher than any before.
    """

    def __init__(
        self,
        host: ledger.HostCapacity,
        epoch: int,
        heartbeat_seconds: float = 10.0,
        timing: Timing | None = None,
    ) -> None:
        self.host = host
        self.epoch = epoch
        self.heartbeat_seconds = heartbeat_seconds
        self.timing = timing or Timing()
        self.guests: dict[str, GuestState] = {}
        self._last_request = 0
        self._last_session = 0
        self._out: list[Action] = []

    # ---- the operator ----------------------------------------------------------------------------

    def add_guest(self, name: str, limits: Limits, reserved: Resources | None = None, revision: int = 0) -> None:
        """Take a guest in. `reserved` and `revision` come from the journal and hold until the hypervisor speaks.

        :raise AdmissionError: When its minimum does not fit.
        """
        ledger.admit(self.host, {**self._limits(), name: limits})
        guest = GuestState(name, limits, revision=revision)
        for kind in Kind:
            guest.tracks[kind].reserved = (reserved or Resources()).get(kind)
        self.guests[name] = guest
        self._out.append(Observe(name))

    def remove_guest(self, name: str) -> None:
        """Forget a guest; its VM stays as it is.

        :raise NotFoundError: When there is none of that name.
        """
        self._guest(name)
        del self.guests[name]

    def set_limits(self, name: str, limits: Limits) -> None:
        """New limits, effective with the next actions.

        :raise NotFoundError: When there is none of that name.
        :raise AdmissionError: When the minimums no longer fit, with the numbers.
        """
        guest = self._guest(name)
        ledger.admit(self.host, {**self._limits(), name: limits})
        guest.limits = limits

    def set_host(self, host: ledger.HostCapacity, limits: Mapping[str, Limits]) -> None:
        """Another capacity, with the limits that are to hold in it, all at once: a minimum may move from one
        guest to another. Guests that are not known (yet) count for admission.

        :raise AdmissionError: When the minimums don't fit; nothing is changed.
        """
        ledger.admit(host, dict(limits))
        self.host = host
        for name, guest in self.guests.items():
            guest.limits = limits.get(name, guest.limits)

    def pause(self, name: str, paused: bool) -> None:
        """Stop or resume decisions about a guest.

        :raise NotFoundError: When there is none of that name.
        """
        self._guest(name).paused = paused

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
        self._out.append(Observe(name))
        kind = Kind.CPU if isinstance(action, RequestVcpus) else Kind.MEMORY
        track = guest.tracks[kind]
        if isinstance(action, Observe):
            return
        track.counters.failures += 1
        self._log(guest, kind, f"hypervisor {'lost the answer to' if unknown else 'refused'} a request: {text}")
        track.doubtful = unknown
        if not unknown and track.phase in (Phase.PLUGGING, Phase.UNPLUGGING):
            self._withdraw(guest, track)
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
        self._heard(guest, now)
        guest.usable = hello.usable
        for track in guest.tracks.values():
            track.announce = True
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

    def on_heartbeat(self, name: str, session: int, heartbeat: Heartbeat, now: float) -> None:
        """A sign of life."""
        guest = self._speaking(name, session)
        if guest is not None:
            self._heard(guest, now)
            guest.usable = heartbeat.usable or guest.usable

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
        if track.phase is Phase.ASKING:
            self._on_reclaim_answer(guest, track, ack, now)
        elif ack.status is not AckStatus.DONE:
            track.counters.refusals += 1
            self._log(guest, ack.kind, f"guest could use only {ack.kind.show(ack.achieved)}: {ack.refusal} {ack.text}")
            track.grow_after = max(track.grow_after, now + self.timing.retry_seconds)

    def _on_reclaim_answer(self, guest: GuestState, track: Track, ack: Ack, now: float) -> None:
        kind = track.kind
        if judge.must_not_shrink(guest, track):
            return
        offered = max(round_up(max(ack.achieved, track.amount), guest.unit(kind)), guest.least(kind))
        if ack.status is not AckStatus.DONE:
            track.counters.refusals += 1
            self._log(
                guest, kind, f"asked down to {kind.show(track.amount)}, guest can do "
                f"{kind.show(ack.achieved)}: {ack.refusal} {ack.text}"
            )  # fmt: skip
        if ack.status is AckStatus.REFUSED or offered >= track.reserved:
            track.end()
            track.set_back(now, self.timing, ack.retry_after_seconds)
            track.announce = True
            return
        held = guest.vm.held(kind) if guest.vm else track.reserved
        order = track.order
        track.begin(Phase.UNPLUGGING, offered, now, self.timing.unplug_progress_seconds, held)
        track.order = order
        track.repeat_at = now + self.timing.unplug_repeat_seconds
        self._out.append(self._request(guest.name, kind, offered))

    # ---- decisions -------------------------------------------------------------------------------

    def next_actions(self, now: float) -> list[Action]:
        """What to do now, in this order. Calling again at once returns nothing new."""
        for guest in self._by_name():
            for track in guest.tracks.values():
                self._follow(guest, track, now)
        for kind in Kind:
            self._balance(kind, now)
        for guest in self._by_name():
            for track in guest.tracks.values():
                self._announce(guest, track)
        actions, self._out = self._out, []
        return actions

    def wake_at(self, now: float) -> float | None:
        """When to call `next_actions` again if nothing happens before."""
        return min(
            (at for guest in self.guests.values() for at in judge.alarms(guest, self.timing, self._stale_seconds, now)),
            default=None,
        )

    def _follow(self, guest: GuestState, track: Track, now: float) -> None:
        """See how far the resize under way has come, and keep the book."""
        vm = guest.vm
        if vm is not None and vm.status is VmStatus.GONE:
            self._reserve(guest, track, 0)
        elif vm is not None and vm.status is VmStatus.RUNNING and guest.vm_fresh:
            self._FOLLOW[track.phase](self, guest, track, vm, now)
        elif vm is not None and vm.status is VmStatus.FROZEN:
            self._reserve(guest, track, max(vm.held(track.kind), track.reserved))

    def _follow_idle(self, guest: GuestState, track: Track, vm: VmState, now: float) -> None:
        self._reserve(guest, track, vm.held(track.kind))

    def _follow_plugging(self, guest: GuestState, track: Track, vm: VmState, now: float) -> None:
        held, plugged = vm.held(track.kind), vm.plugged(track.kind)
        doubtful, track.doubtful = track.doubtful, False
        if doubtful and held < track.amount:  # asked again, the hypervisor knows of no such request
            self._reserve(guest, track, held)
            self._finish(guest, track, f"the request for {track.kind.show(track.amount)} was lost")
            return
        self._reserve(guest, track, max(held, track.amount))
        if plugged >= track.amount:
            track.counters.grows += 1
            track.succeed()
            track.shrink_after = max(track.shrink_after, now + self.timing.cool_down_seconds)
            self._finish(guest, track, f"grown to {track.kind.show(plugged)}")
        elif plugged > track.progress:
            track.progress, track.deadline = plugged, now + self.timing.plug_progress_seconds
        elif now >= track.deadline:
            self._stop_short(guest, track, now, f"no progress beyond {track.kind.show(plugged)}")

    def _follow_asking(self, guest: GuestState, track: Track, vm: VmState, now: float) -> None:
        self._reserve(guest, track, vm.held(track.kind))
        if judge.must_not_shrink(guest, track):
            self._finish(
                guest, track, "not asking any more: " + ("paused" if guest.paused else "under memory pressure")
            )
            return
        if now < track.deadline:
            return
        stage = _NEXT_STAGE.get(track.stage)
        if stage is None:
            track.overdue = True
            track.set_back(now, self.timing)
            self._finish(guest, track, "no answer to a reclaim, overdue")
        else:
            self._ask(guest, track, track.amount, stage, now)

    def _follow_unplugging(self, guest: GuestState, track: Track, vm: VmState, now: float) -> None:
        held = vm.held(track.kind)
        self._reserve(guest, track, held)
        if held <= track.amount:
            track.counters.shrinks += 1
            track.succeed()
            self._finish(guest, track, f"shrunk to {track.kind.show(held)}")
        elif judge.must_not_shrink(guest, track):
            track.counters.partials += 1
            self._settle(guest, track, "the guest must not shrink now")
        elif held < track.progress:
            track.progress, track.deadline = held, now + self.timing.unplug_progress_seconds
            self._unplug_vcpus(guest, track, now)
        elif now >= track.repeat_at and now < track.deadline:
            self._unplug_vcpus(guest, track, now)
        elif now >= track.deadline:
            track.counters.partials += 1
            self._stop_short(guest, track, now, f"guest keeps {track.kind.show(held)}")

    def _unplug_vcpus(self, guest: GuestState, track: Track, now: float) -> None:
        """vCPUs go one by one: ask for the next, or for one again whose removal was lost."""
        track.repeat_at = now + self.timing.unplug_repeat_seconds
        if track.kind is Kind.CPU:
            self._out.append(self._request(guest.name, track.kind, track.amount))

    _FOLLOW: Mapping[Phase, Callable[["BrokerMachine", GuestState, Track, VmState, float], None]] = {
        Phase.IDLE: _follow_idle,
        Phase.PLUGGING: _follow_plugging,
        Phase.ASKING: _follow_asking,
        Phase.UNPLUGGING: _follow_unplugging,
    }

    def _stop_short(self, guest: GuestState, track: Track, now: float, text: str) -> None:
        """What was achieved stays; the rest is not asked for any more."""
        if track.phase is Phase.PLUGGING:
            track.counters.failures += 1
        track.set_back(now, self.timing)
        self._settle(guest, track, text)

    def _settle(self, guest: GuestState, track: Track, text: str) -> None:
        if track.kind is Kind.MEMORY:
            self._out.append(SettleMemory(guest.name))
            guest.vm_fresh = False
        self._out.append(Observe(guest.name))
        self._finish(guest, track, f"ended short of {track.kind.show(track.amount)}: {text}")

    def _finish(self, guest: GuestState, track: Track, text: str) -> None:
        self._log(guest, track.kind, text)
        self._withdraw(guest, track)

    def _withdraw(self, guest: GuestState, track: Track) -> None:
        """Back to idle; the guest hears what it has."""
        track.end()
        track.announce = True

    def _balance(self, kind: Kind, now: float) -> None:
        """Decide the targets of one kind and begin what leads there: free first, then grow."""
        claims = [guest.claim(kind, now, self._stale_seconds) for guest in self._by_name()]
        capacity = self.host.for_guests(kind, len(self.guests))
        targets = allocate(capacity, claims)
        for guest in self._by_name():
            track = guest.tracks[kind]
            track.target = targets[guest.name]
            track.overdue = track.overdue and track.reserved > track.target
            track.reason = judge.explain(guest, track, self._stale_seconds, now)
            if judge.may_shrink(guest, track, self.timing, self._stale_seconds, now):
                self._ask(guest, track, judge.shrink_amount(guest, track), ReclaimStage.ASK, now)
        growing = [
            guest
            for guest in self._by_name()
            if judge.may_grow(guest, guest.tracks[kind], self.timing, self._stale_seconds, now)
        ]
        growing.sort(key=lambda guest: (guest.tracks[kind].reserved / guest.limits.weight.get(kind), guest.name))
        for guest in growing:
            self._grow(guest, guest.tracks[kind], now, capacity)

    def _grow(self, guest: GuestState, track: Track, now: float, capacity: int) -> None:
        if track.phase is Phase.ASKING:
            track.end()
            track.announce = True
        kind, unit = track.kind, guest.unit(track.kind)
        room = max(0, ledger.free(capacity, self._entries(kind)))
        amount = min(track.target, self._without_asking(guest, track, capacity) + round_down(room, unit))
        if kind is Kind.CPU:
            amount = round_down(amount, unit)
        if amount <= track.reserved:
            return
        plugged = guest.vm.plugged(kind) if guest.vm else 0
        track.begin(Phase.PLUGGING, amount, now, self.timing.plug_progress_seconds, plugged)
        guest.revision += 1
        track.order = self._order(guest)
        self._reserve(guest, track, amount)
        self._log(guest, kind, f"growing to {kind.show(amount)}: {track.reason.text}")
        self._out.append(self._request(guest.name, kind, amount))
        track.announce = False
        self._out.append(Send(guest.name, guest.session, Grant(track.order, kind, amount, GrantStage.OFFERED)))

    def _without_asking(self, guest: GuestState, track: Track, capacity: int) -> int:
        """What is the guest's own in any case: its minimum, as far as nobody else holds what backs it (a
        minimum that was just raised may still be lent to others).
        """
        low = guest.limits.min.get(track.kind)
        unlent = max(0, capacity - sum(entry.reserved for entry in self._entries(track.kind)))
        if track.reserved + unlent >= low:
            return max(track.reserved, low)
        return track.reserved + round_down(unlent, guest.unit(track.kind))

    def _ask(self, guest: GuestState, track: Track, amount: int, stage: ReclaimStage, now: float) -> None:
        if stage is ReclaimStage.ASK:
            guest.revision += 1
            track.order = self._order(guest)
            self._log(guest, track.kind, f"asking down to {track.kind.show(amount)}: {track.reason.text}")
        if track.order is None:
            return
        seconds = {
            ReclaimStage.ASK: self.timing.ask_seconds,
            ReclaimStage.URGE: self.timing.urge_seconds,
            ReclaimStage.OVERDUE: self.timing.overdue_seconds,
        }[stage]
        order, track.stage = track.order, stage
        track.begin(Phase.ASKING, amount, now, seconds, track.reserved)
        track.order = order
        message = Reclaim(order, track.kind, amount, stage, seconds, track.reason)
        self._out.append(Send(guest.name, guest.session, message))

    def _announce(self, guest: GuestState, track: Track) -> None:
        """Tell the guest its grant where it may not know it: after hello, and when a resize ended."""
        if not (track.announce and guest.connected and guest.vm is not None and guest.vm_fresh):
            return
        if guest.vm.status is not VmStatus.RUNNING or track.phase in (Phase.ASKING, Phase.UNPLUGGING):
            return
        track.announce = False
        guest.revision += 1
        plugging = track.phase is Phase.PLUGGING
        order = self._order(guest)
        if plugging:
            track.order = order
        stage = GrantStage.OFFERED if plugging else GrantStage.SETTLED
        self._out.append(Send(guest.name, guest.session, Grant(order, track.kind, track.reserved, stage)))

    # ---- small parts -----------------------------------------------------------------------------

    @property
    def _stale_seconds(self) -> float:
        return self.timing.stale_heartbeats * self.heartbeat_seconds

    def free(self, kind: Kind) -> int:
        """What can be granted above minimums now."""
        capacity = self.host.for_guests(kind, len(self.guests))
        return max(0, ledger.free(capacity, self._entries(kind)))

    def _entries(self, kind: Kind) -> list[ledger.Entry]:
        return [ledger.Entry(guest.tracks[kind].reserved, guest.limits.min.get(kind)) for guest in self.guests.values()]

    def _reserve(self, guest: GuestState, track: Track, amount: int) -> None:
        if amount != track.reserved:
            track.reserved = amount
            self._out.append(Record(guest.name, guest.reserved, guest.revision))

    def _request(self, name: str, kind: Kind, amount: int) -> RequestVcpus | RequestMemory:
        if kind is Kind.CPU:
            return RequestVcpus(name, amount // MILLICORES_PER_VCPU)
        return RequestMemory(name, amount)

    def _order(self, guest: GuestState) -> OrderId:
        self._last_request += 1
        return OrderId(self.epoch, self._last_request, guest.revision)

    def _heard(self, guest: GuestState, now: float) -> None:
        guest.last_seen = now

    def _speaking(self, name: str, session: int) -> GuestState | None:
        guest = self.guests.get(name)
        return guest if guest is not None and session and guest.session == session else None

    def _guest(self, name: str) -> GuestState:
        if name not in self.guests:
            raise NotFoundError(f"no guest named {name!r}")
        return self.guests[name]

    def _limits(self) -> dict[str, Limits]:
        return {name: guest.limits for name, guest in self.guests.items()}

    def _by_name(self) -> list[GuestState]:
        return [self.guests[name] for name in sorted(self.guests)]

    def _log(self, guest: GuestState, kind: Kind, text: str) -> None:
        self._out.append(Log(guest.name, kind, text))
