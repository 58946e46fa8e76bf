"""How many CPUs a VM needs, from hand-made samples."""

from dataclasses import replace

import pytest

from guestd.guest.core.need import EstimateSettings
from guestd.guest.core.need_cpu import CpuEstimator, CpuNeed
from guestd.model.guest import Sample
from guestd.model.messages import Throttle, Urgency
from guestd.model.units import GIB

SETTINGS = EstimateSettings()
STEP_SECONDS = 0.05
EMPTY = Sample({}, {}, 0.0, 0, 0, 0, 0, GIB, GIB, 0, 0)


class Cpus:
    """A VM whose CPUs are used by so many tasks."""

    def __init__(self, online: int, psi: bool = True) -> None:
        self.estimator, self.online, self.psi, self.now = CpuEstimator(), online, psi, 50.0
        self.busy: dict[int, float] = {}
        self.idle: dict[int, float] = {}
        self.some_us = 0
        self.steal = 0.0
        self.throttle: Throttle | None = None

    def run(self, seconds: float, tasks: float, runnable: int | None = None, waits: bool | None = None) -> CpuNeed:
        for _ in range(round(seconds / STEP_SECONDS)):
            self.now += STEP_SECONDS
            share = min(tasks, self.online) / self.online
            for number in range(self.online):
                self.busy[number] = self.busy.get(number, 0.0) + share * STEP_SECONDS
                self.idle[number] = self.idle.get(number, 0.0) + (1 - share) * STEP_SECONDS
            if tasks > self.online if waits is None else waits:
                self.some_us += round(STEP_SECONDS * 1e6)
            need = self.sample(round(tasks) if runnable is None else runnable)
        return need

    def sample(self, runnable: int = 0) -> CpuNeed:
        counted = {number: self.busy.get(number, 0.0) for number in range(self.online)}
        idle = {number: self.idle.get(number, 0.0) for number in range(self.online)}
        some = self.some_us if self.psi else None
        sample = replace(EMPTY, cpu_busy_seconds=counted, cpu_idle_seconds=idle, runnable=runnable, cpu_some_us=some)
        sample = replace(sample, cpu_steal_seconds=self.steal)
        return self.estimator.update(sample, self.online, self.now, self.throttle)


def test_an_idle_vm_needs_next_to_nothing_once_that_has_held() -> None:
    need = Cpus(4).run(SETTINGS.hold_seconds + 1, tasks=0.1)
    assert need.needed_millicores < 500
    assert (need.waiting, need.urgency, need.reason.code) == (False, Urgency.NORMAL, "cpu-used")


def test_what_is_there_at_first_is_needed_until_less_has_held() -> None:
    """A daemon that was just (re)started has seen nothing yet: that is no reason to take CPUs away."""
    cpus = Cpus(4)
    assert cpus.sample().needed_millicores == 4000
    assert cpus.run(SETTINGS.hold_seconds - 0.2, tasks=0.1).needed_millicores == 4000
    assert cpus.run(1.0, tasks=0.1).needed_millicores < 1000


def test_tasks_that_wait_are_needed_at_once() -> None:
    cpus = Cpus(1)
    cpus.run(3, tasks=0.1)
    need = cpus.run(0.5, tasks=4)
    assert (need.needed_millicores, need.waiting, need.urgency) == (4000, True, Urgency.NOW)
    assert need.reason.code == "cpu-waiting"


def test_a_burst_says_nothing() -> None:
    cpus = Cpus(1)
    cpus.run(8, tasks=1)
    cpus.run(STEP_SECONDS, tasks=1, runnable=12)
    assert cpus.run(STEP_SECONDS, tasks=1).needed_millicores == 1000


def test_busy_cpus_without_waiting_tasks_are_enough() -> None:
    need = Cpus(2).run(8, tasks=2)
    assert (need.needed_millicores, need.waiting) == (2000, False)
    assert need.used_millicores == 2000


def test_without_psi_busy_cpus_and_runnable_tasks_decide() -> None:
    cpus = Cpus(1, psi=False)
    cpus.run(3, tasks=0.1)
    need = cpus.run(2, tasks=3)
    assert (need.needed_millicores, need.reason.code) == (3000, "cpu-waiting")
    assert "all CPUs are busy" in need.reason.text


def test_a_lower_need_is_believed_late() -> None:
    cpus = Cpus(4)
    cpus.run(8, tasks=4)
    assert cpus.run(SETTINGS.hold_seconds - 1, tasks=1).needed_millicores == 4000
    assert 1000 <= cpus.run(3, tasks=1).needed_millicores <= 1200


def test_counters_that_go_back_or_cpus_that_come_do_no_harm() -> None:
    cpus = Cpus(1)
    cpus.run(8, tasks=1)
    cpus.online = 3
    cpus.busy[1] = cpus.busy[2] = 1e6
    need = cpus.sample()
    assert need.used_millicores <= 1100
    cpus.busy = dict.fromkeys(range(3), 0.0)
    need = cpus.run(2, tasks=1)
    assert 0 <= need.used_millicores <= 3000


def test_sixty_four_cpus_are_asked_for_in_one_jump() -> None:
    cpus = Cpus(1)
    cpus.run(8, tasks=0.1)
    needs = [cpus.run(STEP_SECONDS, tasks=64).needed_millicores for _ in range(8)]
    assert {need for need in needs if need > 1000} == {64_000}
    assert needs[-1] == 64_000


@pytest.mark.parametrize("psi", [True, False])
def test_a_spike_buys_nothing_and_work_that_goes_on_is_served_at_once(psi: bool) -> None:
    cpus = Cpus(1, psi)
    cpus.run(8, tasks=0.1)
    for _ in range(10):
        assert cpus.run(0.2, tasks=8).needed_millicores <= 1000
        cpus.run(1.8, tasks=0.1)
    assert cpus.run(0.35, tasks=8).needed_millicores == 8000


def test_a_vm_that_is_held_back_asks_for_quota_not_for_cpus() -> None:
    cpus = Cpus(4)
    cpus.run(8, tasks=0.1)
    cpus.throttle = Throttle(500, 900)
    need = cpus.run(2, tasks=2)
    assert 2000 <= need.needed_millicores <= 4000
    assert (need.waiting, need.reason.code, need.urgency) == (False, "cpu-throttled", Urgency.SOON)
    assert "quota of 0.5 CPUs in 90% of the time" in need.reason.text
    assert cpus.run(8, tasks=4).needed_millicores == 4000
    assert cpus.run(8, tasks=0.2, runnable=0).needed_millicores == 625  # a quarter more than the quota
    cpus.throttle = None
    assert cpus.run(8, tasks=0.2).needed_millicores < 500


def test_a_vm_that_is_held_back_asks_for_cpus_when_tasks_exceed_them_too() -> None:
    cpus = Cpus(2)
    cpus.run(8, tasks=0.1)
    cpus.throttle = Throttle(500, 900)
    need = cpus.run(2, tasks=6, waits=False)  # cpu.some falls when the host holds the VM back
    assert (need.needed_millicores, need.waiting) == (6000, True)


def test_a_quota_that_is_all_cpus_asks_for_none() -> None:
    cpus = Cpus(2)
    cpus.throttle = Throttle(2000, 100)
    assert cpus.run(8, tasks=2).needed_millicores == 2000


def test_steal_is_a_hint_and_no_demand() -> None:
    cpus, plain = Cpus(2), Cpus(2)
    plain.run(8, tasks=1)
    for _ in range(160):
        cpus.steal += STEP_SECONDS * 2 * 0.3
        need = cpus.run(STEP_SECONDS, tasks=1)
    assert "30% of their time (steal)" in need.reason.text
    assert need.needed_millicores == plain.run(STEP_SECONDS, tasks=1).needed_millicores


def test_tasks_that_a_cgroup_keeps_back_want_no_cpu() -> None:
    cpus = Cpus(4)
    cpus.run(8, tasks=1)
    need = cpus.run(8, tasks=1, runnable=8, waits=True)
    assert (need.waiting, need.reason.code) == (False, "cpu-cgroup")
    assert need.needed_millicores <= 1200


def test_what_trembles_around_a_cpu_keeps_it() -> None:
    cpus = Cpus(2)
    cpus.run(8, tasks=1)
    needs = {-(-cpus.run(0.5, tasks=0.85 + 0.1 * (number % 3)).needed_millicores // 1000) for number in range(200)}
    assert needs == {2}


def test_what_a_cpu_that_goes_leaves_to_do_does_not_bring_it_back() -> None:
    cpus = Cpus(2)
    cpus.run(SETTINGS.hold_seconds + 2, tasks=0.1)
    cpus.online = 1
    need = cpus.run(0.5, tasks=3)
    assert not need.waiting
    assert need.needed_millicores <= 1100
    cpus.run(SETTINGS.settling_seconds, tasks=0.1)
    assert cpus.run(0.5, tasks=3).needed_millicores == 3000


def test_work_that_goes_on_while_cpus_come_and_go_is_served_a_little_later() -> None:
    cpus = Cpus(2)
    cpus.run(SETTINGS.hold_seconds + 2, tasks=0.1)
    cpus.online = 1
    assert cpus.run(1.2, tasks=3).needed_millicores == 3000


def test_a_cpu_that_nothing_was_accounted_for_is_as_busy_as_the_others() -> None:
    cpus = Cpus(2)
    cpus.run(SETTINGS.hold_seconds + 2, tasks=0.2)
    for _ in range(30):  # CPU 1 is going offline: its counters stand still
        cpus.now += STEP_SECONDS
        cpus.busy[0] += 0.1 * STEP_SECONDS
        cpus.idle[0] += 0.9 * STEP_SECONDS
        need = cpus.sample(1)
    assert need.used_millicores == pytest.approx(200, abs=10)


def test_it_says_when_a_lower_need_will_be_believed() -> None:
    cpus = Cpus(3)
    cpus.run(3, tasks=3)
    ended = cpus.now
    need = cpus.run(1, tasks=0.1)
    assert need.needed_millicores == 3000
    assert need.falls_at is not None
    assert need.falls_at == pytest.approx(ended + SETTINGS.hold_seconds, abs=SETTINGS.window_seconds)
    assert cpus.run(8, tasks=0.1).needed_millicores < 1000
