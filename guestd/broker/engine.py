"""The broker around its core: carries out what the machine decides, and tells it what came of it.

One loop: wait until something happened or the machine's alarm, ask for the next actions, make durable
what is to be recorded, then do the rest. Nothing is done whose record could not be written.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import guestd
from guestd.broker import config as configuration
from guestd.broker.config import BrokerConfig, GuestConfig
from guestd.broker.core.actions import Action, HypervisorAction, Log, Record, Send
from guestd.broker.core.guest import GuestState
from guestd.broker.core.ledger import admit
from guestd.broker.core.machine import BrokerMachine
from guestd.broker.core.track import Timing
from guestd.broker.hypervisor.base import Vm
from guestd.broker.journal import Journal
from guestd.broker.session import Session
from guestd.broker.view import guest_view, host_view
from guestd.broker.worker import VmWorker, is_unknown
from guestd.model.errors import (
    AdmissionError,
    ConfigError,
    HypervisorError,
    JournalError,
    NotFoundError,
    SupersededError,
)
from guestd.model.messages import Ack, Demand, GuestMessage, Heartbeat, Hello
from guestd.model.resources import Limits, Resources
from guestd.model.view import GuestView, HostView, LimitsChange, LimitsOrigin
from guestd.model.vm import VmState
from guestd.wire.relay import IngressRelay, Peer

_log = logging.getLogger(__name__)
_COALESCE_SECONDS = 0.005
_JOURNAL_RETRY_SECONDS = 1.0


class Engine:
    """All guests of this host, alive. Implements the backends of the wire's services.

    :param make_vm: makes the hypervisor's side of a guest.
    """

    def __init__(
        self,
        config: BrokerConfig,
        journal: Journal,
        make_vm: Callable[[GuestConfig], Vm],
        relay: IngressRelay,
        timing: Timing | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._journal, self._make_vm, self._relay = config, journal, make_vm, relay
        self._timing, self._clock = timing, clock
        self._guests: dict[str, GuestConfig] = {}
        self._origin: dict[str, tuple[LimitsOrigin, str]] = {}
        self._workers: dict[str, VmWorker] = {}
        self._sessions: dict[str, tuple[int, Session]] = {}
        self._channels: dict[str, str] = {}
        self._errors: Counter[str] = Counter()
        self._subscribers: list[tuple[set[str], asyncio.Event]] = []
        self._wake = asyncio.Event()
        self._changing = asyncio.Lock()
        self._loop_task: asyncio.Task[None] | None = None
        self.started_at = datetime.now(UTC)
        self.machine: BrokerMachine

    # ---- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the journal, take in the guests, and begin.

        :raise JournalError: When the journal cannot be used.
        :raise ConfigError: When a guest that was added by a call has another's channel.
        :raise AdmissionError: When the guests' minimums do not fit.
        """
        saved = await self._journal.open()
        self.machine = BrokerMachine(self._config.host, saved.epoch, self._config.heartbeat_seconds, self._timing)
        guests = {**saved.added, **self._config.guests}
        configuration.check_channels(guests)
        by_call = self._fitting(guests, {name: limits for name, (limits, _) in saved.limits.items() if name in guests})
        for guest in guests.values():
            limits, origin = guest.limits, self._file_origin(guest)
            if guest.name in by_call:
                limits, origin = by_call[guest.name], (LimitsOrigin.ADMIN, saved.limits[guest.name][1])
            reserved, revision = saved.reserved.get(guest.name, (Resources(), 0))
            self.machine.add_guest(guest.name, limits, reserved, revision)
            self.machine.pause(guest.name, guest.name in saved.paused)
            self._origin[guest.name] = origin
            await self._attach(guest)
        self._loop_task = asyncio.create_task(self._run())

    def _fitting(self, guests: dict[str, GuestConfig], by_call: dict[str, Limits]) -> dict[str, Limits]:
        """Limits set by calls, without those that do not fit any more: the host may have shrunk since, and a
        broker that does not start serves nobody.

        :raise AdmissionError: When even the files' own limits don't fit.
        """
        kept = dict(by_call)
        while True:
            try:
                admit(self._config.host, {name: kept.get(name, guest.limits) for name, guest in guests.items()})
            except AdmissionError as error:
                if not kept:
                    raise
                name = max(kept)
                _log.error("%s: limits set by a call do not fit any more, its file's hold: %s", name, error)
                del kept[name]
            else:
                return kept

    async def stop(self) -> None:
        """Stop deciding and let go of all VMs, which stay as they are."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop_task
        for name in list(self._workers):
            await self._workers.pop(name).close()
        await self._journal.close()

    async def wait(self) -> None:
        """Until the loop ends, which it does only by an error that nobody foresaw."""
        if self._loop_task is not None:
            await self._loop_task

    async def reload(self, config: BrokerConfig) -> None:
        """Take over another configuration: guests come, go and change without dropping a stream.

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
                await self._detach(name)
                self.machine.remove_guest(name)
            self.machine.set_host(config.host, limits)
            self._config = config
            for name, guest in sorted(wanted.items()):
                await self._take_over(guest, limits[name])
            self._kick(*gone, *self._guests)

    async def _take_over(self, guest: GuestConfig, limits: Limits) -> None:
        known = self._guests.get(guest.name)
        if known is None:
            self.machine.add_guest(guest.name, limits)
            self._origin[guest.name] = self._file_origin(guest)
            await self._attach(guest)
            return
        self.machine.set_limits(guest.name, limits)
        if self._origin[guest.name][0] is not LimitsOrigin.ADMIN:
            self._origin[guest.name] = self._file_origin(guest)
        same = ("qmp_socket", "cid", "vsock_path", "vsock_privileged_ports")
        if any(getattr(known, field) != getattr(guest, field) for field in same):
            await self._detach(guest.name)
            await self._attach(guest)
        else:
            self._guests[guest.name] = guest

    async def _attach(self, guest: GuestConfig) -> None:
        """Listen to the guest and watch its VM."""
        self._guests[guest.name] = guest
        if guest.vsock_path is not None:
            path = Path(f"{guest.vsock_path}_{self._config.port}")
            try:
                self._relay.listen_unix(guest.name, path, guest.vsock_privileged_ports)
            except OSError as error:
                _log.error("guest %s cannot be listened to: %s; it is left as it is", guest.name, error)
        worker = VmWorker(
            self._make_vm(guest), partial(self._on_state, guest.name), partial(self._on_failed, guest.name), guest.name
        )
        self._workers[guest.name] = worker
        await worker.start()
        self._changed(guest.name)

    async def _detach(self, name: str) -> None:
        """Let go of a guest. Its stream ends: the channel that it came by may be another's from now on."""
        session = self._sessions.get(name)
        if session is not None:
            session[1].end(SupersededError("the broker no longer serves this VM here"))
        await self._relay.stop_listening(name)
        await self._workers.pop(name).close()
        del self._guests[name]

    def guest_of_cid(self, cid: int) -> str | None:
        """Whose context id it is."""
        return next((guest.name for guest in self._guests.values() if guest.cid == cid), None)

    # ---- the loop --------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await self._sleep()
            self._wake.clear()
            actions = self.machine.next_actions(self._clock())
            await self._record([action for action in actions if isinstance(action, Record)])
            for action in actions:
                self._perform(action)

    async def _sleep(self) -> None:
        """Until something happened or the machine's alarm; what happens together is decided together."""
        now = self._clock()
        alarm = self.machine.wake_at(now)
        timeout = None if alarm is None else max(_COALESCE_SECONDS, alarm - now)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._wake.wait()
        await asyncio.sleep(_COALESCE_SECONDS)

    async def _record(self, records: list[Record]) -> None:
        """Make it durable; while that fails, nothing is decided and all guests keep what they have."""
        known = [record for record in records if record.guest in self._guests]
        while known:
            try:
                await self._journal.record(known)
            except JournalError as error:
                _log.error("%s; guests keep what they have, trying again", error)
                await asyncio.sleep(_JOURNAL_RETRY_SECONDS)
            else:
                return

    def _perform(self, action: Action) -> None:
        match action:
            case Record():
                self._changed(action.guest)
            case Send():
                session = self._sessions.get(action.guest)
                if session is not None and session[0] == action.session:
                    session[1].put(action.message)
            case Log():
                _log.info("%s %s: %s", action.guest, action.kind, action.text)
                self._changed(action.guest)
            case _:
                worker = self._workers.get(action.guest)
                if worker is not None:
                    worker.submit(action)

    def _on_state(self, name: str, state: VmState) -> None:
        guest = self.machine.guests.get(name)
        if guest is not None and (guest.vm is None or guest.vm.status is not state.status):
            _log.info("%s: VM is %s", name, state.status)
        if guest is None or guest.vm != state or not guest.vm_fresh:
            self.machine.on_vm_state(name, state, self._clock())
            self._kick(name)

    def _on_failed(self, name: str, action: HypervisorAction, error: HypervisorError) -> None:
        self.machine.on_vm_failed(name, action, str(error), is_unknown(error), self._clock())
        self._kick(name)

    def _kick(self, *names: str) -> None:
        self._wake.set()
        self._changed(*names)

    # ---- guests ----------------------------------------------------------------------------------

    def connect(self, peer: Peer, hello: Hello) -> tuple[int, Session]:
        """See `wire.server.GuestBackend`."""
        now = self._clock()
        number, welcome = self.machine.on_connected(peer.guest, hello, now)
        old = self._sessions.get(peer.guest)
        if old is not None:
            old[1].end(SupersededError("a newer stream of this VM took over"))
        session = Session(welcome, now)
        self._sessions[peer.guest] = (number, session)
        self._channels[peer.guest] = peer.channel
        _log.info("%s: guest daemon %s connected (%s)", peer.guest, hello.identity.agent_version, peer.channel)
        self._kick(peer.guest)
        return number, session

    def receive(self, peer: Peer, session: int, message: GuestMessage) -> None:
        """See `wire.server.GuestBackend`."""
        now = self._clock()
        known = self._sessions.get(peer.guest)
        if known is None or known[0] != session:
            return
        known[1].count(now)
        match message:
            case Demand():
                self.machine.on_demand(peer.guest, session, message, now)
            case Ack():
                self.machine.on_ack(peer.guest, session, message, now)
            case Heartbeat():
                self.machine.on_heartbeat(peer.guest, session, message, now)
                known[1].put(Heartbeat())
            case Hello():
                pass  # the service lets only the first through, to `connect`
        self._kick(peer.guest)

    def disconnect(self, peer: Peer, session: int) -> None:
        """See `wire.server.GuestBackend`."""
        self.machine.on_disconnected(peer.guest, session)
        if self._sessions.get(peer.guest, (0, None))[0] == session:
            del self._sessions[peer.guest]
            _log.info("%s: guest daemon is away", peer.guest)
        self._kick(peer.guest)

    def count_protocol_error(self, peer: Peer) -> None:
        """See `wire.server.GuestBackend`."""
        self._errors[peer.guest] += 1
        self._changed(peer.guest)

    # ---- operators -------------------------------------------------------------------------------

    def host_view(self) -> HostView:
        """See `wire.server.OperatorBackend`."""
        return host_view(self.machine, guestd.__version__, self.started_at)

    def guest_names(self) -> list[str]:
        """See `wire.server.OperatorBackend`."""
        return sorted(self.machine.guests)

    def guest_view(self, name: str) -> GuestView:
        """See `wire.server.OperatorBackend`."""
        state = self._known(name)
        origin, detail = self._origin.get(name, (LimitsOrigin.UNKNOWN, ""))
        return guest_view(state, self._clock(), origin, detail, self._channels.get(name, ""), self._errors[name])

    def subscribe(self) -> tuple[set[str], asyncio.Event, Callable[[], None]]:
        """See `wire.server.OperatorBackend`."""
        entry = (set[str](), asyncio.Event())
        self._subscribers.append(entry)
        return (*entry, lambda: self._subscribers.remove(entry))

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
            self.machine.add_guest(name, limits)
            try:
                await self._journal.add_guest(guest)
            except JournalError:
                self.machine.remove_guest(name)
                raise
            self._origin[name] = self._admin_origin()
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
            await self._detach(name)
            self.machine.remove_guest(name)
        self._kick(name)

    async def change_limits(self, name: str, change: LimitsChange) -> None:
        """See `wire.server.OperatorBackend`."""
        async with self._changing:
            limits = _changed_limits(self._known(name).limits, change)
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
        try:
            if origin[0] is LimitsOrigin.ADMIN:
                await self._journal.set_limits(name, limits, origin[1])
            else:
                await self._journal.reset_limits(name)
        except JournalError:
            self.machine.set_limits(name, before)
            raise
        self._origin[name] = origin
        self._kick(name)

    async def pause_guest(self, name: str, paused: bool) -> None:
        """See `wire.server.OperatorBackend`."""
        async with self._changing:
            self._known(name)
            await self._journal.set_paused(name, paused)
            self.machine.pause(name, paused)
        self._kick(name)

    def _known(self, name: str) -> GuestState:
        state = self.machine.guests.get(name)
        if state is None:
            raise NotFoundError(f"no guest named {name!r}; `guestctl status` lists them")
        return state

    def _file_origin(self, guest: GuestConfig) -> tuple[LimitsOrigin, str]:
        return (LimitsOrigin.FILE, guest.origin) if guest.origin else (LimitsOrigin.ADMIN, "added by a call")

    def _admin_origin(self) -> tuple[LimitsOrigin, str]:
        return (LimitsOrigin.ADMIN, datetime.now(UTC).isoformat(timespec="seconds"))

    def _changed(self, *names: str) -> None:
        for changed, event in self._subscribers:
            changed.update(names)
            event.set()


def _changed_limits(limits: Limits, change: LimitsChange) -> Limits:
    def pick(new: int | None, old: int) -> int:
        return old if new is None else new

    return Limits(
        Resources(
            pick(change.cpu_min_millicores, limits.min.cpu_millicores),
            pick(change.memory_min_bytes, limits.min.memory_bytes),
        ),
        Resources(
            pick(change.cpu_max_millicores, limits.max.cpu_millicores),
            pick(change.memory_max_bytes, limits.max.memory_bytes),
        ),
        Resources(
            pick(change.cpu_weight, limits.weight.cpu_millicores),
            pick(change.memory_weight, limits.weight.memory_bytes),
        ),
    )
