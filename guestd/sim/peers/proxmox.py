"""Proxmox VE's automatic balloon (pvestatd): every 10 s towards 80 % of the host's memory in use.

``goal = 0.8 x host - used``; within 10 MiB of it nothing is done. Each guest's fair size is ``min + share x
surplus``, with equal shares. To grow, guests under pressure (free at most a quarter of their minimum) are served
first, to shrink the others are; each guest moves towards its fair size by at most 100 MiB per cycle.

The host uses what its guests have: there are no other processes in the traces.
"""

import numpy as np
import numpy.typing as npt

from guestd.sim.peers.base import Array, HostSample

_HOST_GOAL = 0.8
_DEAD_GIB, _CHANGE_GIB = 10 / 1024, 100 / 1024
_COMFORT = 0.25


class Proxmox:
    """Slowly towards 80 % of the host."""

    name = "proxmox"
    interval_seconds = 10.0

    def decide(self, now: float, host: HostSample) -> Array:
        goal = _HOST_GOAL * host.capacity - float(host.limit.sum())
        if abs(goal) <= _DEAD_GIB * host.standard:
            return host.limit
        fair = _fair(host, float(host.limit.sum()) + goal)
        pressed = host.limit - host.used <= _COMFORT * host.minimum
        towards = np.maximum(fair - host.limit, 0) if goal > 0 else np.minimum(fair - host.limit, 0)
        most = _CHANGE_GIB * host.standard
        moves = np.clip(towards, -most, most)
        first = pressed if goal > 0 else ~pressed
        limit = host.limit.copy()
        for group in (first, ~first):
            done = _spend(moves, group, goal)
            limit, goal = limit + done, goal - float(done.sum())
        return limit


def _fair(host: HostSample, total: float) -> Array:
    """``min + share x surplus``; what is above a maximum is shared by the rest."""
    size = host.minimum.copy()
    open_: npt.NDArray[np.bool_] = size < host.maximum
    surplus = total - float(size.sum())
    while surplus > 1e-9 * host.capacity and open_.any():
        share = np.where(open_, surplus / open_.sum(), 0.0)
        grown = np.minimum(size + share, host.maximum)
        surplus -= float((grown - size).sum())
        size, open_ = grown, grown < host.maximum
    return size


def _spend(moves: Array, group: npt.NDArray[np.bool_], goal: float) -> Array:
    """The group's moves, in proportion when together they are more than the goal."""
    wanted = np.where(group, moves, 0.0)
    total = float(wanted.sum())
    return wanted if total == 0 or abs(total) <= abs(goal) else wanted * (goal / total)
