"""What each of the guest's benches makes of its numbers: judged, shown, and nothing dropped."""

import json
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from guestd.cli.app import application
from guestd.cli.bench.guest import footprint, quiet, ramp, reaction, reclaim, tax
from guestd.cli.bench.guest.footprint import Span, Usage
from guestd.cli.bench.guest.reclaim import GIB, Asked
from guestd.cli.bench.guest.run import LINES, PARTS


def targets(part: dict[str, object]) -> dict[str, bool]:
    found = part["targets"]
    assert isinstance(found, list)
    json.dumps(part)  # all of it can be written
    return {one["name"]: one["reached"] for one in found}


# ---- reaction --------------------------------------------------------------------------------------------


def steps(utilisation: float | None = 5.6, cpuplugd: float = 1.6) -> reaction.Measured:
    measured = reaction.Measured()
    for kind in reaction.KINDS:
        measured.add("guestd", kind, 0.6)
        measured.add("kernel", kind, 0.1)
        measured.add("neon-utilisation", kind, utilisation)
        measured.add("cpuplugd", kind, cpuplugd)
    return measured


def test_the_kernels_own_time_is_subtracted_before_shares_are_compared() -> None:
    part = reaction.document(steps())
    assert part["rows"]["cpu"]["guestd"]["own"] == pytest.approx(0.5)
    assert part["targets"][0]["value"] == pytest.approx(11.0)
    assert all(targets(part).values())
    assert not all(targets(reaction.document(steps(utilisation=5.0))).values())


def test_a_poller_that_never_came_is_shown_and_proves_nothing() -> None:
    part = reaction.document(steps(utilisation=None))
    assert list(targets(part).values()) == [False, True, True]
    assert "did not come" in part["targets"][0]["note"]
    text = "\n".join(reaction.lines(part))
    assert "neon-utilisation" in text
    assert "none" in text


def test_pollers_of_which_a_target_is_made_take_part_in_every_round() -> None:
    shares = {poller.name: poller.share for poller in reaction.POLLERS}
    assert (shares["neon-utilisation"], shares["cpuplugd"]) == (1.0, 1.0)


# ---- ramp ------------------------------------------------------------------------------------------------


def found(holds: Callable[[int], bool], guess: int, tries: int = 2) -> tuple[int, int]:
    search, made = ramp.Search(guess, tries), 0
    while not search.over:
        search.took(holds(search.rung))
        made += 1
        assert made < 100
    return search.held, made


@pytest.mark.parametrize("limit", range(-1, len(ramp.LADDER)))
@pytest.mark.parametrize("guess", (0, 5, len(ramp.LADDER) - 1))
def test_the_search_finds_the_highest_rung_that_holds(limit: int, guess: int) -> None:
    assert found(lambda rung: rung <= limit, guess)[0] == limit


def test_a_rung_must_hold_as_often_as_was_said() -> None:
    answers = iter([True, False, True, True])
    assert found(lambda _: next(answers), guess=5)[0] == 4


def test_a_ramp_went_well_when_nothing_was_killed_and_the_rate_was_held() -> None:
    total = 1536 << 20
    assert ramp.Try(100, 15.4, 0, 0, total).well
    assert not ramp.Try(100, 25.0, 0, 0, total).well
    assert not ramp.Try(100, 15.4, 1, 0, total).well
    assert not ramp.Try(100, 15.4, 0, 8, total).well
    assert not ramp.Try(100, None, 0, 0, total).well


def test_guestd_is_judged_against_the_best_poller_and_the_vms_limit_is_said() -> None:
    measured = ramp.Measured(best={"guestd": 300, "neon-utilisation": 100, "proxmox": 6, "all there": 500})
    part = ramp.document(measured)
    assert part["targets"][0]["value"] == pytest.approx(3.0)
    assert all(targets(part).values())
    assert "500 MiB/s" in part["targets"][0]["note"]


def test_no_rate_at_all_is_no_success() -> None:
    assert not any(targets(ramp.document(ramp.Measured(best={"guestd": 0, "proxmox": 0}))).values())


# ---- tax -------------------------------------------------------------------------------------------------


def timed(guestd: float, loop: float, failed: int = 0) -> dict[str, object]:
    return {"guestd": [guestd] * 3, "loop": [loop] * 3, "writes": [loop] * 3, "failed": failed}


def test_tax_is_the_ratio_of_the_medians() -> None:
    part = tax.document(tax.Measured(timed(1.2, 1.0), timed(1.06, 1.0, failed=2)))
    assert list(targets(part).values()) == [True, False]
    assert part["targets"][1]["note"] == "2 writes failed"


# ---- reclaim ---------------------------------------------------------------------------------------------


def ask(share: float, seconds: float = 2.0, kills: int = 0) -> Asked:
    return Asked(GIB, round(GIB * share), seconds, 1000.0, 800.0, 0.2, kills)


def asks(guestd: Asked, online: Asked, movable: Asked) -> reclaim.Measured:
    return reclaim.Measured({"a load": {"guestd": [guestd], "online": [online], "online_movable": [movable]}})


def test_reclaim_is_judged_against_both_blind_ways() -> None:
    part = reclaim.document(asks(ask(1.0), ask(0.5), ask(1.0)))
    assert list(targets(part).values()) == [True, True, True, True]
    assert "a load (online): 50%, guestd 100%" in part["targets"][2]["note"]


def test_worse_than_blind_is_not_reached() -> None:
    assert list(targets(reclaim.document(asks(ask(0.9), ask(0.5), ask(1.0)))).values()) == [False, False, True, True]
    slow = reclaim.document(asks(ask(1.0, seconds=4.0), ask(0.5), ask(1.0)))
    assert list(targets(slow).values()) == [True, False, True, True]


def test_where_blind_gets_most_of_it_the_better_half_is_not_shown() -> None:
    part = reclaim.document(asks(ask(1.0), ask(0.9), ask(1.0)))
    assert list(targets(part).values())[2] is False
    assert part["targets"][2]["note"] == "blind got 80% or more everywhere"


def test_an_oom_kill_counts() -> None:
    assert list(targets(reclaim.document(asks(ask(1.0, kills=1), ask(0.5), ask(1.0)))).values())[3] is False


def test_throughput_and_pauses_are_taken_from_the_applications_own_log() -> None:
    log = [(0.0, 0), (1.0, 100), (2.0, 200), (4.5, 300), (5.0, 310)]
    assert reclaim.rate(log, 0.0, 2.0) == pytest.approx(100.0)
    assert reclaim.rate(log, 4.6, 9.0) == 0.0
    assert reclaim.longest_pause(log, 3.0, 5.0) == pytest.approx(2.5)
    assert reclaim.longest_pause(log, 4.9, 5.0) == pytest.approx(0.5)


# ---- quiet -----------------------------------------------------------------------------------------------


def span(cpu: float, switches: int) -> Span:
    return Span(Usage(10.0, [1], 0, 7.0, 100), Usage(110.0, [1], 30 << 20, 7.0 + cpu, 100 + switches))


def costs(pss: int = 40 << 20, cpu: float = 0.5, switches: int = 500) -> quiet.Measured:
    measured = quiet.Measured(noise_seconds=300.0, grows=2, shrinks=1)
    for name, one in measured.footprint.costs.items():
        guestd = name == "guestd"
        one.pss_bytes = pss if guestd else 40 << 20
        one.idle = span(cpu, switches) if guestd else span(1.0, 1000)
        one.loaded = one.idle
    return measured


def test_shares_are_of_the_time_between() -> None:
    rows = quiet.document(costs())["rows"]
    assert rows["guestd"]["idle_cpu_share"] == pytest.approx(0.005)
    assert rows["guestd"]["idle_wakeups_per_second"] == pytest.approx(5.0)
    assert rows["guestd"]["idle_seconds"] == 100


def test_memory_may_be_as_much_and_cpu_and_wakeups_half() -> None:
    assert all(targets(quiet.document(costs())).values())
    for worse in (costs(pss=41 << 20), costs(cpu=0.6), costs(switches=600)):
        assert sum(targets(quiet.document(worse)).values()) == 2


def test_resizes_per_hour_are_extrapolated_and_it_is_said_from_what() -> None:
    part = quiet.document(costs())
    assert part["noise"]["resizes_per_hour"] == pytest.approx(36.0)
    assert "36 resizes per hour (extrapolated from 2 grows and 1 shrinks in 5.0 minutes)" in "\n".join(
        quiet.lines(part)
    )


def test_what_was_not_measured_is_shown_as_unknown() -> None:
    part = quiet.document(quiet.Measured())
    assert not any(targets(part).values())
    assert "?" in "\n".join(footprint.lines(part))


def test_every_part_has_its_lines() -> None:
    assert set(LINES) == set(PARTS)


def test_a_part_that_there_is_not_is_refused() -> None:
    result = CliRunner().invoke(application(), ["bench-guest", "--only", "ramp,speed"])
    assert result.exit_code == 2
    assert "'speed' is not one of reaction" in result.output
