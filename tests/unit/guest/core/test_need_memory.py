"""How much memory a VM needs, from hand-made samples."""

from dataclasses import replace

from guestd.guest.core.need import EstimateSettings
from guestd.guest.core.need_memory import MemoryEstimator, MemoryNeed
from guestd.model.guest import Sample
from guestd.model.messages import Urgency
from guestd.model.units import GIB, MIB

SETTINGS = EstimateSettings()
STEP_SECONDS = 0.05
EMPTY = Sample({}, {}, 0.0, 0, 0, 0, 0, GIB, GIB, 0, 0)
HOLD_SECONDS = SETTINGS.hold_seconds * SETTINGS.memory_hold_share


class Memory:
    """A VM that uses so much memory."""

    def __init__(self, total: int = GIB, used: int = 200 * MIB) -> None:
        self.estimator, self.total, self.used, self.now, self.some_us = MemoryEstimator(), total, used, 50.0, 0
        self.isolated, self.swap, self.psi, self.refaults = 0, 0, True, 0
        self.free: int | None = 0
        self.swap_ins, self.io_some_us = 0, 0

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
            memory_free_bytes=max(0, self.total - self.used) if self.free is None else self.free,
            swap_in_pages=self.swap_ins,
            io_some_us=self.io_some_us if self.psi else None,
        )
        return self.estimator.update(sample, 48 * MIB, self.isolated, self.now)


def test_need_is_what_is_in_use_and_headroom() -> None:
    need = Memory().run(HOLD_SECONDS + 1)
    assert need.needed_bytes == (48 + 200 + 96) * MIB
    assert need.floor_bytes == (48 + 200 + 48) * MIB
    assert need.used_bytes == 200 * MIB
    assert (need.moving, need.pressure, need.urgency) == (False, False, Urgency.NORMAL)
    assert Memory(2 * GIB, used=1000 * MIB).run(8).needed_bytes == (48 + 1000 + 125) * MIB


def test_memory_that_is_there_at_first_is_needed_until_less_has_held() -> None:
    memory = Memory(2 * GIB)
    assert memory.sample().needed_bytes == 2 * GIB + 48 * MIB
    assert memory.run(HOLD_SECONDS - 0.2).needed_bytes == 2 * GIB + 48 * MIB
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
    quarter = (GIB + 48 * MIB) // 4
    assert need.needed_bytes == GIB + 48 * MIB + quarter + quarter // 64


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


# ---- noise, and growth ---------------------------------------------------------------------------


def test_what_trembles_within_the_headroom_changes_nothing() -> None:
    memory = Memory(2 * GIB, used=800 * MIB)
    memory.run(8)
    needs = set()
    for number in range(100):
        memory.used = (800 + 13 * (number % 4)) * MIB
        needs.add(memory.run(1).needed_bytes)
    assert len(needs) == 1
    memory.used = 900 * MIB  # half of the headroom is gone
    assert memory.run(0.5).needed_bytes == round((48 + 900 * 1.125) * MIB)


def test_the_look_ahead_follows_the_plugs_that_were_seen() -> None:
    slow, quick = Memory(used=700 * MIB), Memory(used=700 * MIB)
    for memory, seconds in ((quick, 0.2), (slow, 1.2)):
        memory.run(8)
        memory.used += 300 * MIB
        memory.run(seconds + STEP_SECONDS)
        memory.total += 512 * MIB
        memory.run(8)
    ahead = [memory.run(1, bytes_per_second=100 * MIB).needed_bytes for memory in (quick, slow)]
    assert 100 * MIB < ahead[1] - ahead[0] < 230 * MIB


# ---- swap, cgroups, cache ------------------------------------------------------------------------


def test_swapping_in_is_a_stall_with_or_without_psi() -> None:
    memory = Memory(used=500 * MIB)
    memory.psi = False
    memory.run(8)
    for _ in range(20):
        memory.swap_ins += 50
        need = memory.run(STEP_SECONDS)
    assert (need.pressure, need.reason.code) == (True, "memory-stall")
    assert need.needed_bytes > (GIB + 48 * MIB) * 5 // 4


def test_a_cgroup_at_its_own_limit_asks_for_nothing() -> None:
    memory = Memory(2 * GIB, used=500 * MIB)
    memory.free = GIB
    before = memory.run(8)
    memory.swap = 200 * MIB
    for _ in range(200):
        memory.swap_ins += 100
        need = memory.run(STEP_SECONDS, stalled_share=0.5, refaults_per_second=5000)
        assert not need.pressure
        assert need.needed_bytes == before.needed_bytes
    assert need.reason.code == "memory-cgroup"
    assert "1 GiB are free" in need.reason.text


def test_cache_that_is_read_again_grows_step_by_step_until_it_fits() -> None:
    memory, needs = Memory(GIB, used=300 * MIB), []
    memory.run(8)
    for _ in range(30):
        missing = max(0, 1500 * MIB - memory.total)  # the files are so large, with what is in use
        need = memory.run(1, stalled_share=0.2 if missing else 0, refaults_per_second=missing / 1e5)
        needs.append(need.needed_bytes)
        memory.total = max(memory.total, need.needed_bytes - 48 * MIB)  # it comes
    assert memory.total >= 1500 * MIB
    assert max(needs) < 1900 * MIB
    assert need.floor_bytes > (48 + 300 + 48) * MIB  # a shrink leaves the cache that was read again
    assert need.reason.code == "memory-used"


def test_cache_that_never_fits_is_given_up() -> None:
    memory = Memory(GIB, used=300 * MIB)
    memory.run(8)
    for _ in range(60):
        need = memory.run(1, stalled_share=0.2, refaults_per_second=5000)
        memory.total = max(memory.total, need.needed_bytes - 48 * MIB)
    assert memory.total < 2 * GIB
    assert not need.pressure
    assert need.needed_bytes < GIB + 200 * MIB  # what it had when that began, at most


def test_a_stream_asks_for_nothing() -> None:
    memory = Memory(GIB, used=300 * MIB)
    memory.run(8)
    for _ in range(200):
        memory.io_some_us += 40_000  # tasks wait for the disk, no page is read twice
        need = memory.run(STEP_SECONDS)
    assert need.needed_bytes == (48 + 300 + 96) * MIB
    assert need.floor_bytes == (48 + 300 + 48) * MIB
