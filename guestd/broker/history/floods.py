"""How many events one guest may make: a token bucket each, and a count of what it left out. Pure.

A guest that spent its tokens is not heard until it has half of them again: what is kept of a flood are stretches that
can be read, with how many are missing between them.
"""

from dataclasses import dataclass

_BURST = 20
_PER_SECOND = 2.0
_ENOUGH = _BURST / 2


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float
    left_out: int = 0


class Floods:
    """All guests' buckets. Times of a monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}
        self._flooding: set[str] = set()

    def take(self, name: str, now: float) -> bool:
        """Whether one more event of that guest may be kept; else it is counted."""
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = _Bucket(_BURST, now)
        _fill(bucket, now)
        if name in self._flooding or bucket.tokens < 1:
            self._flooding.add(name)
            bucket.left_out += 1
            return False
        bucket.tokens -= 1
        return True

    def over(self, now: float) -> list[tuple[str, int]]:
        """Guests that may be heard again, and how many of their events were left out."""
        found = []
        for name in sorted(self._flooding):
            bucket = self._buckets[name]
            _fill(bucket, now)
            if bucket.tokens >= _ENOUGH:
                found.append((name, bucket.left_out))
                bucket.left_out = 0
        self._flooding.difference_update(name for name, _ in found)
        return found

    def forget(self, name: str) -> None:
        """The guest is no more."""
        self._buckets.pop(name, None)
        self._flooding.discard(name)


def _fill(bucket: _Bucket, now: float) -> None:
    tokens = bucket.tokens + (now - bucket.at) * _PER_SECOND if now > bucket.at else bucket.tokens
    bucket.tokens, bucket.at = tokens if tokens < _BURST else _BURST, now
