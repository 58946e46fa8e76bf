"""When which guest is to be looked at again: one alarm each, the earliest that was set."""

import heapq
from collections.abc import Iterator


class Alarms:
    """Alarms by name, in the caller's clock."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []
        self._of: dict[str, float] = {}

    def set(self, name: str, at: float | None) -> None:
        """Wake for a guest then; None: nothing waits. A later one than is set rings early, for nothing, and is set
        anew by then.
        """
        if at is None:
            self._of.pop(name, None)
        elif at < self._of.get(name, float("inf")):
            self._of[name] = at
            heapq.heappush(self._heap, (at, name))

    def ring(self, now: float) -> Iterator[str]:
        """Whose alarm is due; it is no longer set."""
        while self._heap and self._heap[0][0] <= now:
            at, name = heapq.heappop(self._heap)
            if self._of.get(name) == at:
                del self._of[name]
                yield name

    @property
    def next_at(self) -> float | None:
        """The next alarm."""
        while self._heap and self._of.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None
