"""CPUs and memory blocks that failed: left alone for a while, longer each time.

A block whose worker cannot even be killed (stuck in the kernel) is in quarantine: the helper refuses it until the
worker has ended, so it is tried again only after the longest pause. Such a write may land at any time: what it does is
our own doing, however late.

What is seen to be as it was wanted, or to be gone, has failed no longer.
"""

from dataclasses import dataclass

from guestd.guest.core.ops import BlockOp, BlockTarget, CpuOp, HandResult, HandStatus, Op
from guestd.model.guest import BlockState, Inventory

Key = tuple[type, int]
"""A CPU or a memory block: the type of its operation, and its number."""


def key_of(op: CpuOp | BlockOp) -> Key:
    """Which CPU or block an operation is about."""
    return (type(op), op.number if isinstance(op, CpuOp) else op.index)


@dataclass(slots=True)
class _Setback:
    until: float
    count: int
    result: HandResult


class Setbacks:
    """What has failed, until it works.

    :param first_seconds: the first pause; it doubles each time, up to `longest_seconds`.
    """

    def __init__(self, first_seconds: float, longest_seconds: float) -> None:
        self._first_seconds, self._longest_seconds = first_seconds, longest_seconds
        self._entries: dict[Key, _Setback] = {}

    def failed(self, key: Key, result: HandResult, now: float) -> float:
        """Note a failure; the seconds for which it is left alone."""
        count = self._entries[key].count + 1 if key in self._entries else 1
        pause = min(self._longest_seconds, self._first_seconds * 2.0 ** min(count - 1, 20))
        if result.status is HandStatus.STUCK:
            pause = self._longest_seconds
        self._entries[key] = _Setback(now + pause, count, result)
        return pause

    def forget(self, key: Key) -> None:
        """It works, or is gone."""
        self._entries.pop(key, None)

    def look(self, inventory: Inventory) -> None:
        """Forget what is gone, or has come to be as it was to be."""
        blocks = {block.index: block.state is not BlockState.OFFLINE for block in inventory.blocks}
        cpus = {number: number in inventory.cpus_online for number in inventory.cpus_present}
        for key, entry in list(self._entries.items()):
            sort, number = key
            online = (cpus if sort is CpuOp else blocks).get(number)
            if online is None or online is _wanted_online(entry.result.op):
                del self._entries[key]

    def resting(self, now: float) -> set[Key]:
        """What is to be left alone now."""
        return {key for key, entry in self._entries.items() if entry.until > now}

    def counts(self, op_type: type) -> dict[int, int]:
        """How often each number of one sort has failed."""
        return {number: entry.count for (sort, number), entry in self._entries.items() if sort is op_type}

    def last(self, op_type: type, online: bool) -> HandResult | None:
        """The newest failure of one sort that still counts: to bring something online, or to take it offline."""
        found = [
            entry
            for (sort, _), entry in self._entries.items()
            if sort is op_type and _wanted_online(entry.result.op) is online
        ]
        return max(found, key=lambda entry: entry.until).result if found else None

    def back_at(self, op_type: type, now: float) -> float | None:
        """When the first of one sort may be tried again."""
        return min(
            (e.until for (sort, _), e in self._entries.items() if sort is op_type and e.until > now), default=None
        )

    def ends(self, now: float) -> list[float]:
        """When pauses end."""
        return [entry.until for entry in self._entries.values() if entry.until > now]

    def stuck(self) -> dict[Key, HandResult]:
        """What hangs in the kernel."""
        return {key: one.result for key, one in self._entries.items() if one.result.status is HandStatus.STUCK}


def _wanted_online(op: Op) -> bool:
    return op.online if isinstance(op, CpuOp) else isinstance(op, BlockOp) and op.target is not BlockTarget.OFFLINE
