"""The host's book: what is charged to whom, and what is left.

The law: for every kind, ``Σ max(reserved, min) ≤ capacity - reserve - overhead`` must hold before
anything above a minimum is reserved. `reserved` is an upper bound of what the hypervisor says a VM
holds: it is raised before anything is plugged and lowered only after the hypervisor confirmed.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from guestd.model.errors import AdmissionError
from guestd.model.resources import Kind, Limits, Resources


@dataclass(frozen=True, slots=True)
class HostCapacity:
    """What the host has for VMs.

    `capacity` counts overcommit in; `reserve` is kept for the host; `overhead_per_guest` is what the
    hypervisor itself takes for each VM.
    """

    capacity: Resources
    reserve: Resources = field(default_factory=Resources)
    overhead_per_guest: Resources = field(default_factory=Resources)

    def for_guests(self, kind: Kind, guests: int) -> int:
        """What can be granted to so many guests in all."""
        return self.capacity.get(kind) - self.reserve.get(kind) - guests * self.overhead_per_guest.get(kind)


@dataclass(frozen=True, slots=True)
class Entry:
    """One guest's line in the book, for one kind."""

    reserved: int
    min: int

    @property
    def charged(self) -> int:
        return max(self.reserved, self.min)


def free(capacity: int, entries: Iterable[Entry]) -> int:
    """What may still be reserved above minimums; negative when the host is over its reserve."""
    return capacity - sum(entry.charged for entry in entries)


def admit(host: HostCapacity, limits: dict[str, Limits]) -> None:
    """Check that all minimums fit together (invariant 1).

    :raise AdmissionError: When they don't, with the numbers.
    """
    for kind in Kind:
        total = sum(limit.min.get(kind) for limit in limits.values())
        room = host.for_guests(kind, len(limits))
        if total > room:
            raise AdmissionError(
                f"{kind}: the minimums of {len(limits)} guests add up to {kind.show(total)}, but the host has "
                f"{kind.show(max(0, room))} for them (capacity {kind.show(host.capacity.get(kind))}, reserve "
                f"{kind.show(host.reserve.get(kind))}, overhead {kind.show(host.overhead_per_guest.get(kind))} "
                f"per guest); lower a min or take a guest away"
            )
