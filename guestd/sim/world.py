"""Both production cores in virtual time, on fake hypervisors and fake guest kernels.

Nothing here decides anything: the world moves a clock, lets each VM's programs use what is online, carries
messages and orders to and fro, and has the invariants checked in each decision and each state. The same script gives
the same trace.

The shells' manners are kept: a core is asked when something happened or its own alarm is due, a VM's requests
go one after the other and each is followed by an observation, and while nothing moves, time jumps. What the
world does beyond them is to break: messages are lost, doubled and late (`fate`), the broker dies between any two
actions (`fuse`), every party has a clock of its own that may be set, a hypervisor may hang.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from guestd.broker.core import actions as broker_actions
from guestd.broker.core.ledger import HostCapacity
from guestd.broker.core.machine import BrokerMachine
from guestd.broker.core.track import Timing
from guestd.broker.hypervisor.fake import FakeVm
from guestd.guest.core import actions as guest_actions
from guestd.model.errors import HypervisorError, OutcomeUnknown
from guestd.model.event import EventCode
from guestd.model.explanation import ReclaimedResource, ReclaimRequest
from guestd.model.messages import Ack, Demand, Grant, GuestMessage, Heartbeat, Hello, Reclaim, Throttle
from guestd.model.resources import Limits, Resources
from guestd.model.units import MIB, MILLICORES_PER_VCPU
from guestd.model.vm import VmStatus
from guestd.sim.guest import LONGEST_JUMP_SECONDS, SimGuest, daemon
from guestd.sim.kernel import GuestKernel, Load
from guestd.sim.mail import Fate, Letter, Mail
from guestd.sim.watch import Watch

STEP_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Entry:
    """One guest's line in the journal."""

    reserved: Resources
    revision: int
    credit: Resources | None = None


@dataclass(slots=True)
class Fuse:
    """When the broker dies, and how: after so many actions; of the requests that it had made by then, so many per
    VM are carried out; after `down_seconds` it is started again.
    """

    actions: int
    requests: int = 0
    down_seconds: float = 1.0


class World:
    """A host with its broker and VMs.

    :param fate: decides for each message between guests and broker.
    :param step_seconds: how finely time passes while something moves.
    """

    def __init__(
        self,
        host: HostCapacity,
        timing: Timing | None = None,
        fate: Callable[[object], Fate] = lambda _: (0.0,),
        settings: guest_actions.Settings | None = None,
        step_seconds: float = STEP_SECONDS,
    ) -> None:
        self.now = 1000.0
        self.clock_seconds = 0.0  # how far the broker's clock is ahead
        self.host, self.timing = host, timing or Timing()
        self.settings, self.step_seconds = settings, step_seconds
        self.guests: dict[str, SimGuest] = {}
        self.limits: dict[str, Limits] = {}
        self.paused: set[str] = set()
        self.observed: set[str] = set()
        self.journal: dict[str, Entry] = {}
        self.epoch = 1
        self.broker: BrokerMachine | None = BrokerMachine(host, 1, timing=self.timing)
        self.fuse: Fuse | None = None
        self.trace: list[str] = []
        self.happened: Counter[str] = Counter()
        self.mail = Mail(fate, self.happened)
        self.watch = Watch(self)
        self._news = True  # the broker has heard something since it last decided
        self._alarm: float | None = None
        self._start_at: float | None = None

    # ---- the script's side -----------------------------------------------------------------------

    @property
    def broker_now(self) -> float:
        """What the broker's clock shows."""
        return self.now + self.clock_seconds

    @property
    def pending(self) -> bool:
        """Whether the broker has heard something that it has not decided on yet."""
        return self._news

    def add(
        self, name: str, limits: Limits, vm: FakeVm | None = None, park: bool = False, observe: bool = False
    ) -> SimGuest:
        """A VM with its daemon, connected at the next step.

        :raise AdmissionError: When its minimum does not fit.
        """
        if self.broker is not None:
            self.broker.add_guest(name, limits, park=park, observe=observe)
        if observe:
            self.observed.add(name)
        vm = vm or FakeVm(plug_rate=4 << 30, unplug_rate=512 * MIB, cpu_unplug_seconds=0.1)
        load = Load()
        guest = SimGuest(name, vm, GuestKernel(vm, load), load, daemon(1, 1, self.now, self.settings), park)
        self.guests[name], self.limits[name] = guest, limits
        self.watch.add(name)
        guest.open()
        self._news = True
        return guest

    def set_limits(self, name: str, limits: Limits) -> None:
        """An operator's call.

        :raise AdmissionError: When the minimums do not fit; nothing is changed.
        """
        assert self.broker is not None
        self.broker.set_limits(name, limits)
        self.limits[name] = limits
        self.watch.on_outside_cause()
        self._news = True

    def set_host(self, host: HostCapacity) -> None:
        """The host has more or less from now on.

        :raise AdmissionError: When the minimums do not fit; nothing is changed.
        """
        assert self.broker is not None
        self.broker.set_host(host, self.limits)
        self.host = host
        self.watch.on_outside_cause()
        self._news = True

    def pause(self, name: str, paused: bool) -> None:
        """An operator's call."""
        assert self.broker is not None
        self.broker.pause(name, paused)
        (self.paused.add if paused else self.paused.discard)(name)
        self._news = True

    def observe(self, name: str, observed: bool) -> None:
        """An operator's change of the configuration. Requests that wait are refused, as a worker does."""
        assert self.broker is not None
        self.broker.observe(name, observed)
        (self.observed.add if observed else self.observed.discard)(name)
        if observed:
            commands = self.guests[name].commands
            waiting = [one for one in commands if isinstance(one, broker_actions.Observe)]
            commands.clear()
            commands.extend(waiting)
        self.watch.on_mode(name)
        self._news = True

    def reclaim(self, name: str, request: ReclaimRequest) -> tuple[ReclaimedResource, ...]:
        """An operator's call.

        :raise AdmissionError: When nothing can be decided about the guest now.
        """
        assert self.broker is not None
        self._news = True
        return self.broker.reclaim(name, request, self.broker_now)

    def run(self, seconds: float) -> None:
        """Let time pass; where nothing moves it jumps."""
        end = self.now + seconds - self.step_seconds / 2
        while self.now < end:
            self.step(min(self._quiet_steps(), max(1, round((end - self.now) / self.step_seconds))))

    def set_clock(self, seconds: float, guest: SimGuest | None = None) -> None:
        """Step the clock of a guest, or of the broker, forwards or back."""
        self.happened["clock step"] += 1
        if guest is None:
            self.clock_seconds += seconds
            self.watch.on_clock_step(seconds)
            self._news = True
        else:
            guest.clock_seconds += seconds
            guest.alarm = 0.0

    def kill_broker(self, requests: int = 0) -> None:
        """The broker dies; only its journal stays. Of what it asked of each VM, so many requests are still
        carried out.
        """
        self.broker = self.fuse = None
        for guest in self.guests.values():
            for _ in range(min(requests, len(guest.commands))):
                guest.carry_out(self.watch)
            guest.commands.clear()
            guest.lose_stream(self.now)
        self.watch.on_death()

    def start_broker(self) -> None:
        """A new broker on the old journal."""
        self.epoch += 1
        self._start_at = None
        self.broker = self.restored()
        self.watch.on_start()
        for guest in self.guests.values():
            guest.stirred = True
        self._news = True

    def restored(self) -> BrokerMachine:
        """A broker as it is after a start from the journal."""
        broker = BrokerMachine(self.host, self.epoch, timing=self.timing)
        for name, limits in self.limits.items():
            entry = self.journal.get(name, Entry(Resources(), 0))
            park = self.guests[name].park
            observe = name in self.observed
            broker.add_guest(name, limits, entry.reserved, entry.revision, entry.credit, park, observe)
            broker.pause(name, name in self.paused)
        return broker

    def hang_up(self, guest: SimGuest) -> None:
        """The guest's stream breaks; it makes a new one at the next step."""
        if self.broker is not None and guest.session:
            self.broker.on_disconnected(guest.name, guest.session)
            self._news = True
        guest.lose_stream(self.now)

    def restart_daemon(self, guest: SimGuest) -> None:
        """The guest daemon is restarted; nothing else changes in the VM."""
        guest.generation += 1
        self._new_daemon(guest)

    def reboot(self, guest: SimGuest, replug_seconds: float = 2.0) -> None:
        """The guest is reset."""
        guest.vm.reset(replug_seconds)
        self._new_kernel(guest)

    # ---- one step --------------------------------------------------------------------------------

    def step(self, steps: int = 1) -> None:
        """So many steps of virtual time in one, and the invariants."""
        seconds = steps * self.step_seconds
        self.now += seconds
        for guest in self.guests.values():
            self._move(guest, seconds)
            self.watch.look(guest)
        for letter in self.mail.arriving(self.now):
            self._hand_over(letter)
        for guest in self.guests.values():
            if guest.runs and not guest.silent:
                self._connect(guest)
                self._run_daemon(guest)
        if self.broker is None and self._start_at is not None and self.now >= self._start_at:
            self.start_broker()
        if self.broker is not None:
            self._run_broker(self.broker)
        self.watch.check_state(seconds)

    def _quiet_steps(self) -> int:
        """How many steps nothing will happen for."""
        until = min(self.now + LONGEST_JUMP_SECONDS, self.mail.next_at)
        if self._start_at is not None:
            until = min(until, self._start_at)
        if self.broker is not None:
            if self._news:
                return 1
            if self._alarm is not None:
                until = min(until, self._alarm - self.clock_seconds)
        for guest in self.guests.values():
            until = min(until, guest.quiet_until(self.now, self.broker is not None, self.step_seconds))
            if until <= self.now:
                return 1
        return max(1, int((until - self.now) / self.step_seconds + 0.999))

    def _move(self, guest: SimGuest, seconds: float) -> None:
        """Time passes in the VM."""
        if guest.vm.status is VmStatus.GONE:
            if not guest.gone:
                guest.gone = True
                self.hang_up(guest)
            return
        if guest.gone:
            guest.gone = False
            self._new_kernel(guest)
        guest.live(seconds, self.now)

    # ---- guest daemons ---------------------------------------------------------------------------

    def _new_daemon(self, guest: SimGuest) -> None:
        self.hang_up(guest)
        guest.start_daemon(self.now, self.settings)
        self.watch.on_new_daemon(guest)

    def _new_kernel(self, guest: SimGuest) -> None:
        guest.boot += 1
        guest.kernel.reboot()
        self._new_daemon(guest)
        self.mail.forget(guest)

    def _connect(self, guest: SimGuest) -> None:
        if self.broker is None or guest.session:
            return
        guest.session, welcome = self.broker.on_connected(guest.name, guest.machine.hello(), self.broker_now)
        self.watch.on_heard(guest)
        self.watch.on_welcome(guest, welcome.epoch)
        guest.machine.on_welcome(welcome, guest.clock(self.now))
        self._news, guest.alarm = True, self.now

    def _run_daemon(self, guest: SimGuest) -> None:
        guest.run_daemon(
            self.now, self.watch, lambda message: self._post(guest, message), lambda text: self._note(guest.name, text)
        )

    # ---- messages --------------------------------------------------------------------------------

    def _post(self, guest: SimGuest, message: object) -> None:
        for letter in self.mail.post(guest, message, self.now):
            self._hand_over(letter)

    def _hand_over(self, letter: Letter) -> None:
        guest, message = letter.guest, letter.message
        if isinstance(message, Grant | Reclaim | Throttle):
            if guest.session and guest.runs:
                self._tell_daemon(guest, message)
            return
        if self.broker is None or not isinstance(message, Demand | Ack | Heartbeat | Hello):
            return
        self.watch.before_message(guest, letter.session, message)
        self._tell_broker(self.broker, guest, letter.session, message)
        self.watch.after_message(guest, letter.session, message)
        self._news = True

    def _tell_daemon(self, guest: SimGuest, message: Grant | Reclaim | Throttle) -> None:
        guest.alarm = self.now
        if isinstance(message, Throttle):
            guest.machine.on_throttle(message, guest.clock(self.now))
            return
        self.watch.on_order(guest, message)
        guest.machine.on_order(message, guest.clock(self.now))

    def _tell_broker(self, broker: BrokerMachine, guest: SimGuest, session: int, message: GuestMessage) -> None:
        match message:
            case Demand():
                broker.on_demand(guest.name, session, message, self.broker_now)
            case Ack():
                broker.on_ack(guest.name, session, message, self.broker_now)
            case Heartbeat():
                broker.on_heartbeat(guest.name, session, message, self.broker_now)
            case Hello():
                raise AssertionError("hello goes by on_connected")

    # ---- the broker ------------------------------------------------------------------------------

    def _run_broker(self, broker: BrokerMachine) -> None:
        for guest in self.guests.values():
            if guest.stirred or self.now >= guest.observe_at:
                guest.stirred = False
                guest.observe_soon(self.now)
            self._hypervise(broker, guest)
        if not self._news and (self._alarm is None or self._alarm > self.broker_now):
            return None
        self._news = False
        actions = broker.next_actions(self.broker_now)
        self.watch.check_actions(broker, actions)
        for action in actions:
            if self.fuse is not None and self.fuse.actions <= 0:
                return self._die(self.fuse)
            if self.fuse is not None:
                self.fuse.actions -= 1
            self._do(action)
        self.watch.on_done(broker)
        for guest in self.guests.values():
            self._hypervise(broker, guest)
        self._alarm = broker.wake_at(self.broker_now)
        return None

    def _die(self, fuse: Fuse) -> None:
        self.happened["crash"] += 1
        self.kill_broker(fuse.requests)
        self._start_at = self.now + fuse.down_seconds

    def _do(self, action: broker_actions.Action) -> None:
        match action:
            case broker_actions.Record():
                self.record(action)
            case broker_actions.Send():
                guest = self.guests[action.guest]
                if guest.session == action.session:
                    self._post(guest, action.message)
            case broker_actions.Log():
                self.happened["would"] += action.code is EventCode.WOULD
                self._note(action.guest, f"{action.kind}: {action.text}")
            case broker_actions.Observe():
                self.guests[action.guest].observe_soon(self.now)
            case _:
                guest = self.guests[action.guest]
                guest.commands.append(action)
                guest.commands.append(broker_actions.Observe(guest.name))

    def record(self, action: broker_actions.Record) -> None:
        """Write to the journal, which never fails here."""
        known = self.journal.get(action.guest)
        credit = known.credit if action.credit is None and known is not None else action.credit
        self.journal[action.guest] = Entry(action.reserved, action.revision, credit)

    def _hypervise(self, broker: BrokerMachine, guest: SimGuest) -> None:
        """Carry out what is asked of a VM and tell the broker."""
        guest.skip_old_observations()
        while guest.commands and self.now >= guest.hung_until:
            action, answer = guest.carry_out(self.watch)
            if isinstance(answer, HypervisorError):
                unknown = isinstance(answer, OutcomeUnknown)
                broker.on_vm_failed(guest.name, action, str(answer), unknown, self.broker_now)
                self._news = True
            elif answer is not None:
                known = broker.guests[guest.name]
                self.watch.on_observed(guest)
                if known.vm != answer or not known.vm_fresh:
                    broker.on_vm_state(guest.name, answer, self.broker_now)
                    self._news = True

    def _note(self, name: str, text: str) -> None:
        self.trace.append(f"{self.now - 1000:7.2f} {name} {text}")


def limits(cpu_min: float, cpu_max: float, memory_min: int, memory_max: int, weight: int = 100) -> Limits:
    """Limits from CPUs and bytes."""
    return Limits(
        Resources(round(cpu_min * MILLICORES_PER_VCPU), memory_min),
        Resources(round(cpu_max * MILLICORES_PER_VCPU), memory_max),
        Resources(weight, weight),
    )
