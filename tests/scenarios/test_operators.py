"""What operators do to guests that live: only observe them, serve them, and take back what is spare at once."""

from guestd.broker.core.ledger import HostCapacity
from guestd.model.explanation import ReclaimRequest
from guestd.model.resources import Kind, Resources
from guestd.model.units import GIB, MIB
from guestd.sim.guest import SimGuest
from guestd.sim.world import World, limits

HOST = HostCapacity(Resources(8000, 8 * GIB))
LIMITS = limits(1, 4, 512 * MIB, 4 * GIB)


def busy(guest: SimGuest) -> None:
    guest.load.tasks, guest.load.memory_bytes = 4.2, 1500 * MIB


def idle(guest: SimGuest) -> None:
    guest.load.tasks, guest.load.memory_bytes = 0.1, 100 * MIB


def codes(world: World, word: str) -> list[str]:
    return [line for line in world.trace if word in line]


def test_a_host_that_is_only_observed_stays_as_it_is_until_it_is_served() -> None:
    world = World(HOST)
    guests = [world.add(name, LIMITS, observe=True) for name in ("a", "b")]
    world.run(2)
    for guest in guests:
        busy(guest)
    world.run(60)
    assert [guest.vm.requests for guest in guests] == [[], []]
    assert world.journal == {}
    assert 4 <= len(codes(world, "would grow")) <= 40
    world.observe("a", False)
    world.run(30)
    assert len(guests[0].kernel.online_cpus) == 4
    assert guests[0].kernel.memory_total > 1500 * MIB
    assert guests[1].vm.requests == []
    requests = list(guests[0].vm.requests)
    world.observe("a", True)
    idle(guests[0])
    world.run(60)
    assert guests[0].vm.requests == requests
    assert codes(world, "a cpu: would shrink to 1 CPU")
    assert len(guests[0].kernel.online_cpus) == 4


def test_what_is_spare_comes_back_without_the_usual_pauses() -> None:
    world = World(HOST)
    guest = world.add("a", LIMITS)
    world.run(2)
    busy(guest)
    world.run(20)
    assert world.broker is not None
    state = world.broker.guests["a"]
    before = state.reserved
    assert before.cpu_millicores == 4000
    for track in state.tracks.values():
        track.kept, track.shrink_after = track.reserved, world.broker_now + 60  # as after a refusal
    idle(guest)
    world.run(15)
    assert state.reserved == before
    cpu, memory = world.reclaim("a", ReclaimRequest())
    assert (cpu.kind, cpu.reserved, cpu.goal) == (Kind.CPU, 4000, 1000)
    assert (memory.kind, memory.goal) == (Kind.MEMORY, 512 * MIB)
    world.run(15)
    assert state.reserved == Resources(1000, 512 * MIB)
