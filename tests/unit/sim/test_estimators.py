"""guestd's estimators against its peers' rules on loads whose truth is known: the orderings that matter."""

import functools

from guestd.sim.estimators.askers import askers
from guestd.sim.estimators.compare import Score, as_json, play
from guestd.sim.estimators.shapes import SHAPES


@functools.cache
def scores(name: str) -> dict[str, Score]:
    [shape] = [shape for shape in SHAPES if shape.name == name]
    return {asker.name: play(shape, asker) for asker in askers(shape.kind, 0.0)}


def test_a_step_is_asked_for_at_once_and_a_poller_is_late() -> None:
    found = scores("step to 2 tasks")
    ours, slow = found["guestd"].met_seconds, found["utilisation, 5 s"].met_seconds
    assert ours is not None and slow is not None
    assert ours <= 0.5
    assert slow >= 5.0
    assert found["guestd"].over < found["utilisation, 5 s"].over


def test_sixty_four_cpus_are_one_jump() -> None:
    ours = scores("step to 64 tasks")["guestd"]
    assert ours.met_seconds is not None
    assert ours.met_seconds <= 0.5
    assert ours.changes <= 3  # up, and down in one or two


def test_spikes_and_limits_within_the_vm_ask_for_nothing() -> None:
    for name in ("fork storms of 0.2 s", "cgroup at its cpu.max", "a stream read once", "cgroup at its memory.max"):
        ours = scores(name)["guestd"]
        assert ours.changes == 0, name
        assert ours.over <= min(one.over for one in scores(name).values() if one.asker.startswith("Neon")), name


def test_a_service_start_has_its_cpus_and_gives_them_back() -> None:
    ours = scores("service start, 8 s")["guestd"]
    assert (ours.highest, ours.changes) == (4.0, 2)
    assert ours.under < 2


def test_a_vm_that_is_held_back_asks_up_to_its_tasks() -> None:
    assert scores("held back by a quota")["guestd"].highest == 4.0
    assert scores("held back by a quota")["cpuplugd, 1 s"].highest < 4.0


def test_a_ramp_is_kept_ahead_of_with_less_than_neon_holds() -> None:
    for name in ("ramp of 20 MiB/s", "ramp of 200 MiB/s", "ramp of 800 MiB/s"):
        found = scores(name)
        assert found["guestd"].under <= 0.01, name
        assert found["guestd"].over < found["Neon, 5 s"].over, name


def test_cache_that_is_read_again_grows_until_it_fits_and_stays() -> None:
    ours = scores("1000 MiB read again")["guestd"]
    assert 1.25 <= ours.highest < 1.6  # up to 3 % of the files may be left out: few pages, nobody waits
    assert ours.under < 10
    assert ours.changes < 15


def test_noise_changes_next_to_nothing() -> None:
    assert scores("noise around 1.5 CPUs")["guestd"].changes == 0
    ours, theirs = (scores("noise around 1000 MiB")[name] for name in ("guestd", "Hyper-V, 1 s"))
    assert ours.changes < theirs.changes


def test_scores_as_json_have_a_schema_and_rounded_numbers() -> None:
    document = as_json(list(scores("fork storms of 0.2 s").values()))
    assert document["schema"] == 1
    assert document["scores"][0]["asker"] == "guestd"
    assert document["scores"][0]["changes"] == 0
