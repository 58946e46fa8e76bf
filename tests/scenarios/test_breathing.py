"""Both production cores together, in virtual time, on fake VMs."""

import errno

import pytest

from guestd.broker.core.ledger import HostCapacity
from guestd.broker.hypervisor.fake import FakeVm, Fault
from guestd.guest.core.ops import CpuOp
from guestd.model.errors import AdmissionError
from guestd.model.resources import Kind, Resources
from guestd.model.units import GIB, MIB
from guestd.model.vm import VmStatus
from guestd.sim.guest import SimGuest
from guestd.sim.kernel import BLOCK_BYTES
from guestd.sim.world import World, limits

HOST = HostCapacity(Resources(8000, 8 * GIB))
ONE = limits(1, 4, 512 * MIB, 2560 * MIB)


def grown(world: World, guest: SimGuest) -> None:
    """Make the guest want everything, and wait until it has it."""
    guest.load.tasks = 4.2
    for _ in range(200):
        guest.load.memory_bytes = min(1500 * MIB, guest.load.memory_bytes + 10 * MIB)
        world.step()
    assert len(guest.kernel.online_cpus) == 4
    assert guest.vm.guest_memory_bytes >= 1792 * MIB


def idle(world: World, guest: SimGuest, seconds: float = 40) -> None:
    guest.load.tasks, guest.load.memory_bytes = 0.1, 120 * MIB
    world.run(seconds)


def at_minimum(guest: SimGuest) -> bool:
    return len(guest.vm.guest_cpus) == 1 and guest.vm.guest_memory_bytes == 512 * MIB


def test_one_vm_grows_with_its_load_and_shrinks_back() -> None:
    world = World(HOST)
    guest = world.add("a", ONE)
    world.run(5)
    assert at_minimum(guest)
    grown(world, guest)
    assert guest.kernel.short_of_memory == 0
    idle(world, guest)
    assert at_minimum(guest)


def test_weights_split_what_is_scarce_and_idle_frees_it() -> None:
    world = World(HostCapacity(Resources(4000, 8 * GIB)))
    big = world.add("big", limits(1, 4, 512 * MIB, GIB, weight=300))
    small = world.add("small", limits(1, 4, 512 * MIB, GIB, weight=100))
    small.load.tasks = 4.2
    world.run(15)
    assert len(small.kernel.online_cpus) == 3
    big.load.tasks = 4.2
    world.run(30)
    assert (len(big.kernel.online_cpus), len(small.kernel.online_cpus)) == (3, 1)
    big.load.tasks = 0.1
    world.run(30)
    assert (len(big.kernel.online_cpus), len(small.kernel.online_cpus)) == (1, 3)


def test_a_broker_that_dies_loses_nothing() -> None:
    world = World(HOST)
    guest = world.add("a", ONE)
    world.run(3)
    grown(world, guest)
    world.run(15)  # the growth is over, and what it asked for ahead is given back
    before = (guest.vm.guest_cpus, guest.vm.guest_memory_bytes)
    world.kill_broker()
    world.run(30)
    assert (guest.vm.guest_cpus, guest.vm.guest_memory_bytes) == before
    world.start_broker()
    world.run(2)
    assert (guest.vm.guest_cpus, guest.vm.guest_memory_bytes) == before
    idle(world, guest)
    assert at_minimum(guest)


def test_a_restarted_daemon_changes_nothing() -> None:
    world = World(HOST)
    guest = world.add("a", ONE)
    world.run(3)
    grown(world, guest)
    world.run(15)  # the growth is over, and what it asked for ahead is given back
    before = (guest.vm.guest_cpus, guest.vm.guest_memory_bytes)
    world.restart_daemon(guest)
    world.run(1)
    assert (guest.vm.guest_cpus, guest.vm.guest_memory_bytes) == before


def test_a_reboot_converges() -> None:
    world = World(HOST)
    guest = world.add("a", ONE)
    world.run(3)
    grown(world, guest)
    world.reboot(guest, replug_seconds=14)
    idle(world, guest, 60)
    assert at_minimum(guest)
    grown(world, guest)


def test_a_block_that_stays_makes_a_partial_shrink() -> None:
    world = World(HOST)
    guest = world.add("a", ONE)
    world.run(3)
    grown(world, guest)
    guest.load.tasks, guest.load.memory_bytes = 0.1, 120 * MIB
    kept = 1024 * MIB
    for _ in range(1200):
        guest.vm.guest_keeps_bytes = kept
        world.guests["a"].kernel.step = lambda seconds: None  # type: ignore[method-assign] - pinned memory
        world.step()
    assert world.broker is not None
    track = world.broker.guests["a"].tracks[Kind.MEMORY]
    assert guest.vm.guest_memory_bytes == kept == track.reserved
    assert track.counters.partials >= 1


def test_a_vm_that_is_gone_frees_everything_but_its_minimum() -> None:
    world = World(HostCapacity(Resources(5000, 3 * GIB)))
    guest, other = world.add("a", ONE), world.add("b", ONE)
    world.run(3)
    grown(world, guest)
    assert world.broker is not None
    guest.vm.set_status(VmStatus.GONE)
    world.run(1)
    assert world.broker.guests["a"].reserved == Resources(0, 0)
    other.load.tasks = 4.2
    world.run(10)
    assert len(other.kernel.online_cpus) == 4


def test_nothing_is_decided_about_a_frozen_vm() -> None:
    world = World(HOST)
    guest = world.add("a", ONE)
    world.run(3)
    grown(world, guest)
    guest.vm.set_status(VmStatus.FROZEN)
    requests = len(guest.vm.requests)
    idle(world, guest)
    assert len(guest.vm.requests) == requests
    guest.vm.set_status(VmStatus.RUNNING)
    idle(world, guest)
    assert at_minimum(guest)


@pytest.mark.parametrize("fault", list(Fault))
def test_a_command_that_fails_or_whose_answer_is_lost_only_delays(fault: Fault) -> None:
    world = World(HOST)
    guest = world.add("a", ONE)
    world.run(3)
    guest.vm.fail_next(fault)
    guest.load.tasks = 4.2
    world.run(30)
    assert len(guest.kernel.online_cpus) == 4
    guest.vm.fail_next(fault, fault)
    idle(world, guest, 60)
    assert at_minimum(guest)


def test_a_cpu_that_fails_once_comes_up_later() -> None:
    world = World(HOST)
    guest = world.add("a", ONE)
    world.run(3)
    guest.kernel.failing[CpuOp(2, True)] = errno.EIO
    guest.load.tasks = 4.2
    world.run(5)
    assert guest.kernel.online_cpus == {0, 1, 3}
    guest.kernel.failing.clear()
    world.run(10)
    assert guest.kernel.online_cpus == {0, 1, 2, 3}


def test_cpus_below_boot_size_stay() -> None:
    world = World(HOST)
    guest = world.add("a", ONE, FakeVm(vcpus=2, vcpus_max=4))
    world.run(20)
    assert guest.vm.guest_cpus == {0, 1}


def test_a_balloon_takes_boot_memory_below_the_minimum_of_the_device() -> None:
    world = World(HOST)
    vm = FakeVm(boot_bytes=GIB, device_bytes=GIB, balloon=True, unplug_rate=256 * MIB)
    guest = world.add("a", limits(1, 4, 512 * MIB, 2 * GIB), vm)
    world.run(30)
    assert vm.guest_memory_bytes == 512 * MIB
    guest.load.memory_bytes = 380 * MIB
    world.run(3)
    assert vm.guest_memory_bytes >= 512 * MIB + BLOCK_BYTES


def test_noise_around_a_block_does_not_flap() -> None:
    world = World(HOST)
    guest = world.add("a", ONE)
    world.run(3)
    for step in range(2400):  # two minutes, up and down by 40 MiB each second
        guest.load.memory_bytes = (400 + 40 * ((step // 20) % 2)) * MIB
        guest.load.tasks = 1.0 + (step // 10) % 2
        world.step()
    resizes = [line for line in world.trace if "grown" in line or "shrunk" in line]
    assert len(resizes) <= 6, resizes


def test_a_minimum_that_does_not_fit_is_refused_with_the_numbers() -> None:
    world = World(HostCapacity(Resources(4000, GIB), Resources(0, 256 * MIB)))
    world.add("a", limits(1, 4, 512 * MIB, GIB))
    with pytest.raises(AdmissionError, match=r"memory: the minimums of 2 guests add up to 1 GiB.*768 MiB"):
        world.add("b", limits(1, 4, 512 * MIB, GIB))
