"""Each peer against vectors computed by hand. CPU: 25 is one vCPU of a VM of four; memory: 1 is one GiB."""

import numpy as np
import pytest

from guestd.model.resources import Kind
from guestd.sim.peers import static
from guestd.sim.peers.autopilot import Autopilot
from guestd.sim.peers.base import HostSample, Policy
from guestd.sim.peers.cpuplugd import Cpuplugd
from guestd.sim.peers.forecaster import Guestd
from guestd.sim.peers.hyperv import HyperV
from guestd.sim.peers.mom import Mom
from guestd.sim.peers.neon import Neon
from guestd.sim.peers.oracle import Oracle
from guestd.sim.peers.proxmox import Proxmox
from guestd.sim.peers.qmemman import Qmemman
from guestd.sim.peers.squeezed import Squeezed

GIB_PER_MIB = 1 / 1024


def host(
    used: list[float],
    limit: list[float],
    *,
    kind: Kind = Kind.MEMORY,
    minimum: float = 0.0,
    maximum: float = 100.0,
    capacity: float = 1000.0,
    cached: float = 0.0,
) -> HostSample:
    count = len(used)
    return HostSample(
        kind,
        np.array(used, float),
        np.full(count, cached),
        np.array(limit, float),
        np.full(count, minimum),
        np.full(count, maximum),
        capacity,
        25.0 if kind is Kind.CPU else 1.0,
    )


def decided(policy: Policy, sample: HostSample, now: float = 0.0) -> list[float]:
    limit: list[float] = policy.decide(now, sample).tolist()
    return limit


def test_static_sizes_come_from_the_whole_trace() -> None:
    use = np.array([[0.0, 1, 2, 3, 4], [5, 5, 5, 5, 15]])
    nobody = host([0, 0], [1, 1])
    assert decided(static.peak(use), nobody) == [4, 15]
    assert decided(static.p95(use), nobody) == pytest.approx([3.8, 13])  # 0.8 of the way from 4th to 5th


def test_the_oracle_knows_the_next_sample() -> None:
    oracle = Oracle(np.array([[9.0, 18, 27]]), 300.0)
    assert decided(oracle, host([9], [9]), now=300.0) == pytest.approx([20])
    assert decided(oracle, host([9], [9]), now=600.0) == pytest.approx([30])
    assert decided(oracle, host([9], [9]), now=900.0) == pytest.approx([30])  # the trace has ended


def test_autopilot_looks_back_twelve_samples() -> None:
    policy = Autopilot()
    assert decided(policy, host([50], [0])) == pytest.approx([55])
    for _ in range(11):
        assert decided(policy, host([10], [0])) == pytest.approx([55])
    assert decided(policy, host([10], [0])) == pytest.approx([11])


class TestNeon:
    def test_cpu_jumps_up_to_quarters_of_a_vcpu_and_steps_down_by_one(self) -> None:
        # 40 / 0.9 = 44.4, in units of 6.25: 50. 10 / 0.9 = 11.1: 12.5, but one step down from 50 is 43.75.
        assert decided(Neon(), host([40, 10], [25, 50], kind=Kind.CPU)) == [50, 43.75]

    def test_memory_follows_use_or_use_and_cache(self) -> None:
        assert decided(Neon(), host([3], [2])) == [4]  # 3 / 0.75
        assert decided(Neon(), host([3], [2], cached=3)) == [7]  # 6 / 0.9 = 6.7

    def test_the_monitor_refuses_to_shrink_below_what_is_used(self) -> None:
        # To 7: 0.85 x 6.902 = 5.87, more than 5.2 + 0.098.
        assert decided(Neon(), host([5.2], [8])) == [7]
        # To 1: 0.85 x 0.902 = 0.767 < 0.7 + 0.098, though 0.7 / 0.75 wants 1.
        assert decided(Neon(), host([0.7], [2])) == [2]


class TestCpuplugd:
    def test_one_cpu_more_when_hardly_any_is_idle(self) -> None:
        assert decided(Cpuplugd(), host([49], [50], kind=Kind.CPU)) == [75]  # 0.04 idle
        assert decided(Cpuplugd(), host([47], [50], kind=Kind.CPU)) == [50]  # 0.12 idle

    def test_one_cpu_less_when_more_than_one_is_idle(self) -> None:
        assert decided(Cpuplugd(), host([20, 24], [50, 50], kind=Kind.CPU)) == [25, 50]  # 1.2 and 1.04 idle

    def test_the_last_cpu_stays(self) -> None:
        assert decided(Cpuplugd(), host([0], [25], kind=Kind.CPU)) == [25]

    def test_memory_moves_by_tenths(self) -> None:
        # Full: a tenth of all more. 5 of 10 free: a tenth of that less. 0.5 of 10 free: nothing.
        assert decided(Cpuplugd(), host([10, 5, 9.5], [10, 10, 10])) == pytest.approx([11, 9.5, 10])


class TestMom:
    def test_shrinks_at_most_a_twentieth_when_the_host_is_short(self) -> None:
        # 100 - 90 is a tenth free: goal = used + 0.2 x 0.5 x current = 20 + 4.5 and 44 + 4.5.
        sample = host([20, 44], [45, 45], capacity=100)
        assert decided(Mom(), sample) == pytest.approx([42.75, 45])
        assert decided(Mom(), host([20, 39], [45, 45], capacity=100)) == pytest.approx([42.75, 43.5])

    def test_grows_when_there_is_plenty(self) -> None:
        assert decided(Mom(), host([5, 5], [10, 99.9], capacity=1000)) == pytest.approx([10.5, 99.9])

    def test_decides_on_the_mean_of_its_samples(self) -> None:
        policy = Mom()
        policy.decide(0, host([20, 44], [45, 45], capacity=100))
        assert decided(policy, host([20, 34], [45, 45], capacity=100)) == pytest.approx([42.75, 43.5])  # mean 39


class TestHyperV:
    def test_a_fifth_over_what_is_committed_in_steps_of_128_mib(self) -> None:
        assert decided(HyperV(), host([10, 1, 0.05], [1, 1, 1])) == pytest.approx([12, 1.25, 0.125])

    def test_all_keep_the_same_share_of_their_buffers_when_the_host_is_short(self) -> None:
        assert decided(HyperV(), host([10, 20], [1, 1], capacity=33)) == pytest.approx([11, 22])

    def test_bounds(self) -> None:
        assert decided(HyperV(), host([99, 0], [1, 1], minimum=2, maximum=100)) == [100, 2]


class TestProxmox:
    def test_nothing_within_the_dead_band(self) -> None:
        assert decided(Proxmox(), host([1, 1], [4, 4 - 9 * GIB_PER_MIB], capacity=10)) == [4, 4 - 9 * GIB_PER_MIB]

    def test_guests_under_pressure_grow_first(self) -> None:
        # 0.8 x 15 - 11.95 = 0.05 to give, fair is 4 each. The first has 0.1 free, at most a quarter of its minimum.
        sample = host([3.8, 1, 1], [3.9, 3.9, 4.15], minimum=1, maximum=8, capacity=15)
        assert decided(Proxmox(), sample) == pytest.approx([3.95, 3.9, 4.15])

    def test_comfortable_guests_shrink_first(self) -> None:
        # 0.05 too much. The first is above its fair size too, but under pressure.
        sample = host([4.0, 1, 1], [4.1, 4.1, 3.85], minimum=1, maximum=8, capacity=15)
        assert decided(Proxmox(), sample) == pytest.approx([4.1, 4.05, 3.85])

    def test_100_mib_at_most_in_a_cycle(self) -> None:
        limit = decided(Proxmox(), host([1, 1], [5, 5], minimum=1, maximum=8, capacity=10))
        assert limit == pytest.approx([5 - 100 * GIB_PER_MIB] * 2)

    def test_what_a_maximum_leaves_is_shared_by_the_rest(self) -> None:
        # Fair sizes of 8 in all: 2 (its maximum) and 6, so the first has nothing to move.
        sample = HostSample(
            Kind.MEMORY, np.ones(2), np.zeros(2), np.array([2.0, 5.9]), np.zeros(2), np.array([2.0, 9.0]), 10.0, 1.0
        )
        assert decided(Proxmox(), sample) == pytest.approx([2, 5.9 + 100 * GIB_PER_MIB])


class TestSqueezed:
    def test_all_at_the_same_point_of_their_range(self) -> None:
        # 40 - 2 x 10 minimum over ranges of 90: 2/9 of the way.
        sample = host([0, 0], [50, 10], minimum=10, maximum=100, capacity=60)
        # Goal 30 each; nothing is free yet, so only the first moves, and the second once it has.
        assert decided(Squeezed(), sample) == pytest.approx([30, 10])
        assert decided(Squeezed(), host([0, 0], [30, 10], minimum=10, capacity=60)) == pytest.approx([30, 30])

    def test_no_more_than_the_maximum(self) -> None:
        assert decided(Squeezed(), host([5], [50], maximum=80, capacity=500)) == [80]


class TestQmemman:
    def test_everything_is_given_out_by_preference(self) -> None:
        # Preferences 13 and 26 of 78: twice each.
        assert decided(Qmemman(), host([10, 20], [1, 1], capacity=78)) == pytest.approx([26, 52])

    def test_what_a_maximum_leaves_goes_to_the_others(self) -> None:
        assert decided(Qmemman(), host([10, 20], [1, 1], maximum=40, capacity=60)) == pytest.approx([20, 40])

    def test_everybody_has_a_least_preference(self) -> None:
        limit = decided(Qmemman(), host([0, 1], [1, 1], capacity=200 * GIB_PER_MIB + 1.3))
        assert limit == pytest.approx([200 * GIB_PER_MIB, 1.3])

    def test_small_moves_are_not_made(self) -> None:
        assert decided(Qmemman(), host([10, 20], [26.1, 51.9], capacity=78)) == [26.1, 51.9]
        assert decided(Qmemman(), host([10, 20], [26.2, 51.8], capacity=78)) == pytest.approx([26, 52])


def test_guestd_keeps_the_limit_until_it_knows_a_guest_for_an_hour() -> None:
    policy = Guestd(1)
    for _ in range(11):
        assert decided(policy, host([10], [77])) == [77]
    assert decided(policy, host([10], [77])) == pytest.approx([11])
