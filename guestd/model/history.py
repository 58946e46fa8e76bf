"""A guest's past, in steps: of each step the highest value. Millicores or bytes."""

from dataclasses import dataclass
from datetime import datetime

from guestd.model.resources import Kind


@dataclass(frozen=True, slots=True)
class HistoryResource:
    """One kind in one step."""

    kind: Kind
    demand: int
    reserved: int
    plugged: int
    usable: int
    used: int


@dataclass(frozen=True, slots=True)
class HistoryPoint:
    """One step, beginning at `at` (UTC). CPU and memory, in this order."""

    at: datetime
    resources: tuple[HistoryResource, ...]


@dataclass(frozen=True, slots=True)
class History:
    """Steps of one length, by time; those of which nothing is known are left out."""

    step_seconds: float
    points: tuple[HistoryPoint, ...]
