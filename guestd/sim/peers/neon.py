"""Neon autoscaling: an agent on the host and a monitor in the guest.

Every 5 s: CPU for ``load / 0.9``, memory for ``max(used / 0.75, (used + cache) / 0.9)``, in units of a quarter vCPU
and of 1 GiB. It grows by any number of units at once and shrinks one unit a time; the monitor refuses a shrink of
memory when ``0.85 x (target - 100 MiB) < used + 100 MiB``.

Left out: the scheduler's permission and migration. CPU and memory move on their own here, not as one compute unit,
and the load average is the CPU use itself.
"""

import numpy as np

from guestd.model.resources import Kind
from guestd.sim.peers.base import Array, HostSample

_LOAD_GOAL, _USED_GOAL, _TOTAL_GOAL = 0.9, 0.75, 0.9
_MONITOR_SHARE, _MONITOR_GIB = 0.85, 100 / 1024


class Neon:
    """Jumps up, steps down."""

    name = "neon"
    interval_seconds = 5.0

    def decide(self, now: float, host: HostSample) -> Array:
        unit = host.standard * (0.25 if host.kind is Kind.CPU else 1.0)
        if host.kind is Kind.CPU:
            wanted = host.used / _LOAD_GOAL
        else:
            wanted = np.maximum(host.used / _USED_GOAL, (host.used + host.cached) / _TOTAL_GOAL)
        goal = np.ceil(wanted / unit - 1e-9) * unit
        down = np.maximum(goal, host.limit - unit)
        if host.kind is Kind.MEMORY:
            spare = _MONITOR_GIB * host.standard
            down = np.where(_MONITOR_SHARE * (down - spare) < host.used + spare, host.limit, down)
        return host.bounded(np.where(goal >= host.limit, goal, down))
