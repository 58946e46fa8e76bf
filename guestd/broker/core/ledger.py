"""The host's book: what is charged to whom, and what is left.

The law: for every kind, ``Σ max(reserved, min) ≤ capacity - reserve - overhead`` must hold before
anything above a minimum is reserved. `reserved` is an upper bound of what the hypervisor says a VM
holds: it is raised before anything is plugged and lowered only after the hypervisor confirmed.
Minimums and bursts are backed by what is really there: overcommit never counts for them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from guestd.model.errors import AdmissionError
from guestd.model.resources import Kind, Limits, Resources


@dataclass(frozen=True, slots=True)
class HostCapacity:
    """What the host has for VMs.

    `capacity` counts overcommit in, `physical` does not (None: there is none); `reserve` is kept for the host;
    `overhead_per_guest` is what the hypervisor itself takes for each VM; `idle_tax` (0..0.99) is what memory
    that is wanted and not used costs when memory is scarce, see `allocate`.
    """

    capacity: Resources
    reserve: Resources = field(default_factory=Resources)
    overhead_per_guest: Resources = field(default_factory=Resources)
    physical: Resources | None = None
    idle_tax: float = 0.75

    def for_guests(self, kind: Kind, guests: int) -> int:
        """What can be granted to so many guests in all."""
        return self.capacity.get(kind) - self._kept(kind, guests)

    def backed(self, kind: Kind, guests: int) -> int:
        """As much of it as is really there: what minimums and bursts are lent from."""
        physical = self.capacity if self.physical is None else self.physical
        return min(self.capacity.get(kind), physical.get(kind)) - self._kept(kind, guests)

    def _kept(self, kind: Kind, guests: int) -> int:
        return self.reserve.get(kind) + guests * self.overhead_per_guest.get(kind)


class Book:
    """Every guest's line for one kind, with running sums."""

    def __init__(self) -> None:
        self._lines: dict[str, tuple[int, int]] = {}  # reserved, min
        self.charged = 0  # Σ max(reserved, min)
        self.reserved = 0
        self.minimums = 0

    def put(self, name: str, reserved: int, minimum: int) -> None:
        """Write or replace a guest's line."""
        before = self._lines.get(name, (0, 0))
        self._lines[name] = (reserved, minimum)
        self._add(reserved, minimum, 1)
        self._add(*before, -1)

    def remove(self, name: str) -> None:
        """Strike a guest's line out."""
        self._add(*self._lines.pop(name, (0, 0)), -1)

    def _add(self, reserved: int, minimum: int, sign: int) -> None:
        self.charged += sign * max(reserved, minimum)
        self.reserved += sign * reserved
        self.minimums += sign * minimum

    def __len__(self) -> int:
        return len(self._lines)


def admit(host: HostCapacity, limits: Mapping[str, Limits]) -> None:
    """Check that all minimums fit together (invariant 1).

    :raise AdmissionError: When they don't, with the numbers.
    """
    for kind in Kind:
        check_minimums(host, kind, sum(limit.min.get(kind) for limit in limits.values()), len(limits))


def check_minimums(host: HostCapacity, kind: Kind, minimums: int, guests: int) -> None:
    """The same from the sum of the minimums of so many guests.

    :raise AdmissionError: When they don't fit, with the numbers.
    """
    room = host.backed(kind, guests)
    if minimums > room:
        physical = host.capacity if host.physical is None else host.physical
        raise AdmissionError(
            f"{kind}: the minimums of {guests} guests add up to {kind.show(minimums)}, but the host has "
            f"{kind.show(max(0, room))} for them (there is {kind.show(physical.get(kind))}, reserve "
            f"{kind.show(host.reserve.get(kind))}, overhead {kind.show(host.overhead_per_guest.get(kind))} "
            f"per guest; overcommit does not count for minimums); lower a min or take a guest away"
        )
