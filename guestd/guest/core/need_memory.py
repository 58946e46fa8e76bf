"""How much memory the VM needs, from what it does: a pure estimator, fed with samples.

The law:

1. The need is what is in use (MemTotal - MemAvailable: page cache that can be dropped does not count, the kernel's
   own reserve does; and what is swapped out), plus what the kernel took for itself before MemTotal, plus headroom,
   plus what the present growth will have used up by the time that a plug takes.
2. A plug takes twice as long as the slowest of the last few from demand to arrival, `horizon_min_seconds` at least
   and `horizon_seconds` at most; one that took longer says that the host had none, and says nothing of plugs.
3. The headroom is there to be used: more is asked for when half of it is gone, and then all of it. Less is needed
   when that is half a headroom less. So what trembles within the headroom changes nothing.
4. A stall on memory asks for a quarter more than there is, whatever the arithmetic says: tasks stall (PSI) where
   little is available, or pages are swapped in. Tasks also stall, with plenty available,
   while the kernel moves pages about to unplug memory; that is no want of any.
5. Cache that is read again is kept, and grown while that helps (`need_cache`).
6. The kernel takes what is *free* before tasks stall. Who stalls, swaps in or reads again while plenty is free is
   a cgroup at its own limit: no want of the VM, and what is swapped out then is not needed.
7. `floor` is what must stay after a shrink: in use, half of the headroom, and the cache that is to be kept.
8. While the VM is being shrunk the kernel isolates one memory block after the other, and an isolated
   block looks as if it were in use: that much more than before the shrink is not believed.
9. A lower need is believed only after it has held for half of `hold_seconds` (what was asked for growth that ended: for
   `growth_hold_seconds`), and what is there at first is needed.
10. Growth is what has gone on for two stretches of `trend_seconds`: the mean of the two, but at most twice the
    slower. A jump is no trend, and neither is what comes back to where it was within the hold of rule 9.

Weak spots: a program that allocates everything within one sampling interval is faster than any estimate; a
cgroup at its limit in a VM whose free memory others fill with cache looks like the VM's own want, until steps for the
cache help nothing.
"""

from collections import deque
from dataclasses import dataclass

from guestd.guest.core.need import EstimateSettings, Held
from guestd.guest.core.need_cache import CacheGuard
from guestd.model.guest import Sample
from guestd.model.messages import Urgency
from guestd.model.reason import Reason
from guestd.model.units import MIB, format_size

_ARRIVAL_BYTES = 16 * MIB
"""So much more (a plug) or so much missing (a demand): less is rounding."""


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


@dataclass(frozen=True, slots=True)
class _Stall:
    """What went wrong in the last window: shares of the time (None without PSI), pages per second."""

    share: float | None = None
    io_share: float | None = None
    refaults: float = 0.0
    swap_ins: float = 0.0

    def __str__(self) -> str:
        shares = ((self.share, "memory"), (self.io_share, "I/O"))
        waits = [f"{share:.0%} of the time on {name}" for share, name in shares if share is not None and share > 0]
        return ", ".join([*waits, f"{self.refaults:.0f} pages/s read again", f"{self.swap_ins:.0f} swapped in"])


class _PlugTime:
    """How long memory takes to come (rule 2)."""

    def __init__(self, settings: EstimateSettings) -> None:
        self._settings = settings
        self._seen: deque[float] = deque(maxlen=4)
        self._asked_at: float | None = None
        self._held_bytes = 0

    def update(self, needed_bytes: int, held_bytes: int, now: float) -> None:
        if held_bytes > self._held_bytes + _ARRIVAL_BYTES and self._asked_at is not None:
            if now - self._asked_at <= self._settings.horizon_seconds:
                self._seen.append(now - self._asked_at)
            self._asked_at = None
        self._held_bytes = held_bytes
        if needed_bytes <= held_bytes + _ARRIVAL_BYTES:
            self._asked_at = None
        elif self._asked_at is None:
            self._asked_at = now

    @property
    def horizon_seconds(self) -> float:
        settings = self._settings
        longest = 2 * max(self._seen) if self._seen else settings.horizon_seconds
        return min(settings.horizon_seconds, max(settings.horizon_min_seconds, longest))


class MemoryEstimator:
    """Feed it each sample with its time; it answers with the need."""

    def __init__(self, settings: EstimateSettings | None = None) -> None:
        self._settings = settings or EstimateSettings()
        self._history: deque[tuple[float, Sample, int]] = deque()  # time, sample, bytes in use
        self._before_shrink = 0
        self._asked = 0
        self._level = Held(self._settings.hold_seconds * self._settings.memory_hold_share)
        self._ahead = Held(self._settings.growth_hold_seconds)
        self._cache = CacheGuard(self._settings)
        self._plugs = _PlugTime(self._settings)
        self._swap_before = 0
        self._swapped = 0  # of what is swapped out, what is the VM's own want

    def update(self, sample: Sample, kernel_bytes: int, isolated_bytes: int, now: float) -> MemoryNeed:
        """
        :param kernel_bytes: what the kernel took at boot, beside MemTotal.
        :param isolated_bytes: what may look used because it is just being unplugged.
        :param now: seconds, monotonic.
        """
        settings, history = self._settings, self._history
        held_bytes = sample.memory_total_bytes + kernel_bytes
        if not history:
            self._asked = self._level.update(held_bytes, now)
        plenty = _plenty_free(sample, settings)
        used = self._without_isolated(sample, self._swapped_out(sample, plenty), isolated_bytes)
        history.append((now, sample, used))
        while len(history) > 2 and history[1][0] < now - settings.window_seconds:
            history.popleft()
        headroom = max(settings.headroom_min_bytes, round(used * settings.headroom_share))
        stall = self._stalls(now)
        thrashing = stall.refaults > settings.thrashing_pages_per_second
        swapping = stall.swap_ins > settings.thrashing_pages_per_second
        scarce = sample.memory_available_bytes < max(2 * headroom, sample.memory_total_bytes // 8)
        stalling = stall.share is not None and stall.share > settings.pressure_share
        in_cgroup = plenty and not isolated_bytes and (swapping or thrashing or (stalling and not scarce))
        urgent = not plenty and (swapping or (stalling and scarce))
        wanting = not plenty and thrashing and _waits(stall, settings)
        kept, step = self._cache.update(sample, stall.refaults, wanting, plenty, held_bytes, now)
        stalled = urgent or (stalling and step > 0)
        rate = self._growth_rate(now)
        moving = rate > settings.moving_bytes_per_second
        base = kernel_bytes + used
        level = max(base + headroom, min(held_bytes, base + headroom + kept))
        more = max(step, held_bytes + held_bytes // 4 if urgent else 0)
        needed = self._needed(level, more, rate, headroom, held_bytes, now)
        self._plugs.update(needed, held_bytes, now)
        floor = max(base + headroom // 2, min(held_bytes, base + headroom // 2 + kept))
        urgency = Urgency.NOW if stalled else Urgency.SOON if moving or step else Urgency.NORMAL
        shown = f"{format_size(used)} in use"
        if urgent:
            reason = Reason("memory-stall", f"tasks stall on memory ({stall}), {shown}")
        elif step or stalled:
            reason = Reason("memory-cache", f"cache is read again ({stall}), {format_size(kept)} of it kept, {shown}")
        elif in_cgroup:
            free = format_size(sample.memory_free_bytes)
            reason = Reason("memory-cgroup", f"{free} are free while tasks stall ({stall}): a cgroup's limit; {shown}")
        elif moving:
            ahead = self._plugs.horizon_seconds
            text = f"{shown}, growing by {format_size(round(rate))}/s, looked ahead for {ahead:.1f} s"
            reason = Reason("memory-growth", text)
        else:
            cache = f", cache kept {format_size(kept)}" if kept >= MIB else ""
            reason = Reason("memory-used", f"{shown}, headroom {format_size(headroom)}{cache}")
        return MemoryNeed(needed, floor, used, moving, stalled, urgency, reason)

    def _needed(self, level: int, more: int, rate: float, headroom: int, held_bytes: int, now: float) -> int:
        """What to ask for: rules 3 and 9."""
        highest = self._level.update(level, now)
        growth = round(rate * self._plugs.horizon_seconds) if level == highest else 0
        ahead = max(more, level + growth)
        ahead += max(0, ahead - held_bytes) // 64  # the memmap of what is to come
        held = max(highest, self._ahead.update(ahead, now))
        if more > self._asked or ahead > self._asked + headroom // 2:
            self._asked = ahead
        elif held + headroom // 2 < self._asked:
            self._asked = held
        return self._asked

    def _swapped_out(self, sample: Sample, plenty: bool) -> int:
        """Bytes that are swapped out for want of memory: not what went while plenty was free (rule 6)."""
        more = max(0, sample.swap_used_bytes - self._swap_before)
        self._swap_before = sample.swap_used_bytes
        self._swapped = min(sample.swap_used_bytes, self._swapped + (0 if plenty else more))
        return self._swapped

    def _without_isolated(self, sample: Sample, swapped_bytes: int, isolated_bytes: int) -> int:
        used = max(0, sample.memory_total_bytes - sample.memory_available_bytes) + swapped_bytes
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

    def _stalls(self, now: float) -> _Stall:
        before_at, before, _ = self._history[0]
        newest, seconds = self._history[-1][1], now - before_at
        if seconds <= 0:
            return _Stall()
        return _Stall(
            _share(before.memory_some_us, newest.memory_some_us, seconds),
            _share(before.io_some_us, newest.io_some_us, seconds),
            max(0, newest.refaults - before.refaults) / seconds,
            max(0, newest.swap_in_pages - before.swap_in_pages) / seconds,
        )


def _share(before: int | None, after: int | None, seconds: float) -> float | None:
    return None if before is None or after is None else (after - before) / 1e6 / seconds


def _plenty_free(sample: Sample, settings: EstimateSettings) -> bool:
    """Whether nobody can be waiting for the kernel to find memory."""
    least = max(settings.plenty_free_min_bytes, round(sample.memory_total_bytes * settings.plenty_free_share))
    return sample.memory_free_bytes > least


def _waits(stall: _Stall, settings: EstimateSettings) -> bool:
    """Whether tasks wait for pages that are read again; without PSI that they are read is all there is to know."""
    shares = [share for share in (stall.share, stall.io_share) if share is not None]
    return not shares or max(shares) > settings.pressure_share
