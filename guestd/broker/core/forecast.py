"""What each guest is likely to use in the next interval, learned online from all guests of a host.

One `Forecaster` serves one kind of resource. It gets the mean use of each interval (5 minutes) and answers with the
limit that each guest should have in the next one. Units are those of `used`; only ratios matter.

The law:

1. **What is minimised.** Amounts above use are waste, amounts below are unmet demand. To waste least at a given sum of
   unmet demand, every guest must have the same chance `risk` of using more than its limit (Lagrange; the
   newsvendor's rule with one price for all). So the limit is the conditional ``1 - risk`` quantile of each guest's next
   use, and all depends on how sharp that is.
2. **One linear law for all guests:** limit = weights · features. The features are amounts from the guest's own past
   day (maxima, quantiles, mean change, ...; see `_look_back`), so the law has no scale: it is the same for a small
   guest and a large one. It starts as the reference (rule 4).
3. **Learning.** After each interval the weights take a few damped Newton steps on the quantile (pinball) loss of all
   guests, smoothed over a part of each guest's own typical change (He, Pan, Tan, Zhou, "Smoothed quantile
   regression with large-scale inference", J. Econometrics 232, 2023). The curvature seen before is remembered and
   slowly forgotten; it is the step size, so there is no learning rate. A step that makes the loss worse is halved.
4. **How much risk.** The reference is a moving window, 1.1 x the largest of the last 12 samples (as in Rzadca et
   al., "Autopilot", EuroSys 2020), computed beside it on the same guests. `risk` starts from the share of samples in
   which the reference falls short and is moved so that unmet demand is 0.9 of the reference's over the last day.
5. **Never worse for long.** Over the last day the law and the reference are compared by the loss of rule 1; while the
   law loses, or has not seen enough, the reference decides.

Nothing here is fitted to any load: constants are lengths of memory and the wish of rule 4. A guest without
data in an interval (NaN) is neither learned from nor forgotten; one with fewer than 12 samples in the last
day has no forecast (NaN).

Weak spots: what has no sign in the past (a job that starts) is not foreseen: with independent samples the best limit
is a fixed quantile, and no law does better. With fewer than some ten guests there is little to learn from: the
result is near the reference, in single cases a little worse. Guests share one law, weighted by size: a guest that lies
moves the others' limits a little, so the caller must bound `used` by what the VM has.
"""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

DAY = 288
"""Samples that are remembered of each guest: a day of 5-minute samples."""
WINDOW = 12
"""Samples of the reference's window, and least samples for a forecast: an hour."""
REFERENCE_MARGIN = 1.1
UNMET_GOAL = 0.9
"""Unmet demand that is aimed at, as a share of the reference's."""

_LONG_WINDOW = 4 * WINDOW
_NEWTON_STEPS = 3
_LEAST_STEP = 1e-4  # a step that makes the loss worse is halved down to this
_SMOOTHING = 0.15  # width over which the loss is smoothed, in typical changes of the guest
_PRIOR_SAMPLES = 30.0  # how many guest-samples the first law is worth
_ENOUGH_SAMPLES = 1000  # guest-samples before the law may decide: 100 for each weight
_MEMORY_SAMPLES = 50_000.0  # guest-samples after which what was learned is forgotten ...
_MEMORY_STEPS = 50.0  # ... but not before so many intervals
_RISK_GAIN = 8.0  # how fast the risk answers to unmet demand away from the goal (per log unit)
_RISK_BOUNDS = (0.001, 0.3)
_COUNTS = 1e-5  # share of all use below which unmet demand or waste is nothing
_REFERENCE, _LARGEST, _CHANGE = 0, 1, 2  # places in a row of features


class Forecaster:
    """Forecasts for guests in numbered slots, 1.4 KiB each.

    :param slots: guests at the start; see `resize`.
    """

    def __init__(self, slots: int = 0) -> None:
        self._ring = np.full((slots, DAY), np.nan, np.float32)  # column `step % DAY` holds that step's use
        self._last = np.full(slots, np.nan)
        self._change = np.zeros(slots)  # mean change from sample to sample
        self._changes = np.zeros(slots)  # how many it is the mean of, at most DAY
        self._steps = 0
        self._features = np.full((slots, _FEATURES), np.nan)
        self._law = _Law()

    @property
    def slots(self) -> int:
        return len(self._ring)

    @property
    def risk(self) -> float:
        """The chance that a guest uses more than its limit, that is aimed at now."""
        return self._law.risk

    def resize(self, slots: int) -> None:
        """Have so many slots: new ones at the end are empty, the last ones go first."""
        kept, new = min(slots, self.slots), max(0, slots - self.slots)

        def fit(values: Array, fill: float = np.nan) -> Array:
            return np.concatenate([values[:kept], np.full((new, *values.shape[1:]), fill, values.dtype)])

        ring = np.full((slots, DAY), np.nan, np.float32)
        ring[:kept] = self._ring[:kept]
        self._ring = ring
        self._last, self._features = fit(self._last), fit(self._features)
        self._change, self._changes = fit(self._change, 0.0), fit(self._changes, 0.0)

    def reset(self, slot: int) -> None:
        """Forget the guest in a slot; the next sample there is another guest's first."""
        self._ring[slot] = self._last[slot] = self._features[slot] = np.nan
        self._change[slot] = self._changes[slot] = 0.0

    def step(self, used: Array) -> Array:
        """Take in the interval that just ended, and say what each guest should have in the next one.

        :param used: mean use of each slot in the interval; NaN: no data.
        :return: one limit per slot; NaN: not enough known.
        :raise ValueError: When `used` has another length than there are slots, or is negative or infinite.
        """
        used = np.asarray(used, np.float64)
        if used.shape != (self.slots,):
            raise ValueError(f"use of {used.shape} given for {self.slots} slots; call resize() first")
        if np.any(used < 0) or np.any(np.isinf(used)):
            raise ValueError(f"use of slot {np.argmax((used < 0) | np.isinf(used))} is negative or infinite")
        scored = ~np.isnan(used) & ~np.isnan(self._features[:, _REFERENCE])
        if scored.any():
            self._law.learn(self._features[scored], used[scored])
        self._remember(used)
        self._features = self._look_back()
        return self._law.limits(self._features)

    def _remember(self, used: Array) -> None:
        self._ring[:, self._steps % DAY] = used
        self._steps += 1
        change = np.abs(used - self._last)
        seen = ~np.isnan(change)
        self._changes[seen] = np.minimum(self._changes[seen] + 1, DAY)
        self._change[seen] += (change[seen] - self._change[seen]) / self._changes[seen]
        self._last = np.where(np.isnan(used), self._last, used)

    def _look_back(self) -> Array:
        """The features of each slot, in units of use; NaN with fewer than `WINDOW` samples."""
        held = min(self._steps, DAY)
        recent = self._ring[:, np.arange(self._steps - min(held, _LONG_WINDOW), self._steps) % DAY]
        hour = recent[:, -WINDOW:]
        day, long = np.sort(self._ring[:, :held], axis=1), np.sort(recent, axis=1)
        in_day, in_long, in_hour = (np.count_nonzero(~np.isnan(part), axis=1) for part in (day, long, hour))
        features = np.empty((self.slots, _FEATURES))
        features[:, _REFERENCE] = REFERENCE_MARGIN * np.fmax.reduce(hour, axis=1, initial=np.nan)
        features[:, _LARGEST] = largest = _quantile(day, in_day, 1.0)
        features[:, _CHANGE] = self._change
        features[:, 3] = self._last
        features[:, 4] = np.nansum(hour, axis=1) / np.where(in_hour, in_hour, np.nan)
        features[:, 5] = np.fmax.reduce(hour[:, -WINDOW // 2 :], axis=1, initial=np.nan)
        features[:, 6] = _quantile(long, in_long, 1.0)
        features[:, 7] = _quantile(long, in_long, 0.95)
        features[:, 8] = _quantile(day, in_day, 0.95)
        features[:, 9] = _quantile(day, in_day, 0.5)
        features = np.where(np.isnan(features), largest[:, None], features)  # silent for a while: its day's most
        features[in_day < WINDOW] = np.nan
        return features


_FEATURES = 10


def _quantile(ordered: npt.NDArray[np.float32], count: npt.NDArray[np.intp], q: float) -> Array:
    """The sample nearest to quantile `q` of the first `count` of each sorted row."""
    column = np.maximum(np.rint(q * (count - 1)), 0).astype(np.intp)
    samples: Array = ordered[np.arange(len(ordered)), column].astype(np.float64)
    return samples


class _Law:
    """The weights that all guests share, the risk, and how both did in the last day."""

    def __init__(self) -> None:
        self.risk = 0.05
        self._start()
        self._short = np.array([self.risk, 1.0])  # samples in which the reference fell short; all samples
        self._unmet, self._waste = np.zeros(2), np.zeros(2)  # of law and reference, both over the last day
        self._loss = np.zeros(2)
        self._use = 0.0
        self._learned = 0  # guest-samples in all

    def _start(self) -> None:
        """As the reference."""
        self._weights = np.zeros(_FEATURES)
        self._weights[_REFERENCE] = 1.0
        self._curvature: Array | None = None

    def _by_law(self, features: Array) -> Array:
        return np.maximum(features @ self._weights, 0.0)

    def limits(self, features: Array) -> Array:
        """Rule 5."""
        proven = self._learned >= _ENOUGH_SAMPLES and self._loss[0] <= self._loss[1]
        return self._by_law(features) if proven else features[:, _REFERENCE].copy()

    def learn(self, features: Array, used: Array) -> None:
        """Take in what guests used after they had these features."""
        forget = min(1 / _MEMORY_STEPS, len(used) / _MEMORY_SAMPLES)
        self._judge(features, used, forget)
        self._learned += len(used)
        try:
            self._improve(features, used, forget)
        except np.linalg.LinAlgError:
            self._start()
        if not np.all(np.isfinite(self._weights)):
            self._start()

    def _judge(self, features: Array, used: Array, forget: float) -> None:
        """Rules 4 and 5: what came of law and reference, and the risk that follows from it."""
        limits = np.stack([self._by_law(features), features[:, _REFERENCE]])
        over = used - limits
        unmet, waste = np.maximum(over, 0).sum(axis=1), np.maximum(-over, 0).sum(axis=1)
        kept = 1 - 1 / DAY
        self._loss = self._loss * kept + (1 - self.risk) * unmet + self.risk * waste
        self._unmet, self._waste = self._unmet * kept + unmet, self._waste * kept + waste
        self._use = self._use * kept + used.sum()
        self._short = self._short * (1 - forget) + [np.count_nonzero(over[1] > 0), len(used)]
        nothing = _COUNTS * self._use + np.finfo(float).tiny
        law, reference = self._unmet + nothing
        missed = np.log(law / (UNMET_GOAL * reference))
        share = self._short[0] / self._short[1]
        self.risk = float(np.clip(share * np.exp(np.clip(-_RISK_GAIN * missed, -50, 50)), *_RISK_BOUNDS))

    def _improve(self, features: Array, used: Array, forget: float) -> None:
        """Rule 3: Newton steps on the smoothed loss. Its gradient is (chance of falling short - risk) x feature."""
        width = _SMOOTHING * features[:, _CHANGE] + 0.003 * features[:, _LARGEST]
        width += 1e-9 * used.mean() + 1e-30  # where a guest is idle

        def loss(weights: Array) -> float:
            left = (features @ weights - used) / width
            return float((width * (self.risk * left + np.logaddexp(0.0, -left))).sum())

        for repeat in range(_NEWTON_STEPS):
            left = features @ self._weights - used
            short = 1 / (1 + np.exp(np.clip(left / width, -30, 30)))
            if repeat == 0:
                # The second part keeps steps bounded where no guest is near its limit: half a majorant of the loss.
                bend = short * (1 - short) / width + self.risk / (width + np.abs(left))
                seen = (features * bend[:, None]).T @ features
                if self._curvature is None:
                    typical = np.trace(seen) / _FEATURES / len(used)
                    self._curvature = _PRIOR_SAMPLES * typical * np.eye(_FEATURES)
                self._curvature = self._curvature * (1 - forget) + seen
                ridge = 1e-9 * np.trace(self._curvature) + np.finfo(float).tiny
                system = self._curvature + ridge * np.eye(_FEATURES)
            step = np.linalg.solve(system, features.T @ (short - self.risk))
            before = loss(self._weights)
            while loss(self._weights + step) > before and np.abs(step).max() > _LEAST_STEP:
                step /= 2
            self._weights = self._weights + step
