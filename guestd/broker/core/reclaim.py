"""An operator takes back what a guest does not need, now: the usual way of shrinking, without its pauses.

Cool-down, what the guest would not go below when it was last asked, what it is likely to need soon, and steps that are
too small to be worth while count for nothing. All else does: need, floor and minimum, memory pressure, the budget.
"""

from guestd.broker.core.guest import GuestState
from guestd.broker.core.resize import Resizer
from guestd.broker.core.track import Phase, Track
from guestd.model.explanation import ReclaimedResource
from guestd.model.messages import Demand
from guestd.model.reason import Reason
from guestd.model.resources import Kind
from guestd.model.units import MILLICORES_PER_VCPU, round_up


def reclaim(
    resizer: Resizer, guest: GuestState, demand: Demand, track: Track, at_most: int | None, dry_run: bool
) -> ReclaimedResource:
    """Begin to take what is spare of one kind, at most so much (None: all); `dry_run`: only say what would be asked."""
    held = track.reserved
    goal, reason = _goal(resizer, guest, demand, track, at_most)
    new = track.phase is Phase.IDLE or (track.phase is Phase.ASKING and goal < track.amount)
    if goal < held and new and not dry_run:
        track.kept = track.expected = 0
        track.reason = Reason("reclaim", f"an operator takes what is spare, {reason.text}")
        resizer.shrink(guest, track, goal)
    return ReclaimedResource(track.kind, held, min(goal, held), reason)


def _goal(resizer: Resizer, guest: GuestState, demand: Demand, track: Track, at_most: int | None) -> tuple[int, Reason]:
    """Down to where it can be asked now, and why no further."""
    kind, held = track.kind, track.reserved
    if at_most == 0:
        return held, Reason("not-asked", f"no {kind} was asked for")
    if track.phase is Phase.PLUGGING:
        return held, Reason("growing", f"is growing to {kind.show(track.amount)}")
    if track.phase is Phase.UNPLUGGING:
        return track.amount, Reason("taking", f"is being taken down to {kind.show(track.amount)} already")
    if kind is Kind.MEMORY and demand.under_memory_pressure:
        return held, Reason("pressure", "the guest is under memory pressure")
    if not track.in_budget(resizer.now, resizer.timing, shrinking=True):
        back = track.budget_back_at(resizer.now, resizer.timing) or resizer.now
        most = resizer.timing.budget_shrinks
        text = f"{most} shrinks began within {resizer.timing.budget_window_seconds:.0f} s, as many as may"
        return held, Reason("budget", f"{text}; again in {back - resizer.now:.0f} s")
    goal, reason = _need(guest, demand, kind)
    unit = guest.unit(kind)
    if at_most is not None and round_up(held - at_most, unit) > goal:
        goal, reason = round_up(held - at_most, unit), Reason("asked", f"at most {kind.show(at_most)} was asked for")
    if track.phase is Phase.ASKING and track.amount <= goal:
        return track.amount, Reason("asking", f"is being asked down to {kind.show(track.amount)} already")
    return goal, reason


def _need(guest: GuestState, demand: Demand, kind: Kind) -> tuple[int, Reason]:
    """The least that it is to keep."""
    needed, least = demand.needed.get(kind), guest.least(kind)
    whole = MILLICORES_PER_VCPU if kind is Kind.CPU else guest.unit(kind)
    shown = f"needs {kind.show(needed)}"
    if round_up(needed, whole) >= least:
        return round_up(needed, whole), Reason("demand", shown)
    low = guest.bounds(kind)[0]
    if least == round_up(low, guest.unit(kind)):
        return least, Reason("min", f"{shown}, min is {kind.show(low)}")
    return least, Reason("floor", f"{shown}, cannot go below {kind.show(least)} now")
