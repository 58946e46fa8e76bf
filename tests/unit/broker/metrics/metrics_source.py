"""A broker's state made by hand, for metrics."""

from datetime import UTC, datetime

from guestd.broker.metrics.tally import Tally
from guestd.model.errors import NotFoundError
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB, MIB
from guestd.model.view import GuestView, HostView, ResizePhase, ResourceView
from guestd.model.vm import VmStatus

LIMITS = Limits(Resources(500, 512 * MIB), Resources(4000, 4 * GIB))
BURSTING = Limits(
    Resources(1000, GIB), Resources(2000, 2 * GIB), LIMITS.weight, Resources(3000, 0), Resources(300_000, 0)
)


class FakeSource:
    """Implements `Source`."""

    def __init__(self, *guests: GuestView) -> None:
        self.tally = Tally()
        self.guests = {guest.name: guest for guest in guests}

    def host_view(self) -> HostView:
        started = datetime(2026, 1, 2, tzinfo=UTC)
        capacity, none = Resources(8000, 16 * GIB), Resources()
        return HostView(capacity, none, none, none, none, Resources(7500, 15 * GIB), 7, "1.2.3", started, 1, 0)

    def guest_names(self) -> list[str]:
        return sorted(self.guests)

    def guest_numbers(self, name: str) -> GuestView:
        if name not in self.guests:
            raise NotFoundError(name)
        return self.guests[name]


def guest(name: str, *, limits: Limits = LIMITS, quota: int = 0, **fields: object) -> GuestView:
    """A guest with different numbers everywhere."""
    cpu = ResourceView(
        Kind.CPU, 1500, 2000, 2000, 3000, 3000, 2000, 1250, ResizePhase.UNPLUGGING, grows=3, refusals=2, overdue=True,
        burst_credit=90_000, quota=quota, throttled_permille=250,
    )  # fmt: skip
    memory = ResourceView(Kind.MEMORY, GIB, 2 * GIB, 2 * GIB, GIB, GIB, 900 * MIB, 700 * MIB, failures=4, partials=1)
    known = {"vm_status": VmStatus.RUNNING, "connected": True, "protocol_errors": 5, "last_seen_ago_seconds": 2.5}
    return GuestView(name, limits, resources=(cpu, memory), **{**known, **fields})  # type: ignore[arg-type]
