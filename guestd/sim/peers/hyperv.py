"""Hyper-V Dynamic Memory: a buffer of 20 % over what the guest has committed, each second.

The guest reports committed memory each second; the balance tries to give ``committed x 1.2``, in steps of 128 MiB
upwards. When the host cannot give all buffers, all get the same share of theirs.

Committed memory is taken to be what is used. Weights are equal. Ballooning down is taken to be as quick as adding.
"""

import numpy as np

from guestd.sim.peers.base import Array, HostSample

_BUFFER = 0.2
_UNIT_GIB = 1 / 8


class HyperV:
    """Committed and a fifth."""

    name = "hyper-v"
    interval_seconds = 1.0

    def decide(self, now: float, host: HostSample) -> Array:
        unit = _UNIT_GIB * host.standard
        wanted = np.ceil((1 + _BUFFER) * host.used / unit - 1e-9) * unit
        limit = host.bounded(wanted)
        buffers = np.maximum(limit - np.maximum(host.used, host.minimum), 0.0)
        over = float(limit.sum()) - host.capacity
        if over > 0 and buffers.sum() > 0:
            limit = limit - buffers * min(1.0, over / float(buffers.sum()))
        return limit
