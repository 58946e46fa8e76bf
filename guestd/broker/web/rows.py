"""What the page's list needs of a guest, and nothing that changes without anything having happened.

Amounts are those of `guestd.model.view`: millicores and bytes.
"""

import msgspec

from guestd.model.resources import Kind
from guestd.model.view import GuestView, ResizePhase


class Part(msgspec.Struct, frozen=True, omit_defaults=True):
    """One kind of resource; what is left out is 0, false or idle."""

    min: int
    max: int
    weight: int
    burst: int = 0
    demand: int = 0
    reserved: int = 0
    plugged: int = 0
    usable: int = 0
    used: int = 0
    lent: int = 0  # of what is reserved, above max
    quota: int = 0
    throttled: int = 0  # permille
    phase: str = ResizePhase.IDLE.value
    overdue: bool = False


class Row(msgspec.Struct, frozen=True, omit_defaults=True):
    """One guest."""

    name: str
    cpu: Part
    memory: Part
    vm: str = ""  # empty: the hypervisor was not asked yet
    connected: bool = False
    paused: bool = False
    observed: bool = False
    hostname: str = ""
    degraded: str = ""


def row(guest: GuestView) -> Row:
    """The guest's row."""
    return Row(
        name=guest.name,
        cpu=_part(guest, Kind.CPU),
        memory=_part(guest, Kind.MEMORY),
        vm=guest.vm_status.value if guest.vm_status else "",
        connected=guest.connected,
        paused=guest.paused,
        observed=guest.observed,
        hostname=guest.hostname,
        degraded=guest.degraded,
    )


def _part(guest: GuestView, kind: Kind) -> Part:
    one, limits = guest.resource(kind), guest.limits
    return Part(
        min=limits.min.get(kind),
        max=limits.max.get(kind),
        weight=limits.weight.get(kind),
        burst=limits.burst.get(kind),
        demand=one.demand,
        reserved=one.reserved,
        plugged=one.plugged,
        usable=one.usable,
        used=one.used,
        lent=one.burst,
        quota=one.quota,
        throttled=one.throttled_permille,
        phase=one.phase.value,
        overdue=one.overdue,
    )
