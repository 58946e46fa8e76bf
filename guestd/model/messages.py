"""What guest and broker say to each other, free of any encoding (`guestd.wire` converts).

An order (grant or reclaim) is about one kind of resource and states the whole amount that the guest
is to have, never a difference: repeating it changes nothing.
"""

from dataclasses import dataclass
from enum import StrEnum

from guestd.model.guest import Identity
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Resources


class Urgency(StrEnum):
    """How badly a demand is meant."""

    NORMAL = "normal"
    SOON = "soon"  # at this rate the resource runs out within seconds
    NOW = "now"  # work is stalling on it


@dataclass(frozen=True, slots=True)
class Usable:
    """What the guest can use right now: the fourth amount, known only to it."""

    vcpus_online: int = 0
    vcpus_present: int = 0
    memory_online_bytes: int = 0
    memory_total_bytes: int = 0  # MemTotal
    memory_block_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Hello:
    """The guest's first message on a stream."""

    protocol_min: int
    protocol_max: int
    identity: Identity
    usable: Usable
    last_revision: int = 0


@dataclass(frozen=True, slots=True)
class Welcome:
    """The broker's first message: under which name, epoch and rules the guest is served."""

    protocol: int
    guest: str
    epoch: int
    heartbeat_seconds: float
    limits_min: Resources
    limits_max: Resources


@dataclass(frozen=True, slots=True)
class Demand:
    """What the guest needs in all, and why.

    `floor` is the least it can do with now (a shrink below it would be refused); `acceptable_memory_bytes`
    the most memory it can hold without running out of kernel memory for its bookkeeping.
    """

    sequence: int
    needed: Resources
    floor: Resources
    acceptable_memory_bytes: int
    urgency: Urgency
    reasons: tuple[Reason, ...]
    usable: Usable
    memory_used_bytes: int = 0
    cpu_used_millicores: int = 0
    under_memory_pressure: bool = False


@dataclass(frozen=True, slots=True)
class OrderId:
    """Names an order: `epoch` grows with each start of the broker, `request_id` within an epoch;
    `revision` orders decisions about one guest and kind, a lower one is obsolete.
    """

    epoch: int
    request_id: int
    revision: int


class GrantStage(StrEnum):
    """How far along a grant is."""

    OFFERED = "offered"  # reserved, and being plugged
    SETTLED = "settled"  # all of it is the guest's
    ENDING = "ending"  # the part that is burst ends when `remaining_seconds` are over


@dataclass(frozen=True, slots=True)
class Grant:
    """The guest may use `amount` of `kind` (millicores or bytes): `burst` of it for `remaining_seconds` at most, and
    less when others need their own (preemptible); the rest for good.
    """

    id: OrderId
    kind: Kind
    amount: int
    stage: GrantStage = GrantStage.OFFERED
    remaining_seconds: float | None = None
    burst: int = 0


class ReclaimStage(StrEnum):
    """How firmly a reclaim is meant."""

    ASK = "ask"
    URGE = "urge"
    OVERDUE = "overdue"


@dataclass(frozen=True, slots=True)
class Reclaim:
    """The guest is to get ready to have only `amount` of `kind`, within `remaining_seconds`."""

    id: OrderId
    kind: Kind
    amount: int
    stage: ReclaimStage
    remaining_seconds: float
    reason: Reason


class AckStatus(StrEnum):
    """How far the guest got with an order."""

    DONE = "done"
    PARTIAL = "partial"
    REFUSED = "refused"


class RefusalReason(StrEnum):
    """Why an order, or a part of it, was not carried out."""

    IN_USE = "in-use"  # the memory or CPU is needed by what runs
    PINNED = "pinned"  # CPU 0, isolated CPUs, unmovable memory
    PRESSURE = "pressure"  # the guest is short already
    BUSY = "busy"  # the kernel said EBUSY or EAGAIN
    TIMEOUT = "timeout"  # the kernel did not finish in time
    UNSUPPORTED = "unsupported"  # the guest has no way of doing it
    STALE = "stale"  # an older epoch or revision
    FAILED = "failed"  # the kernel said anything else
    DRY_RUN = "dry-run"
    VETO = "veto"  # a hook said no, or not yet
    OTHERS = "others"  # something else in the guest holds it so: a person, a rule, another agent


@dataclass(frozen=True, slots=True)
class Ack:
    """The answer to an order: what was achieved, and why not the rest.

    For a grant `achieved` is what is online; for a reclaim what the guest can shrink to now, and `later_amount`
    what it expects to be able to shrink to after `retry_after_seconds` (0: it promises nothing).
    """

    id: OrderId
    kind: Kind
    status: AckStatus
    achieved: int
    usable: Usable
    refusal: RefusalReason | None = None
    text: str = ""
    retry_after_seconds: float = 0.0
    later_amount: int = 0


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Says only that the sender lives; the guest's carries what is usable."""

    usable: Usable | None = None


@dataclass(frozen=True, slots=True)
class Throttle:
    """The host holds the VM's vCPUs back: what the guest cannot see for itself.

    `throttled_permille` is the share of the last second's periods in which its quota was used up.
    """

    quota_millicores: int
    throttled_permille: int


GuestMessage = Hello | Demand | Ack | Heartbeat
BrokerMessage = Welcome | Grant | Reclaim | Throttle | Heartbeat
