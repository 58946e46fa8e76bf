"""Regime (b) of the scoreboard: the host's memory model, the scores, the search, and guestd in it."""

import json

import numpy as np
import pytest

from guestd.model.units import GIB, MIB
from guestd.sim.peers.base import Array, HostSample
from guestd.sim.scoreboard import fast
from guestd.sim.scoreboard.fleet import KERNEL_BYTES, PLUG_RATE, REACTION_SECONDS, STEP_SECONDS, Fleet, play, score
from guestd.sim.traces import MemoryTrace

STEP_UP = (STEP_SECONDS - REACTION_SECONDS) * PLUG_RATE  # what comes in the step of a decision


def trace(name: str, used: list[float], every_seconds: float = 60.0) -> MemoryTrace:
    times = np.arange(len(used)) * every_seconds
    bytes_ = np.array(used) * GIB
    return MemoryTrace(name, times, bytes_, bytes_ / 10, bytes_, np.full(len(used), 16.0 * GIB))


class Script:
    """Decides what it was told, one decision after the other; the last one stays."""

    name, interval_seconds = "script", 10.0

    def __init__(self, *decisions: list[float]) -> None:
        self._decisions, self.seen = list(decisions), list[HostSample]()

    def decide(self, now: float, host: HostSample) -> Array:
        self.seen.append(host)
        decision = self._decisions.pop(0) if len(self._decisions) > 1 else self._decisions[0]
        return np.array(decision) * GIB


def flat(vms: int, gib: float = 1.0, seconds: float = 200.0) -> tuple[Fleet, Array, Array]:
    fleet = Fleet("flat", (trace("a", [gib] * 10),), vms, seconds)
    return fleet, *fleet.use()


def test_memory_comes_after_the_reaction_at_the_plug_rate() -> None:
    fleet, used, cached = flat(1)
    given, _ = play(Script([5.0]), fleet, 16 * GIB, used, cached)
    start = GIB + KERNEL_BYTES
    assert given[0, 0] == start + STEP_UP
    assert given[1, 0] == start + STEP_UP + STEP_SECONDS * PLUG_RATE
    assert given[-1, 0] == 5 * GIB


def test_memory_goes_at_the_unplug_rate_and_what_is_used_stays() -> None:
    fleet, used, cached = flat(1, gib=2.0)
    given, _ = play(Script([6.0], [1.0]), fleet, 16 * GIB, used, cached)
    decided = round(10 / STEP_SECONDS)
    assert given[decided - 1, 0] == 6 * GIB
    assert given[decided, 0] == 6 * GIB - (STEP_SECONDS - REACTION_SECONDS) * 512 * MIB
    assert given[decided + 4, 0] - given[decided + 8, 0] == 512 * MIB
    assert given[-1, 0] == 2 * GIB + KERNEL_BYTES


def test_a_host_is_never_overcommitted_and_what_is_free_is_split_by_what_would_come() -> None:
    fleet, used, cached = flat(2)
    given, _ = play(Script([6.0, 1.25]), fleet, 3 * GIB, used, cached)
    assert given.sum(axis=1).max() <= 3 * GIB + 1
    wanted = min(STEP_UP, 6 * GIB), 1.25 * GIB - (GIB + KERNEL_BYTES)
    grown = given[0] - (GIB + KERNEL_BYTES)
    assert grown == pytest.approx(wanted), "there is room for the first step"
    assert given[-1].sum() == pytest.approx(3 * GIB)


def test_what_one_gives_back_another_gets() -> None:
    fleet, used, cached = flat(2)
    given, resizes = play(Script([4.0, 1.0], [1.1, 3.9]), fleet, 5 * GIB, used, cached)
    assert given.sum(axis=1).max() <= 5 * GIB + 1
    assert given[-1] == pytest.approx([1.1 * GIB, 3.9 * GIB])
    assert resizes == 0, "all before the warm-up ended"


def test_a_policy_sees_use_limits_and_host() -> None:
    fleet, used, cached = flat(2)
    policy = Script([2.0, 2.0])
    play(policy, fleet, 5 * GIB, used, cached)
    last = policy.seen[-1]
    assert last.used.tolist() == [GIB, GIB]
    assert last.cached == pytest.approx([GIB / 10] * 2)
    assert last.free == 1 * GIB
    assert (last.minimum[0], last.maximum[0], last.standard) == (GIB, 16 * GIB, GIB)


def test_scores_by_hand() -> None:
    steps = round(140 / STEP_SECONDS)
    used = np.full((steps, 2), 2.0 * GIB)
    given = np.full((steps, 2), 4.0 * GIB)
    given[:40] = 0.0  # in the warm-up: not scored
    given[-20:, 0] = 1.0 * GIB + KERNEL_BYTES  # 1 GiB lacks for 5 of 20 s in one of two VMs
    outcome = score(8 * GIB, used, given, 3)
    assert outcome.unmet_share == pytest.approx(5 / 80)
    assert outcome.short_share == pytest.approx(5 / 40)
    assert outcome.short_seconds_per_vm_hour == pytest.approx(450)
    assert outcome.worst_short_bytes == GIB
    assert outcome.resizes_per_vm_hour == pytest.approx(3 / (40 / 3600))
    needed = 2 + KERNEL_BYTES / GIB
    got = 1 + KERNEL_BYTES / GIB
    assert outcome.slack_share == pytest.approx(1 - (35 * needed + 5 * got) / (35 * 4 + 5 * got))


def test_vms_begin_at_other_places_and_those_of_a_small_fleet_are_in_a_large_one() -> None:
    traces = (trace("a", [1, 2, 3, 4, 3, 2]), trace("b", [5, 6, 7, 6]))
    small, large = Fleet("s", traces, 3, 240.0), Fleet("l", traces, 7, 240.0)
    assert (small.use()[0] == large.use()[0][:, :3]).all()
    assert len({large.shift(number) for number in range(7)}) == 7
    for number, profile in enumerate(large.profiles()):  # the load of guestd's run is the same
        at = np.arange(0, 240, STEP_SECONDS)
        assert np.interp(at, profile.time_seconds, profile.memory_bytes) == pytest.approx(large.use()[0][:, number])


def waves() -> Fleet:
    return Fleet("waves", (trace("a", [1, 1, 4, 1, 1, 2]), trace("b", [2, 2, 1, 1, 3, 1])), 4, 420.0)


class Generous:
    """Gives twice what is used, each second."""

    name, interval_seconds = "generous", 1.0

    def decide(self, now: float, host: HostSample) -> Array:
        return 2.0 * host.used


@pytest.fixture(scope="module")
def smallest() -> int:
    """The smallest host that is enough for `Generous`, in GiB: tried one after the other."""
    fleet = waves()
    used, cached = fleet.use()

    def unmet(host_gib: int) -> float:
        given, resizes = play(Generous(), fleet, host_gib * GIB, used, cached)
        return score(host_gib * GIB, used, given, resizes).unmet_share

    return next(gib for gib in range(4, 65) if unmet(gib) <= fast.UNMET_SHARE)


@pytest.mark.parametrize("around", [None, 4 * GIB, 14 * GIB, 60 * GIB])
def test_the_search_finds_the_smallest_host_that_is_enough(around: int | None, smallest: int) -> None:
    fleet = waves()
    used, cached = fleet.use()
    player = fast.peer_players(fleet, used, cached, [Generous])["generous"]
    found = fast.search("generous", player, fleet, used, around)
    assert found.fitting is not None
    assert found.fitting.host_bytes == smallest * GIB
    assert found.vms_per_host(4) == pytest.approx(fast.HOST_BYTES / GIB / (smallest / 4))
    assert found.ample.host_bytes == 64 * GIB
    assert 4 < smallest < 32


def test_a_policy_that_always_gives_too_little_has_no_host() -> None:
    class Mean:
        name, interval_seconds = "mean", 1.0

        def decide(self, now: float, host: HostSample) -> Array:
            return 0.9 * host.used

    fleet = waves()
    used, cached = fleet.use()
    found = fast.search("mean", fast.peer_players(fleet, used, cached, [Mean])["mean"], fleet, used)
    assert found.fitting is None
    assert found.vms_per_host(4) is None
    assert found.ample.unmet_share > fast.UNMET_SHARE


def test_the_oracle_lacks_nothing_and_needs_no_more_than_the_static_peak() -> None:
    fleet = waves()
    used, cached = fleet.use()
    players = fast.peer_players(fleet, used, cached, [])
    oracle = fast.search("oracle", players["oracle"], fleet, used)
    peak = fast.search("static peak", players["static peak"], fleet, used)
    assert oracle.ample.unmet_share == peak.ample.unmet_share == 0
    assert oracle.fitting is not None
    assert peak.fitting is not None
    assert oracle.fitting.host_bytes < peak.fitting.host_bytes
    assert peak.fitting.resizes_per_vm_hour == 0


def test_guestd_serves_a_fleet_with_the_production_cores_and_the_same_way_each_time() -> None:
    fleet = Fleet("waves", waves().traces, 2, 200.0)
    used, _ = fleet.use()
    first, second = (fast.guestd_player(fleet, used)(8 * GIB) for _ in range(2))
    assert (first[0] == second[0]).all()
    assert first[1] == second[1] > 0
    outcome = score(8 * GIB, used, *first)
    assert outcome.unmet_share < 0.001
    assert 0 < outcome.slack_share < 0.6
    scarce = score(4 * GIB, used, *fast.guestd_player(fleet, used)(4 * GIB))
    assert scarce.unmet_share > outcome.unmet_share


def test_a_comparison_as_json() -> None:
    fleet = Fleet("short", (trace("a", [1, 1, 2, 1]),), 2, 140.0, maximum_bytes=3 * GIB)
    results = fast.compare(fleet, [Generous])
    shown = json.loads(json.dumps(fast.as_json(fleet, results)))
    assert list(shown["policies"]) == ["guestd", "static peak", "static p95", "autopilot-like", "generous", "oracle"]
    assert shown["policies"]["guestd"]["vms_per_host"] <= shown["policies"]["oracle"]["vms_per_host"]
    assert shown["policies"]["guestd"]["ample"]["host_bytes"] == 6 * GIB
    assert shown["traces"] == ["a"]
