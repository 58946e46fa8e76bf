"""Noise, and guests that are in the way of the others."""

import random

import pytest

from guestd.broker.core.ledger import HostCapacity
from guestd.broker.core.track import Timing
from guestd.broker.hypervisor.fake import FakeVm
from guestd.model.resources import Kind, Resources
from guestd.model.units import GIB, MIB
from guestd.sim.guest import SimGuest
from guestd.sim.world import World, limits

HOST = HostCapacity(Resources(8000, 8 * GIB))
ONE = limits(1, 4, 512 * MIB, 2560 * MIB)
HOUR = 3600
HOLD_SECONDS = 6.0
"""For so long a lower need must last to be believed (`EstimateSettings.hold_seconds`)."""


def resizes(world: World) -> int:
    return world.happened["grow"] + world.happened["shrink"] + world.happened["partial"]


def test_noise_that_is_quicker_than_a_need_is_believed_resizes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    world, dice = World(HOST, step_seconds=0.1), random.Random(3)
    guest = world.add("a", ONE)
    for second in range(0, HOUR, 2):
        high = second % 4 == 0
        guest.load.memory_bytes = (520 if high else 120 + dice.randrange(380)) * MIB
        guest.load.tasks = 2.6 if high else dice.choice((0.1, 1.0, 2.0))
        world.run(2)
    count = resizes(world)
    with capsys.disabled():
        print(f"\nnoise every 2 s: {count} resizes per hour")
    # A lower need is believed after 6 s, and the higher one comes back after 2: up in a few steps, and then nothing.
    assert count <= 6


def test_noise_made_to_flap_meets_the_hold_and_the_cool_down(capsys: pytest.CaptureFixture[str]) -> None:
    world = World(HOST, step_seconds=0.1)
    guest = world.add("a", ONE)
    period = HOLD_SECONDS + 1.5  # just long enough for each lower need to be believed
    for _ in range(round(HOUR / (2 * period))):
        guest.load.tasks, guest.load.memory_bytes = 2.6, 600 * MIB
        world.run(period)
        guest.load.tasks, guest.load.memory_bytes = 0.1, 120 * MIB
        world.run(period)
    count = resizes(world)
    with capsys.disabled():
        print(f"\nnoise every {period} s: {count} resizes per hour")
    # Each cycle waits for the hold of a lower need, so there is at most one grow (in two steps) and one
    # shrink (likewise) of each kind in it.
    assert count <= 2 * 2 * 2 * HOUR / (2 * HOLD_SECONDS)
    assert count >= 100  # it does follow: the noise is no noise but load


def test_the_budget_bounds_what_the_cool_down_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    world = World(HOST, Timing(budget_grows=4, budget_shrinks=2, cool_down_seconds=0.0), step_seconds=0.1)
    guest = world.add("a", ONE)
    for _ in range(round(HOUR / 16)):
        guest.load.tasks, guest.load.memory_bytes = 2.6, 600 * MIB
        world.run(8)
        guest.load.tasks, guest.load.memory_bytes = 0.1, 120 * MIB
        world.run(8)
    count = resizes(world)
    with capsys.disabled():
        print(f"\nnoise every 8 s with a budget of 4 per minute and kind: {count} resizes per hour")
    assert count <= (4 + 2) * 2 * (HOUR / 60 + 1)
    assert count >= 4 * HOUR / 60 / 2


def crowd(world: World) -> list[SimGuest]:
    rates = {"plug_rate": 4 * GIB, "unplug_rate": 512 * MIB, "cpu_unplug_seconds": 0.1}
    return [world.add(name, ONE, FakeVm(**rates)) for name in ("bad", "b", "c")]


@pytest.mark.parametrize("how", ["refuses", "silent", "answers late", "hypervisor hangs"])
def test_one_bad_guest_does_not_stop_the_balance_of_the_rest(how: str) -> None:
    world = World(HostCapacity(Resources(8000, 6 * GIB)))
    bad, b, c = crowd(world)
    bad.load.tasks, bad.load.memory_bytes = 4.2, 900 * MIB
    b.load.tasks = 2.6
    world.run(20)
    assert len(bad.kernel.online_cpus) == 4
    had = bad.vm.truth()
    match how:
        case "refuses":
            bad.kernel.pinned, bad.load.unmovable_bytes = frozenset({1, 2, 3}), 2 * GIB
        case "silent":
            bad.silent = True
        case "answers late":
            bad.kernel.op_seconds = 30.0
            bad.load.unmovable_bytes = 2 * GIB
        case "hypervisor hangs":
            bad.hung_until = world.now + 10_000
    bad.load.tasks, bad.load.memory_bytes = 0.1, 120 * MIB
    b.load.tasks, c.load.tasks, c.load.memory_bytes = 0.1, 4.2, 1300 * MIB
    world.run(40)
    assert world.broker is not None
    kept = world.broker.guests["bad"].reserved
    assert kept.memory_bytes >= had.memory_held_bytes if how in ("silent", "hypervisor hangs") else True
    there = min(4, (8000 - kept.cpu_millicores) // 1000 - 1)
    assert len(c.kernel.online_cpus) == there, world.trace[-20:]
    assert c.kernel.memory_total >= 1300 * MIB
    assert len(b.vm.guest_cpus) == 1
    if how != "answers late":
        assert kept.cpu_millicores == 4000
        tracks = world.broker.guests["bad"].tracks
        if how == "refuses":
            assert tracks[Kind.CPU].counters.refusals >= 1
            assert tracks[Kind.CPU].counters.refusals <= 5  # each refusal doubles the pause before the next asking


def test_a_bad_guest_gives_back_when_it_comes_to_its_senses() -> None:
    world = World(HOST)
    bad, b, _ = crowd(world)
    bad.load.tasks, bad.load.memory_bytes = 4.2, 900 * MIB
    world.run(20)
    bad.silent, bad.load.tasks, bad.load.memory_bytes = True, 0.1, 120 * MIB
    b.load.tasks = 4.2
    world.run(120)
    assert len(bad.vm.guest_cpus) == 4
    assert len(b.kernel.online_cpus) == 3
    bad.silent = False
    world.run(40)
    assert len(bad.vm.guest_cpus) == 1
    assert bad.vm.guest_memory_bytes == 512 * MIB
    assert len(b.kernel.online_cpus) == 4
