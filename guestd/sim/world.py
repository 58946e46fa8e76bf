"""Both production cores in virtual time, on fake hypervisors and fake guest kernels.

Nothing here decides anything: the world moves a clock in fixed steps, lets each VM's programs use what is
online, carries messages and orders to and fro, and checks the invariants after every step. The same
script gives the same trace.
"""

from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

from guestd.broker.core import actions as broker_actions
from guestd.broker.core.ledger import HostCapacity
from guestd.broker.core.machine import BrokerMachine
from guestd.broker.core.track import Timing
from guestd.broker.hypervisor.fake import FakeVm
from guestd.guest.core import machine as guest_machine
from guestd.guest.core.machine import GuestMachine
from guestd.guest.core.ops import BlockOp, BlockTarget, CpuOp, HandResult, HandStatus, Op
from guestd.model.errors import HypervisorError, OutcomeUnknown
from guestd.model.guest import BlockState, Capability, Identity, Inventory, MemoryBlock, Sample
from guestd.model.messages import Ack, Demand, GuestMessage, Heartbeat, Hello
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import MIB, MILLICORES_PER_VCPU
from guestd.model.vm import VmStatus

BLOCK_BYTES = 128 * MIB
STEP_SECONDS = 0.05
_KERNEL_BYTES = 48 * MIB
_ALL = frozenset({Capability.CPU_ONLINE, Capability.MEMORY_ONLINE, Capability.VIRTIO_MEM, Capability.PSI})


@dataclass(slots=True)
class Load:
    """What a VM's programs want: so many runnable tasks, so much memory in use (bytes)."""

    tasks: float = 0.1
    memory_bytes: int = 120 * MIB


class GuestKernel:
    """What a guest kernel shows, on top of a `FakeVm`: CPUs and blocks arrive offline, counters count."""

    def __init__(self, vm: FakeVm, load: Load) -> None:
        self.vm, self.load = vm, load
        self.online_cpus: set[int] = set(vm.guest_cpus)
        self.online_blocks: set[int] = set(range(vm.boot_bytes // BLOCK_BYTES))
        self.failing: dict[Op, int] = {}  # operations that fail, and with which errno
        self.busy_seconds: dict[int, float] = {}
        self.idle_seconds: dict[int, float] = {}
        self.some_us = 0
        self.short_of_memory = 0  # steps in which programs wanted more than there was
        self._refresh()

    def step(self, seconds: float) -> None:
        """Let programs run for a while."""
        self._refresh()
        running = min(self.load.tasks, len(self.online_cpus))
        for number in sorted(self.online_cpus):
            share = running / len(self.online_cpus)
            self.busy_seconds[number] = self.busy_seconds.get(number, 0.0) + share * seconds
            self.idle_seconds[number] = self.idle_seconds.get(number, 0.0) + (1 - share) * seconds
        if self.load.tasks > len(self.online_cpus):
            self.some_us += round(seconds * 1e6)
        if self.load.memory_bytes > self.memory_total:
            self.short_of_memory += 1
        self.vm.guest_keeps_bytes = min(self.vm.guest_memory_bytes, self.load.memory_bytes + _KERNEL_BYTES)

    @property
    def present_blocks(self) -> int:
        return -(-self.vm.guest_memory_bytes // BLOCK_BYTES)

    @property
    def memory_total(self) -> int:
        online = sum(1 for index in self.online_blocks if index < self.present_blocks)
        return max(0, min(self.vm.guest_memory_bytes, online * BLOCK_BYTES) - _KERNEL_BYTES)

    def sample(self) -> Sample:
        """As `guestd.guest.sensors` would read it."""
        available = max(0, self.memory_total - self.load.memory_bytes)
        busy = {number: self.busy_seconds.get(number, 0.0) for number in sorted(self.online_cpus)}
        idle = {number: self.idle_seconds.get(number, 0.0) for number in sorted(self.online_cpus)}
        return Sample(busy, idle, 0.0, round(self.load.tasks), self.some_us, 0, 0, self.memory_total, available, 0, 0)

    def inventory(self) -> Inventory:
        """As `guestd.guest.sysfs` would read it."""
        self._refresh()
        blocks = tuple(
            MemoryBlock(index, BlockState.ONLINE if index in self.online_blocks else BlockState.OFFLINE, index >= 4)
            for index in range(self.present_blocks)
        )
        kernel = self.vm.boot_bytes
        return Inventory(
            cpus_possible=frozenset(range(self.vm.vcpus_max)),
            cpus_present=self.vm.guest_cpus,
            cpus_online=frozenset(self.online_cpus),
            block_bytes=BLOCK_BYTES,
            blocks=blocks,
            kernel_zone_bytes=kernel,
            kernel_free_bytes=kernel // 4,
            movable_zone_bytes=max(0, self.memory_total - kernel),
        )

    def perform(self, op: Op) -> HandResult:
        """As the root helper would do it."""
        if op in self.failing:
            return HandResult(op, HandStatus.FAILED, self.failing[op], 0.01)
        match op:
            case CpuOp(number, online):
                if number not in self.vm.guest_cpus:
                    return HandResult(op, HandStatus.GONE)
                (self.online_cpus.add if online else self.online_cpus.discard)(number)
            case BlockOp(index, target):
                if index >= self.present_blocks:
                    return HandResult(op, HandStatus.GONE)
                (self.online_blocks.discard if target is BlockTarget.OFFLINE else self.online_blocks.add)(index)
        return HandResult(op, HandStatus.OK, 0, 0.01)

    def reboot(self) -> None:
        """A new kernel: all CPUs that are plugged are online, hot-added memory is offline."""
        self.online_cpus = set(self.vm.guest_cpus)
        self.online_blocks = set(range(self.vm.boot_bytes // BLOCK_BYTES))
        self.busy_seconds.clear()
        self.idle_seconds.clear()

    def _refresh(self) -> None:
        self.online_cpus &= self.vm.guest_cpus
        self.online_blocks = {index for index in self.online_blocks if index < self.present_blocks}


@dataclass(slots=True)
class SimGuest:
    """One VM of the world: hypervisor, kernel and guest daemon."""

    name: str
    vm: FakeVm
    kernel: GuestKernel
    load: Load
    machine: GuestMachine
    generation: int = 1
    boot: int = 1
    session: int = 0
    to_broker: deque[GuestMessage] = field(default_factory=deque)
    commands: deque[broker_actions.HypervisorAction] = field(default_factory=deque)


def _finish(call: Coroutine[object, None, object]) -> object:
    """The value of a coroutine that never waits."""
    try:
        call.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("a fake waited")


class World:
    """A host with its broker and VMs.

    :param lose: tells for each message whether it is lost.
    """

    def __init__(
        self,
        host: HostCapacity,
        timing: Timing | None = None,
        lose: Callable[[object], bool] = lambda _: False,
    ) -> None:
        self.now = 1000.0
        self.host, self.timing, self.lose = host, timing, lose
        self.guests: dict[str, SimGuest] = {}
        self.limits: dict[str, Limits] = {}
        self.journal: dict[str, tuple[Resources, int]] = {}
        self.epoch = 1
        self.broker: BrokerMachine | None = BrokerMachine(host, 1, timing=timing)
        self.trace: list[str] = []
        self._decided: set[str] = set()  # guests whose hypervisor's word the last decision knew

    # ---- the script's side -----------------------------------------------------------------------

    def add(self, name: str, limits: Limits, vm: FakeVm | None = None) -> SimGuest:
        """A VM with its daemon, connected at the next step."""
        vm = vm or FakeVm(plug_rate=4 << 30, unplug_rate=512 * MIB, cpu_unplug_seconds=0.1)
        load = Load()
        guest = SimGuest(name, vm, GuestKernel(vm, load), load, self._daemon(1, 1))
        self.guests[name] = guest
        self.limits[name] = limits
        if self.broker is not None:
            self.broker.add_guest(name, limits)
        return guest

    def run(self, seconds: float) -> None:
        """Let time pass."""
        for _ in range(round(seconds / STEP_SECONDS)):
            self.step()

    def kill_broker(self) -> None:
        """The broker dies between any two actions; only its journal stays."""
        self.broker = None
        for guest in self.guests.values():
            guest.session = 0
            guest.commands.clear()
            guest.to_broker.clear()
            guest.machine.on_disconnected()

    def start_broker(self) -> None:
        """A new broker on the old journal."""
        self.epoch += 1
        self.broker = BrokerMachine(self.host, self.epoch, timing=self.timing)
        for name, limits in self.limits.items():
            reserved, revision = self.journal.get(name, (Resources(), 0))
            self.broker.add_guest(name, limits, reserved, revision)

    def restart_daemon(self, guest: SimGuest) -> None:
        """The guest daemon is restarted; nothing else changes in the VM."""
        guest.generation += 1
        self._hang_up(guest)
        guest.machine = self._daemon(guest.boot, guest.generation)

    def reboot(self, guest: SimGuest, replug_seconds: float = 2.0) -> None:
        """The guest is reset."""
        guest.boot += 1
        self._hang_up(guest)
        guest.vm.reset(replug_seconds)
        guest.kernel.reboot()
        guest.machine = self._daemon(guest.boot, guest.generation)

    # ---- one step --------------------------------------------------------------------------------

    def step(self) -> None:
        """One step of virtual time, and the invariants."""
        self.now += STEP_SECONDS
        for guest in self.guests.values():
            guest.vm.advance(STEP_SECONDS)
            guest.kernel.step(STEP_SECONDS)
            self._connect(guest)
            self._run_daemon(guest)
        if self.broker is not None:
            self._run_broker(self.broker)
        self.check()

    def check(self) -> None:
        """The invariants that hold in every state (numbers as in ARCHITECTURE.md)."""
        broker = self.broker
        if broker is None:
            return
        for kind in Kind:
            capacity = self.host.for_guests(kind, len(self.guests))
            charged = sum(
                max(guest.tracks[kind].reserved, guest.limits.min.get(kind)) for guest in broker.guests.values()
            )
            assert charged <= capacity, f"(2) {kind}: {charged} charged, {capacity} there"
            self._check_guests(broker, kind)

    def _check_guests(self, broker: BrokerMachine, kind: Kind) -> None:
        for name, state in broker.guests.items():
            guest, track = self.guests[name], state.tracks[kind]
            held = guest.vm.truth()
            fresh = state.vm_fresh and state.vm is not None and state.vm.status is VmStatus.RUNNING
            if fresh and name in self._decided:
                assert track.reserved >= held.held(kind), f"(5) {name} {kind}: holds more than is reserved"
            assert track.amount <= max(state.bounds(kind)[1], track.reserved), f"(3) {name} {kind} above its max"
            assert 0 in guest.kernel.online_cpus, f"(9) {name}: CPU 0 is offline"

    def _daemon(self, boot: int, generation: int) -> GuestMachine:
        identity = Identity(boot.to_bytes(16, "big"), generation, "sim", "sim", "sim", _ALL)
        return GuestMachine(identity, self.now)

    def _hang_up(self, guest: SimGuest) -> None:
        if self.broker is not None and guest.session:
            self.broker.on_disconnected(guest.name, guest.session)
        guest.session = 0
        guest.to_broker.clear()

    def _connect(self, guest: SimGuest) -> None:
        if self.broker is None or guest.session or guest.vm._booting_seconds > 0:
            return
        guest.session, welcome = self.broker.on_connected(guest.name, guest.machine.hello(), self.now)
        guest.machine.on_welcome(welcome, self.now)

    def _run_daemon(self, guest: SimGuest) -> None:
        machine = guest.machine
        for _ in range(4):
            for action in machine.next_actions(self.now):
                match action:
                    case guest_machine.TakeSample():
                        machine.on_sample(guest.kernel.sample(), self.now)
                    case guest_machine.Rescan():
                        machine.on_inventory(guest.kernel.inventory(), self.now)
                    case guest_machine.Do():
                        for op in action.ops:
                            machine.on_result(guest.kernel.perform(op), self.now)
                    case guest_machine.Say():
                        if guest.session and not self.lose(action.message):
                            guest.to_broker.append(action.message)
                    case guest_machine.Log():
                        self._note(guest.name, action.text)

    def _run_broker(self, broker: BrokerMachine) -> None:
        for guest in self.guests.values():
            while guest.to_broker:
                self._deliver(broker, guest, guest.to_broker.popleft())
            guest.commands.append(broker_actions.Observe(guest.name))
            self._hypervise(broker, guest)
        self._decided = {name for name, state in broker.guests.items() if state.vm_fresh}
        for action in broker.next_actions(self.now):
            match action:
                case broker_actions.Record():
                    self.journal[action.guest] = (action.reserved, action.revision)
                case broker_actions.Send():
                    guest = self.guests[action.guest]
                    if guest.session == action.session and not self.lose(action.message):
                        guest.machine.on_order(action.message, self.now)
                case broker_actions.Log():
                    self._note(action.guest, f"{action.kind}: {action.text}")
                case _:
                    self.guests[action.guest].commands.append(action)
        for guest in self.guests.values():
            self._hypervise(broker, guest)

    def _deliver(self, broker: BrokerMachine, guest: SimGuest, message: GuestMessage) -> None:
        match message:
            case Demand():
                broker.on_demand(guest.name, guest.session, message, self.now)
            case Ack():
                broker.on_ack(guest.name, guest.session, message, self.now)
            case Heartbeat():
                broker.on_heartbeat(guest.name, guest.session, message, self.now)
            case Hello():
                raise AssertionError("hello goes by on_connected")

    def _hypervise(self, broker: BrokerMachine, guest: SimGuest) -> None:
        while guest.commands:
            action = guest.commands.popleft()
            try:
                match action:
                    case broker_actions.Observe():
                        state = _finish(guest.vm.observe())
                        broker.on_vm_state(guest.name, state, self.now)  # type: ignore[arg-type]
                    case broker_actions.RequestVcpus():
                        _finish(guest.vm.request_vcpus(action.count))
                    case broker_actions.RequestMemory():
                        _finish(guest.vm.request_memory(action.amount_bytes))
                    case broker_actions.SettleMemory():
                        _finish(guest.vm.settle_memory())
            except HypervisorError as error:
                broker.on_vm_failed(guest.name, action, str(error), isinstance(error, OutcomeUnknown), self.now)

    def _note(self, name: str, text: str) -> None:
        self.trace.append(f"{self.now - 1000:7.2f} {name} {text}")


def limits(cpu_min: float, cpu_max: float, memory_min: int, memory_max: int, weight: int = 100) -> Limits:
    """Limits from CPUs and bytes."""
    return Limits(
        Resources(round(cpu_min * MILLICORES_PER_VCPU), memory_min),
        Resources(round(cpu_max * MILLICORES_PER_VCPU), memory_max),
        Resources(weight, weight),
    )
