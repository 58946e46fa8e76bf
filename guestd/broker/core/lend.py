"""Bursts: who may hold more than the maximum, for how long, and when that is told.

A burst may begin when the credit lasts for a while or is full, and goes on until the credit is used up or
others need their own. What is held above the maximum after that is overdue: charged, shown, and nothing more
is granted until it is given back.
"""

from guestd.broker.core.burst import Bucket
from guestd.broker.core.guest import GuestState
from guestd.broker.core.judge import burst_threshold, is_over_burst
from guestd.broker.core.track import Lend, Timing, Track

_SPENT_SECONDS = 0.001


def flow(guest: GuestState, track: Track, now: float) -> None:
    """Let the credit of the time that passed flow, with what was held until now."""
    kind, limits = track.kind, guest.limits
    if track.lend is not None:
        track.lend.bucket.advance(
            now, track.reserved, guest.sustained(kind), limits.burst_credit.get(kind), limits.burst_refill.get(kind)
        )


def tend(guest: GuestState, track: Track, timing: Timing, now: float) -> str | None:
    """Open and close the lending as the credit tells. What happened in words, or None."""
    kind, lend = track.kind, _adopt(guest, track, now)
    if lend is None:
        return _mark(guest, track, "")
    flow(guest, track, now)
    above = guest.burst_held(kind)
    if above and lend.open:
        if lend.bucket.seconds_left(above) <= _SPENT_SECONDS:
            lend.open = False
    elif not above:
        lend.open, lend.noticed = lend.bucket.credit >= burst_threshold(guest, kind, timing), False
    return _mark(guest, track, ", its burst credit is used up")


def _adopt(guest: GuestState, track: Track, now: float) -> Lend | None:
    """The track's lending as the limits are now; it begins with what the journal has, else with a full bucket."""
    cap = guest.limits.burst_credit.get(track.kind)
    if not guest.limits.burst.get(track.kind):
        track.lend = None
    elif track.lend is None and guest.saved_credit is not None:
        track.lend = Lend(Bucket.restored(min(guest.saved_credit.get(track.kind), cap), now))
    elif track.lend is None:
        track.lend = Lend(Bucket.full(cap, now))
    return track.lend


def _mark(guest: GuestState, track: Track, why: str) -> str | None:
    if track.overdue or guest.observed or guest.vm is None or not is_over_burst(guest, track):
        return None
    track.overdue = True
    track.counters.overdue += 1
    high = guest.sustained(track.kind)
    return f"holds {track.kind.show(track.reserved)}, max is {track.kind.show(high)}{why}: overdue"


def notice_due(guest: GuestState, track: Track, timing: Timing) -> float | None:
    """Seconds that a burst still lasts, when it is time to say so; None when it is not."""
    lend, above = track.lend, guest.burst_held(track.kind)
    if lend is None or not lend.open or lend.noticed or not above:
        return None
    left = lend.bucket.seconds_left(above)
    return left if left <= timing.burst_notice_seconds else None
