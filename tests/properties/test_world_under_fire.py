"""Random loads, lost messages, failing commands, deaths and reboots: the invariants hold after every step
(`World.check`), and when peace returns everything converges.
"""

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from guestd.broker.core.ledger import HostCapacity
from guestd.broker.hypervisor.fake import FakeVm, Fault
from guestd.model.resources import Kind, Resources
from guestd.model.units import GIB, MIB
from guestd.model.vm import VmStatus
from guestd.sim.world import World, limits

EVENTS = st.one_of(
    st.tuples(st.just("tasks"), st.integers(0, 1), st.sampled_from((0.1, 1.0, 2.5, 4.2, 9.0))),
    st.tuples(st.just("memory"), st.integers(0, 1), st.sampled_from((100, 300, 700, 1100, 1500))),
    st.tuples(st.just("fault"), st.integers(0, 1), st.sampled_from(list(Fault))),
    st.tuples(st.just("blind"), st.integers(0, 1), st.integers(1, 3)),
    st.tuples(st.just("freeze"), st.integers(0, 1), st.just(0)),
    st.tuples(st.just("thaw"), st.integers(0, 1), st.just(0)),
    st.tuples(st.just("reboot"), st.integers(0, 1), st.just(0)),
    st.tuples(st.just("daemon"), st.integers(0, 1), st.just(0)),
    st.tuples(st.just("broker"), st.just(0), st.integers(0, 40)),
    st.tuples(st.just("run"), st.just(0), st.integers(1, 60)),
)


def apply(world: World, event: tuple[str, int, object]) -> None:
    what, index, value = event
    guest = world.guests["ab"[index]]
    match what:
        case "tasks":
            guest.load.tasks = value
        case "memory":
            guest.load.memory_bytes = value * MIB
        case "fault":
            guest.vm.fail_next(value)
        case "blind":
            guest.vm.lose_next_observations(value)
        case "freeze":
            guest.vm.set_status(VmStatus.FROZEN)
        case "thaw":
            guest.vm.set_status(VmStatus.RUNNING)
        case "reboot":
            world.reboot(guest)
        case "daemon":
            world.restart_daemon(guest)
        case "broker":
            world.kill_broker()
            for _ in range(value):
                world.step()
            world.start_broker()
        case "run":
            for _ in range(value):
                world.step()
    world.step()


@settings(
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.lists(EVENTS, min_size=3, max_size=25), st.integers(0, 9), st.randoms(use_true_random=False))
def test_invariants_hold_and_peace_converges(events: list[tuple[str, int, object]], loss: int, random: object) -> None:
    fire = [True]
    world = World(
        HostCapacity(Resources(6000, 4 * GIB)),
        lose=lambda _: fire[0] and random.randrange(10) < loss,  # type: ignore[attr-defined]
    )
    vms = []
    for name in ("a", "b"):
        vm = FakeVm(plug_rate=4 * GIB, unplug_rate=512 * MIB, cpu_unplug_seconds=0.2)
        world.add(name, limits(1, 4, 512 * MIB, 2560 * MIB), vm)
        vms.append(vm)
    for event in events:
        apply(world, event)
    fire[0] = False
    for guest in world.guests.values():
        guest.vm.set_status(VmStatus.RUNNING)
        guest.load.tasks, guest.load.memory_bytes = 0.1, 100 * MIB
    assert world.broker is not None
    calm = 0
    for _ in range(150):
        world.run(1)
        there = all(len(vm.guest_cpus) == 1 and vm.guest_memory_bytes == 512 * MIB for vm in vms)
        calm = calm + 1 if there else 0
        if calm > 12:  # longer than any need is held
            break
    for name, guest in world.guests.items():
        assert len(guest.vm.guest_cpus) == 1, (name, world.trace[-10:])
        assert guest.vm.guest_memory_bytes == 512 * MIB, (name, world.trace[-10:])
        for kind in Kind:
            assert world.broker.guests[name].tracks[kind].reserved == (1000 if kind is Kind.CPU else 512 * MIB)
