"""The broker's newest orders, and which of them count.

An order of an older epoch or revision is obsolete; the same one again is no other (it keeps what was done for it, and
gets the stored answer). Another epoch starts counting anew.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from guestd.model.messages import Ack, Grant, Reclaim
from guestd.model.resources import Kind


@dataclass(slots=True)
class Order:
    """The newest order of one kind, and how far it got."""

    order: Grant | Reclaim
    deadline: float
    late_at: float  # from when on the answer is to be on its way
    before: int  # granted when it came, millicores or bytes
    answer: Ack | None = None
    tries: int = 0  # of taking CPUs or blocks offline
    trimmed: bool = False  # the kernel gave up what it could
    free_before: int | None = None  # bytes that were free when it was last asked to


class Orders:
    """One order per kind."""

    def __init__(self) -> None:
        self.epoch = 0
        self.granted: dict[Kind, int] = {}
        """What the VM may have, by the newest orders and answers."""
        self._current: dict[Kind, Order] = {}
        self._revision: dict[Kind, int] = {}

    def begin_epoch(self, epoch: int) -> None:
        """The broker was started anew, or lost its journal."""
        if epoch != self.epoch:
            self.epoch = epoch
            self._revision.clear()
            self._current.clear()

    def drop_reclaims(self) -> None:
        """Nobody waits any more for what was to be given back."""
        for current in self.open:
            if isinstance(current.order, Reclaim):
                del self._current[current.order.kind]

    @property
    def last_revision(self) -> int:
        """The highest one seen."""
        return max(self._revision.values(), default=0)

    def of(self, kind: Kind) -> Order | None:
        """The newest order of a kind."""
        return self._current.get(kind)

    def all(self) -> Iterable[Order]:
        """All that there are."""
        return self._current.values()

    @property
    def open(self) -> list[Order]:
        """Those that have no answer yet."""
        return [current for current in self._current.values() if current.answer is None]

    def stored_answer(self, order: Grant | Reclaim) -> Ack | None:
        """What was answered to this very order before."""
        known = self._current.get(order.kind)
        return known.answer if known is not None and known.order.id == order.id else None

    def is_stale(self, order: Grant | Reclaim) -> bool:
        """Whether it is of an older epoch or revision."""
        return order.id.epoch != self.epoch or order.id.revision < self._revision.get(order.kind, 0)

    def take(self, order: Grant | Reclaim, online: int, deadline: float, late_at: float) -> None:
        """Make it the newest of its kind.

        :param online: what is online now, for one who was never granted anything.
        """
        self._revision[order.kind] = order.id.revision
        before = self.granted.get(order.kind, online)
        known = self._current.get(order.kind)
        if isinstance(order, Grant):
            self.granted[order.kind] = order.amount
        elif known is not None and known.order.id == order.id:  # the same, more firmly: go on
            known.order, known.deadline, known.late_at = order, deadline, late_at
            return
        self._current[order.kind] = Order(order, deadline, late_at, before)
