"""The forecaster: what it promises at its edges, and that it learns."""

import numpy as np
import pytest

from guestd.broker.core.forecast import DAY, REFERENCE_MARGIN, WINDOW, Array, Forecaster


def noisy(guests: int, steps: int, seed: int = 1) -> Array:
    """Independent log-normal use, guests of many sizes, some lively and some quiet; (steps, guests)."""
    generator = np.random.default_rng(seed)
    size, spread = generator.lognormal(2, 1, guests), generator.uniform(0.02, 0.8, guests)
    return size * np.exp(spread * generator.standard_normal((steps, guests)))


def run(forecaster: Forecaster, use: Array) -> Array:
    """Limits for the step after each row of use."""
    return np.array([forecaster.step(row) for row in use])


def window(use: Array) -> Array:
    """The reference's limits for the step after each row, NaN before there are `WINDOW` samples."""
    limits = np.full_like(use, np.nan)
    for step in range(WINDOW - 1, len(use)):
        limits[step] = REFERENCE_MARGIN * use[step - WINDOW + 1 : step + 1].max(axis=0)
    return limits


def slack_and_unmet(use: Array, limits: Array) -> tuple[float, float]:
    """Over the steps that the limits are for, from the second hour on."""
    used, limit = use[2 * WINDOW + 1 :], limits[2 * WINDOW : -1]
    return 1 - np.minimum(used, limit).sum() / limit.sum(), np.maximum(used - limit, 0).sum() / used.sum()


def test_no_forecast_in_the_first_hour() -> None:
    limits = run(Forecaster(2), np.full((WINDOW, 2), 5.0))
    assert np.isnan(limits[:-1]).all()
    assert limits[-1] == pytest.approx([5.5, 5.5])


def test_begins_as_the_reference() -> None:
    use = noisy(3, 100)
    assert run(Forecaster(3), use)[WINDOW - 1 :] == pytest.approx(window(use)[WINDOW - 1 :])


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_learns_to_waste_less_and_to_miss_less_than_the_reference(seed: int) -> None:
    use = noisy(300, DAY, seed)
    slack, unmet = slack_and_unmet(use, run(Forecaster(300), use))
    reference_slack, reference_unmet = slack_and_unmet(use, window(use))
    assert slack < 0.97 * reference_slack
    assert unmet < 0.97 * reference_unmet


def test_quiet_guests_get_less_than_a_tenth_more() -> None:
    use = 10 + 0.01 * noisy(200, DAY)
    limits = run(Forecaster(200), use)
    assert limits[-1].sum() < 1.05 * use[-1].sum()
    assert slack_and_unmet(use, limits)[1] <= slack_and_unmet(use, window(use))[1] + 1e-5


def test_the_risk_follows_the_reference() -> None:
    calm, wild = Forecaster(300), Forecaster(300)
    run(calm, 10 + 0.01 * noisy(300, DAY))
    run(wild, noisy(300, DAY))
    assert wild.risk > 3 * calm.risk


def test_a_new_level_of_load_is_learned() -> None:
    use = noisy(200, 2 * DAY)
    use[DAY:] *= np.linspace(1, 4, 200)
    limits = run(Forecaster(200), use)
    slack, unmet = slack_and_unmet(use[DAY:], limits[DAY:])
    reference_slack, reference_unmet = slack_and_unmet(use[DAY:], window(use)[DAY:])
    assert slack < reference_slack
    assert unmet < reference_unmet


def test_the_same_past_gives_the_same_limits() -> None:
    use = noisy(50, 150)
    assert np.array_equal(run(Forecaster(50), use), run(Forecaster(50), use), equal_nan=True)


def test_units_do_not_matter() -> None:
    use = noisy(100, 120)
    assert run(Forecaster(100), 2.0**30 * use) == pytest.approx(
        2.0**30 * run(Forecaster(100), use), rel=1e-6, nan_ok=True
    )


def test_places_do_not_matter() -> None:
    use = noisy(100, 60)
    turned = run(Forecaster(100), use[:, ::-1])[:, ::-1]
    assert turned == pytest.approx(run(Forecaster(100), use), rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("kind", ["idle", "constant", "switch", "spikes", "steps", "huge"])
def test_odd_loads_give_sane_limits(kind: str) -> None:
    generator = np.random.default_rng(4)
    shape = (2 * DAY, 40)
    use = {
        "idle": np.zeros(shape),
        "constant": np.full(shape, 7.0),
        "switch": 50.0 * generator.integers(0, 2, shape),
        "spikes": np.where(generator.random(shape) < 0.01, 1e6, 1.0),
        "steps": np.repeat(generator.lognormal(0, 2, (8, 40)), DAY // 4, axis=0),
        "huge": 2.0**50 * generator.random(shape),
    }[kind]
    limits = run(Forecaster(40), use)[WINDOW:]
    assert np.isfinite(limits).all()
    assert (limits >= 0).all()
    assert (limits <= 10 * use.max()).all()
    if kind in ("idle", "constant"):
        assert (limits >= 0.999 * use[WINDOW:]).all()


class TestGuestsComeAndGo:
    def test_a_late_guest_has_its_first_hour_too(self) -> None:
        forecaster = Forecaster(2)
        run(forecaster, np.full((50, 2), 5.0))
        forecaster.resize(3)
        limits = run(forecaster, np.full((WINDOW, 3), 5.0))
        assert np.isfinite(limits[:, :2]).all()
        assert np.isnan(limits[:-1, 2]).all()
        assert limits[-1, 2] == pytest.approx(5.5)

    def test_the_last_slots_go_first(self) -> None:
        forecaster = Forecaster(3)
        run(forecaster, np.tile([1.0, 2.0, 3.0], (20, 1)))
        forecaster.resize(2)
        assert forecaster.slots == 2
        assert forecaster.step(np.array([1.0, 2.0])) == pytest.approx([1.1, 2.2])

    def test_a_reset_slot_is_somebody_else(self) -> None:
        forecaster = Forecaster(2)
        run(forecaster, np.tile([100.0, 2.0], (20, 1)))
        forecaster.reset(0)
        limits = run(forecaster, np.tile([1.0, 2.0], (WINDOW, 1)))
        assert np.isnan(limits[:-1, 0]).all()
        assert limits[-1] == pytest.approx([1.1, 2.2])

    def test_a_silent_guest_keeps_a_forecast_from_its_day(self) -> None:
        forecaster = Forecaster(2)
        run(forecaster, np.tile([4.0, 2.0], (20, 1)))
        quiet = run(forecaster, np.tile([np.nan, 2.0], (DAY, 1)))
        assert quiet[: 6 * WINDOW, 0] == pytest.approx(np.full(6 * WINDOW, 4.4), rel=0.1)
        assert np.isnan(quiet[-1, 0])  # nothing is known of its last day
        assert quiet[-1, 1] == pytest.approx(2.2)

    def test_silence_is_no_idleness(self) -> None:
        use = noisy(100, DAY)
        gaps = use.copy()
        gaps[np.random.default_rng(5).random(use.shape) < 0.2] = np.nan
        limits, whole = run(Forecaster(100), gaps), run(Forecaster(100), use)
        assert np.nansum(limits[-1]) == pytest.approx(whole[-1].sum(), rel=0.15)

    def test_an_empty_host(self) -> None:
        forecaster = Forecaster()
        assert forecaster.step(np.empty(0)).shape == (0,)
        forecaster.resize(1)
        assert np.isnan(forecaster.step(np.array([1.0]))).all()


@pytest.mark.parametrize("used", [[1.0], [1.0, -1.0], [np.inf, 1.0], [[1.0, 1.0]]])
def test_nonsense_is_refused_and_changes_nothing(used: list[float]) -> None:
    forecaster, other = Forecaster(2), Forecaster(2)
    for each in (forecaster, other):
        run(each, np.full((20, 2), 5.0))
    with pytest.raises(ValueError, match="use of"):
        forecaster.step(np.array(used))
    assert np.array_equal(forecaster.step(np.array([5.0, 6.0])), other.step(np.array([5.0, 6.0])))


def test_four_kib_per_guest_at_most() -> None:
    forecaster = Forecaster(1000)
    run(forecaster, noisy(1000, 30))
    arrays = [value for value in vars(forecaster).values() if isinstance(value, np.ndarray)]
    assert len(arrays) == 5
    assert sum(array.nbytes for array in arrays) <= 1.4 * 1024 * 1000
