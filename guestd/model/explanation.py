"""Why a guest has what it has, and what an operator can do about it. Amounts in millicores or bytes."""

from dataclasses import dataclass

from guestd.model.event import DecisionInputs, Event
from guestd.model.reason import Reason
from guestd.model.resources import Kind
from guestd.model.view import GuestView


@dataclass(frozen=True, slots=True)
class ResourceExplanation:
    """One kind: `summary` says in one sentence what it has and why, `to_get_more` what it would take, most
    effective first; empty when it has all that it asks for.
    """

    kind: Kind
    summary: str
    reason: Reason
    inputs: DecisionInputs | None
    demand_reasons: tuple[Reason, ...] = ()
    to_get_more: tuple[Reason, ...] = ()
    events: tuple[Event, ...] = ()  # oldest first, at most 20


@dataclass(frozen=True, slots=True)
class GuestExplanation:
    """The guest now, and CPU and memory, in this order. `unknown_time`: nothing is recorded of the time asked for."""

    guest: GuestView
    resources: tuple[ResourceExplanation, ...]
    unknown_time: bool = False


@dataclass(frozen=True, slots=True)
class ReclaimRequest:
    """What an operator wants back now: at most so much; None: all that is spare."""

    cpu_millicores: int | None = None
    memory_bytes: int | None = None
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class ReclaimedResource:
    """One kind: from `reserved` down to `goal` (the same when nothing is spare), and why no further."""

    kind: Kind
    reserved: int
    goal: int
    reason: Reason
