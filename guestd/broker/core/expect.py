"""What guests are likely to need in the next five minutes, so that it is not taken from them only to be given back.

The need that a guest states is averaged over each interval and handed to the `Forecaster`. What it expects is *kept*,
never granted: a guest keeps what it holds up to there while there is plenty of it, and needs alone count as soon as
anybody lacks something or less than an eighth of the host is free.

Weak spot: an expectation begins an hour after the guest was first seen, and anew with each start of the broker.
"""

from dataclasses import dataclass

import numpy as np

from guestd.broker.core.forecast import Forecaster

INTERVAL_SECONDS = 300.0
PLENTY_SHARE = 8  # what is kept may leave no less than this part of the capacity free


@dataclass(slots=True)
class _Mean:
    """A guest's need in the interval that goes on: integral and time of what is known of it."""

    slot: int
    need: int | None = None
    since: float = 0.0
    total: float = 0.0
    seconds: float = 0.0

    def note(self, need: int | None, now: float) -> None:
        passed = min(INTERVAL_SECONDS, max(0.0, now - self.since))
        if self.need is not None:
            self.total += self.need * passed
            self.seconds += passed
        self.need, self.since = need, now

    def take(self, now: float) -> float:
        """The mean, and begin anew; NaN when less than half of the interval is known."""
        self.note(self.need, now)
        mean = self.total / self.seconds if self.seconds >= INTERVAL_SECONDS / 2 else float("nan")
        self.total = self.seconds = 0.0
        return mean


class Expectation:
    """One kind of resource of all guests."""

    def __init__(self) -> None:
        self._means: dict[str, _Mean] = {}
        self._free_slots: list[int] = []
        self._forecaster = Forecaster()
        self.next_at: float | None = None

    def note(self, name: str, need: int | None, now: float) -> None:
        """What a guest needs from now on; None: nobody knows. Bounded by the caller, a guest may say anything."""
        mean = self._means.get(name)
        if mean is None:
            if need is None:
                return
            mean = self._means[name] = _Mean(self._slot(), since=now)
        if self.next_at is None:
            self.next_at = now + INTERVAL_SECONDS
        mean.note(need, now)

    def forget(self, name: str) -> None:
        """The guest is gone."""
        mean = self._means.pop(name, None)
        if mean is not None:
            self._forecaster.reset(mean.slot)
            self._free_slots.append(mean.slot)
        if not self._means:
            self.next_at = None

    def step(self, now: float) -> dict[str, int]:
        """End the interval when it is over. What each guest may need in the next one, if so much is known."""
        if self.next_at is None or now < self.next_at:
            return {}
        self.next_at = now + INTERVAL_SECONDS
        used = np.full(self._forecaster.slots, np.nan)
        for mean in self._means.values():
            used[mean.slot] = mean.take(now)
        expected = self._forecaster.step(used)
        return {name: round(expected[m.slot]) for name, m in self._means.items() if not np.isnan(expected[m.slot])}

    def _slot(self) -> int:
        if not self._free_slots:
            slots = self._forecaster.slots
            more = max(16, slots // 2)
            self._forecaster.resize(slots + more)
            self._free_slots = list(range(slots + more - 1, slots - 1, -1))
        return self._free_slots.pop()
