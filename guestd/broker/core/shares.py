"""The pool of one kind of resource, and what observed guests would get of it.

A guest that is only observed claims what it has, like any other that is left alone, so that nobody is shrunk for it or
granted what it holds. What it would get is found beside that, in a second pool where it competes as if it were served.
That one is kept only while somebody is observed, and read only for those.
"""

from collections.abc import Set

from guestd.broker.core.allocate import Pool
from guestd.broker.core.guest import GuestState
from guestd.model.resources import Kind


class Shares:
    """Who is to have how much of one kind."""

    def __init__(self, kind: Kind, idle_tax: float, rehearsing: bool) -> None:
        self.kind, self.idle_tax = kind, idle_tax
        self._pool = Pool(kind, idle_tax)
        self._rehearsal: Pool | None = None
        self.rehearse(rehearsing)

    def rehearse(self, on: bool) -> None:
        """Begin or end the second pool. A new one is empty: put all guests anew."""
        if not on:
            self._rehearsal = None
        elif self._rehearsal is None:
            self._rehearsal = Pool(self.kind, self.idle_tax)

    def put(self, guest: GuestState, now: float, stale_seconds: float, plenty: bool) -> None:
        """Have a guest claim what it is to compete for."""
        claim = guest.claim(self.kind, now, stale_seconds, plenty)
        self._pool.put(guest.name, claim)
        if self._rehearsal is not None:
            if guest.observed:
                claim = guest.claim(self.kind, now, stale_seconds, plenty, rehearsing=True)
            self._rehearsal.put(guest.name, claim)

    def remove(self, name: str) -> None:
        """Forget a guest, where it is known."""
        for pool in (self._pool, self._rehearsal):
            if pool is not None and name in pool:
                pool.remove(name)

    def solve(self, capacity: int, backed: int, observed: Set[str]) -> set[str]:
        """Share out, see `Pool.solve`. Whose target changed; of the second pool only the observed ones'."""
        changed = set(self._pool.solve(capacity, backed))
        if self._rehearsal is not None:
            changed.update(observed & set(self._rehearsal.solve(capacity, backed)))
        return changed

    def target(self, guest: GuestState) -> int:
        """What it is to have, or would if it were served."""
        return self._pool_of(guest).target(guest.name)

    @property
    def scarce(self) -> bool:
        """Whether some guest does not get what it needs and may have."""
        return self._pool.scarce

    @property
    def scarce_if_served(self) -> bool:
        """The same were those served that are only observed."""
        return self._pool.scarce if self._rehearsal is None else self._rehearsal.scarce

    def _pool_of(self, guest: GuestState) -> Pool:
        return self._rehearsal if guest.observed and self._rehearsal is not None else self._pool
