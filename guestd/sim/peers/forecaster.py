"""guestd itself, as far as 5-minute samples go: the broker's `Forecaster`, and nothing else, decides.

Of a guest without a forecast yet the limit stays as it is.
"""

import numpy as np

from guestd.broker.core.forecast import Forecaster
from guestd.sim.peers.base import Array, HostSample


class Guestd:
    """The production forecaster's limits."""

    name = "guestd"
    interval_seconds = 300.0

    def __init__(self, vms: int) -> None:
        self._forecaster = Forecaster(vms)

    def decide(self, now: float, host: HostSample) -> Array:
        limit = self._forecaster.step(host.used)
        return np.where(np.isnan(limit), host.limit, limit)
