"""What happened on a host, and what a decision was made from.

Amounts are in millicores or bytes, by the kind they go with. Texts may carry words of a guest: whoever shows
them escapes them.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from guestd.model.reason import Reason
from guestd.model.resources import Kind, Limits


class EventCode(StrEnum):
    """What an event is about."""

    UNKNOWN = "unknown"  # of a newer broker
    GROWING = "growing"  # a grow began
    GROWN = "grown"
    ASKING = "asking"  # the guest was asked to give some back
    SHRINKING = "shrinking"  # hypervisor or quota take some back, with no need to ask
    SHRUNK = "shrunk"
    REFUSED = "refused"  # the guest refused, or gave only a part
    ENDED_SHORT = "ended-short"
    OVERDUE = "overdue"
    FAILED = "failed"  # the hypervisor failed a request, or its answer was lost
    BURST = "burst"  # one began, is about to end, or is over
    WOULD = "would"  # observe mode: what would have been done
    VM = "vm"  # the VM's state changed
    CHANNEL = "channel"  # the guest daemon came or went
    OPERATOR = "operator"  # an operator changed something
    BROKER = "broker"  # the broker itself


_OTHERS = (EventCode.UNKNOWN, EventCode.VM, EventCode.CHANNEL, EventCode.OPERATOR, EventCode.BROKER)
DECISIONS = tuple(code for code in EventCode if code not in _OTHERS)
"""What a decision about a guest may be."""


@dataclass(frozen=True, slots=True)
class DecisionInputs:
    """What a decision about one kind of resource of one guest was made from."""

    demand: int
    used: int
    limits: Limits
    reserved: int
    plugged: int
    target: int
    expected: int = 0
    kept: int = 0
    burst_credit: int = 0  # resource x seconds
    capacity: int = 0  # the host's, for all guests
    free: int = 0
    scarce: bool = False
    idle_tax_permille: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. `guest` is empty for what concerns the broker, `kind` None for what concerns none."""

    id: int  # grows by one with each event, over restarts too
    at: datetime  # UTC
    guest: str
    kind: Kind | None
    code: EventCode
    text: str
    before: int = 0
    after: int = 0
    reason: Reason | None = None
    inputs: DecisionInputs | None = None


@dataclass(frozen=True, slots=True)
class EventQuery:
    """Which events: of one guest (empty: all), `since <= at < until`, at most `limit` after event `after_id`, oldest
    first; with `newest` the newest `limit` of them instead, still oldest first.
    """

    guest: str = ""
    since: datetime | None = None
    until: datetime | None = None
    after_id: int = 0
    limit: int = 1000
    newest: bool = False


@dataclass(frozen=True, slots=True)
class SeenEvent:
    """An event that is followed, and how many were missed just before it."""

    event: Event
    missed: int = 0
