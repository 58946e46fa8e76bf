"""What may be done about one kind of one guest now, and why: predicates on what is known, nothing else."""

from collections.abc import Iterator

from guestd.broker.core.guest import GuestState
from guestd.broker.core.track import Phase, Timing, Track
from guestd.model.messages import Reason
from guestd.model.resources import Kind
from guestd.model.units import round_down, round_up
from guestd.model.vm import VmStatus


def may_shrink(guest: GuestState, track: Track, timing: Timing, stale_seconds: float, now: float) -> bool:
    """Whether a shrink may begin."""
    if guest.why_fixed(now, stale_seconds) is not None or guest.demand is None:
        return False
    return (
        track.phase is Phase.IDLE
        and track.target < track.reserved
        and now >= track.shrink_after
        and not (track.kind is Kind.MEMORY and guest.demand.under_memory_pressure)
        and shrink_amount(guest, track) < track.reserved
        and track.in_budget(now, timing, shrinking=True)
    )


def must_not_shrink(guest: GuestState, track: Track) -> bool:
    """Whether a shrink that was begun must not go on: what was known then has changed."""
    pressed = guest.demand is not None and guest.demand.under_memory_pressure and track.kind is Kind.MEMORY
    return guest.paused or pressed or (guest.vm is not None and guest.vm.status is not VmStatus.RUNNING)


def shrink_amount(guest: GuestState, track: Track) -> int:
    """How low a shrink may go now."""
    return max(track.target, guest.least(track.kind))


def may_grow(guest: GuestState, track: Track, timing: Timing, stale_seconds: float, now: float) -> bool:
    """Whether a grow may begin, or one under way may go further."""
    if guest.why_fixed(now, stale_seconds) is not None or track.overdue or now < track.grow_after:
        return False
    if track.phase is Phase.ASKING:
        return track.target >= track.reserved
    if track.phase is Phase.UNPLUGGING:
        return track.kind is Kind.MEMORY and track.target > track.reserved
    aim = track.amount if track.phase is Phase.PLUGGING else track.reserved
    return track.target > aim and track.in_budget(now, timing, shrinking=False)


def explain(guest: GuestState, track: Track, stale_seconds: float, now: float) -> Reason:
    """Why the target is what it is."""
    kind, fixed = track.kind, guest.why_fixed(now, stale_seconds)
    if fixed is not None or guest.demand is None:
        return Reason("fixed", f"keeps {kind.show(track.reserved)}: {fixed}")
    needed, target = guest.demand.needed.get(kind), track.target
    low, high = guest.bounds(kind)
    shown = f"needs {kind.show(needed)}"
    if target >= round_up(needed, guest.unit(kind)):
        code = "min" if target == round_up(low, guest.unit(kind)) else "demand"
        return Reason(code, shown if code == "demand" else f"{shown}, min is {kind.show(low)}")
    if target == round_down(high, guest.unit(kind)):
        return Reason("max", f"{shown}, max is {kind.show(high)}")
    return Reason("share", f"{shown}, its share of a scarce pool is {kind.show(target)}")


def alarms(guest: GuestState, timing: Timing, stale_seconds: float, now: float) -> Iterator[float]:
    """When something about the guest is to be decided again if nothing happens before."""
    if guest.vm is None or guest.vm.status is not VmStatus.RUNNING or not guest.vm_fresh:
        return
    if guest.last_seen is not None and not guest.stale(now, stale_seconds):
        yield guest.last_seen + stale_seconds + 0.001
    for track in guest.tracks.values():
        if track.phase is not Phase.IDLE:
            yield track.deadline
        if track.phase is Phase.UNPLUGGING and track.kind is Kind.CPU:
            yield track.repeat_at
        for at in (track.grow_after, track.shrink_after):
            if at > now and track.phase is Phase.IDLE and track.target != track.reserved:
                yield at
        budget_back = track.begun[0] + timing.budget_window_seconds if track.begun else 0.0
        if budget_back > now and len(track.begun) >= timing.budget_resizes // 2:
            yield budget_back
