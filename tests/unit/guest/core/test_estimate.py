"""What a VM needs, from hand-made samples."""

from dataclasses import replace

from guestd.guest.core.estimate import CpuEstimator, CpuNeed, EstimateSettings, MemoryEstimator, MemoryNeed
from guestd.model.guest import Sample
from guestd.model.messages import Urgency
from guestd.model.units import GIB, MIB

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

    def run(self, seconds: float, tasks: float, runnable: int | None = None) -> CpuNeed:
        for _ in range(round(seconds / STEP_SECONDS)):
            self.now += STEP_SECONDS
            share = min(tasks, self.online) / self.online
            for number in range(self.online):
                self.busy[number] = self.busy.get(number, 0.0) + share * STEP_SECONDS
                self.idle[number] = self.idle.get(number, 0.0) + (1 - share) * STEP_SECONDS
            if tasks > self.online:
                self.some_us += round(STEP_SECONDS * 1e6)
            need = self.sample(round(tasks) if runnable is None else runnable)
        return need

    def sample(self, runnable: int = 0) -> CpuNeed:
        counted = {number: self.busy.get(number, 0.0) for number in range(self.online)}
        idle = {number: self.idle.get(number, 0.0) for number in range(self.online)}
        some = self.some_us if self.psi else None
        sample = replace(EMPTY, cpu_busy_seconds=counted, cpu_idle_seconds=idle, runnable=runnable, cpu_some_us=some)
        return self.estimator.update(sample, self.online, self.now)


class Memory:
    """A VM that uses so much memory."""

    def __init__(self, total: int = GIB, used: int = 200 * MIB) -> None:
        self.estimator, self.total, self.used, self.now, self.some_us = MemoryEstimator(), total, used, 50.0, 0
        self.isolated, self.swap, self.psi, self.refaults = 0, 0, True, 0

    def run(
        self, seconds: float, bytes_per_second: float = 0, stalled_share: float = 0, refaults_per_second: float = 0
    ) -> MemoryNeed:
        for _ in range(round(seconds / STEP_SECONDS)):
            self.now += STEP_SECONDS
            self.used += round(bytes_per_second * STEP_SECONDS)
            self.some_us += round(stalled_share * STEP_SECONDS * 1e6)
            self.refaults += round(refaults_per_second * STEP_SECONDS)
            need = self.sample()
        return need

    def sample(self) -> MemoryNeed:
        sample = replace(
            EMPTY,
            memory_total_bytes=self.total,
            memory_available_bytes=max(0, self.total - self.used),
            swap_used_bytes=self.swap,
            memory_some_us=self.some_us if self.psi else None,
            refaults=self.refaults,
        )
        return self.estimator.update(sample, 48 * MIB, self.isolated, self.now)


# ---- CPU -----------------------------------------------------------------------------------------


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


# ---- memory --------------------------------------------------------------------------------------


def test_need_is_what_is_in_use_and_headroom() -> None:
    need = Memory().run(SETTINGS.hold_seconds + 1)
    assert need.needed_bytes == (48 + 200 + 96) * MIB
    assert need.floor_bytes == (48 + 200 + 48) * MIB
    assert need.used_bytes == 200 * MIB
    assert (need.moving, need.pressure, need.urgency) == (False, False, Urgency.NORMAL)
    assert Memory(2 * GIB, used=1000 * MIB).run(8).needed_bytes == (48 + 1000 + 200) * MIB


def test_memory_that_is_there_at_first_is_needed_until_less_has_held() -> None:
    memory = Memory(2 * GIB)
    assert memory.sample().needed_bytes == 2 * GIB + 48 * MIB
    assert memory.run(SETTINGS.hold_seconds - 0.2).needed_bytes == 2 * GIB + 48 * MIB
    assert memory.run(1.0).needed_bytes < GIB


def test_what_is_swapped_out_is_in_use() -> None:
    memory = Memory()
    memory.swap = 100 * MIB
    assert memory.run(1).used_bytes == 300 * MIB


def test_growth_is_looked_ahead_of() -> None:
    memory = Memory(used=400 * MIB)
    memory.run(8)
    need = memory.run(2, bytes_per_second=100 * MIB)
    assert need.moving
    assert (need.urgency, need.reason.code) == (Urgency.SOON, "memory-growth")
    ahead = need.needed_bytes - (48 + 600 + 120) * MIB
    assert 250 * MIB < ahead < 320 * MIB


def test_a_jump_is_no_trend() -> None:
    memory = Memory()
    memory.run(8)
    memory.used += 150 * MIB
    need = memory.run(0.25)
    assert not need.moving
    assert need.needed_bytes == (48 + 350 + 96) * MIB


def test_a_stall_where_plenty_is_available_and_nothing_is_read_again_is_no_want() -> None:
    memory = Memory()
    memory.run(8)
    assert not memory.run(1, stalled_share=0.2).pressure


def test_a_stall_with_refaults_is_want_however_much_is_available() -> None:
    memory = Memory()
    memory.run(8)
    assert memory.run(1, stalled_share=0.2, refaults_per_second=1000).pressure


def test_a_stall_asks_for_a_quarter_more() -> None:
    memory = Memory(used=850 * MIB)
    memory.run(8)
    need = memory.run(1, stalled_share=0.2)
    assert (need.pressure, need.urgency, need.reason.code) == (True, Urgency.NOW, "memory-stall")
    assert need.needed_bytes == (GIB + 48 * MIB) * 5 // 4


def test_without_psi_there_is_no_stall() -> None:
    memory = Memory()
    memory.psi = False
    assert not memory.run(2).pressure


def test_what_is_isolated_for_a_shrink_does_not_look_used() -> None:
    memory = Memory(2 * GIB, used=300 * MIB)
    memory.run(8)
    memory.isolated = 128 * MIB
    memory.used += 128 * MIB
    need = memory.run(1)
    assert need.used_bytes == 300 * MIB
    memory.used += 200 * MIB  # and more than that is
    assert memory.run(1).used_bytes == 500 * MIB


def test_growth_includes_its_own_bookkeeping() -> None:
    memory = Memory(GIB, used=GIB)
    need = memory.run(8)
    plain = 48 * MIB + GIB + round(GIB * SETTINGS.headroom_share)
    assert need.needed_bytes == plain + (plain - GIB - 48 * MIB) // 64
