"""The world under fire: a rule-based state machine over both production cores.

Each rule does one thing to the world and lets a moment pass; the invariants of `guestd.sim` judge every decision and
every state. When an example is over, peace returns, and everything must converge. What really happened (in the cores,
not in the rules) is counted in `HAPPENED`.

Run as a program it does so many examples, prints what happened, and ends with 1 and the broken promise when
one is broken: ``python fire.py EXAMPLES``, and with ``random`` after it other examples each time.
"""

import errno
import random
import sys
from collections import Counter

from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from guestd.broker.core.ledger import HostCapacity
from guestd.broker.core.track import Timing
from guestd.broker.hypervisor.fake import FakeVm, Fault
from guestd.guest.core.actions import Settings
from guestd.guest.core.ops import BlockOp, BlockTarget, CpuOp
from guestd.model.errors import AdmissionError
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB, MIB, MILLICORES_PER_VCPU
from guestd.model.vm import VmStatus
from guestd.sim.guest import SimGuest
from guestd.sim.mail import Fate
from guestd.sim.world import Fuse, World

HAPPENED: Counter[str] = Counter()
STEPS_PER_EXAMPLE = 100

HOST = HostCapacity(Resources(5000, 4 * GIB), Resources(0, 512 * MIB), Resources(0, 64 * MIB))
TIMING = Timing(budget_grows=12, budget_shrinks=6, burst_least_seconds=5.0)
PACE = Settings(quick_seconds=0.15)
NAMES = ("plain", "balloon", "quota")


def bounds(cpu: tuple[int, int, int], memory: tuple[int, int, int], weight: int = 100, seconds: int = 20) -> Limits:
    """Limits from (min, max, burst) in millicores and MiB; the credit lasts for so many seconds."""
    above = Resources(max(0, cpu[2] - cpu[1]), max(0, memory[2] - memory[1]) * MIB)
    return Limits(
        Resources(cpu[0], memory[0] * MIB),
        Resources(cpu[1], memory[1] * MIB),
        Resources(weight, weight),
        Resources(cpu[2], memory[2] * MIB),
        Resources(above.cpu_millicores * seconds, above.memory_bytes * seconds),
        Resources(above.cpu_millicores // 4, above.memory_bytes // 4),
    )


USUAL = {
    "plain": bounds((1000, 3000, 4000), (512, 1792, 2560)),
    "balloon": bounds((1000, 4000, 0), (512, 2048, 0)),
    "quota": bounds((500, 2000, 3500), (512, 1536, 2048), weight=200),
}
OTHERS = (
    bounds((1000, 2000, 4000), (640, 1024, 2304), seconds=8),
    bounds((2000, 4000, 0), (1024, 2560, 0)),
    bounds((1000, 1000, 0), (512, 512, 0)),
    bounds((1500, 2500, 3000), (700, 1500, 1700), weight=50, seconds=60),
)
HOSTS = (
    HOST,
    HostCapacity(Resources(4000, 5 * GIB // 2), Resources(0, 256 * MIB)),
    HostCapacity(Resources(12000, 8 * GIB), physical=Resources(6000, 4 * GIB)),
)

ROOMY = HostCapacity(Resources(12000, 10 * GIB))

guests = st.sampled_from(NAMES)
seconds = st.sampled_from((0.05, 0.1, 0.3, 1.0, 2.5, 6.0))
fuses = st.tuples(st.integers(0, 9), st.integers(0, 3), st.sampled_from((0.1, 0.1, 1.0, 20.0)))


class WorldUnderFire(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.weather = (0, 0, 0)
        self.dice = random.Random(0)
        self.broken = False
        self.world = World(HOST, TIMING, self.fate, PACE, step_seconds=0.1)
        rates = {"plug_rate": 2 * GIB, "unplug_rate": 512 * MIB, "cpu_unplug_seconds": 0.2}
        self.world.add("plain", USUAL["plain"], FakeVm(**rates))
        self.world.add("balloon", USUAL["balloon"], FakeVm(boot_bytes=GIB, device_bytes=GIB, balloon=True, **rates))
        self.world.add("quota", USUAL["quota"], FakeVm(cpu_enforced=True, vcpus_max=4, **rates), park=True)

    # ---- how the rest is done --------------------------------------------------------------------

    def fate(self, message: object) -> Fate:
        """Lost, doubled or late, as the weather is: permille each."""
        lost, doubled, late = self.weather
        if self.dice.randrange(1000) < lost:
            return ()
        first = self.dice.choice((0.1, 0.5, 3.0, 12.0)) if self.dice.randrange(1000) < late else 0.0
        if self.dice.randrange(1000) < doubled:
            return (first, self.dice.choice((0.0, 0.3, 8.0)))
        return (first,)

    def run(self, seconds: float) -> None:
        """Let time pass, and keep the trace when a promise is broken."""
        HAPPENED["step"] += 1
        try:
            self.world.run(seconds)
        except AssertionError:
            self.broken = True
            note("\n".join(self.world.trace[-40:]))
            raise

    def guest(self, name: str) -> SimGuest:
        return self.world.guests[name]

    @initialize(seed=st.integers(0, 1 << 16), weather=st.sampled_from(((0, 0, 0), (10, 50, 50), (50, 200, 300))))
    def begin(self, seed: int, weather: tuple[int, int, int]) -> None:
        self.dice.seed(seed)
        self.weather = weather
        self.run(1.0)

    # ---- programs --------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from((1.0, 5.0, 12.0, 30.0)))
    def wait(self, seconds: float) -> None:
        self.run(seconds)

    @rule(name=guests, tasks=st.sampled_from((0.1, 1.3, 2.2, 4.2, 1e6)), seconds=seconds)
    def compute(self, name: str, tasks: float, seconds: float) -> None:
        self.guest(name).load.tasks = tasks
        self.run(seconds)

    @rule(name=guests, mebibytes=st.sampled_from((100, 400, 700, 1100, 1500, 1 << 24)), seconds=seconds)
    def allocate(self, name: str, mebibytes: int, seconds: float) -> None:
        self.guest(name).load.memory_bytes = mebibytes * MIB
        self.run(seconds)

    @rule(name=guests, tasks=st.sampled_from((2.2, 4.2)), mebibytes=st.sampled_from((700, 1300)))
    def work(self, name: str, tasks: float, mebibytes: int) -> None:
        load = self.guest(name).load
        load.tasks, load.memory_bytes = tasks, mebibytes * MIB
        self.run(4.0)

    @rule(name=guests, mebibytes=st.sampled_from((0, 300, 900)))
    def idle(self, name: str, mebibytes: int) -> None:
        load = self.guest(name).load
        load.tasks, load.memory_bytes, load.unmovable_bytes = 0.1, 100 * MIB, mebibytes * MIB
        self.run(15.0)

    @rule(name=guests, other=guests)
    def swap(self, name: str, other: str) -> None:
        """One begins to work as another goes idle: what it is to get has to come back first."""
        idle, busy = self.guest(name).load, self.guest(other).load
        idle.tasks, idle.memory_bytes = 0.1, 100 * MIB
        busy.tasks, busy.memory_bytes = 4.2, 1300 * MIB
        self.run(9.0)

    # ---- guests that cannot or do not want to ----------------------------------------------------

    @rule(name=guests, pinned=st.sampled_from(((), (1,), (2, 3))), seconds=seconds)
    def pin(self, name: str, pinned: tuple[int, ...], seconds: float) -> None:
        self.guest(name).kernel.pinned = frozenset(pinned)
        self.run(seconds)

    @rule(name=guests, number=st.integers(1, 3), online=st.booleans(), seconds=seconds)
    def break_cpu(self, name: str, number: int, online: bool, seconds: float) -> None:
        self.guest(name).kernel.failing[CpuOp(number, online)] = errno.EBUSY
        self.run(seconds)

    @rule(name=guests, index=st.integers(4, 12), seconds=seconds)
    def break_block(self, name: str, index: int, seconds: float) -> None:
        self.guest(name).kernel.failing[BlockOp(index, BlockTarget.ONLINE_MOVABLE)] = errno.EIO
        self.run(seconds)

    @rule(name=guests, op_seconds=st.sampled_from((0.0, 0.0, 0.4, 6.0)), seconds=seconds)
    def mend(self, name: str, op_seconds: float, seconds: float) -> None:
        kernel = self.guest(name).kernel
        kernel.failing.clear()
        kernel.op_seconds = op_seconds
        self.run(seconds)

    @rule(name=guests, mebibytes=st.sampled_from((64, 512)), seconds=seconds)
    def take(self, name: str, mebibytes: int, seconds: float) -> None:
        guest = self.guest(name)
        guest.load.unmovable_bytes += mebibytes * MIB
        guest.vm.guest_takes(mebibytes * MIB)
        guest.kernel.step(0.0)
        HAPPENED["taken"] += 1
        self.run(seconds)

    @rule(name=guests, silent=st.booleans(), seconds=seconds)
    def hang_daemon(self, name: str, silent: bool, seconds: float) -> None:
        self.guest(name).silent = silent
        self.run(seconds)

    @rule(name=guests, seconds=seconds)
    def restart_daemon(self, name: str, seconds: float) -> None:
        self.world.restart_daemon(self.guest(name))
        HAPPENED["daemon restart"] += 1
        self.run(seconds)

    @rule(name=guests, replug_seconds=st.sampled_from((0.5, 14.0)), seconds=seconds)
    def reboot(self, name: str, replug_seconds: float, seconds: float) -> None:
        if self.guest(name).runs:
            self.world.reboot(self.guest(name), replug_seconds)
            HAPPENED["reboot"] += 1
        self.run(seconds)

    # ---- hypervisors -----------------------------------------------------------------------------

    @rule(name=guests, fault=st.sampled_from(list(Fault)), count=st.integers(1, 2), seconds=seconds)
    def fault(self, name: str, fault: Fault, count: int, seconds: float) -> None:
        self.guest(name).vm.fail_next(*[fault] * count)
        self.run(seconds)

    @rule(name=guests, count=st.integers(1, 3), seconds=seconds)
    def blind(self, name: str, count: int, seconds: float) -> None:
        self.guest(name).vm.lose_next_observations(count)
        self.run(seconds)

    @rule(name=guests, hang=st.sampled_from((0.5, 3.0, 15.0)), seconds=seconds)
    def hang(self, name: str, hang: float, seconds: float) -> None:
        self.guest(name).hung_until = self.world.now + hang
        self.run(seconds)

    @rule(name=guests, status=st.sampled_from(list(VmStatus)), seconds=seconds)
    def change_status(self, name: str, status: VmStatus, seconds: float) -> None:
        if self.guest(name).vm.status is not status:
            self.guest(name).vm.set_status(status)
            HAPPENED[f"VM {status}"] += 1
        self.run(seconds)

    @rule(names=st.permutations(NAMES))
    def vanish(self, names: list[str]) -> None:
        """A VM is gone while another works, and then a third would like what both had."""
        gone, idle, busy = (self.guest(name) for name in names)
        gone.vm.set_status(VmStatus.GONE)
        HAPPENED["VM gone"] += 1
        idle.load.tasks, idle.load.memory_bytes = 4.2, 1300 * MIB
        self.run(4.0)
        idle.load.tasks, idle.load.memory_bytes = 0.1, 100 * MIB
        busy.load.tasks, busy.load.memory_bytes = 4.2, 1300 * MIB
        self.run(9.0)

    @rule(seconds=seconds)
    def all_run(self, seconds: float) -> None:
        for guest in self.world.guests.values():
            guest.vm.set_status(VmStatus.RUNNING)
        self.run(seconds)

    @rule(permille=st.sampled_from((None, 0, 400)), seconds=seconds)
    def throttle(self, permille: int | None, seconds: float) -> None:
        vm = self.guest("quota").vm
        if permille is None:
            vm.lose_cpu_group()
        else:
            vm.set_cpu_throttled(permille)
        self.run(seconds)

    # ---- broker, network, clocks -----------------------------------------------------------------

    @rule(name=guests, tasks=st.sampled_from((2.2, 4.2)), fuse=fuses)
    def crash_growing(self, name: str, tasks: float, fuse: tuple[int, int, float]) -> None:
        self.world.fuse = Fuse(*fuse)
        load = self.guest(name).load
        load.tasks, load.memory_bytes = tasks, load.memory_bytes + 300 * MIB
        self.run(3.0)

    @rule(name=guests, fuse=fuses)
    def crash_shrinking(self, name: str, fuse: tuple[int, int, float]) -> None:
        self.world.fuse = Fuse(*fuse)
        load = self.guest(name).load
        load.tasks, load.memory_bytes = 0.1, 100 * MIB
        self.run(9.0)

    @rule(
        lost=st.sampled_from((0, 50, 300, 900)), doubled=st.sampled_from((0, 200)), late=st.sampled_from((0, 100, 500)),
        seconds=seconds,
    )  # fmt: skip
    def weather_changes(self, lost: int, doubled: int, late: int, seconds: float) -> None:
        self.weather = (lost, doubled, late)
        self.run(seconds)

    @rule(seconds=seconds)
    def calm(self, seconds: float) -> None:
        self.weather = (0, 0, 0)
        self.run(seconds)

    @rule(step=st.sampled_from((-20.0, -3.0, -0.1, 0.5, 10.0, 90.0, 3600.0)), seconds=seconds)
    def set_broker_clock(self, step: float, seconds: float) -> None:
        if self.world.clock_seconds + step > -60:
            self.world.set_clock(step)
        self.run(seconds)

    @rule(name=guests, step=st.sampled_from((-20.0, -1.0, 0.5, 10.0, 600.0)), seconds=seconds)
    def set_guest_clock(self, name: str, step: float, seconds: float) -> None:
        if self.guest(name).clock_seconds + step > -60:
            self.world.set_clock(step, self.guest(name))
        self.run(seconds)

    # ---- operators -------------------------------------------------------------------------------

    @rule(name=guests, which=st.sampled_from((None, *range(len(OTHERS)))), seconds=seconds)
    def set_limits(self, name: str, which: int | None, seconds: float) -> None:
        self._change(lambda: self.world.set_limits(name, USUAL[name] if which is None else OTHERS[which]))
        self.run(seconds)

    @rule(host=st.sampled_from(HOSTS), seconds=seconds)
    def set_host(self, host: HostCapacity, seconds: float) -> None:
        self._change(lambda: self.world.set_host(host))
        self.run(seconds)

    @rule(name=guests, paused=st.booleans(), seconds=seconds)
    def pause(self, name: str, paused: bool, seconds: float) -> None:
        self._change(lambda: self.world.pause(name, paused))
        self.run(seconds)

    def _change(self, call: object) -> None:
        """An operator's call; while no broker runs there is nobody to call."""
        if self.world.broker is None:
            return
        try:
            call()  # type: ignore[operator]
            HAPPENED["operator's change"] += 1
        except AdmissionError:
            HAPPENED["admission refused"] += 1

    # ---- peace -----------------------------------------------------------------------------------

    def teardown(self) -> None:
        if not self.broken:
            self._peace()
        HAPPENED.update(self.world.happened)
        HAPPENED["example"] += 1

    def _peace(self) -> None:
        world = self.world
        self.weather, world.fuse = (0, 0, 0), None
        if world.broker is None:
            world.start_broker()
        world.set_host(ROOMY)
        for name, guest in world.guests.items():
            guest.vm.set_status(VmStatus.RUNNING)
            guest.vm._faults.clear()
            guest.vm._lost_observations = 0
            guest.vm.set_cpu_throttled(0)  # who is idle is not held back
            guest.kernel.failing.clear()
            guest.kernel.pinned, guest.kernel.op_seconds, guest.hung_until = frozenset(), 0.0, 0.0
            guest.silent = False
            guest.load.tasks, guest.load.memory_bytes, guest.load.unmovable_bytes = 0.1, 100 * MIB, 0
            world.pause(name, False)
        self._until(self._at_minimum, "everybody is idle: not at the minimum")
        for name in NAMES:
            world.set_limits(name, USUAL[name])
        world.set_host(HOST)
        self._until(self._at_minimum, "limits are back: not at the minimum")
        guest = world.guests["plain"]
        guest.load.tasks, guest.load.memory_bytes = 4.2, 900 * MIB
        self._until(self._has_grown, "plain works: it has not got what it needs")

    def _until(self, there: object, what: str) -> None:
        calm = 0
        for _ in range(80):
            self.run(5.0)
            calm = calm + 1 if there() else 0  # type: ignore[operator]
            if calm > 2:
                return
        note("\n".join(self.world.trace[-40:]))
        raise AssertionError(f"(15) {what}: " + "; ".join(self._unlike_minimum()))

    def _at_minimum(self) -> bool:
        return not self._unlike_minimum()

    def _unlike_minimum(self) -> list[str]:
        """Who is not at its minimum, in words."""
        world, found = self.world, []
        assert world.broker is not None
        for name, guest in world.guests.items():
            state, low = world.broker.guests[name], world.limits[name].min
            for kind, track in state.tracks.items():
                unit, held = state.unit(kind), guest.vm.truth().held(kind)
                least = max(-(-low.get(kind) // unit) * unit, MILLICORES_PER_VCPU if kind is Kind.CPU else 0)
                if not track.reserved == held == max(least, state.bounds(kind)[0]):
                    wait = track.shrink_after - world.broker_now
                    found.append(
                        f"{name} {kind} holds {held}, reserved {track.reserved}, {track.phase}, target {track.target} "
                        f"({track.reason.text}), needs {state.demand and state.demand.needed}, fixed because "
                        f"{state.why_fixed(world.broker_now, 30.0)}, shrinks in {wait:.0f} s, grows in "
                        f"{track.grow_after - world.broker_now:.0f} s, overdue {track.overdue}, min {low.get(kind)}"
                    )
        return found

    def _has_grown(self) -> bool:
        guest = self.world.guests["plain"]
        return len(guest.kernel.online_cpus) >= 3 and guest.kernel.memory_total >= 900 * MIB


def burn(examples: int, derandomize: bool = True, machine: type[WorldUnderFire] = WorldUnderFire) -> None:
    """So many examples; raises what the first broken promise says.

    Derandomized, the same code gives the same examples. Failures are not shrunk, which takes minutes; the steps of the
    example are printed as they were, with the end of its trace.
    """
    run_state_machine_as_test(
        machine,
        settings=settings(
            derandomize=derandomize,
            database=None,
            phases=[Phase.generate],
            max_examples=examples,
            stateful_step_count=STEPS_PER_EXAMPLE,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def report() -> str:
    """What happened, a line each."""
    return "\n".join(f"{count:8d} {what}" for what, count in sorted(HAPPENED.items(), key=lambda item: -item[1]))


if __name__ == "__main__":
    try:
        burn(int(sys.argv[1]), derandomize=sys.argv[2:] != ["random"])
    finally:
        print(report())
