"""What may be done about one kind of one guest now, and why: predicates on what is known, nothing else."""

from collections.abc import Iterator

from guestd.broker.core.guest import GuestState
from guestd.broker.core.track import Phase, Timing, Track
from guestd.model.resources import Kind
from guestd.model.units import MILLICORES_PER_VCPU, round_down, round_up
from guestd.model.vm import VmStatus

_QUOTA_STEP = 10
"""A CPU quota moves by a tenth or more."""
_MEMORY_STEP = 4
"""While there is plenty, memory goes back by a quarter or more, or down to the minimum: a need that goes to and fro
would else be a resize each time.
"""


def may_shrink(
    guest: GuestState, track: Track, timing: Timing, stale_seconds: float, now: float, plenty: bool = False
) -> bool:
    """Whether a shrink may begin; while there is plenty for all, one for little may not."""
    if track.phase is not Phase.IDLE or track.target >= track.reserved or now < track.shrink_after:
        return False
    if guest.why_fixed(now, stale_seconds) is not None or guest.demand is None:
        return False
    amount = shrink_amount(guest, track)
    least = round_up(guest.bounds(track.kind)[0], guest.unit(track.kind))
    return (
        not (track.kind is Kind.MEMORY and guest.demand.under_memory_pressure)
        and amount < track.reserved
        and not (amount > least and is_slight(guest, track, track.reserved - amount, plenty))
        and track.in_budget(now, timing, shrinking=True)
    )


def must_not_shrink(guest: GuestState, track: Track) -> bool:
    """Whether a shrink that was begun must not go on: what was known then has changed."""
    pressed = guest.demand is not None and guest.demand.under_memory_pressure and track.kind is Kind.MEMORY
    return guest.paused or pressed or (guest.vm is not None and guest.vm.status is not VmStatus.RUNNING)


def takes_too_much(guest: GuestState, track: Track, stale_seconds: float, now: float) -> bool:
    """Whether memory is being taken of which the guest has come to need more than it was to be left with."""
    if track.kind is not Kind.MEMORY or track.phase is not Phase.UNPLUGGING:
        return False
    if guest.why_fixed(now, stale_seconds) is not None:
        return False
    return track.amount < min(shrink_amount(guest, track), track.reserved)


def must_force(guest: GuestState, track: Track) -> int | None:
    """Down to what CPU time must be forced, whatever the guest says: its burst is over. None: nothing must."""
    if track.kind is not Kind.CPU or not guest.bounded or guest.paused or guest.observed or not guest.vm_fresh:
        return None
    if guest.vm is None or guest.vm.status is not VmStatus.RUNNING or track.phase is Phase.UNPLUGGING:
        return None
    return guest.sustained(track.kind) if is_over_burst(guest, track) else None


def is_over_burst(guest: GuestState, track: Track) -> bool:
    """Whether it holds more than its maximum without credit for that."""
    lent = track.lend is not None and track.lend.open
    return not lent and guest.burst_held(track.kind) > 0


def has_not_taken(guest: GuestState, track: Track) -> bool:
    """Whether the guest has less online than it was granted, with nothing under way."""
    if track.phase is not Phase.IDLE or not guest.can(track.kind):
        return False
    if track.kind is Kind.CPU:
        return guest.usable.vcpus_online * MILLICORES_PER_VCPU < round_down(track.reserved, MILLICORES_PER_VCPU)
    return guest.usable.memory_online_bytes + guest.unit(Kind.MEMORY) <= track.reserved


def must_park(guest: GuestState, track: Track, timing: Timing, stale_seconds: float, now: float) -> bool:
    """Whether more vCPUs are online than the CPU time is for: a kernel that has just booted brings up all there are."""
    if track.kind is not Kind.CPU or not (guest.park and guest.bounded) or track.phase is not Phase.IDLE:
        return False
    if track.target > track.reserved or now < track.shrink_after or guest.why_fixed(now, stale_seconds) is not None:
        return False
    return needs_asking(guest, track, track.reserved) and track.in_budget(now, timing, shrinking=True)


def is_asked_in_vain(track: Track) -> bool:
    """Whether a guest is being asked for what it is to keep after all."""
    if track.phase is not Phase.ASKING or track.target < track.reserved:
        return False
    return track.target > track.reserved or track.amount < track.reserved  # else it is only to park vCPUs


def holds_too_much(guest: GuestState, track: Track) -> bool:
    """Whether it holds more than it needs, is to have, or may. Its minimum is never too much."""
    if track.reserved <= guest.limits.min.get(track.kind):
        return False
    if track.reserved > track.target or is_over_burst(guest, track):
        return True
    if guest.demand is None:
        return True
    return track.reserved > round_up(guest.demand.needed.get(track.kind), guest.unit(track.kind))


def shrink_amount(guest: GuestState, track: Track) -> int:
    """How low a shrink may go now."""
    return max(track.target, guest.least(track.kind))


def may_grow(guest: GuestState, track: Track, timing: Timing, stale_seconds: float, now: float) -> bool:
    """Whether a grow may begin, or one under way may go further."""
    if track.overdue or now < track.grow_after or guest.why_fixed(now, stale_seconds) is not None:
        return False
    if track.phase is Phase.ASKING:
        return is_asked_in_vain(track)
    if track.phase is Phase.UNPLUGGING:
        return track.kind is Kind.MEMORY and track.target > track.reserved
    aim = track.amount if track.phase is Phase.PLUGGING else track.reserved
    return track.target > aim and track.in_budget(now, timing, shrinking=False)


def is_slight(guest: GuestState, track: Track, step: int, plenty: bool = False) -> bool:
    """Whether a step of a CPU quota is too small to be worth telling anybody, or of memory while there is plenty."""
    if track.kind is Kind.MEMORY:
        return plenty and step * _MEMORY_STEP < track.reserved and not is_over_burst(guest, track)
    if not guest.bounded:
        return False
    return step < MILLICORES_PER_VCPU and step * _QUOTA_STEP < track.reserved


def is_left(guest: GuestState, track: Track, plenty: bool, scarce: bool) -> bool:
    """Whether it is left at what it has though it is to have another amount: no step towards that is worth a resize,
    or the guest cannot go lower. Nothing begins until something changes.
    """
    if track.phase is not Phase.IDLE or track.overdue or track.target == track.reserved:
        return False
    if track.target > track.reserved:
        return scarce and is_slight(guest, track, track.target - track.reserved)
    amount = shrink_amount(guest, track)
    least = round_up(guest.bounds(track.kind)[0], guest.unit(track.kind))
    slight = amount > least and is_slight(guest, track, track.reserved - amount, plenty)
    return amount >= track.reserved or slight


def would_resize(
    guest: GuestState, track: Track, timing: Timing, stale_seconds: float, now: float, plenty: bool, scarce: bool
) -> int | None:
    """To what an observed guest would be resized now; None when that was said already, or nothing would begin. What was
    said last is taken as done, with the pauses and budgets of what is really done.
    """
    if guest.why_unclear(now, stale_seconds) is not None or guest.demand is None:
        return None
    amount = track.target if track.target > track.reserved else min(shrink_amount(guest, track), track.reserved)
    said = track.reserved if track.would is None else track.would
    shrinking = amount < said
    pause = track.shrink_after if shrinking else track.grow_after
    if amount == said or now < pause or not track.in_budget(now, timing, shrinking):
        return None
    if shrinking:
        least = round_up(guest.bounds(track.kind)[0], guest.unit(track.kind))
        slight = amount > least and is_slight(guest, track, said - amount, plenty)
        pressed = track.kind is Kind.MEMORY and guest.demand.under_memory_pressure
        return None if slight or pressed else amount
    return None if scarce and is_slight(guest, track, amount - said) else amount


def needs_asking(guest: GuestState, track: Track, amount: int) -> bool:
    """Whether the guest has to do something before the hypervisor can take so much: all but a CPU quota."""
    if track.kind is Kind.MEMORY or not guest.bounded:
        return True
    if not guest.can(Kind.CPU):  # it could only say no
        return False
    return max(guest.usable.vcpus_online, 1) > max(1, -(-amount // MILLICORES_PER_VCPU))


def alarms(guest: GuestState, timing: Timing, stale_seconds: float, now: float) -> Iterator[float]:
    """When something about the guest is to be decided again if nothing happens before."""
    for track in guest.tracks.values():
        yield from _burst_alarms(guest, track, timing, now)
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
            if at > now and track.phase is Phase.IDLE and (track.target != track.reserved or track.kept):
                yield at
        budget_back = track.budget_back_at(now, timing)
        if budget_back is not None:
            yield budget_back


def burst_threshold(guest: GuestState, kind: Kind, timing: Timing) -> int:
    """The credit, in resource x seconds, with which a burst may begin."""
    limits = guest.limits
    above = limits.burst.get(kind) - limits.max.get(kind)
    return min(limits.burst_credit.get(kind), round(above * timing.burst_least_seconds))


def _burst_alarms(guest: GuestState, track: Track, timing: Timing, now: float) -> Iterator[float]:
    lend, kind = track.lend, track.kind
    if lend is None:
        return
    above = guest.burst_held(kind)
    if above and lend.open:
        left = lend.bucket.seconds_left(above)
        yield now + max(left, 0.001)
        if not lend.noticed:
            yield now + max(left - timing.burst_notice_seconds, 0.001)
        yield max(now, lend.recorded_at + timing.credit_record_seconds) + 0.001
    elif not above and not lend.open:
        wait = lend.bucket.seconds_until(burst_threshold(guest, kind, timing), guest.limits.burst_refill.get(kind))
        if wait != float("inf"):
            yield now + max(wait, 0.001)
