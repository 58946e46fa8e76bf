"""What operators see and change: the roster of guests, their limits, pauses, and a reload of the files.

A change is checked by the machine, made durable, and then holds; when it cannot be made durable the machine goes
back to what held before. Changes come one after the other.
"""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from datetime import UTC, datetime

import guestd
from guestd.broker import config as configuration
from guestd.broker.config import BrokerConfig, GuestConfig
from guestd.broker.core.guest import GuestState
from guestd.broker.core.ledger import admit
from guestd.broker.core.machine import BrokerMachine
from guestd.broker.failpoint import Failpoint, reach
from guestd.broker.history.changes import changed_limits_text
from guestd.broker.history.explain import explain_now, explain_past
from guestd.broker.history.store import Store
from guestd.broker.journal import Journal
from guestd.broker.metrics.tally import Tally
from guestd.broker.reload import reloaded
from guestd.broker.view import guest_view, host_view
from guestd.model.errors import AdmissionError, ConfigError, JournalError, NotFoundError
from guestd.model.event import Event, EventCode, EventQuery, SeenEvent
from guestd.model.explanation import GuestExplanation, ReclaimedResource, ReclaimRequest
from guestd.model.history import History
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.view import GuestView, HostView, LimitsChange, LimitsOrigin
from guestd.wire.health import Health

_log = logging.getLogger(__name__)


class Operators(ABC):
    """The operators' half of the engine. Implements `wire.server.OperatorBackend`."""

    machine: BrokerMachine

    def __init__(self, config: BrokerConfig, journal: Journal, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._journal, self._clock = config, journal, clock
        self._guests: dict[str, GuestConfig] = {}
        self._origin: dict[str, tuple[LimitsOrigin, str]] = {}
        self._channels: dict[str, str] = {}
        self._errors: Counter[str] = Counter()
        self.tally = Tally()
        self.health = Health()
        self._subscribers: list[tuple[set[str], asyncio.Event]] = []
        path, most_bytes = config.state_dir / "history.db", config.outlets.history_bytes
        self.store = Store(path, most_bytes, tally=self.tally, changed=self._take_unsampled)
        self._unsampled: set[str] = set()  # guests that changed since history last looked
        self._changing = asyncio.Lock()
        self.started_at = datetime.now(UTC)

    @abstractmethod
    async def _attach(self, guest: GuestConfig) -> None:
        """Listen to the guest and watch its VM."""

    @abstractmethod
    async def _detach(self, name: str) -> None:
        """Let go of a guest; its VM stays as it is."""

    @abstractmethod
    def _observe(self, name: str, observed: bool) -> None:
        """Only observe the guest from now on, or serve it."""

    @abstractmethod
    def _kick(self, *names: str) -> None:
        """Have it decided anew; something about these guests changed."""

    def host_view(self) -> HostView:
        """See `wire.server.OperatorBackend`."""
        return host_view(self.machine, guestd.__version__, self.started_at)

    def guest_names(self) -> list[str]:
        """See `wire.server.OperatorBackend`."""
        return sorted(self.machine.guests)

    def guest_view(self, name: str) -> GuestView:
        """See `wire.server.OperatorBackend`."""
        self._known(name)
        self.machine.explain(name, self._clock())
        return self.guest_numbers(name)

    def guest_numbers(self, name: str) -> GuestView:
        """See `metrics.host.Source`."""
        state = self._known(name)
        origin, detail = self._origin.get(name, (LimitsOrigin.UNKNOWN, ""))
        channel, at_rest = self._channels.get(name, ""), [kind for kind in Kind if self.machine.at_rest(name, kind)]
        return guest_view(state, self._clock(), origin, detail, channel, self._errors[name], at_rest)

    def subscribe(self) -> tuple[set[str], asyncio.Event, Callable[[], None]]:
        """See `wire.server.OperatorBackend`."""
        entry = (set[str](), asyncio.Event())
        self._subscribers.append(entry)
        return (*entry, lambda: self._subscribers.remove(entry))

    async def explain(self, name: str, at: datetime | None) -> GuestExplanation:
        """See `wire.server.OperatorBackend`."""
        self._known(name)
        unknown = False
        if at is None or at >= datetime.now(UTC):
            resources = await explain_now(self.machine, self.store, name, self._clock())
        else:
            resources, unknown = await explain_past(self.store, name, at)
        return GuestExplanation(self.guest_view(name), resources, unknown)

    async def events(self, query: EventQuery) -> tuple[Event, ...]:
        """See `wire.server.OperatorBackend`."""
        return await self.store.events(query)

    def follow_events(self, guest: str, after_id: int) -> AsyncGenerator[SeenEvent, None]:
        """See `wire.server.OperatorBackend`."""
        return self.store.follow(guest, after_id)

    async def history(self, name: str, since: datetime | None, until: datetime | None, max_points: int) -> History:
        """See `wire.server.OperatorBackend`."""
        self._known(name)
        return await self.store.history(name, since, until, max_points)

    async def add_guest(
        self, name: str, limits: Limits, qmp_socket: str, cid: int | None, vsock_path: str | None
    ) -> None:
        """See `wire.server.OperatorBackend`."""
        guest = GuestConfig(name, limits, qmp_socket, cid, vsock_path)
        async with self._changing:
            if name in self._guests:
                raise FileExistsError(f"there is a guest named {name!r} already")
            problems = configuration.problems(guest)
            if problems:
                raise ValueError("; ".join(problems))
            try:
                configuration.check_channels({**self._guests, name: guest})
            except ConfigError as error:
                raise ValueError(str(error)) from error
            self.machine.add_guest(name, limits, park=guest.park_cpus, observe=self._observes(guest))
            reach(Failpoint.ADDING)
            try:
                await self._journal.add_guest(guest)
            except JournalError:
                self.machine.remove_guest(name)
                raise
            reach(Failpoint.ADDED)
            self._origin[name] = self._admin_origin()
            self.store.note(EventCode.OPERATOR, "added", name)
            await self._attach(guest)
        self._kick(name)

    async def remove_guest(self, name: str) -> None:
        """See `wire.server.OperatorBackend`."""
        async with self._changing:
            guest = self._guests.get(name)
            if guest is None:
                raise NotFoundError(f"no guest named {name!r}")
            if guest.origin:
                raise AdmissionError(
                    f"guest {name!r} comes from {guest.origin}; take it out there and reload the broker"
                )
            await self._journal.forget_guest(name)
            await self._remove(name)
        self._kick(name)

    async def change_limits(self, name: str, change: LimitsChange) -> None:
        """See `wire.server.OperatorBackend`."""
        async with self._changing:
            limits = changed_limits(self._known(name).limits, change)
            problems = limits.problems()
            if problems:
                raise ValueError(f"guest {name}: " + "; ".join(problems))
            await self._set_limits(name, limits, self._admin_origin())

    async def reset_limits(self, name: str) -> None:
        """See `wire.server.OperatorBackend`."""
        async with self._changing:
            self._known(name)
            guest = self._guests[name]
            if not guest.origin:
                raise AdmissionError(f"guest {name!r} was added by a call: there is no file to go back to")
            await self._set_limits(name, guest.limits, self._file_origin(guest))

    async def _set_limits(self, name: str, limits: Limits, origin: tuple[LimitsOrigin, str]) -> None:
        before = self._known(name).limits
        self.machine.set_limits(name, limits)
        reach(Failpoint.LIMITING)
        try:
            if origin[0] is LimitsOrigin.ADMIN:
                await self._journal.set_limits(name, limits, origin[1])
            else:
                await self._journal.reset_limits(name)
        except JournalError:
            self.machine.set_limits(name, before)
            raise
        reach(Failpoint.LIMITED)
        self._origin[name] = origin
        self._note_limits(name, "set" if origin[0] is LimitsOrigin.ADMIN else "reset to the file's", before, limits)
        self._kick(name)

    async def pause_guest(self, name: str, paused: bool) -> None:
        """See `wire.server.OperatorBackend`."""
        async with self._changing:
            self._known(name)
            await self._journal.set_paused(name, paused)
            self.machine.pause(name, paused)
            self.store.note(EventCode.OPERATOR, "paused" if paused else "resumed", name)
        self._kick(name)

    async def reclaim_guest(self, name: str, request: ReclaimRequest) -> tuple[ReclaimedResource, ...]:
        """See `wire.server.OperatorBackend`."""
        self._known(name)
        reclaimed = self.machine.reclaim(name, request, self._clock())
        if not request.dry_run:
            for one in reclaimed:
                shown = f"{one.kind.show(one.reserved)} -> {one.kind.show(one.goal)}: {one.reason.text}"
                text, amounts = f"an operator reclaims: {shown}", (one.reserved, one.goal)
                self.store.note(EventCode.OPERATOR, text, name, one.kind, *amounts, reason=one.reason)
            self._kick(name)
        return reclaimed

    async def reload(self, config: BrokerConfig) -> list[str]:
        """Take over another configuration: guests come, go and change without dropping a stream. Returns what of it
        takes a restart.

        What operators set for a guest that is no longer in the files is forgotten with it.

        :raise ConfigError: When two guests share a channel; nothing is changed.
        :raise AdmissionError: When it does not fit; nothing is changed.
        :raise JournalError: When what goes cannot be forgotten.
        """
        async with self._changing:
            added = {name: guest for name, guest in self._guests.items() if not guest.origin}
            wanted = {**added, **config.guests}
            configuration.check_channels(wanted)
            gone = sorted(set(self._guests) - set(wanted))
            limits = {
                name: self.machine.guests[name].limits
                if self._origin.get(name, (None, ""))[0] is LimitsOrigin.ADMIN and name in self.machine.guests
                else guest.limits
                for name, guest in wanted.items()
            }
            admit(config.host, limits)
            for name in gone:
                await self._journal.forget_guest(name)
            for name in gone:
                await self._remove(name)
            for name, state in self.machine.guests.items():
                self._note_limits(name, "changed by a reload", state.limits, limits[name])
            self.machine.set_host(config.host, limits)
            self._config, late = reloaded(self._config, config)
            for name, guest in sorted(wanted.items()):
                await self._take_over(guest, limits[name])
            self._kick(*gone, *self._guests)
            return late

    async def _take_over(self, guest: GuestConfig, limits: Limits) -> None:
        known = self._guests.get(guest.name)
        if known is None:
            self.machine.add_guest(guest.name, limits, park=guest.park_cpus, observe=self._observes(guest))
            self._origin[guest.name] = self._file_origin(guest)
            self.store.note(EventCode.OPERATOR, "added by a reload", guest.name)
            await self._attach(guest)
            return
        self.machine.set_park(guest.name, guest.park_cpus)
        self.machine.set_limits(guest.name, limits)
        if self._origin[guest.name][0] is not LimitsOrigin.ADMIN:
            self._origin[guest.name] = self._file_origin(guest)
        same = ("qmp_socket", "cid", "vsock_path", "vsock_privileged_ports")
        if any(getattr(known, field) != getattr(guest, field) for field in same):
            await self._detach(guest.name)
            await self._attach(guest)
        else:
            self._guests[guest.name] = guest
        self._observe(guest.name, self._observes(guest))

    async def _remove(self, name: str) -> None:
        await self._detach(name)
        self.machine.remove_guest(name)
        for known in (self._origin, self._channels, self._errors):
            known.pop(name, None)
        self.store.note(EventCode.OPERATOR, "removed", name)
        self.store.forget(name)

    def _note_limits(self, name: str, how: str, before: Limits, after: Limits) -> None:
        changes = changed_limits_text(before, after)
        if changes:
            self.store.note(EventCode.OPERATOR, f"limits {how}: {changes}", name)

    def _observes(self, guest: GuestConfig) -> bool:
        return self._config.observe or guest.observe

    def _known(self, name: str) -> GuestState:
        state = self.machine.guests.get(name)
        if state is None:
            raise NotFoundError(f"no guest named {name!r}")
        return state

    def _file_origin(self, guest: GuestConfig) -> tuple[LimitsOrigin, str]:
        return (LimitsOrigin.FILE, guest.origin) if guest.origin else (LimitsOrigin.ADMIN, "added by a call")

    def _admin_origin(self) -> tuple[LimitsOrigin, str]:
        return (LimitsOrigin.ADMIN, datetime.now(UTC).isoformat(timespec="seconds"))

    def _take_unsampled(self) -> list[GuestState]:
        names, self._unsampled = self._unsampled, set()
        return [self.machine.guests[name] for name in names if name in self.machine.guests]

    def _changed(self, *names: str) -> None:
        self._unsampled.update(names)
        for changed, event in self._subscribers:
            changed.update(names)
            event.set()


def changed_limits(limits: Limits, change: LimitsChange) -> Limits:
    """The limits with that change. A burst that is taken away (0) takes its credit and refill along, one that is new
    gets the usual ones.
    """

    def pick(cpu: int | None, memory: int | None, old: Resources) -> Resources:
        return Resources(
            old.cpu_millicores if cpu is None else cpu,
            old.memory_bytes if memory is None else memory,
        )

    burst = pick(change.cpu_burst_millicores, change.memory_burst_bytes, limits.burst)
    maximum = pick(change.cpu_max_millicores, change.memory_max_bytes, limits.max)
    credit, refill = limits.burst_credit, limits.burst_refill
    for kind in Kind:
        if burst.get(kind) == 0:
            usual = 0, 0
        elif limits.burst.get(kind) == 0:
            usual = Limits.usual_burst(maximum.get(kind), burst.get(kind))
        else:
            continue
        credit, refill = credit.with_(kind, usual[0]), refill.with_(kind, usual[1])
    return Limits(
        pick(change.cpu_min_millicores, change.memory_min_bytes, limits.min),
        maximum,
        pick(change.cpu_weight, change.memory_weight, limits.weight),
        burst,
        pick(change.cpu_burst_credit, change.memory_burst_credit, credit),
        pick(change.cpu_burst_refill, change.memory_burst_refill, refill),
    )
