"""How long a guest may hold more than its maximum: a token bucket.

The law:

1. Credit is an exact integer in resource x microseconds, always within 0 and the cap.
2. While more than the maximum is held, credit falls by what is above it; otherwise it rises by the refill.
3. Time only counts forwards: a clock that was set back adds and takes nothing, one that was set ahead moves the
   credit no further than to 0 or to the cap.
4. A cap that is lowered cuts the credit at once.

Weak spots: what is held is taken as constant since the last `advance`, so call that before a holding changes. A
journal keeps whole resource x seconds, so a restart costs up to one of them.
"""

import math
from dataclasses import dataclass
from typing import Self

_MICRO = 1_000_000


@dataclass(slots=True)
class Bucket:
    """Credit for a burst, in resource x microseconds, as of `at_microseconds`."""

    credit_microseconds: int
    at_microseconds: int

    @classmethod
    def full(cls, cap: int, now: float) -> Self:
        """A new guest's bucket.

        :param cap: resource x seconds.
        """
        return cls.restored(cap, now)

    @classmethod
    def restored(cls, credit: int, now: float) -> Self:
        """A bucket as the journal knows it.

        :param credit: resource x seconds; the next `advance` cuts it to the cap.
        """
        return cls(max(0, credit) * _MICRO, _microseconds(now))

    @property
    def credit(self) -> int:
        """Resource x seconds, rounded down."""
        return self.credit_microseconds // _MICRO

    def advance(self, now: float, held: int, limits_max: int, cap: int, refill: int) -> None:
        """Let time pass until `now`.

        :param held: what was held since the last call; what of it is above `limits_max` is taken per second.
        :param cap: resource x seconds.
        :param refill: resource x seconds per second in which nothing above `limits_max` is held.
        """
        at = _microseconds(now)
        elapsed = max(0, at - self.at_microseconds)
        self.at_microseconds = at
        rate = limits_max - held if held > limits_max else refill
        self.credit_microseconds = min(max(self.credit_microseconds + rate * elapsed, 0), max(cap, 0) * _MICRO)

    def seconds_left(self, above: int) -> float:
        """How long the credit lasts when so much above the maximum is held; infinite for nothing."""
        return self.credit_microseconds / (above * _MICRO) if above > 0 else math.inf

    def seconds_until(self, credit: int, refill: int) -> float:
        """When so much credit (resource x seconds) is there if nothing above the maximum is held; 0 if it is already,
        infinite without a refill. Two microseconds are added, so that a clock's rounding does not wake one too early.
        """
        missing = credit * _MICRO - self.credit_microseconds
        if missing <= 0:
            return 0.0
        return (-(-missing // refill) + 2) / _MICRO if refill > 0 else math.inf


def _microseconds(now: float) -> int:
    return math.floor(now * _MICRO)
