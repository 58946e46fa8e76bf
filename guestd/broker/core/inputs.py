"""What a decision is made from, for the record."""

from dataclasses import dataclass

from guestd.broker.core.guest import GuestState
from guestd.broker.core.ledger import Book
from guestd.broker.core.track import Track
from guestd.model.event import DecisionInputs
from guestd.model.resources import Kind


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """One kind of the host's resources, as it was last shared out."""

    capacity: int = 0  # for all guests, millicores or bytes
    scarce: bool = False
    scarce_if_served: bool = False  # were those served that are only observed
    idle_tax: float = 0.0


def known_inputs(guest: GuestState, track: Track, pool: PoolFacts, book: Book) -> DecisionInputs:
    """All that a decision about one kind of a guest is made from."""
    kind, demand = track.kind, guest.demand
    used = 0
    if demand is not None:
        used = demand.cpu_used_millicores if kind is Kind.CPU else demand.memory_used_bytes
    return DecisionInputs(
        demand=demand.needed.get(kind) if demand is not None else 0,
        used=used,
        limits=guest.limits,
        reserved=track.reserved,
        plugged=guest.vm.plugged(kind) if guest.vm is not None else 0,
        target=track.target,
        expected=track.expected,
        kept=track.kept,
        burst_credit=track.lend.bucket.credit if track.lend is not None else 0,
        capacity=pool.capacity,
        free=max(0, pool.capacity - book.charged),
        scarce=pool.scarce_if_served if guest.observed else pool.scarce,
        idle_tax_permille=round(pool.idle_tax * 1000),
    )
