"""A moving window: the largest of the 12 five-minute samples before, and a tenth.

After the moving-window recommender of Rzadca et al., "Autopilot: workload autoscaling at Google", EuroSys 2020.
"""

from collections import deque

import numpy as np

from guestd.sim.peers.base import Array, HostSample

_SAMPLES = 12
_MARGIN = 1.1


class Autopilot:
    """1.1 x max of the last hour."""

    name = "autopilot-like"
    interval_seconds = 300.0

    def __init__(self) -> None:
        self._window: deque[Array] = deque(maxlen=_SAMPLES)

    def decide(self, now: float, host: HostSample) -> Array:
        self._window.append(host.used)
        limit: Array = _MARGIN * np.max(np.array(self._window), axis=0)
        return limit
