"""qmemman of Qubes OS: all memory of the host goes to the guests, in proportion to what they prefer.

A guest prefers ``max(1.3 x used, 200 MiB)``. With enough memory for all, everybody gets its preference times the same
factor, at most its maximum; with too little, those who have more than they prefer give it up and the others share
what there is likewise. Nothing happens until some guest would move by more than 150 MiB.

The original decides when a guest reports, which is each second at most.
"""

import numpy as np

from guestd.sim.peers.base import Array, HostSample

_PREFERENCE = 1.3
_LEAST_GIB, _MOVE_GIB = 200 / 1024, 150 / 1024


class Qmemman:
    """Everything to somebody."""

    name = "qmemman"
    interval_seconds = 1.0

    def decide(self, now: float, host: HostSample) -> Array:
        preferred = np.maximum(_PREFERENCE * host.used, _LEAST_GIB * host.standard)
        goal = _share_out(np.minimum(preferred, host.maximum), host.maximum, host.capacity)
        goal = host.bounded(goal)
        if np.max(np.abs(goal - host.limit), initial=0.0) <= _MOVE_GIB * host.standard:
            return host.limit
        return goal


def _share_out(preferred: Array, maximum: Array, capacity: float) -> Array:
    """Preferences times one factor so that all is given out, nobody above its maximum."""
    capped = np.zeros(len(preferred), bool)
    while not capped.all():
        factor = (capacity - float(maximum[capped].sum())) / float(preferred[~capped].sum())
        over = ~capped & (preferred * factor > maximum)
        if not over.any():
            return np.where(capped, maximum, preferred * factor)
        capped |= over
    return maximum.copy()
