"""What both estimators of need share: their constants, and a value that falls late."""

from collections import deque
from dataclasses import dataclass

from guestd.model.units import MIB


@dataclass(frozen=True, slots=True)
class EstimateSettings:
    """Constants of the estimators; seconds, bytes, shares of 1."""

    window_seconds: float = 1.0  # over which rates are taken
    min_window_seconds: float = 0.14  # below this a rate is noise: /proc/stat counts in 10 ms
    hold_seconds: float = 6.0  # for so long a lower need must last to be believed

    runnable_samples: int = 4
    spike_seconds: float = 0.25  # tasks that waited for less than this in the last window buy no CPU
    settling_seconds: float = 2.0  # after a CPU came or went
    settling_spike_seconds: float = 0.8  # the same as `spike_seconds`, until then
    waiting_share: float = 0.3  # of the time in which some task waits for a CPU
    busy_share: float = 0.9  # of the CPUs online, above which they are all busy
    cpu_spare_share: float = 0.1
    cpu_spare_cpus: float = 0.1
    throttled_more_share: float = 0.25  # of the quota: the least that is asked above it
    steal_share: float = 0.05  # of the time of all CPUs, from which on it is mentioned

    headroom_share: float = 0.125  # of what is in use
    headroom_min_bytes: int = 96 * MIB
    horizon_seconds: float = 3.0  # looked ahead of growth, until a plug was seen; never more
    horizon_min_seconds: float = 1.0
    memory_hold_share: float = 0.5  # of `hold_seconds`: what trembles is the headroom's matter
    growth_hold_seconds: float = 1.0  # what was asked for growth that ended is kept for so long
    trend_seconds: float = 0.1
    moving_bytes_per_second: int = 8 * MIB
    pressure_share: float = 0.05  # of the time in which some task stalls on memory
    thrashing_pages_per_second: float = 100.0  # refaults, or pages swapped in: 0.4 MiB/s read again
    plenty_free_share: float = 1 / 16  # of all memory: where so much is free the kernel does not look for any
    plenty_free_min_bytes: int = 64 * MIB

    protect_seconds: float = 300.0  # cache that was read again is kept for so long
    cache_settle_seconds: float = 2.0  # from the arrival of more memory until its effect on the cache is judged
    cache_blind_steps: int = 4  # so many steps in a row may be without effect
    cache_fall_share: float = 0.1  # refaults that fell by less than this did not fall
    cache_pause_seconds: float = 600.0  # after steps without effect


class Held:
    """The highest value of the last `seconds`: rises at once, falls late."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._values: deque[tuple[float, int]] = deque()

    def update(self, value: int, now: float) -> int:
        """Take a value in; returns the highest. :param now: seconds, never falling."""
        while self._values and self._values[-1][1] <= value:
            self._values.pop()
        self._values.append((now, value))
        while self._values[0][0] < now - self._seconds:
            self._values.popleft()
        return self._values[0][1]

    @property
    def falls_at(self) -> float | None:
        """When it will be lower unless it rises before; None: it is as low as the last value."""
        return self._values[0][0] + self._seconds if len(self._values) > 1 else None
