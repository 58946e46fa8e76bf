"""Why a guest has what it has, in words with numbers.

What the guest itself said is repeated as it is, bounded in length: whoever shows it escapes it.
"""

from guestd.broker.core.advice import Case, to_get_more
from guestd.broker.core.guest import GuestState
from guestd.broker.core.judge import is_left, is_over_burst, shrink_amount
from guestd.broker.core.track import Phase, Track
from guestd.model.explanation import ResourceExplanation
from guestd.model.reason import Reason
from guestd.model.resources import Kind
from guestd.model.units import round_down, round_up

_LONGEST_QUOTE = 160
_LEFT = ("slight", "floor")
_OTHER_PREFIX = {Kind.CPU: "memory-", Kind.MEMORY: "cpu-"}


def explain_resource(case: Case) -> ResourceExplanation:
    """One kind of one guest: what it has and why, and what it would take to get more."""
    demand, other = case.guest.demand, _OTHER_PREFIX[case.kind]
    reasons = tuple(one for one in demand.reasons if not one.code.startswith(other)) if demand is not None else ()
    summary = _summary(case, next((one.text for one in reasons if one.code.startswith(f"{case.kind}-")), ""))
    return ResourceExplanation(case.kind, summary, case.track.reason, case.inputs, reasons, to_get_more(case))


def _summary(case: Case, quote: str) -> str:
    guest, track = case.guest, case.track
    has, reason = f"has {case.show(case.has)}", track.reason
    if reason.code == "fixed":
        return f"{has} and {reason.text}"
    why = reason.text
    if quote and guest.demand is not None:
        needs = f"needs {case.show(guest.demand.needed.get(case.kind))}"
        why = why.replace(needs, f"{needs} ({quote[:_LONGEST_QUOTE]})", 1)
    if "max is" not in why and "above max" not in why:
        why += f"; max is {case.show(guest.bounds(case.kind)[1])}"
    return f"{has}{_way(case)} because it {why}"


def _way(case: Case) -> str:
    """Where it is going, when it is not there yet."""
    track, target = case.track, case.show(case.track.target)
    if track.reason.code in _LEFT:
        return ""
    if case.guest.observed:
        return (
            f", is only observed and would have {target}" if track.target != track.reserved else ", is only observed,"
        )
    match track.phase:
        case Phase.PLUGGING:
            return f", growing to {case.show(track.amount)},"
        case Phase.ASKING | Phase.UNPLUGGING:
            return f", giving back down to {case.show(track.amount)},"
    return f", is to have {target}," if track.target != track.reserved else ""


def explain_target(
    guest: GuestState, track: Track, stale_seconds: float, now: float, plenty: bool = False, scarce: bool = False
) -> Reason:
    """Why the target is what it is; or why a guest that is served is left at something else."""
    kind, fixed = track.kind, guest.why_unclear(now, stale_seconds)
    if fixed is not None or guest.demand is None:
        return Reason("fixed", f"keeps {kind.show(track.reserved)}: {fixed}")
    needed, target = guest.demand.needed.get(kind), track.target
    low, high = guest.bounds(kind)
    unit = guest.unit(kind)
    shown = f"needs {kind.show(needed)}"
    if is_over_burst(guest, track) and track.lend is not None:
        return Reason("burst-over", f"{shown}, its burst is over, max is {kind.show(high)}")
    if not guest.observed and is_left(guest, track, plenty, scarce):
        return _why_left(guest, track, shown)
    if now < track.shrink_after and low < target <= track.kept:
        return Reason("kept", f"{shown}, would not go below {kind.show(track.kept)}")
    if target > high:
        return Reason("burst", f"{shown}, {kind.show(target - high)} of it lent above max {kind.show(high)}")
    if needed < track.expected and round_up(needed, unit) < target:
        text = (
            f"{shown}, keeps {kind.show(target)}: likely to need {kind.show(track.expected)} soon, and there is plenty"
        )
        return Reason("expected", text)
    if kind is Kind.MEMORY and target < low and guest.demand.acceptable_memory_bytes < low:
        return Reason("acceptable", f"{shown}, min is {kind.show(low)}, takes {kind.show(target)} of it now")
    if target >= round_up(needed, unit):
        code = "min" if target == round_up(low, unit) else "demand"
        return Reason(code, shown if code == "demand" else f"{shown}, min is {kind.show(low)}")
    if target == round_down(high, unit):
        return Reason("max", f"{shown}, max is {kind.show(high)}")
    return Reason("share", f"{shown}, its share of a scarce pool is {kind.show(target)}")


def _why_left(guest: GuestState, track: Track, shown: str) -> Reason:
    kind, amount = track.kind, shrink_amount(guest, track)
    shown = f"{shown}, keeps {kind.show(track.reserved)}"
    if track.target < track.reserved <= amount:
        return Reason("floor", f"{shown}: it cannot go below {kind.show(guest.least(kind))} now")
    if kind is Kind.MEMORY:
        return Reason("slight", f"{shown}: less than a quarter is not taken while there is plenty")
    return Reason("slight", f"{shown}: less than a tenth is not worth a change of its CPU time")
