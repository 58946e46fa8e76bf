"""One kind of resource of one guest: its place in the book and the resize under way.

::

            grow: record, plug, offer                      shrink: ask
    IDLE ───────────────────────────► PLUGGING   IDLE ─────────────────► ASKING
     ▲                                    │       ▲  ▲  refused, overdue    │ ack
     │   hypervisor has it, or no         │       │  └──────────────────────┤
     └── progress: settle what is there ──┘       │                         ▼
                                                  └── hypervisor confirms ─ UNPLUGGING
                                                      all, or stops short

CPU that a quota bounds may skip ASKING: where no CPU has to go offline, and where the guest does not answer.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from guestd.broker.core.burst import Bucket
from guestd.model.messages import OrderId, ReclaimStage
from guestd.model.reason import Reason
from guestd.model.resources import Kind


class Phase(StrEnum):
    """What is going on."""

    IDLE = "idle"
    PLUGGING = "plugging"
    ASKING = "asking"
    UNPLUGGING = "unplugging"


@dataclass(frozen=True, slots=True)
class Timing:
    """Deadlines and pauses of resizes, in seconds.

    The progress deadlines begin anew with each step forward. 5 s without progress is what Xen's
    squeezed calls an inactive domain; CPU unplug took up to 4 s in one piece when measured.
    """

    plug_progress_seconds: float = 10.0
    ask_seconds: float = 5.0
    urge_seconds: float = 5.0
    overdue_seconds: float = 10.0
    unplug_progress_seconds: float = 8.0
    unplug_repeat_seconds: float = 2.0
    reboot_seconds: float = 60.0  # for the first step after a guest reset
    cool_down_seconds: float = 5.0  # no shrink so soon after a grow
    retry_seconds: float = 5.0  # after a refusal or a failure, doubled each time up to the next line
    retry_max_seconds: float = 60.0
    stale_heartbeats: float = 3.0  # silence after which a report is stale
    budget_window_seconds: float = 60.0
    budget_grows: int = 60  # begun per window; a grow that goes further is none
    budget_shrinks: int = 30
    burst_notice_seconds: float = 10.0  # a burst's end is announced so long before
    burst_least_seconds: float = 30.0  # a burst begins when its credit lasts so long, or is full
    credit_record_seconds: float = 10.0  # how often the credit of a burst that goes on is made durable


_NOTHING_YET = Reason("start", "nothing decided yet")


@dataclass(slots=True)
class Counters:
    """Ends of resizes since the broker started."""

    grows: int = 0
    shrinks: int = 0
    partials: int = 0
    refusals: int = 0
    failures: int = 0
    overdue: int = 0
    bursts: int = 0
    forced: int = 0


@dataclass(slots=True)
class Lend:
    """What a guest may hold above its maximum: the credit, and whether it may be used."""

    bucket: Bucket
    open: bool = True  # a burst that was there before the broker goes on
    noticed: bool = False  # the guest was told that it ends
    recorded_at: float = 0.0


@dataclass(slots=True)
class Track:
    """State of one kind of one guest. Amounts in millicores or bytes, times in the caller's clock."""

    kind: Kind
    bounds: tuple[int, int] = (0, 0)  # least and most that limits and hypervisor allow, without a burst
    sustained: int = 0  # the most that may be held for good, see `GuestState.look_at_bounds`
    reserved: int = 0
    target: int = 0
    expected: int = 0  # what the guest is likely to need soon, and keeps while there is plenty
    reason: Reason = _NOTHING_YET
    phase: Phase = Phase.IDLE
    amount: int = 0  # where the resize under way leads
    before: int = 0  # what was reserved when it began
    would: int | None = None  # of an observed guest: what was last said that it would have
    order: OrderId | None = None
    stage: ReclaimStage = ReclaimStage.ASK
    deadline: float = 0.0
    repeat_at: float = 0.0  # when to ask the hypervisor again to unplug a vCPU
    progress: int = 0  # best seen of plugged (growing) or held (shrinking)
    grow_after: float = 0.0
    shrink_after: float = 0.0
    setbacks: int = 0  # refusals and failures in a row
    overdue: bool = False
    kept: int = 0  # what the guest would not go below, believed until `shrink_after`
    lend: Lend | None = None
    doubtful: bool = False  # the outcome of the last request is unknown
    settled: bool = False  # the hypervisor was told to end what it does, so that less can be reserved
    announce: bool = False  # the guest has to hear its grant (again)
    grown_at: list[float] = field(default_factory=list)  # when grows began, within the budget window
    shrunk_at: list[float] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)

    def begin(self, phase: Phase, amount: int, now: float, seconds: float, progress: int) -> None:
        """Enter a phase that leads to `amount`, with so many seconds for the first step."""
        if self.phase is Phase.IDLE or (phase is Phase.PLUGGING) != (self.phase is Phase.PLUGGING):
            self.before = self.reserved
        if phase is Phase.PLUGGING and self.phase is not Phase.PLUGGING:
            self.grown_at.append(now)
        elif phase is not Phase.PLUGGING and self.phase is Phase.IDLE:
            self.shrunk_at.append(now)
        self.phase, self.amount, self.deadline, self.progress = phase, amount, now + seconds, progress

    def end(self) -> None:
        """Back to idle; what the resize came to is the caller's to count."""
        self.phase, self.order, self.doubtful = Phase.IDLE, None, False

    def succeed(self) -> None:
        """A resize came out whole: forget the setbacks before it."""
        self.setbacks, self.overdue = 0, False

    def set_back(self, now: float, timing: Timing, asked_pause: float = 0.0) -> None:
        """A refusal or failure: the next try waits, longer each time."""
        pause = min(timing.retry_max_seconds, timing.retry_seconds * 2 ** min(self.setbacks, 10))
        pause = max(pause, min(asked_pause, timing.retry_max_seconds))
        self.setbacks += 1
        self.shrink_after = max(self.shrink_after, now + pause)
        self.grow_after = max(self.grow_after, now + min(pause, timing.retry_seconds))

    def in_budget(self, now: float, timing: Timing, shrinking: bool) -> bool:
        """Whether one more resize may begin (invariant 12). Grows leave the shrinks theirs: what a guest that grows and
        grows has to spare is others'.
        """
        begun, most = (self.shrunk_at, timing.budget_shrinks) if shrinking else (self.grown_at, timing.budget_grows)
        while begun and begun[0] <= now - timing.budget_window_seconds:
            del begun[0]
        return len(begun) < most

    def budget_back_at(self, now: float, timing: Timing) -> float | None:
        """When one more resize may begin that may not now; None when both sorts may."""
        spent = ((self.grown_at, timing.budget_grows), (self.shrunk_at, timing.budget_shrinks))
        back = [begun[0] + timing.budget_window_seconds for begun, most in spent if len(begun) >= most]
        return min((at for at in back if at > now), default=None)
