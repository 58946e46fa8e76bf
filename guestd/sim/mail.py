"""Messages between guests and broker, each with a fate of its own."""

import heapq
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from guestd.sim.guest import SimGuest

Fate = tuple[float, ...]
"""What becomes of a message: the delay of each copy that arrives, in seconds. Empty: it is lost."""


@dataclass(frozen=True, slots=True, order=True)
class Letter:
    """One copy of a message on its way, by the stream with this session number."""

    due: float
    number: int
    guest: SimGuest = field(compare=False)
    session: int = field(compare=False)
    message: object = field(compare=False)


class Mail:
    """What is on its way.

    :param fate: decides for each message.
    :param happened: counts what was lost, duplicated and delayed.
    """

    def __init__(self, fate: Callable[[object], Fate], happened: Counter[str]) -> None:
        self.fate, self._happened = fate, happened
        self._letters: list[Letter] = []
        self._count = 0

    def post(self, guest: SimGuest, message: object, now: float) -> list[Letter]:
        """Send a message on the guest's stream, either way. Returns the copies that are there at once."""
        if not guest.session:
            return []
        delays = self.fate(message)
        self._happened["lost"] += not delays
        self._happened["duplicated"] += len(delays) > 1
        self._happened["delayed"] += sum(delay > 0 for delay in delays)
        at_once = []
        for delay in delays:
            self._count += 1
            letter = Letter(now + delay, self._count, guest, guest.session, message)
            if delay > 0:
                heapq.heappush(self._letters, letter)
            else:
                at_once.append(letter)
        return at_once

    def arriving(self, now: float) -> Iterator[Letter]:
        """What has arrived by now, in order."""
        while self._letters and self._letters[0].due <= now:
            yield heapq.heappop(self._letters)

    @property
    def next_at(self) -> float:
        """When the next letter arrives."""
        return self._letters[0].due if self._letters else float("inf")

    def forget(self, guest: SimGuest) -> None:
        """Nothing that is on its way to or from a kernel outlives it."""
        self._letters = [letter for letter in self._letters if letter.guest is not guest]
        heapq.heapify(self._letters)
