"""What the broker counts as it goes, for whoever asks later. Counts from its start, and only upwards."""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from guestd.model.event import EventCode

ROUND_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
"""Upper bounds of the buckets that rounds of decisions are sorted into."""


@dataclass(slots=True)
class Tally:
    """`rounds` has one count per bucket, and one more for what took longer than any."""

    decisions: Counter[EventCode] = field(default_factory=Counter)
    journal_failures: int = 0
    events_left_out: int = 0  # of a guest with too many at once
    events_lost: int = 0  # could not be written
    samples_lost: int = 0
    record_interruptions: int = 0  # of the record of decisions, each failed try to go on among them
    rounds: list[int] = field(default_factory=lambda: [0] * (len(ROUND_SECONDS) + 1))
    rounds_seconds: float = 0.0

    def count_round(self, seconds: float) -> None:
        """One round of decisions took so long, with its record and what it set going."""
        self.rounds[bisect_left(ROUND_SECONDS, seconds)] += 1
        self.rounds_seconds += seconds
