"""What the VM needs, from what it does: pure estimators, fed with samples.

CPU, the law:

1. Utilisation says what is used, but it saturates at what is online. Where all CPUs are busy and tasks
   wait for one (`cpu.some` of PSI, where there is PSI) the need is the number of *runnable* tasks: the
   least of the last samples, so that a burst says nothing (plugging a CPU is one by itself: it wakes a
   handful of kernel threads for an instant).
2. Where nothing waits, what is used plus a tenth is enough, and never more than is online.
3. A lower need is believed only after it has held for `hold_seconds`: growing is cheap, flapping is not.
   So what is there when the estimator begins is needed until then: a restarted daemon takes nothing away.

Memory, the law:

1. The need is what is in use (MemTotal - MemAvailable: page cache that can be dropped does not count),
   plus what the kernel took for itself before MemTotal, plus headroom, plus what the present growth
   will have used up by the time that a plug takes (`horizon_seconds`).
2. A stall on memory (PSI) asks for a quarter more than there is, whatever the arithmetic says: where little
   is available, or what was dropped is read again (refaults). Tasks also stall, with plenty available,
   while the kernel moves pages about to unplug memory; that is no want of any.
3. `floor` is what must stay after a shrink: in use, and half of the headroom.
4. While the VM is being shrunk the kernel isolates one memory block after the other, and an isolated
   block looks as if it were in use: that much more than before the shrink is not believed.
5. As with CPUs, a lower need is believed only after it has held, and what is there at first is needed.
6. Growth is what has gone on for two stretches of `trend_seconds`: the mean of the two, but at most twice the
   slower. A jump is no trend.

Weak spots: cache that is worth its memory is seen only when tasks stall for want of it; a program that
allocates everything within one sampling interval is faster than any estimate.
"""

from collections import deque
from dataclasses import dataclass

from guestd.model.guest import Sample
from guestd.model.messages import Reason, Throttle, Urgency
from guestd.model.units import MIB, MILLICORES_PER_VCPU, format_size


@dataclass(frozen=True, slots=True)
class EstimateSettings:
    """Constants of the estimators; seconds, bytes, shares of 1."""

    window_seconds: float = 1.0  # over which rates are taken
    min_window_seconds: float = 0.14  # below this a rate is noise: /proc/stat counts in 10 ms
    runnable_samples: int = 4
    waiting_share: float = 0.3  # of the time in which some task waits for a CPU
    busy_share: float = 0.8  # of the CPUs online, above which they are all busy
    cpu_spare_share: float = 0.1
    hold_seconds: float = 6.0
    headroom_share: float = 0.2  # of what is in use; Hyper-V's default buffer is 20 %
    headroom_min_bytes: int = 96 * MIB
    horizon_seconds: float = 3.0
    trend_seconds: float = 0.1
    moving_bytes_per_second: int = 8 * MIB
    pressure_share: float = 0.05  # of the time in which some task stalls on memory
    thrashing_pages_per_second: float = 100.0  # refaults: 0.4 MiB/s read again


@dataclass(frozen=True, slots=True)
class CpuNeed:
    """CPU needed and used, in millicores."""

    needed_millicores: int
    used_millicores: int
    waiting: bool
    urgency: Urgency
    reason: Reason


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Memory needed in all, floor, and what is in use; bytes."""

    needed_bytes: int
    floor_bytes: int
    used_bytes: int
    moving: bool
    pressure: bool
    urgency: Urgency
    reason: Reason


class _Held:
    """The highest value of the last `seconds`: rises at once, falls late."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._values: deque[tuple[float, int]] = deque()

    def update(self, value: int, now: float) -> int:
        while self._values and self._values[-1][1] <= value:
            self._values.pop()
        self._values.append((now, value))
        while self._values[0][0] < now - self._seconds:
            self._values.popleft()
        return self._values[0][1]


class CpuEstimator:
    """Feed it each sample with its time; it answers with the need."""

    def __init__(self, settings: EstimateSettings | None = None) -> None:
        self._settings = settings or EstimateSettings()
        self._history: deque[tuple[float, Sample]] = deque()
        self._held = _Held(self._settings.hold_seconds)

    def update(self, sample: Sample, online: int, now: float, throttle: Throttle | None = None) -> CpuNeed:
        """:param online: CPUs online now; :param now: seconds, monotonic."""
        settings, history = self._settings, self._history
        if not history:
            self._held.update(online * MILLICORES_PER_VCPU, now)
        history.append((now, sample))
        while len(history) > settings.runnable_samples and history[1][0] < now - settings.window_seconds:
            history.popleft()
        used, used_now, some = self._rates(now)
        runnable = min(entry.runnable for _, entry in list(history)[-settings.runnable_samples :])
        busy = len(history) >= settings.runnable_samples and used_now > settings.busy_share * online
        waiting = busy and runnable > online and (some is None or some > settings.waiting_share)
        if waiting:
            needed = max(float(runnable), used)
            shown = "all CPUs are busy" if some is None else f"tasks wait {some:.0%} of the time"
            reason = Reason("cpu-waiting", f"{runnable} tasks want to run on {online} CPUs, {shown}")
        else:
            needed = min(used * (1 + settings.cpu_spare_share), float(online))
            reason = Reason("cpu-used", f"{used:.2f} of {online} CPUs are used")
        held = self._held.update(round(needed * MILLICORES_PER_VCPU), now)
        urgency = Urgency.NOW if waiting else Urgency.NORMAL
        return CpuNeed(held, round(used * MILLICORES_PER_VCPU), waiting, urgency, reason)

    def _rates(self, now: float) -> tuple[float, float, float | None]:
        """CPUs used over the last window and over the last moments, and the share of the last moments in
        which tasks waited (None without PSI).
        """
        newest = self._history[-1][1]
        window = now - self._settings.window_seconds
        start = next((entry for entry in reversed(self._history) if entry[0] <= window), self._history[0])
        recent = self._recent(now)
        if recent is None or now - start[0] < self._settings.min_window_seconds:
            return 0.0, 0.0, None if newest.cpu_some_us is None else 0.0
        used = _cpus_used(start[1], newest)
        seconds = now - recent[0]
        used_now = _cpus_used(recent[1], newest)
        if newest.cpu_some_us is None or recent[1].cpu_some_us is None:
            return used, used_now, None
        return used, used_now, (newest.cpu_some_us - recent[1].cpu_some_us) / 1e6 / seconds

    def _recent(self, now: float) -> tuple[float, Sample] | None:
        """The newest sample old enough to take a rate from: waiting is judged on the last moments."""
        oldest = now - self._settings.min_window_seconds
        return next((entry for entry in reversed(self._history) if entry[0] <= oldest), None)


def _cpus_used(before: Sample, after: Sample) -> float:
    """How many CPUs were in use between two samples: the sum of each one's busy share of the time that the
    kernel accounted for.

    Of the time accounted for, not of the time passed: what the host takes from a running vCPU is neither
    busy nor idle (where there is steal it says so, elsewhere ticks are simply lost), and a CPU that could
    not be idle for a moment is in use however little of it there was. Counted by CPU number: one that
    came or went between counts for nothing, a counter that went back counts as 0.
    """
    used = 0.0
    for number, busy_after in after.cpu_busy_seconds.items():
        busy_before = before.cpu_busy_seconds.get(number)
        if busy_before is None:
            continue
        busy = max(0.0, busy_after - busy_before)
        idle = max(0.0, after.cpu_idle_seconds.get(number, 0.0) - before.cpu_idle_seconds.get(number, 0.0))
        used += busy / (busy + idle) if busy + idle > 0 else 1.0
    return used


class MemoryEstimator:
    """Feed it each sample with its time; it answers with the need."""

    def __init__(self, settings: EstimateSettings | None = None) -> None:
        self._settings = settings or EstimateSettings()
        self._history: deque[tuple[float, Sample, int]] = deque()  # time, sample, bytes in use
        self._before_shrink = 0
        self._held = _Held(self._settings.hold_seconds)

    def update(self, sample: Sample, kernel_bytes: int, isolated_bytes: int, now: float) -> MemoryNeed:
        """
        :param kernel_bytes: what the kernel took at boot, beside MemTotal.
        :param isolated_bytes: what may look used because it is just being unplugged.
        :param now: seconds, monotonic.
        """
        settings, history = self._settings, self._history
        used = self._without_isolated(sample, isolated_bytes)
        if not history:
            self._held.update(sample.memory_total_bytes + kernel_bytes, now)
        history.append((now, sample, used))
        while len(history) > 2 and history[1][0] < now - settings.window_seconds:
            history.popleft()
        held_bytes = sample.memory_total_bytes + kernel_bytes
        rate = self._growth_rate(now)
        headroom = max(settings.headroom_min_bytes, round(used * settings.headroom_share))
        needed = kernel_bytes + used + headroom + round(rate * settings.horizon_seconds)
        needed += max(0, needed - held_bytes) // 64  # the memmap of what is to come
        scarce = sample.memory_available_bytes < max(2 * headroom, sample.memory_total_bytes // 8)
        stalled = self._stalled(now, scarce)
        moving = rate > settings.moving_bytes_per_second
        if stalled:
            needed = max(needed, held_bytes + held_bytes // 4)
            reason = Reason("memory-stall", f"tasks stall on memory, {format_size(used)} in use")
        elif moving:
            shown = f"{format_size(used)} in use, growing by {format_size(round(rate))}/s"
            reason = Reason("memory-growth", shown)
        else:
            shown = f"{format_size(used)} in use, headroom {format_size(headroom)}"
            reason = Reason("memory-used", shown)
        urgency = Urgency.NOW if stalled else Urgency.SOON if moving else Urgency.NORMAL
        floor = kernel_bytes + used + headroom // 2
        return MemoryNeed(self._held.update(needed, now), floor, used, moving, stalled, urgency, reason)

    def _without_isolated(self, sample: Sample, isolated_bytes: int) -> int:
        used = max(0, sample.memory_total_bytes - sample.memory_available_bytes) + sample.swap_used_bytes
        if not isolated_bytes:
            self._before_shrink = used
        more = used - self._before_shrink
        return used if more <= 0 else self._before_shrink + max(0, more - isolated_bytes)

    def _growth_rate(self, now: float) -> float:
        """Bytes per second by which the memory in use grows."""
        trend = self._settings.trend_seconds
        middle, oldest = self._before(now - trend), self._before(now - 2 * trend)
        if middle is None or oldest is None or oldest[0] >= middle[0]:
            return 0.0
        used = self._history[-1][2]
        recent = (used - middle[2]) / (now - middle[0])
        earlier = (middle[2] - oldest[2]) / (middle[0] - oldest[0])
        return max(0.0, min((recent + earlier) / 2, 2 * min(recent, earlier)))

    def _before(self, at: float) -> tuple[float, Sample, int] | None:
        """The newest sample that is not younger than `at`."""
        return next((entry for entry in reversed(self._history) if entry[0] <= at), None)

    def _stalled(self, now: float, scarce: bool) -> bool:
        before_at, before, _ = self._history[0]
        newest, seconds = self._history[-1][1], now - before_at
        if before.memory_some_us is None or newest.memory_some_us is None or seconds <= 0:
            return False
        thrashing = newest.refaults - before.refaults > self._settings.thrashing_pages_per_second * seconds
        share = (newest.memory_some_us - before.memory_some_us) / 1e6 / seconds
        return share > self._settings.pressure_share and (scarce or thrashing)
