"""The arithmetic of CPU bandwidth. Pure.

A group may use `quota` of CPU time in each `period`, all its threads together; then they wait for the next period
(kernel: scheduler/sched-bwc). The kernel takes periods up to 1 s and quotas from 1 ms.
"""

from collections import deque
from dataclasses import dataclass

PERIODS_US = (20_000, 100_000, 1_000_000)
"""The shortest that the kernel takes for a quota is used. Shorter ones cost more interrupts; in longer ones a bound
guest stands still for longer, and so does QEMU where a vCPU is stopped while it holds QEMU's global lock.
"""

_LEAST_QUOTA_US = 1_000
_WINDOW_SECONDS = 1.0
_LEAST_APART_SECONDS = 0.05  # of looks that are remembered, which bounds their number
_STEP_PERMILLE = 10


@dataclass(frozen=True, slots=True)
class Quota:
    """So much CPU time in each period, both in microseconds."""

    quota_us: int
    period_us: int

    @property
    def millicores(self) -> int:
        """Rounded; at least 1, since there is a bound."""
        return max(1, round(1000 * self.quota_us / self.period_us))


def quota_of(millicores: int) -> Quota:
    """The bound for so many millicores, exactly.

    :raise ValueError: When it is less than 1 millicore, which the kernel cannot do.
    """
    if millicores < 1:
        raise ValueError(f"{millicores} millicores: a bound is a whole number from 1 up")
    period = next(period for period in PERIODS_US if period * millicores >= 1000 * _LEAST_QUOTA_US)
    return Quota(period * millicores // 1000, period)


def weight_of(millicores: int, one_thread: int, most: int) -> int:
    """The group's weight against threads and groups beside it: as many threads' as the quota has CPUs, and never
    less than one's. Without it a VM of 8 vCPUs would weigh as much as a single thread outside.

    :param one_thread: What a thread weighs; :param most: the kernel's greatest weight.
    """
    return min(most, max(one_thread, one_thread * millicores // 1000))


class ThrottleMeter:
    """In how many of the last second's periods the bound was hit, from counters that only grow.

    Answers are in permille, in steps of 10, so that they don't change for nothing. A period counts when
    anything wanted to run in it; where nothing did, nothing was throttled. When looks are further apart than
    a second the answer covers the time since the last one.
    """

    def __init__(self) -> None:
        self._looks: deque[tuple[float, int, int]] = deque()

    def look(self, now: float, periods: int, throttled: int) -> int:
        """The counters as they are now (`nr_periods`, `nr_throttled`); the answer in permille."""
        looks = self._looks
        if looks and (periods < looks[-1][1] or throttled < looks[-1][2]):
            looks.clear()  # another group's
        if not looks or now >= looks[-1][0] + _LEAST_APART_SECONDS:
            looks.append((now, periods, throttled))
        while len(looks) > 1 and looks[1][0] <= now - _WINDOW_SECONDS:
            looks.popleft()
        passed = periods - looks[0][1]
        if passed <= 0:
            return 0
        permille = min(1000, 1000 * (throttled - looks[0][2]) / passed)
        return _STEP_PERMILLE * round(permille / _STEP_PERMILLE)
