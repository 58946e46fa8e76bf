"""How often the guest samples: often while something moves, hardly ever at rest."""

import pytest

from guestd.guest.core.actions import Rescan, Settings, TakeSample
from guestd.guest.core.machine import GuestMachine
from guestd.model.guest import Capability, Identity, Inventory, Sample
from guestd.model.units import GIB, MIB

SETTINGS = Settings()


class Quiet:
    """A guest in which nothing happens, unless `used_bytes` changes."""

    def __init__(self, watched: bool) -> None:
        self.now, self.used_bytes = 100.0, 100 * MIB
        self.machine = GuestMachine(Identity(bytes(16), 1, capabilities=frozenset({Capability.PSI})), self.now)
        self.machine.on_watched(watched)

    def samples(self, seconds: float) -> int:
        """How many samples it takes in the next seconds."""
        end, taken = self.now + seconds, 0
        while self.now < end:
            for action in self.machine.next_actions(self.now):
                if isinstance(action, TakeSample):
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
