"""One VM of a world: hypervisor, kernel and guest daemon, each with its own idea of the time."""

from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from guestd.broker.core import actions as broker_actions
from guestd.broker.hypervisor.fake import FakeVm
from guestd.guest.core import actions as guest_actions
from guestd.guest.core.machine import GuestMachine
from guestd.guest.core.ops import HandResult
from guestd.model.errors import HypervisorError
from guestd.model.guest import Capability, Identity
from guestd.model.messages import GuestMessage
from guestd.model.resources import Kind
from guestd.model.units import MILLICORES_PER_VCPU
from guestd.model.vm import VmState, VmStatus
from guestd.sim.kernel import GuestKernel, Load

if TYPE_CHECKING:
    from guestd.sim.watch import Watch

WATCH_SECONDS = 5.0
"""A VM is observed at least so often."""
LONGEST_JUMP_SECONDS = 60.0
_OBSERVE = broker_actions.Observe
_ALL = frozenset({Capability.CPU_ONLINE, Capability.MEMORY_ONLINE, Capability.VIRTIO_MEM, Capability.PSI})


def daemon(boot: int, generation: int, now: float, settings: guest_actions.Settings | None) -> GuestMachine:
    """A guest daemon that was just started."""
    identity = Identity(boot.to_bytes(16, "big"), generation, "sim", "sim", "sim", _ALL)
    machine = GuestMachine(identity, now, settings)
    machine.on_watched(True)
    return machine


@dataclass(slots=True)
class SimGuest:
    """One VM. `now` is the world's time everywhere."""

    name: str
    vm: FakeVm
    kernel: GuestKernel
    load: Load
    machine: GuestMachine
    park: bool = False
    generation: int = 1
    boot: int = 1
    session: int = 0
    clock_seconds: float = 0.0  # how far its clock is ahead of the world's
    silent: bool = False  # its daemon hangs
    hung_until: float = 0.0  # its hypervisor answers nothing before
    commands: deque[broker_actions.HypervisorAction] = field(default_factory=deque)
    doing: list[tuple[float, HandResult]] = field(default_factory=list)
    alarm: float = 0.0  # when the daemon is to be asked again
    stirred: bool = True  # the hypervisor said that something changed
    observe_at: float = 0.0
    gone: bool = False

    def open(self) -> None:
        """Hear of changes from the hypervisor."""

        def stir() -> None:
            self.stirred = True

        _finish(self.vm.open(stir))

    @property
    def runs(self) -> bool:
        """Whether programs in it do."""
        status = self.vm.status
        return status in (VmStatus.RUNNING, VmStatus.UNREACHABLE) and not self.vm.booting

    def clock(self, now: float) -> float:
        """What its clock shows."""
        return now + self.clock_seconds

    def quiet_until(self, now: float, served: bool, step_seconds: float) -> float:
        """When something happens with this VM, for all that is known now. `served`: a broker runs."""
        until = now + LONGEST_JUMP_SECONDS
        if self.vm.moving:
            if self.stirred or not self.vm.booting:
                return now
            until = now + 10 * step_seconds
        if served:
            waiting = bool(self.commands) or self.stirred
            until = min(until, max(self.hung_until, 0.0 if waiting else self.observe_at))
            if self.runs and not self.session and not self.silent:
                return now
        if self.runs and not self.silent:
            until = min(until, self.alarm, *(due for due, _ in self.doing))
        return until

    # ---- inside ----------------------------------------------------------------------------------

    def live(self, seconds: float, now: float) -> None:
        """Time passes in the VM."""
        self.vm.advance(seconds)
        if not self.runs:
            return
        self.kernel.step(seconds)
        if self.kernel.take_trigger():
            self.machine.on_pressure(self.clock(now))
            self.alarm = now
        if self.kernel.take_hotplug():
            self.machine.on_hotplug(self.clock(now))
            self.alarm = now

    def lose_stream(self, now: float) -> None:
        """The daemon finds its stream broken."""
        self.session = 0
        self.machine.on_disconnected()
        self.alarm = min(self.alarm, now)

    def start_daemon(self, now: float, settings: guest_actions.Settings | None) -> None:
        """Another daemon in the place of the old one, which took what it knew along."""
        self.doing.clear()
        self.machine = daemon(self.boot, self.generation, self.clock(now), settings)
        self.alarm = now

    def run_daemon(
        self, now: float, watch: "Watch", say: Callable[[GuestMessage], None], log: Callable[[str], None]
    ) -> None:
        """Let the daemon do what it wants to, if it wants to now."""
        for due, result in [entry for entry in self.doing if entry[0] <= now]:
            self.doing.remove((due, result))
            self.machine.on_result(result, self.clock(now))
            self.alarm = now
        if self.alarm > now:
            return
        for _ in range(4):
            actions = self.machine.next_actions(self.clock(now))
            for action in actions:
                match action:
                    case guest_actions.Say():
                        watch.on_said(self, action.message)
                        say(action.message)
                    case guest_actions.Log():
                        log(action.text)
                    case _:
                        self._perform(action, now, watch)
            if not actions:
                break
        self.alarm = self.machine.wake_at(self.clock(now)) - self.clock_seconds

    def _perform(
        self, action: guest_actions.TakeSample | guest_actions.Rescan | guest_actions.Do, now: float, watch: "Watch"
    ) -> None:
        match action:
            case guest_actions.TakeSample():
                self.machine.on_sample(self.kernel.sample(), self.clock(now))
            case guest_actions.Rescan():
                inventory = self.kernel.inventory()
                watch.on_inventory(self, inventory)
                self.machine.on_inventory(inventory, self.clock(now))
            case guest_actions.Do():
                for op in action.ops:
                    watch.on_op(self, op)
                    result = self.kernel.perform(op)
                    if self.kernel.op_seconds:
                        self.doing.append((now + self.kernel.op_seconds, result))
                    else:
                        self.machine.on_result(result, self.clock(now))

    # ---- outside ---------------------------------------------------------------------------------

    def observe_soon(self, now: float) -> None:
        """Ask the hypervisor after all that was asked of it before."""
        self.observe_at = now + WATCH_SECONDS
        if not self.commands or not isinstance(self.commands[-1], broker_actions.Observe):
            self.commands.append(broker_actions.Observe(self.name))

    def skip_old_observations(self) -> None:
        """What was asked before a request says nothing of it; each request is followed by an observation."""
        requests = [number for number, action in enumerate(self.commands) if not isinstance(action, _OBSERVE)]
        if requests:
            kept = (a for n, a in enumerate(self.commands) if n > requests[-1] or not isinstance(a, _OBSERVE))
            self.commands = deque(kept)

    def to_come(self, kind: Kind) -> int:
        """What it may come to hold when all is done that it was asked, in millicores or bytes."""
        promised = self.vm.promised(kind)
        if self.vm.status is VmStatus.GONE:
            return promised
        if kind is Kind.MEMORY:
            return max(
                [promised, *(a.amount_bytes for a in self.commands if isinstance(a, broker_actions.RequestMemory))]
            )
        counts = [a.count for a in self.commands if isinstance(a, broker_actions.RequestVcpus)]
        quotas = [a.millicores for a in self.commands if isinstance(a, broker_actions.RequestCpuQuota)]
        plugged = max([len(self.vm.guest_cpus), *counts]) * MILLICORES_PER_VCPU
        quota = max([self.vm.cpu_quota_millicores, *quotas])
        return max(promised, min(plugged, quota or plugged))

    def carry_out(self, watch: "Watch") -> tuple[broker_actions.HypervisorAction, VmState | HypervisorError | None]:
        """The next of what is asked of the hypervisor, and what it answered."""
        action = self.commands.popleft()
        state = None
        try:
            match action:
                case broker_actions.Observe():
                    state = _finish(self.vm.observe())
                case broker_actions.RequestVcpus():
                    _finish(self.vm.request_vcpus(action.count))
                case broker_actions.RequestCpuQuota():
                    _finish(self.vm.request_cpu_quota(action.millicores))
                case broker_actions.RequestMemory():
                    _finish(self.vm.request_memory(action.amount_bytes))
                case broker_actions.SettleMemory():
                    _finish(self.vm.settle_memory())
        except HypervisorError as error:
            return action, error
        finally:
            watch.look(self, action)
        return action, state if isinstance(state, VmState) else None


def _finish(call: Coroutine[object, None, object]) -> object:
    """The value of a coroutine that never waits."""
    try:
        call.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("a fake waited")
