"""Whether a VM has settled into what was wanted of it, and what is missing: pure, and the loop that waits for it."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from guestd.cli.text import printable
from guestd.model.errors import GuestdError
from guestd.model.explanation import ReclaimedResource
from guestd.model.resources import Kind
from guestd.model.view import GuestView, ResizePhase
from guestd.model.vm import VmStatus

if TYPE_CHECKING:
    from guestd.wire.client import BrokerClient

_LOOK_SECONDS: Final = 0.3
Missing = Callable[[GuestView], list[str]]


def missing_for_pause(guest: GuestView) -> list[str]:
    """What is missing until nothing is done about it any more."""
    return [] if guest.paused and not _moving(guest) else _moving(guest) or ["it is not paused yet"]


def missing_for_rest(guest: GuestView) -> list[str]:
    """What is missing until it has what it is to have, or so much of it as the broker cares for."""
    found = _obstacles(guest) or _moving(guest)
    for kind in Kind:
        one = guest.resource(kind)
        if not found and one.reserved != one.target and not one.at_rest:
            what = "go down to" if one.reserved > one.target else "get"
            found = [_has(kind, one.reserved, f"is to {what} {kind.show(one.target)}", one.reason.text)]
    return found


def missing_for_reclaim(goals: Sequence[ReclaimedResource]) -> Missing:
    """What is missing until it is down to these goals."""

    def missing(guest: GuestView) -> list[str]:
        found = _obstacles(guest)
        for goal in goals:
            one = guest.resource(goal.kind)
            if goal.goal < goal.reserved and one.reserved > goal.goal:
                text = f"was asked to go down to {goal.kind.show(goal.goal)}"
                found.append(_has(goal.kind, one.reserved, text, one.reason.text))
        return found

    return missing


async def settled(client: "BrokerClient", guest: GuestView, missing: Missing, seconds: float) -> GuestView:
    """The guest once nothing is missing, two looks in a row: a decision may come just after the first.

    :raise GuestdError: When that does not happen in time; it says what is missing.
    """
    end = time.monotonic() + seconds
    calm = False
    while True:
        left = missing(guest)
        if not left and calm:
            return guest
        calm = not left
        room = end - time.monotonic()
        if room <= 0 and left:
            raise GuestdError(
                f"{guest.name}: not settled after {seconds:g} s: {'; '.join(left)}; "
                f"guestctl explain {guest.name} says why"
            )
        await asyncio.sleep(min(_LOOK_SECONDS, max(room, 0.05)))
        guest = await client.guest(guest.name)


def _obstacles(guest: GuestView) -> list[str]:
    if guest.observed:
        return ["it is in observe mode, so nothing is done about it"]
    if guest.paused:
        return [f"it is paused; guestctl resume {guest.name}"]
    if guest.vm_status is not VmStatus.RUNNING:
        return [f"its VM is {guest.vm_status.value if guest.vm_status else 'not known yet'}"]
    return []


def _moving(guest: GuestView) -> list[str]:
    return [
        _has(kind, one.plugged, "overdue" if one.overdue else one.phase.value, one.reason.text)
        for kind in Kind
        if (one := guest.resource(kind)).overdue or one.phase not in (ResizePhase.IDLE, ResizePhase.UNKNOWN)
    ]


def _has(kind: Kind, amount: int, what: str, why: str) -> str:
    return f"{kind} has {kind.show(amount)}, {what}{f' ({printable(why, 200)})' if why else ''}"
