"""How what is free is handed out to those that wait for it."""

from guestd.broker.core.guest import GuestState
from guestd.broker.core.ledger import Book
from guestd.model.resources import Kind
from guestd.model.units import round_down


def share_room(growing: list[GuestState], kind: Kind, book: Book, capacity: int, backed: int) -> dict[str, int]:
    """What each may grow to with what is free: first everybody up to the maximum, those with least for their
    weight before the others; then bursts, from what is really there (`backed`).
    """
    growing.sort(key=lambda guest: (guest.tracks[kind].reserved / guest.limits.weight.get(kind), guest.name))
    charged, reserved = book.charged, book.reserved
    amounts = {guest.name: guest.tracks[kind].reserved for guest in growing}
    for bursting in (False, True):
        for guest in growing:
            track, low, had = guest.tracks[kind], guest.limits.min.get(kind), amounts[guest.name]
            aim = track.target if bursting else min(track.target, track.sustained)
            most = backed if bursting else capacity
            room = _own(guest, kind, had, capacity - reserved) + max(0, most - charged)
            amount = min(aim, round_down(room, guest.unit(kind)))
            if amount > had:
                amounts[guest.name] = amount
                charged += max(amount, low) - max(had, low)
                reserved += amount - had
    return amounts


def _own(guest: GuestState, kind: Kind, had: int, unlent: int) -> int:
    """What is the guest's own in any case: its minimum, as far as nobody else holds what backs it (a minimum that was
    just raised may still be lent to others).
    """
    low = guest.limits.min.get(kind)
    if had + max(0, unlent) >= low:
        return max(had, low)
    return had + round_down(max(0, unlent), guest.unit(kind))
