"""What a broker shows to those who watch it: the host as one pool, and each guest in it.

Plain values with the units of `monitor.proto`: CPU in millicores, memory in bytes. Texts that come from a
guest (`hostname`, `agent_version`, `kernel`, the reasons) prove nothing and may hold anything: whoever
shows them escapes them.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from guestd.model.reason import Reason
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.vm import VmStatus

_NO_REASON = Reason("", "")


class LimitsOrigin(StrEnum):
    """Where the limits of a guest come from."""

    UNKNOWN = "unknown"
    FILE = "file"
    ADMIN = "admin"  # wins over a file until it is reset


class ResizePhase(StrEnum):
    """What is going on with one kind of resource of a guest."""

    UNKNOWN = "unknown"
    IDLE = "idle"
    PLUGGING = "plugging"
    ASKING = "asking"  # the guest was asked to give some back
    UNPLUGGING = "unplugging"


@dataclass(frozen=True, slots=True)
class HostView:
    """The host as one pool."""

    capacity: Resources
    reserve: Resources
    overhead: Resources
    committed: Resources
    minimums: Resources
    free: Resources
    epoch: int
    version: str
    started_at: datetime | None
    guests: int
    guests_connected: int


@dataclass(frozen=True, slots=True)
class ResourceView:
    """One kind of resource of one guest: the four amounts, and what is wanted. Millicores or bytes."""

    kind: Kind
    demand: int = 0
    target: int = 0
    reserved: int = 0
    plugged: int = 0
    onlined: int = 0
    usable: int = 0
    used: int = 0
    phase: ResizePhase = ResizePhase.UNKNOWN
    reason: Reason = _NO_REASON
    grows: int = 0
    shrinks: int = 0
    partials: int = 0
    refusals: int = 0
    failures: int = 0
    overdue: bool = False
    burst: int = 0  # of what is reserved, above max
    burst_credit: int = 0  # resource x seconds
    quota: int = 0  # CPU time that the host allows; 0: not bound
    throttled_permille: int = 0
    at_rest: bool = False  # nothing will be done until something changes: it has its target, or is left as it is


@dataclass(frozen=True, slots=True)
class GuestView:
    """One guest. `vm_status` is None until the hypervisor was asked."""

    name: str
    limits: Limits
    limits_origin: LimitsOrigin = LimitsOrigin.UNKNOWN
    limits_origin_detail: str = ""
    vm_status: VmStatus | None = None
    paused: bool = False
    connected: bool = False
    channel: str = ""
    hostname: str = ""
    agent_version: str = ""
    kernel: str = ""
    resources: tuple[ResourceView, ...] = ()
    demand_reasons: tuple[Reason, ...] = ()
    last_seen_ago_seconds: float | None = None  # None: it never said anything
    protocol_errors: int = 0
    revision: int = 0
    degraded: str = ""
    observed: bool = False  # decided about and shown, never touched

    def resource(self, kind: Kind) -> ResourceView:
        """The resource of that kind; all amounts 0 when the broker did not tell."""
        for one in self.resources:
            if one.kind is kind:
                return one
        return ResourceView(kind)


@dataclass(frozen=True, slots=True)
class GuestRemoved:
    """A guest that the broker does not know any more."""

    name: str


@dataclass(frozen=True, slots=True)
class LimitsChange:
    """New limits; None leaves a limit as it is. Millicores, bytes, and weights of 1..10000."""

    cpu_min_millicores: int | None = None
    cpu_max_millicores: int | None = None
    cpu_weight: int | None = None
    memory_min_bytes: int | None = None
    memory_max_bytes: int | None = None
    memory_weight: int | None = None
    cpu_burst_millicores: int | None = None
    cpu_burst_credit: int | None = None
    cpu_burst_refill: int | None = None
    memory_burst_bytes: int | None = None
    memory_burst_credit: int | None = None
    memory_burst_refill: int | None = None
