"""How often the guest samples: often while something moves, hardly ever at rest."""

import math

import pytest

from guestd.guest.core.actions import Rescan, Settings, TakeSample
from guestd.guest.core.machine import GuestMachine
from guestd.model.guest import Capability, Identity, Inventory, Sample
from guestd.model.units import GIB, MIB

SETTINGS = Settings()


class Quiet:
    """A guest in which nothing happens, unless `used_bytes` changes."""

    def __init__(self, watched: bool) -> None:
        self.now, self.used_bytes, self.runnable = 100.0, 100 * MIB, 0
        self.busy_seconds = self.idle_seconds = 0.0
        self.sampled_at = self.now
        self.machine = GuestMachine(Identity(bytes(16), 1, capabilities=frozenset({Capability.PSI})), self.now)
        self.machine.on_watched(watched)

    def samples(self, seconds: float, trigger_seconds: float = math.inf) -> int:
        """How many samples it takes in the next seconds, with a PSI trigger every so often."""
        end, taken, trigger_at = self.now + seconds, 0, self.now + trigger_seconds
        while self.now < end:
            if self.now >= trigger_at:
                self.machine.on_pressure(self.now)
                trigger_at += trigger_seconds
            for action in self.machine.next_actions(self.now):
                if isinstance(action, TakeSample):
                    self.machine.on_sample(self.sample(), self.now)
                    taken += 1
                elif isinstance(action, Rescan):
                    self.machine.on_inventory(
                        Inventory(cpus_present=frozenset({0}), cpus_online=frozenset({0})), self.now
                    )
            self.now = min(end, trigger_at, max(self.machine.wake_at(self.now), self.now + 0.001))
        return taken

    def sample(self) -> Sample:
        passed, self.sampled_at = self.now - self.sampled_at, self.now
        if self.runnable:
            self.busy_seconds += passed
        else:
            self.idle_seconds += passed
        return Sample(
            cpu_busy_seconds={0: self.busy_seconds},
            cpu_idle_seconds={0: self.idle_seconds},
            cpu_steal_seconds=0.0,
            runnable=self.runnable,
            cpu_some_us=round(self.busy_seconds * 1e6),
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


def test_less_memory_free_is_one_look_where_it_is_only_cache() -> None:
    guest = Quiet(watched=True)
    guest.samples(60.0)
    guest.machine.on_glance(guest.now)
    assert guest.samples(SETTINGS.rest_seconds / 2) == 1


def test_more_memory_in_use_wakes_it_for_as_long_as_a_need_holds() -> None:
    guest = Quiet(watched=True)
    guest.samples(60.0)
    guest.used_bytes += 2 * SETTINGS.stir_bytes
    guest.machine.on_glance(guest.now)
    assert guest.samples(SETTINGS.calm_for_seconds) >= 0.8 * SETTINGS.calm_for_seconds / SETTINGS.calm_seconds


def test_tasks_that_go_on_waiting_are_followed_closely_until_it_was_said_how_many_there_are() -> None:
    guest = Quiet(watched=True)
    guest.samples(60.0)
    guest.runnable = 3
    guest.machine.on_pressure(guest.now)
    assert guest.samples(1.0) >= 0.6 / SETTINGS.quick_seconds
    guest.samples(2.0)
    assert guest.samples(20.0, trigger_seconds=1.0) <= 20.0 / SETTINGS.calm_seconds + 20.0 + 1, "a trigger is one look"
    guest.runnable = 5
    assert guest.samples(1.0) >= 0.5 / SETTINGS.quick_seconds, "more of them are something new"
