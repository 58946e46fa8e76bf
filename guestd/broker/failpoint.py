"""Points at which a test can have the broker die, as by SIGKILL: one at each boundary of a grant's life.

Off unless the environment had ``GUESTD_FAILPOINT=NAME[:N]`` at the start: then the N-th passage (the first without
N) ends the process at once. Nothing is flushed, closed or told, which is the purpose.
"""

import os
import signal
from collections.abc import Mapping
from enum import StrEnum

VARIABLE = "GUESTD_FAILPOINT"


class Failpoint(StrEnum):
    """Where the broker can be made to die. Passages count only rounds in which there is something to lose."""

    STARTED = "started"  # the new epoch is written, nothing else was done
    DECIDED = "decided"  # in memory only
    RECORDING = "recording"  # the rows are written, not yet committed
    RECORDED = "recorded"  # durable, nothing of it done
    ACTED = "acted"  # the hypervisor took a request, and nobody here knows yet
    CONFIRMED = "confirmed"  # the hypervisor answered, the book does not know yet
    SETTLED = "settled"  # what the hypervisor confirmed is in the book
    ANSWERING = "answering"  # an order is about to be queued for its guest
    ANSWERED = "answered"  # an order was written to its guest's stream
    ACKED = "acked"  # the guest's answer came in
    ADDING = "adding"  # a guest is added: before the journal has it
    ADDED = "added"  # and after
    LIMITING = "limiting"  # limits are set: before the journal has them
    LIMITED = "limited"  # and after


def parse(environment: Mapping[str, str]) -> tuple[Failpoint | None, int]:
    """Which passage is deadly.

    :raise ValueError: When the variable makes no sense.
    """
    text = environment.get(VARIABLE, "")
    if not text:
        return None, 0
    name, colon, count = text.partition(":")
    passage = count if colon else "1"
    if name not in list(Failpoint) or not passage.isdecimal() or int(passage) < 1:
        raise ValueError(f"{VARIABLE}={text}: must be NAME or NAME:N, with a name of {', '.join(Failpoint)}")
    return Failpoint(name), int(passage)


_armed, _left = parse(os.environ)


def reach(point: Failpoint) -> None:
    """Pass this point, or die at it."""
    global _left
    if _armed is not point:
        return
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
