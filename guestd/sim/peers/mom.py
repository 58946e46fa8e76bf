"""oVirt's Memory Overcommitment Manager, on the host, with its balloon policy: every 10 s, over 10 samples of 5 s.

With less than a fifth of the host free all guests shrink, each to ``max(min, used + 0.2 x (free / 0.2) x
current)``, else all grow up to their maximum; 5 % of the current size per step at most, less than 0.25 % is left
alone.
"""

from collections import deque

import numpy as np

from guestd.sim.peers.base import Array, HostSample

_PRESSURE = 0.2
_GUEST_FREE = 0.2
_MOST, _LEAST = 0.05, 0.0025
_DECISIONS = 5  # 10 samples of 5 s, two a decision


class Mom:
    """All up or all down."""

    name = "mom"
    interval_seconds = 10.0

    def __init__(self) -> None:
        self._used: deque[Array] = deque(maxlen=_DECISIONS)

    def decide(self, now: float, host: HostSample) -> Array:
        self._used.append(host.used)
        used: Array = np.mean(np.array(self._used), axis=0)
        free = max(0.0, host.free / host.capacity)
        if free < _PRESSURE:
            goal = np.maximum(host.minimum, used + _GUEST_FREE * (free / _PRESSURE) * host.limit)
            goal = np.minimum(goal, host.limit)
        else:
            goal = np.maximum(host.maximum, host.limit)
        moved = np.clip(goal, (1 - _MOST) * host.limit, (1 + _MOST) * host.limit)
        small = np.abs(moved - host.limit) < _LEAST * host.limit
        return host.bounded(np.where(small, host.limit, moved))
