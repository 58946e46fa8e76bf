"""Knows the next sample: the bound that nobody reaches."""

from guestd.sim.peers.base import Array, HostSample

_FULLNESS = 0.9


class Oracle:
    """The next sample's use / 0.9.

    :param use: (VMs, samples), the trace that is played.
    """

    name = "oracle"

    def __init__(self, use: Array, interval_seconds: float) -> None:
        self.interval_seconds = interval_seconds
        self._use = use

    def decide(self, now: float, host: HostSample) -> Array:
        column = min(round(now / self.interval_seconds), self._use.shape[1] - 1)
        limit: Array = self._use[:, column] / _FULLNESS
        return limit
