"""What can be done to the machine, and what became of it. The root helper does exactly these."""

import errno
from dataclasses import dataclass
from enum import StrEnum

from guestd.model.resources import Kind


class HandStatus(StrEnum):
    """What became of an operation."""

    OK = "ok"
    ALREADY = "already"  # it was so before
    FAILED = "failed"  # the kernel said no: see errno
    GONE = "gone"  # there is no such CPU or block (any more)
    REFUSED = "refused"  # the helper does not do that
    TIMEOUT = "timeout"  # not over at the deadline, or not begun
    STUCK = "stuck"  # an earlier write hangs in the kernel and cannot be killed
    DRY_RUN = "dry-run"  # nothing was done


class BlockTarget(StrEnum):
    """What can be written to a block's state."""

    ONLINE = "online"
    ONLINE_MOVABLE = "online_movable"
    ONLINE_KERNEL = "online_kernel"
    OFFLINE = "offline"


@dataclass(frozen=True, slots=True)
class CpuOp:
    """Bring a CPU online, or take it offline."""

    number: int
    online: bool

    def __str__(self) -> str:
        return f"cpu {self.number} {'online' if self.online else 'offline'}"


@dataclass(frozen=True, slots=True)
class BlockOp:
    """Set the state of a memory block."""

    index: int
    target: BlockTarget

    def __str__(self) -> str:
        return f"block {self.index} {self.target}"


@dataclass(frozen=True, slots=True)
class TrimOp:
    """Have the kernel give up so much of its least used memory (page cache first, swap where there is some)."""

    bytes: int

    def __str__(self) -> str:
        return f"reclaim {self.bytes}"


class HookEvent(StrEnum):
    """When hooks are run."""

    BEFORE_SHRINK = "before-shrink"  # may veto, or ask for time
    AFTER_GROW = "after-grow"
    BURST_ENDING = "burst-ending"


@dataclass(frozen=True, slots=True)
class HookOp:
    """Run the hooks of this guest, one after the other; amounts in millicores or bytes.

    The result's `state` is ``none`` (there are none), ``done``, ``veto:NAME`` or ``wait:SECONDS:NAME``; with the
    status FAILED it is ``failed:NAME``, and the resize goes on.
    """

    event: HookEvent
    kind: Kind
    before: int
    after: int
    seconds: int  # that they have

    def __str__(self) -> str:
        return f"hook {self.event} {self.kind} {self.before} {self.after} {self.seconds}"


Op = CpuOp | BlockOp | TrimOp | HookOp


@dataclass(frozen=True, slots=True)
class HandResult:
    """What became of one operation; `state` is what was read back, empty when nothing was."""

    op: Op
    status: HandStatus
    errno: int = 0
    elapsed_seconds: float = 0.0
    state: str = ""

    @property
    def ok(self) -> bool:
        """Whether the machine is now as it was asked to be."""
        return self.status in (HandStatus.OK, HandStatus.ALREADY)

    def __str__(self) -> str:
        why = f" ({errno.errorcode.get(self.errno, self.errno)})" if self.errno else ""
        return f"{self.op}: {self.status}{why}, {self.elapsed_seconds * 1000:.1f} ms"
