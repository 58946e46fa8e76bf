"""squeezed of XenServer (xapi): every 10 s all guests at the same point between their minimum and maximum.

``limit = min + g x (max - min)`` with ``g = surplus / sum of ranges``, 0 to 1. What must be freed is freed first: a
guest grows only by what is free now. What a guest uses plays no part.

Left out: guests that make no progress for 5 s count as inactive.
"""

import numpy as np

from guestd.sim.peers.base import Array, HostSample


class Squeezed:
    """Proportional, blind to use."""

    name = "squeezed"
    interval_seconds = 10.0

    def decide(self, now: float, host: HostSample) -> Array:
        ranges = host.maximum - host.minimum
        total = float(ranges.sum())
        share = min(1.0, max(0.0, (host.capacity - float(host.minimum.sum())) / total)) if total > 0 else 0.0
        goal = host.minimum + share * ranges
        growth = np.maximum(goal - host.limit, 0.0)
        wanted = float(growth.sum())
        granted = min(1.0, max(0.0, host.free) / wanted) if wanted > 0 else 0.0
        return np.minimum(goal, host.limit) + granted * growth
