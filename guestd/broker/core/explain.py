"""Why a guest has what it has, in words with numbers."""

from guestd.broker.core.guest import GuestState
from guestd.broker.core.judge import is_over_burst
from guestd.broker.core.track import Track
from guestd.model.event import DecisionInputs
from guestd.model.messages import Reason
from guestd.model.resources import Kind
from guestd.model.units import round_down, round_up


def explain_target(guest: GuestState, track: Track, stale_seconds: float, now: float) -> Reason:
    """Why the target is what it is."""
    kind, fixed = track.kind, guest.why_unclear(now, stale_seconds)
    if fixed is not None or guest.demand is None:
        return Reason("fixed", f"keeps {kind.show(track.reserved)}: {fixed}")
    needed, target = guest.demand.needed.get(kind), track.target
    low, high = guest.bounds(kind)
    unit = guest.unit(kind)
    shown = f"needs {kind.show(needed)}"
    if is_over_burst(guest, track) and track.lend is not None:
        return Reason("burst-over", f"{shown}, its burst is over, max is {kind.show(high)}")
    if now < track.shrink_after and low < target <= track.kept:
        return Reason("kept", f"{shown}, would not go below {kind.show(track.kept)}")
    if target > high:
        return Reason("burst", f"{shown}, {kind.show(target - high)} of it lent above max {kind.show(high)}")
    if needed < track.expected and round_up(needed, unit) < target:
        text = (
            f"{shown}, keeps {kind.show(target)}: likely to need {kind.show(track.expected)} soon, and there is plenty"
        )
        return Reason("expected", text)
    if target >= round_up(needed, unit):
        code = "min" if target == round_up(low, unit) else "demand"
        return Reason(code, shown if code == "demand" else f"{shown}, min is {kind.show(low)}")
    if target == round_down(high, unit):
        return Reason("max", f"{shown}, max is {kind.show(high)}")
    return Reason("share", f"{shown}, its share of a scarce pool is {kind.show(target)}")


def known_inputs(
    guest: GuestState, track: Track, capacity: int, free: int, scarce: bool, idle_tax: float
) -> DecisionInputs:
    """All that a decision about one kind is made from."""
    kind, demand = track.kind, guest.demand
    used = 0
    if demand is not None:
        used = demand.cpu_used_millicores if kind is Kind.CPU else demand.memory_used_bytes
    return DecisionInputs(
        demand=demand.needed.get(kind) if demand is not None else 0,
        used=used,
        limits=guest.limits,
        reserved=track.reserved,
        plugged=guest.vm.plugged(kind) if guest.vm is not None else 0,
        target=track.target,
        expected=track.expected,
        kept=track.kept,
        burst_credit=track.lend.bucket.credit if track.lend is not None else 0,
        capacity=capacity,
        free=free,
        scarce=scarce,
        idle_tax_permille=round(idle_tax * 1000),
    )
