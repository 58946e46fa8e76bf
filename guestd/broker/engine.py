"""The broker around its core: carries out what the machine decides, and tells it what came of it.

One loop: wait until something happened or the machine's alarm, ask for the next actions, make durable
what is to be recorded in one commit, then do the rest. Nothing is done whose record could not be written. While a
commit is under way events only accumulate: the next round decides them all together.
"""

import asyncio
import contextlib
import gc
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import guestd
from guestd.broker import config as configuration
from guestd.broker.config import BrokerConfig, GuestConfig
from guestd.broker.core.actions import Action, HypervisorAction, Log, Observe, Record, Send
from guestd.broker.core.ledger import admit
from guestd.broker.core.track import Timing
from guestd.broker.failpoint import Failpoint, reach
from guestd.broker.hypervisor.base import Vm
from guestd.broker.journal import Journal, SavedGuest
from guestd.broker.operator import Operators
from guestd.broker.record.recorder import Recorder
from guestd.broker.session import CONNECTION_MESSAGES, Allowance, Session
from guestd.broker.worker import VmWorker, is_unknown
from guestd.model.errors import AdmissionError, FloodError, HypervisorError, JournalError, SupersededError
from guestd.model.event import EventCode
from guestd.model.messages import Ack, Demand, GuestMessage, Heartbeat, Hello
from guestd.model.resources import Limits
from guestd.model.view import LimitsOrigin
from guestd.model.vm import VmState
from guestd.wire.relay import IngressRelay, Peer

_log = logging.getLogger(__name__)
_GATHER_MIN_SECONDS = 0.005
_GATHER_MAX_SECONDS = 0.020
_JOURNAL_RETRY_SECONDS = 1.0
_MANY = 500
_CALM_SECONDS = 0.5  # without a new stream: while they come, there are better things to do than to tidy up


class Engine(Operators):
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
        super().__init__(config, journal, clock)
        self._make_vm, self._relay, self._timing = make_vm, relay, timing
        self._workers: dict[str, VmWorker] = {}
        self._sessions: dict[str, tuple[int, Session]] = {}
        self._allowance: dict[str, Allowance] = {}
        self._by_cid: dict[int, str] = {}
        self._complaint: dict[str, str] = {}  # what was last said about a VM that cannot be asked
        self._wake = asyncio.Event()
        self._next_round = 0.0  # of the loop's clock: not before, so that what happens meanwhile is decided together
        self._begun = 0  # guests and streams that are new to the garbage collector
        self._begun_at = 0.0
        self._loop_task: asyncio.Task[None] | None = None
        directory, most_bytes = config.state_dir / "record", config.outlets.record_bytes
        self._recorder = Recorder(directory, most_bytes, clock, tally=self.tally, told=self._note_from_thread)
        self._loop: asyncio.AbstractEventLoop | None = None

    # ---- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the journal, take in the guests, and begin.

        :raise JournalError: When the journal cannot be used.
        :raise ConfigError: When a guest that was added by a call has another's channel.
        :raise AdmissionError: When the guests' minimums do not fit.
        """
        self._loop = asyncio.get_running_loop()
        saved = await self._journal.open()
        guests = {**saved.added, **self._config.guests}
        configuration.check_channels(guests)
        by_call = self._fitting(guests, {name: limits for name, (limits, _) in saved.limits.items() if name in guests})
        await self.store.start()  # before the record, whose troubles are events
        self.machine = self._recorder.machine(
            self._config.host, saved.epoch, self._config.heartbeat_seconds, self._timing
        )
        for guest in guests.values():
            limits, origin = guest.limits, self._file_origin(guest)
            if guest.name in by_call:
                limits, origin = by_call[guest.name], (LimitsOrigin.ADMIN, saved.limits[guest.name][1])
            known = saved.reserved.get(guest.name, SavedGuest())
            observe = self._observes(guest)
            self.machine.add_guest(
                guest.name, limits, known.reserved, known.revision, known.credit, guest.park_cpus, observe
            )
            self.machine.pause(guest.name, guest.name in saved.paused)
            self._origin[guest.name] = origin
            await self._attach(guest)
        self._begun = len(guests)
        text = f"broker {guestd.__version__} started, epoch {saved.epoch}: {len(guests)} guests"
        self.store.note(EventCode.BROKER, text)
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
            await asyncio.gather(self._loop_task, return_exceptions=True)  # `wait` has told what ended it
        for name in list(self._workers):
            await self._workers.pop(name).close()
        self.store.note(EventCode.BROKER, "broker stops")
        await self.store.stop()
        await self._journal.close()
        await asyncio.to_thread(self._recorder.close)

    def _note_from_thread(self, text: str) -> None:
        """Something happened to what is kept, seen by a thread of its own. At the very end nobody hears of it."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self.store.note, EventCode.BROKER, text)

    async def wait(self) -> None:
        """Until the loop ends, which it does only by an error that nobody foresaw."""
        if self._loop_task is not None:
            await self._loop_task

    async def _attach(self, guest: GuestConfig) -> None:
        """Listen to the guest and watch its VM."""
        self._guests[guest.name] = guest
        if guest.vsock_path is not None:
            path = Path(f"{guest.vsock_path}_{self._config.port}")
            try:
                self._relay.listen_unix(guest.name, path, guest.vsock_privileged_ports)
            except OSError as error:
                _log.error("guest %s cannot be listened to: %s; it is left as it is", guest.name, error)
                self.store.note(EventCode.BROKER, f"cannot be listened to: {error}", guest.name)
        worker = VmWorker(
            self._make_vm(guest),
            partial(self._on_state, guest.name),
            partial(self._on_failed, guest.name),
            guest.name,
            self._observes(guest),
        )
        self._workers[guest.name] = worker
        if guest.cid is not None:
            self._by_cid[guest.cid] = guest.name
        await worker.start()
        self._changed(guest.name)

    def _observe(self, name: str, observed: bool) -> None:
        self.machine.observe(name, observed)
        self._workers[name].only_observe(observed)

    async def _detach(self, name: str) -> None:
        """Let go of a guest. Its stream ends: the channel that it came by may be another's from now on."""
        session = self._sessions.get(name)
        if session is not None:
            session[1].end(SupersededError("the broker no longer serves this VM here"))
        await self._relay.stop_listening(name)
        guest = self._guests.pop(name)
        if guest.cid is not None:
            self._by_cid.pop(guest.cid, None)
        self._complaint.pop(name, None)
        self._allowance.pop(name, None)
        await self._workers.pop(name).close()

    def guest_of_cid(self, cid: int) -> str | None:
        """Whose context id it is."""
        return self._by_cid.get(cid)

    # ---- the loop --------------------------------------------------------------------------------

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._sleep()
            self._wake.clear()
            began = loop.time()
            actions = self.machine.next_actions(self._clock())
            records = [action for action in actions if isinstance(action, Record)]
            if records:
                reach(Failpoint.DECIDED)
                await self._record(records)
                reach(Failpoint.RECORDED)
            for action in actions:
                self._perform(action)
            self.store.look()
            many = self._begun >= max(_MANY, len(self._guests) // 2)
            if many and self._clock() - self._begun_at > _CALM_SECONDS:
                self._begun = 0
                _settle_heap()
            ended = loop.time()
            self.tally.count_round(ended - began)
            gather = min(_GATHER_MAX_SECONDS, max(_GATHER_MIN_SECONDS, ended - began))
            self._next_round = ended + gather

    async def _sleep(self) -> None:
        """Until something happened or the machine's alarm. The first event after a quiet time is decided at once;
        rounds follow each other after a pause that is as long as the last one took, within 5 to 20 ms.
        """
        now = self._clock()
        alarm = self.machine.wake_at(now)
        timeout = None if alarm is None else max(0.0, alarm - now)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._wake.wait()
        await asyncio.sleep(max(0.0, self._next_round - asyncio.get_running_loop().time()))

    async def _record(self, records: list[Record]) -> None:
        """Make it durable; while that fails, nothing is decided and all guests keep what they have."""
        said = ""
        while known := [record for record in records if record.guest in self._guests]:
            try:
                await self._journal.record(known)
            except JournalError as error:
                self.tally.journal_failures += 1
                self.health.set(False)
                if str(error) != said:
                    said = str(error)
                    _log.error("%s; until then nothing is decided and guests keep what they have", said)
                    self.store.note(EventCode.BROKER, f"{said}; until then nothing is decided")
                await asyncio.sleep(_JOURNAL_RETRY_SECONDS)
            else:
                self.health.set(True)
                if said:
                    _log.warning("the journal can be written again")
                    self.store.note(EventCode.BROKER, "the journal can be written again")
                return

    def _perform(self, action: Action) -> None:
        match action:
            case Record():
                self._changed(action.guest)
            case Send():
                session = self._sessions.get(action.guest)
                if session is not None and session[0] == action.session:
                    reach(Failpoint.ANSWERING)
                    session[1].put(action.message)
            case Log():
                self.tally.decisions[action.code] += 1
                _log.info("%s %s: %s", action.guest, action.kind, action.text, extra=_in_numbers(action))
                self._note_decision(action)
                self._changed(action.guest)
            case _:
                worker = self._workers.get(action.guest)
                if worker is not None:
                    worker.submit(action)

    def _note_decision(self, one: Log) -> None:
        what = (one.code, one.text, one.guest, one.kind)
        self.store.note(*what, one.before, one.after, one.reason, one.inputs)

    def _on_state(self, name: str, state: VmState) -> None:
        self._complaint.pop(name, None)
        guest = self.machine.guests.get(name)
        if guest is not None and (guest.vm is None or guest.vm.status is not state.status):
            _log.info("%s: VM is %s", name, state.status, extra={"guest": name})
            self.store.note(EventCode.VM, f"VM is {state.status}", name)
        if guest is None or guest.vm != state or not guest.vm_fresh:
            reach(Failpoint.CONFIRMED)
            self.machine.on_vm_state(name, state, self._clock())
            reach(Failpoint.SETTLED)
            self._kick(name)

    def _on_failed(self, name: str, action: HypervisorAction, error: HypervisorError) -> None:
        if isinstance(action, Observe) and self._complaint.get(name) != str(error):
            self._complaint[name] = str(error)
            text = "%s: the hypervisor's answer is of no use, asking again: %s"
            _log.warning(text, name, error, extra={"guest": name})
            self.store.note(EventCode.VM, f"the hypervisor's answer is of no use, asking again: {error}", name)
        self.machine.on_vm_failed(name, action, str(error), is_unknown(error), self._clock())
        self._kick(name)

    def _kick(self, *names: str) -> None:
        self._wake.set()
        self._changed(*names)

    # ---- guests ----------------------------------------------------------------------------------

    def connect(self, peer: Peer, hello: Hello) -> tuple[int, Session]:
        """See `wire.server.GuestBackend`."""
        now = self._clock()
        self._allowance.setdefault(peer.guest, Allowance(now))
        self._count(peer.guest, now, CONNECTION_MESSAGES)
        number, welcome = self.machine.on_connected(peer.guest, hello, now)
        old = self._sessions.get(peer.guest)
        if old is not None:
            old[1].end(SupersededError("a newer stream of this VM took over"))
        session = Session(welcome)
        self._begun, self._begun_at = self._begun + 1, now
        self._sessions[peer.guest] = (number, session)
        self._channels[peer.guest] = peer.channel
        text, version = "%s: guest daemon %s connected (%s)", hello.identity.agent_version
        _log.info(text, peer.guest, version, peer.channel, extra={"guest": peer.guest})
        self.store.note(EventCode.CHANNEL, f"guest daemon {version} connected ({peer.channel})", peer.guest)
        self._kick(peer.guest)
        return number, session

    def _count(self, name: str, now: float, messages: float) -> None:
        """:raise FloodError: When that is more than the guest may say; it is not listened to for a while then."""
        try:
            self._allowance[name].count(now, messages)
        except FloodError as error:
            seconds = self._relay.shun(name)
            if seconds:
                _log.warning("%s: %s; not listened to for %.0f s", name, error, seconds, extra={"guest": name})
                self.store.note(EventCode.CHANNEL, f"{error}; not listened to for {seconds:.0f} s", name)
            raise

    def receive(self, peer: Peer, session: int, message: GuestMessage) -> None:
        """See `wire.server.GuestBackend`."""
        now = self._clock()
        known = self._sessions.get(peer.guest)
        if known is None or known[0] != session:
            return
        self._count(peer.guest, now, 1)
        match message:
            case Demand():
                self.machine.on_demand(peer.guest, session, message, now)
            case Ack():
                self.machine.on_ack(peer.guest, session, message, now)
                reach(Failpoint.ACKED)
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
            _log.info("%s: guest daemon is away", peer.guest, extra={"guest": peer.guest})
            if peer.guest in self._guests:  # else its end is what was told of it last
                self.store.note(EventCode.CHANNEL, "guest daemon is away", peer.guest)
        self._kick(peer.guest)

    def count_protocol_error(self, peer: Peer) -> None:
        """See `wire.server.GuestBackend`."""
        self._errors[peer.guest] += 1
        self._changed(peer.guest)


def _in_numbers(decision: Log) -> dict[str, object]:
    """What a log that is read by programs says of it besides the text."""
    return {name: getattr(decision, name) for name in ("guest", "kind", "code", "before", "after")}


def _settle_heap() -> None:
    """Take what will live long out of the garbage collector's sight, and collect what did not.

    Else a full collection stops the loop for tenths of a second time and again, with thousands of guests. What the
    frozen leave behind in cycles stays until the next time, which comes with the streams that replace them.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
