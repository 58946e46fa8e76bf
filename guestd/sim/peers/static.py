"""Fixed sizes: what people do without any of this.

Peak and 95th percentile are taken from the whole trace, the future included, which nobody can do for real.
"""

import numpy as np

from guestd.sim.peers.base import Array, HostSample


class Static:
    """The same limits for ever."""

    interval_seconds = 300.0

    def __init__(self, name: str, limit: Array) -> None:
        self.name = name
        self._limit = limit

    def decide(self, now: float, host: HostSample) -> Array:
        return self._limit


def peak(use: Array) -> Static:
    """Each VM's largest use; `use` is (VMs, samples)."""
    return Static("static peak", use.max(axis=1))


def p95(use: Array) -> Static:
    """Each VM's 95th percentile of use (linear interpolation)."""
    return Static("static p95", np.quantile(use, 0.95, axis=1))
