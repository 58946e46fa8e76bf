"""cpuplugd of s390-tools, in the guest, with the rules of IBM's sample configuration; every second.

CPU: one more when ``(1 - active) x online < 0.08``, one less when ``idle x online > 1.15``; never less than one.
Memory: a tenth of all more when pages are scanned (``pgscanrate > 20``), a tenth of what is free less when
``free + cache`` is more than a tenth of all.

A page-scan rate is not in the traces: pages count as scanned when `used` fills the limit. Active and idle
shares are those of the last interval.
"""

import numpy as np

from guestd.model.resources import Kind
from guestd.sim.peers.base import Array, HostSample

_PLUG_BELOW, _UNPLUG_ABOVE = 0.08, 1.15
_STEP = 0.1


class Cpuplugd:
    """One CPU, or a tenth of memory, at a time."""

    name = "cpuplugd"
    interval_seconds = 1.0

    def decide(self, now: float, host: HostSample) -> Array:
        return host.bounded(_cpus(host) if host.kind is Kind.CPU else _memory(host))


def _cpus(host: HostSample) -> Array:
    idle = np.maximum(host.limit - host.used, 0.0) / host.standard
    more = np.where(idle < _PLUG_BELOW, host.limit + host.standard, host.limit)
    fewer = np.maximum(host.limit - host.standard, np.minimum(host.standard, host.limit))
    return np.where(idle > _UNPLUG_ABOVE, fewer, more)


def _memory(host: HostSample) -> Array:
    free = np.maximum(host.limit - host.used - host.cached, 0.0)
    less = np.where(host.limit - host.used > _STEP * host.limit, host.limit - _STEP * free, host.limit)
    return np.where(host.used >= host.limit, (1 + _STEP) * host.limit, less)
