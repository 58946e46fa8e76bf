"""Who is served, by which limits, and what an operator may ask of it: the operator's half of the machine.

Like events, an operator's changes only change what is known; `BrokerMachine` decides about it.
"""

from collections.abc import Mapping

from guestd.broker.core import judge, ledger, lend
from guestd.broker.core.actions import Observe
from guestd.broker.core.advice import Case
from guestd.broker.core.alarms import Alarms
from guestd.broker.core.expect import Expectation
from guestd.broker.core.explain import explain_resource, explain_target
from guestd.broker.core.guest import GuestState
from guestd.broker.core.inputs import PoolFacts, known_inputs
from guestd.broker.core.reclaim import reclaim
from guestd.broker.core.resize import Resizer
from guestd.broker.core.shares import Shares
from guestd.broker.core.track import Phase, Timing
from guestd.model.errors import AdmissionError, NotFoundError
from guestd.model.event import DecisionInputs
from guestd.model.explanation import ReclaimedResource, ReclaimRequest, ResourceExplanation
from guestd.model.resources import Kind, Limits, Resources


class Roster:
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
        self._resizer = Resizer(epoch, self.timing)
        self._observed: set[str] = set()
        self._shares = self._new_shares()
        self._last_session = 0
        self._touched: set[str] = set()  # something happened to them
        self._hungry: dict[Kind, set[str]] = {kind: set() for kind in Kind}  # wait for what is not free yet
        self._expectations = {kind: Expectation() for kind in Kind}
        self._plenty = dict.fromkeys(Kind, True)
        self._alarms = Alarms()

    # ---- changes ---------------------------------------------------------------------------------

    def add_guest(
        self,
        name: str,
        limits: Limits,
        reserved: Resources | None = None,
        revision: int = 0,
        credit: Resources | None = None,
        park: bool = False,
        observe: bool = False,
    ) -> None:
        """Take a guest in, only to `observe` it or to serve it. `reserved`, `revision` and burst `credit` come from the
        journal; what is reserved holds until the hypervisor speaks. Nothing is recorded of an observed guest: until
        then the most is charged for it that it may have. Without a `credit` the buckets are full.

        :raise AdmissionError: When its minimum does not fit.
        """
        for kind, book in self._resizer.books.items():
            ledger.check_minimums(self.host, kind, book.minimums + limits.min.get(kind), len(book) + 1)
        guest = GuestState(name, limits, park, observed=observe, revision=revision, saved_credit=credit)
        for kind in Kind:
            track = guest.tracks[kind]
            track.reserved = max((reserved or Resources()).get(kind), limits.ceiling(kind) if observe else 0)
            self._resizer.books[kind].put(name, track.reserved, limits.min.get(kind))
        guest.look_at_bounds()
        self.guests[name] = guest
        self._touched.add(name)
        self._resizer.out.append(Observe(name))
        if observe:
            self._rehearse(name, True)

    def remove_guest(self, name: str) -> None:
        """Forget a guest; its VM stays as it is.

        :raise NotFoundError: When there is none of that name.
        """
        self._guest(name)
        del self.guests[name]
        self._touched.discard(name)
        self._alarms.set(name, None)
        self._rehearse(name, False)
        for kind in Kind:
            self._resizer.books[kind].remove(name)
            self._shares[kind].remove(name)
            self._hungry[kind].discard(name)
            self._expectations[kind].forget(name)

    def set_limits(self, name: str, limits: Limits) -> None:
        """New limits, effective with the next actions.

        :raise NotFoundError: When there is none of that name.
        :raise AdmissionError: When the minimums no longer fit, with the numbers.
        """
        guest = self._guest(name)
        for kind, book in self._resizer.books.items():
            minimums = book.minimums - guest.limits.min.get(kind) + limits.min.get(kind)
            ledger.check_minimums(self.host, kind, minimums, len(book))
        self._adopt(guest, limits)

    def set_host(self, host: ledger.HostCapacity, limits: Mapping[str, Limits]) -> None:
        """Another capacity, with the limits that are to hold in it, all at once: a minimum may move from one
        guest to another. Guests that are not known (yet) count for admission.

        :raise AdmissionError: When the minimums don't fit; nothing is changed.
        """
        ledger.admit(host, limits)
        taxed_anew = host.idle_tax != self.host.idle_tax
        self.host = host
        if taxed_anew:
            self._shares = self._new_shares()
        for name, guest in self.guests.items():
            self._adopt(guest, limits.get(name, guest.limits))

    def _adopt(self, guest: GuestState, limits: Limits) -> None:
        for kind in Kind:
            track = guest.tracks[kind]
            lend.flow(guest, track, self._resizer.now)
            self._resizer.books[kind].put(guest.name, track.reserved, limits.min.get(kind))
        guest.limits = limits
        guest.look_at_bounds()
        self._touched.add(guest.name)

    def pause(self, name: str, paused: bool) -> None:
        """Stop or resume decisions about a guest.

        :raise NotFoundError: When there is none of that name.
        """
        self._guest(name).paused = paused
        self._touched.add(name)

    def set_park(self, name: str, park: bool) -> None:
        """Leave a guest's vCPUs plugged from now on, or not, see `GuestState.park`.

        :raise NotFoundError: When there is none of that name.
        """
        self._guest(name).park = park
        self._touched.add(name)

    def observe(self, name: str, observed: bool) -> None:
        """Only watch a guest from now on, or serve it (again). What is under way is let go of.

        :raise NotFoundError: When there is none of that name.
        """
        guest = self._guest(name)
        if guest.observed is not observed:
            guest.observed = observed
            self._rehearse(name, observed)
            (self._resizer.let_go if observed else self._resizer.take_over)(guest)
            self._touched.add(name)

    def _rehearse(self, name: str, observed: bool) -> None:
        """Have what observed guests would get found as long as there are any: among all."""
        first = observed and not self._observed
        (self._observed.add if observed else self._observed.discard)(name)
        for shares in self._shares.values():
            shares.rehearse(bool(self._observed))
        if first:
            self._touched.update(self.guests)

    def reclaim(self, name: str, request: ReclaimRequest, now: float) -> tuple[ReclaimedResource, ...]:
        """Take back what a guest does not need, now; CPU and memory, in this order. See `reclaim.py`.

        :raise NotFoundError: When there is none of that name.
        :raise AdmissionError: When nothing can be decided about it now, and why.
        """
        guest, stale, dry_run = self._guest(name), self._stale_seconds, request.dry_run
        why = guest.why_unclear(now, stale) if dry_run else guest.why_fixed(now, stale)
        if why is not None or guest.demand is None:
            raise AdmissionError(f"nothing can be reclaimed from guest {name!r} now: {why}")
        self._resizer.now = now
        if not dry_run:
            self._touched.add(name)
        at_most = {Kind.CPU: request.cpu_millicores, Kind.MEMORY: request.memory_bytes}
        return tuple(
            reclaim(self._resizer, guest, guest.demand, track, at_most[kind], dry_run)
            for kind, track in guest.tracks.items()
        )

    # ---- what is known ---------------------------------------------------------------------------

    @property
    def _stale_seconds(self) -> float:
        return self.timing.stale_heartbeats * self.heartbeat_seconds

    def explain(self, name: str, now: float) -> None:
        """Bring the reasons of a guest's targets up to date.

        :raise NotFoundError: When there is none of that name.
        """
        guest = self._guest(name)
        for kind, track in guest.tracks.items():
            plenty, scarce = self._plenty[kind], self._shares[kind].scarce
            track.reason = explain_target(guest, track, self._stale_seconds, now, plenty, scarce)

    def at_rest(self, name: str, kind: Kind) -> bool:
        """Whether nothing is under way, and nothing will begin until something changes: it has its target, or is left
        at what it has.

        :raise NotFoundError: When there is none of that name.
        """
        guest = self._guest(name)
        track = guest.tracks[kind]
        if track.phase is not Phase.IDLE or track.overdue or name in self._touched:
            return False
        left = judge.is_left(guest, track, self._plenty[kind], self._shares[kind].scarce)
        return track.target == track.reserved or left

    def free(self, kind: Kind) -> int:
        """What can be granted above minimums now."""
        return max(0, self.host.for_guests(kind, len(self.guests)) - self._resizer.books[kind].charged)

    def scarce(self, kind: Kind) -> bool:
        """Whether some guest does not get what it needs and may have."""
        return self._shares[kind].scarce

    def inputs(self, name: str, kind: Kind) -> DecisionInputs:
        """What a decision about a guest is made from now.

        :raise NotFoundError: When there is none of that name.
        """
        guest = self._guest(name)
        return known_inputs(guest, guest.tracks[kind], self._facts(kind), self._resizer.books[kind])

    def explain_resource(self, name: str, kind: Kind, now: float) -> ResourceExplanation:
        """Why a guest has what it has of one kind, and what it would take to get more.

        :raise NotFoundError: When there is none of that name.
        """
        self.explain(name, now)
        guest = self._guest(name)
        inputs, others = self.inputs(name, kind), self.guests.values()
        return explain_resource(Case(guest, guest.tracks[kind], inputs, self.timing, self._stale_seconds, now, others))

    def _facts(self, kind: Kind) -> PoolFacts:
        shares, capacity = self._shares[kind], self.host.for_guests(kind, len(self.guests))
        return PoolFacts(capacity, shares.scarce, shares.scarce_if_served, shares.idle_tax)

    def _new_shares(self) -> dict[Kind, Shares]:
        taxes = {Kind.CPU: 0.0, Kind.MEMORY: self.host.idle_tax}
        return {kind: Shares(kind, tax, bool(self._observed)) for kind, tax in taxes.items()}

    def _guest(self, name: str) -> GuestState:
        if name not in self.guests:
            raise NotFoundError(f"no guest named {name!r}")
        return self.guests[name]
