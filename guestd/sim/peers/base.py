"""What a policy sees of one host, and what it decides.

A policy decides about one kind of resource of all VMs of one host. It is written as its peer decides, with the peer's
constants, at the peer's own interval; it keeps what state it needs. It is called every `interval_seconds`
of virtual time; what becomes of its decision (latency, refusals) is the caller's business, so `limit`
may differ from what was decided before.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from guestd.model.resources import Kind

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class HostSample:
    """One look at a host. Arrays have one element per VM, all in one unit of measure (percent, bytes, ...).

    :param used: what the VMs wanted in the last interval (mean); memory without page cache. It may be above `limit`.
    :param cached: page cache; zeros for CPU.
    :param limit: what the VMs have now.
    :param minimum: least a VM may get.
    :param maximum: most a VM may get.
    :param capacity: what the host has for all VMs.
    :param standard: one vCPU (CPU) or one GiB (memory), in this unit of measure: peers with absolute
        constants need it.
    """

    kind: Kind
    used: Array
    cached: Array
    limit: Array
    minimum: Array
    maximum: Array
    capacity: float
    standard: float

    @property
    def free(self) -> float:
        """What no VM has."""
        return self.capacity - float(self.limit.sum())

    def bounded(self, limit: Array) -> Array:
        """Within minimum and maximum of each VM."""
        return np.clip(limit, self.minimum, self.maximum)


class Policy(Protocol):
    """Who gets how much next."""

    name: str
    interval_seconds: float

    def decide(self, now: float, host: HostSample) -> Array:
        """The next limit of each VM, in the unit of measure of `host.used`.

        :param now: virtual seconds, never falling between calls.
        """
        ...
