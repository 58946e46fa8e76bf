"""What of the page cache is worth its memory: pure, told how much is read again.

The law:

1. Cache that can be dropped is not in use: it asks for nothing. A stream (each page read once) never changes that.
2. A refault is a page that was dropped and is read again. As much as was read again in the last
   `protect_seconds` is *protected*: it counts in the floor, and as needed of what there is. It asks for nothing more.
3. While pages are read again, tasks wait for that and little is free, the cache is too small: more is asked
   for, an eighth of what there is at a time. The next step waits for the memory, and for its effect. The cache with
   which that ends is protected as a whole, for as long.
4. A step after which no less is read again was for nothing. After `cache_blind_steps` of them in a row it is
   given up (a file many times as large as memory): what they brought is no longer protected, and nothing is asked
   for during `cache_pause_seconds`.

Weak spot: a set of files that is read in turns and is larger than a few steps more looks like one that never fits.
"""

from collections import deque

from guestd.guest.core.need import EstimateSettings
from guestd.model.guest import Sample

PAGE_BYTES = 4096
_STEP = 8  # the inverse of a step
_LOG_SECONDS = 1.0


class CacheGuard:
    """Fed with each sample."""

    def __init__(self, settings: EstimateSettings) -> None:
        self._settings = settings
        self._log: deque[tuple[float, int]] = deque()  # time, pages read again: about one a second
        self._refaults_before = 0
        self._refaulted = 0  # pages, but for a cgroup's own
        self._target = 0  # bytes held that the present step asks for; 0: none
        self._arrived_at: float | None = None
        self._refaults_arrived = 0
        self._rate_before = 0.0
        self._blind = 0
        self._cache_at_first = 0
        self._limit: int | None = None  # no more than this is protected, and nothing asked for, until:
        self._limited_until = 0.0
        self._worth, self._worth_until = 0, 0.0  # bytes of cache with which nothing was read again any more

    def update(
        self, sample: Sample, rate: float, wanting: bool, plenty: bool, held_bytes: int, now: float
    ) -> tuple[int, int]:
        """
        :param rate: pages read again per second, of late.
        :param wanting: tasks wait for them, and little memory is free.
        :param plenty: so much is free that it is a cgroup that reads again.
        :param held_bytes: what the VM has.
        :returns: bytes of cache to keep, and bytes in all to ask for (0: no more than there is).
        """
        more = max(0, sample.refaults - self._refaults_before)
        self._refaults_before = sample.refaults
        self._refaulted += 0 if plenty or not self._log else more
        cache = max(0, sample.memory_available_bytes - sample.memory_free_bytes)
        if self._limit is not None and now >= self._limited_until:
            self._limit = None
        if wanting and self._limit is None:
            self._step(sample, rate, cache, held_bytes, now)
        elif not wanting:
            if self._target:
                self._worth, self._worth_until = cache, now + self._settings.protect_seconds
            self._target, self._blind = 0, 0
        worth = self._worth if now < self._worth_until else 0
        kept = min(cache, max(worth, self._read_again(now) * PAGE_BYTES))
        return (kept if self._limit is None else min(kept, self._limit)), self._target

    def _read_again(self, now: float) -> int:
        """Pages, in the last `protect_seconds`."""
        log = self._log
        if not log or now - log[-1][0] >= _LOG_SECONDS:
            log.append((now, self._refaulted))
        while len(log) > 1 and log[1][0] < now - self._settings.protect_seconds:
            log.popleft()
        return self._refaulted - log[0][1]

    def _step(self, sample: Sample, rate: float, cache: int, held_bytes: int, now: float) -> None:
        """Ask for a first step, or judge the last one and ask for the next."""
        if not self._target:
            self._rate_before, self._cache_at_first = rate, cache
            self._ask(held_bytes)
            return
        if held_bytes < self._target - held_bytes // (4 * _STEP):
            return
        if self._arrived_at is None:
            self._arrived_at, self._refaults_arrived = now, sample.refaults
        seconds = now - self._arrived_at
        if seconds < self._settings.cache_settle_seconds:
            return
        since = (sample.refaults - self._refaults_arrived) / seconds
        fell = since < self._rate_before * (1 - self._settings.cache_fall_share)
        self._blind, self._rate_before = (0 if fell else self._blind + 1), since
        if self._blind >= self._settings.cache_blind_steps:
            self._limit, self._limited_until = self._cache_at_first, now + self._settings.cache_pause_seconds
            self._target, self._blind = 0, 0
        else:
            self._ask(held_bytes)

    def _ask(self, held_bytes: int) -> None:
        self._target, self._arrived_at = held_bytes + held_bytes // _STEP, None
