"""How often the guest samples: often while something moves, hardly ever at rest."""

from itertools import pairwise

import pytest

from guestd.guest.core.actions import Rescan, Say, Settings, TakeSample
from guestd.guest.core.machine import GuestMachine
from guestd.model.guest import Capability, Identity, Inventory, Sample
from guestd.model.messages import Heartbeat, Welcome
from guestd.model.resources import Resources
from guestd.model.units import GIB, MIB

SETTINGS = Settings()


class Quiet:
    """A guest in which nothing happens, unless `used_bytes` changes."""

    def __init__(self, watched: bool) -> None:
        self.now, self.used_bytes = 100.0, 100 * MIB
        self.machine = GuestMachine(Identity(bytes(16), 1, capabilities=frozenset({Capability.PSI})), self.now)
        self.machine.on_watched(watched)
        self.beats, self.wakes = list[float](), list[float]()

    def samples(self, seconds: float) -> int:
        """How many samples it takes in the next seconds."""
        end, taken = self.now + seconds, 0
        while self.now < end:
            self.wakes.append(self.now)
            for action in (*self.machine.next_actions(self.now), *self.machine.next_actions(self.now)):
                if isinstance(action, Say) and isinstance(action.message, Heartbeat):
                    self.beats.append(self.now)
                elif isinstance(action, TakeSample):
                    self.machine.on_sample(self.sample(), self.now)
                    taken += 1
                elif isinstance(action, Rescan):
                    self.machine.on_inventory(
                        Inventory(cpus_present=frozenset({0}), cpus_online=frozenset({0})), self.now
                    )
            self.now = min(end, max(self.machine.wake_at(self.now), self.now + 0.001))
        return taken

    def sample(self) -> Sample:
        return Sample(
            cpu_busy_seconds={0: 1.0},
            cpu_idle_seconds={0: self.now},
            cpu_steal_seconds=0.0,
            runnable=0,
            cpu_some_us=0,
            memory_some_us=0,
            memory_full_us=0,
            memory_total_bytes=GIB,
            memory_available_bytes=GIB - self.used_bytes,
            swap_used_bytes=0,
            refaults=0,
        )


def test_at_rest_it_samples_hardly_ever() -> None:
    guest = Quiet(watched=True)
    guest.samples(SETTINGS.calm_for_seconds + 1)
    assert guest.samples(60.0) <= 60.0 / SETTINGS.rest_seconds + 1


def test_without_someone_who_watches_it_never_rests() -> None:
    guest = Quiet(watched=False)
    guest.samples(60.0)
    assert guest.samples(10.0) == pytest.approx(10.0 / SETTINGS.calm_seconds, abs=2)


def test_a_false_alarm_is_over_soon() -> None:
    guest = Quiet(watched=True)
    guest.samples(60.0)
    guest.machine.on_pressure(guest.now)
    assert guest.samples(20.0) <= SETTINGS.quick_for_seconds / SETTINGS.quick_seconds + 20.0 / SETTINGS.rest_seconds + 2


def test_more_memory_in_use_wakes_it_for_as_long_as_a_need_holds() -> None:
    guest = Quiet(watched=True)
    guest.samples(60.0)
    guest.used_bytes += 2 * SETTINGS.stir_bytes
    guest.machine.on_pressure(guest.now)
    assert guest.samples(SETTINGS.calm_for_seconds) >= 0.8 * SETTINGS.calm_for_seconds / SETTINGS.calm_seconds


def test_a_sample_that_failed_is_taken_again_soon_also_in_deep_rest() -> None:
    guest = Quiet(watched=True)
    guest.samples(60.0)
    before = guest.now
    while not any(isinstance(action, TakeSample) for action in guest.machine.next_actions(guest.now)):
        guest.now = guest.machine.wake_at(guest.now)
    assert guest.now - before > SETTINGS.rest_seconds
    guest.machine.on_failed_sample(guest.now, blind=False)
    assert guest.machine.wake_at(guest.now) == pytest.approx(guest.now + SETTINGS.retry_sample_seconds)
    assert guest.samples(20.0) == 1, "once it can be read there is rest again"


@pytest.mark.parametrize("seconds", [2.0, 7.0, 30.0, 45.0])
def test_heartbeats_come_on_time_in_the_deepest_rest(seconds: float) -> None:
    guest = Quiet(watched=True)
    guest.samples(20.0)
    guest.machine.on_welcome(Welcome(1, "a", 3, seconds, Resources(1000, GIB), Resources(4000, GIB)), guest.now)
    guest.samples(100.0)
    guest.beats.clear()
    guest.samples(10 * seconds)
    pauses = [after - before for before, after in pairwise(guest.beats)]
    assert len(pauses) >= 8
    assert all(seconds - 0.3 <= pause <= seconds + 0.01 for pause in pauses), pauses


def test_what_is_due_at_nearly_the_same_time_is_done_in_one_go() -> None:
    guest = Quiet(watched=True)
    guest.samples(20.0)
    guest.machine.on_welcome(Welcome(1, "a", 3, 30.0, Resources(1000, GIB), Resources(4000, GIB)), guest.now)
    guest.samples(100.0)
    guest.wakes.clear()
    guest.samples(300.0)
    assert len(guest.wakes) <= 300.0 / SETTINGS.deep_rest_seconds + 300.0 / SETTINGS.reconcile_seconds + 2


def test_who_cannot_tell_its_load_is_not_woken_for_a_heartbeat_that_it_cannot_say() -> None:
    guest = Quiet(watched=True)
    guest.samples(20.0)
    guest.machine.on_welcome(Welcome(1, "a", 3, 2.0, Resources(1000, GIB), Resources(4000, GIB)), guest.now)
    guest.samples(1.0)
    guest.machine.on_failed_sample(guest.now, blind=True)
    guest.now += 10.0
    guest.machine.next_actions(guest.now)
    assert guest.machine.wake_at(guest.now) > guest.now
