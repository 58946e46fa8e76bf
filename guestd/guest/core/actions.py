"""What the guest's machine asks of its shell, and the constants of its decisions."""

from dataclasses import dataclass

from guestd.guest.core.ops import Op
from guestd.model.messages import GuestMessage
from guestd.model.units import MIB


@dataclass(frozen=True, slots=True)
class Settings:
    """Times in seconds."""

    quick_seconds: float = 0.05
    calm_seconds: float = 0.25
    rest_seconds: float = 5.0
    deep_rest_seconds: float = 30.0  # with one CPU online: there is nothing to give but memory, which is glanced at
    retry_sample_seconds: float = 1.0  # after one that failed
    quick_for_seconds: float = 0.5  # after something moved
    calm_for_seconds: float = 8.0  # likewise; longer than a lower need must hold to be believed
    stir_bytes: int = 4 * MIB  # so much more memory in use than at the sample before, or less: something moves
    reconcile_seconds: float = 60.0  # look at CPUs and blocks even if no event came
    reconcile_moving_seconds: float = 0.5  # the same while an order is open
    grant_answer_seconds: float = 20.0
    answer_margin_seconds: float = 1.0  # an answer is on its way so long before the order's deadline, or
    answer_margin_share: float = 0.2  # this share of its time before
    reclaim_tries: int = 3
    backoff_seconds: float = 2.0  # for a CPU or block that failed; doubled each time
    backoff_max_seconds: float = 300.0
    op_deadline_seconds: float = 10.0  # for what is begun together
    ops_at_once: int = 64  # CPUs or blocks: the helper takes 256 in a request, and a slow block 90 ms
    shrink_hook_seconds: int = 30  # what hooks have before a shrink
    grow_hook_seconds: int = 60  # and after a grow: nobody waits for them
    trim_seconds: float = 3.0  # for one trim
    trim_chunk_bytes: int = 256 * MIB


@dataclass(frozen=True, slots=True)
class TakeSample:
    """Read the load now. `quick`: the next one follows soon, by the fast lane."""

    quick: bool = True


@dataclass(frozen=True, slots=True)
class Rescan:
    """Read CPUs and blocks now."""


@dataclass(frozen=True, slots=True)
class Do:
    """Have the helper do these, in order."""

    ops: tuple[Op, ...]
    deadline_seconds: float


@dataclass(frozen=True, slots=True)
class Say:
    """Send to the broker."""

    message: GuestMessage


@dataclass(frozen=True, slots=True)
class Log:
    """One decision in words."""

    text: str


Action = TakeSample | Rescan | Do | Say | Log
