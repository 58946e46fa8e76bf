"""Resizes under way: what each step of one needs next, and the book that is kept on it.

The four laws of `machine.py` hold here; all that is decided goes into `out`, in order.
"""

from collections.abc import Callable, Mapping

from guestd.broker.core import judge, lend
from guestd.broker.core.actions import (
    Action,
    Log,
    Observe,
    Record,
    RequestCpuQuota,
    RequestMemory,
    RequestVcpus,
    Send,
    SettleMemory,
)
from guestd.broker.core.guest import GuestState
from guestd.broker.core.inputs import PoolFacts, known_inputs
from guestd.broker.core.ledger import Book
from guestd.broker.core.track import Phase, Timing, Track
from guestd.model.event import EventCode
from guestd.model.messages import Ack, AckStatus, Grant, GrantStage, OrderId, Reclaim, ReclaimStage, Throttle
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Resources
from guestd.model.units import MILLICORES_PER_VCPU, round_up
from guestd.model.vm import VmState, VmStatus

_THROTTLE_STEP_PERMILLE, _THROTTLE_OVER_PERMILLE = 100, 50
_NEXT_STAGE = {ReclaimStage.ASK: ReclaimStage.URGE, ReclaimStage.URGE: ReclaimStage.OVERDUE}


class Resizer:
    """Begins, follows and ends resizes, and keeps the books. `now` is set by the machine before each use, and `pools`
    as they come out.
    """

    def __init__(self, epoch: int, timing: Timing) -> None:
        self.epoch, self.timing = epoch, timing
        self.now = 0.0
        self.out: list[Action] = []
        self.books = {kind: Book() for kind in Kind}
        self.pools = {kind: PoolFacts() for kind in Kind}
        self._last_request = 0

    # ---- how far it has come ---------------------------------------------------------------------

    def follow(self, guest: GuestState, track: Track) -> None:
        """See how far the resize under way has come, and keep the book."""
        vm = guest.vm
        if vm is not None and vm.status is VmStatus.GONE:
            self.reserve(guest, track, 0)
        elif vm is not None and guest.observed and guest.vm_fresh:
            self._watch(guest, track, vm)
        elif vm is not None and vm.status is VmStatus.RUNNING and guest.vm_fresh:
            self._FOLLOW[track.phase](self, guest, track, vm)
        elif vm is not None and vm.status is VmStatus.FROZEN:
            self.reserve(guest, track, max(vm.held(track.kind), track.reserved))

    def _follow_idle(self, guest: GuestState, track: Track, vm: VmState) -> None:
        held = vm.held(track.kind)
        if _may_deflate(track, vm) and held < track.reserved and not track.settled:
            self._end_deflating(guest, track)
            return
        track.settled = False
        if held > track.reserved and track.reserved:
            text = (
                f"the hypervisor reports {track.kind.show(held)}, which is more than the "
                f"{track.kind.show(track.reserved)} that were granted: charged"
            )
            self.log(guest, track, EventCode.VM, text, track.reserved, held)
        self.reserve(guest, track, held)
        if track.kind is Kind.CPU and vm.cpu_enforced and not guest.paused and vm.cpu_quota_millicores != held:
            self.out.append(RequestCpuQuota(guest.name, held))
            guest.vm_fresh = False

    def _follow_plugging(self, guest: GuestState, track: Track, vm: VmState) -> None:
        held = vm.held(track.kind)
        plugged = vm.plugged(track.kind) if track.kind is Kind.MEMORY else held
        doubtful, track.doubtful = track.doubtful, False
        if doubtful and held < track.amount:  # asked again, the hypervisor knows of no such request
            if _may_deflate(track, vm):
                self._end_deflating(guest, track)
            else:
                self.reserve(guest, track, held)
            text = f"the request for {track.kind.show(track.amount)} was lost"
            self.finish(guest, track, EventCode.ENDED_SHORT, text, held)
            return
        self.reserve(guest, track, max(held, track.amount))
        if guest.has(track.kind, track.amount):
            track.counters.grows += 1
            track.succeed()
            track.kept = 0
            track.shrink_after = max(track.shrink_after, self.now + self.timing.cool_down_seconds)
            self.finish(guest, track, EventCode.GROWN, f"grown to {track.kind.show(plugged)}", plugged)
        elif plugged > track.progress:
            track.progress, track.deadline = plugged, self.now + self.timing.plug_progress_seconds
        elif self.now >= track.deadline:
            self._stop_short(guest, track, f"no progress beyond {track.kind.show(plugged)}", plugged)

    def _follow_asking(self, guest: GuestState, track: Track, vm: VmState) -> None:
        self.reserve(guest, track, vm.held(track.kind))
        if judge.must_not_shrink(guest, track):
            why = "paused" if guest.paused else "under memory pressure"
            self.finish(guest, track, EventCode.ENDED_SHORT, f"not asking any more: {why}", track.reserved)
            return
        if self.now < track.deadline:
            return
        stage = _NEXT_STAGE.get(track.stage)
        amount = max(track.amount, guest.least(track.kind))
        if amount >= track.reserved > track.amount:
            text = f"not asking any more: it needs {track.kind.show(amount)} by now"
            self.finish(guest, track, EventCode.ENDED_SHORT, text, track.reserved)
            return
        if track.kind is Kind.CPU and guest.bounded and stage is not ReclaimStage.URGE:
            text = "no answer to a reclaim: taking CPU time by quota"
            self.log(guest, track, EventCode.SHRINKING, text, track.reserved, amount)
            self.force(guest, track, amount)
        elif stage is None:
            track.counters.overdue += not track.overdue
            track.overdue = True
            track.kept = track.reserved
            track.set_back(self.now, self.timing)
            self.finish(guest, track, EventCode.OVERDUE, "no answer to a reclaim, overdue", track.reserved)
        else:
            self.ask(guest, track, amount, stage)

    def _follow_unplugging(self, guest: GuestState, track: Track, vm: VmState) -> None:
        held = vm.held(track.kind)
        self.reserve(guest, track, held)
        left = held if track.kind is Kind.MEMORY else held + vm.vcpus
        if guest.is_down_to(track.kind, track.amount):
            track.counters.shrinks += 1
            track.succeed()
            self.finish(guest, track, EventCode.SHRUNK, f"shrunk to {track.kind.show(held)}", held)
        elif judge.must_not_shrink(guest, track):
            track.counters.partials += 1
            self._settle(guest, track, "the guest must not shrink now", held)
        elif left < track.progress:
            track.progress, track.deadline = left, self.now + self.timing.unplug_progress_seconds
            self._unplug_vcpus(guest, track)
        elif self.now >= track.deadline:
            track.counters.partials += 1
            track.kept = held if track.kind is Kind.MEMORY else 0
            self._stop_short(guest, track, f"guest keeps {track.kind.show(held)}", held)
        elif self.now >= track.repeat_at:
            self._unplug_vcpus(guest, track)

    def _watch(self, guest: GuestState, track: Track, vm: VmState) -> None:
        """Of an observed guest: charge what it holds, and what a balloon that was let go of may still give it."""
        held = vm.held(track.kind)
        if track.phase is Phase.PLUGGING and held < track.amount and _may_deflate(track, vm):
            held = track.amount
        else:
            track.end()
        self.reserve(guest, track, held)

    def _end_deflating(self, guest: GuestState, track: Track) -> None:
        """Have the balloon stay as it is, before less is reserved than it may come to."""
        track.settled, guest.vm_fresh = True, False
        self.out += [SettleMemory(guest.name), Observe(guest.name)]

    _FOLLOW: Mapping[Phase, Callable[["Resizer", GuestState, Track, VmState], None]] = {
        Phase.IDLE: _follow_idle,
        Phase.PLUGGING: _follow_plugging,
        Phase.ASKING: _follow_asking,
        Phase.UNPLUGGING: _follow_unplugging,
    }

    def _unplug_vcpus(self, guest: GuestState, track: Track) -> None:
        """vCPUs go one by one: ask for the next, or for one again whose removal was lost."""
        track.repeat_at = self.now + self.timing.unplug_repeat_seconds
        if track.kind is Kind.CPU:
            self._request(guest, track.kind, track.amount)

    def _stop_short(self, guest: GuestState, track: Track, text: str, achieved: int) -> None:
        """What was achieved stays; the rest is not asked for any more."""
        if track.phase is Phase.PLUGGING:
            track.counters.failures += 1
        track.set_back(self.now, self.timing)
        self._settle(guest, track, text, achieved)

    def _settle(self, guest: GuestState, track: Track, text: str, achieved: int) -> None:
        if track.kind is Kind.MEMORY:
            self.out.append(SettleMemory(guest.name))
        guest.vm_fresh = False  # a request may still wait at the hypervisor: its word after that counts
        self.out.append(Observe(guest.name))
        text = f"ended short of {track.kind.show(track.amount)}: {text}"
        self.finish(guest, track, EventCode.ENDED_SHORT, text, achieved)

    def finish(self, guest: GuestState, track: Track, code: EventCode, text: str, achieved: int) -> None:
        """Back to idle, in words; the guest hears what it has."""
        self.log(guest, track, code, text, track.before, achieved)
        self.withdraw(track)

    def withdraw(self, track: Track) -> None:
        """Back to idle; the guest hears what it has."""
        track.end()
        track.announce = True

    # ---- less ------------------------------------------------------------------------------------

    def shrink(self, guest: GuestState, track: Track, amount: int) -> None:
        """Begin to take back what is above `amount`."""
        if judge.needs_asking(guest, track, amount):
            self.ask(guest, track, amount, ReclaimStage.ASK)
        else:
            text = f"down to {track.kind.show(amount)}: {track.reason.text}"
            self.log(guest, track, EventCode.SHRINKING, text, track.reserved, amount)
            self.force(guest, track, amount)

    def ask(self, guest: GuestState, track: Track, amount: int, stage: ReclaimStage) -> None:
        """Ask the guest for what is above `amount`, or again more firmly."""
        if stage is ReclaimStage.ASK:
            guest.revision += 1
            track.order = self.order(guest)
            text = f"asking down to {track.kind.show(amount)}: {track.reason.text}"
            self.log(guest, track, EventCode.ASKING, text, track.reserved, amount)
        if track.order is None:
            return
        seconds = {
            ReclaimStage.ASK: self.timing.ask_seconds,
            ReclaimStage.URGE: self.timing.urge_seconds,
            ReclaimStage.OVERDUE: self.timing.overdue_seconds,
        }[stage]
        order, track.stage = track.order, stage
        track.begin(Phase.ASKING, amount, self.now, seconds, track.reserved)
        track.order = order
        # A guest can only let go of whole vCPUs; what is less is the quota's business.
        whole = round_up(amount, MILLICORES_PER_VCPU) if track.kind is Kind.CPU else amount
        message = Reclaim(order, track.kind, whole, stage, seconds, track.reason)
        self.out.append(Send(guest.name, guest.session, message))

    def answer(self, guest: GuestState, track: Track, ack: Ack) -> None:
        """The guest's answer to a reclaim: what it can give is taken, the rest waits."""
        kind = track.kind
        if judge.must_not_shrink(guest, track):
            return
        offered = max(round_up(max(ack.achieved, track.amount), guest.unit(kind)), guest.least(kind))
        if ack.status is not AckStatus.DONE:
            later = f"; {kind.show(ack.later_amount)} in {ack.retry_after_seconds:.0f} s" if ack.later_amount else ""
            text = (
                f"asked down to {kind.show(track.amount)}, guest can do "
                f"{kind.show(ack.achieved)}: {ack.refusal} {ack.text}{later}"
            )
            self.refused(guest, track, ack, text, min(offered, track.reserved))
        if kind is Kind.CPU and guest.bounded:  # its CPU time is the host's to give, whatever is online
            offered = track.amount
            if ack.status is not AckStatus.DONE:
                track.shrink_after = max(track.shrink_after, self.now + self.timing.retry_seconds)
        elif ack.status is AckStatus.REFUSED or offered >= self._held(guest, track):
            track.kept = track.reserved
            track.set_back(self.now, self.timing, ack.retry_after_seconds)
            self.withdraw(track)
            return
        elif ack.status is AckStatus.PARTIAL:
            track.kept = offered
            track.shrink_after = max(track.shrink_after, self.now + ack.retry_after_seconds)
        self.force(guest, track, offered)

    def refused(self, guest: GuestState, track: Track, ack: Ack, text: str, achieved: int) -> None:
        """Count a refusal or a partial answer, and say it."""
        track.counters.refusals += 1
        reason = Reason(str(ack.refusal or ack.status), ack.text)
        self.log(guest, track, EventCode.REFUSED, text, track.reserved, achieved, reason)

    def _held(self, guest: GuestState, track: Track) -> int:
        """What it holds by the newest word, which may be less than is reserved yet."""
        return min(track.reserved, guest.vm.held(track.kind)) if guest.vm and guest.vm_fresh else track.reserved

    def force(self, guest: GuestState, track: Track, amount: int) -> None:
        """Have the hypervisor take back what is above `amount`."""
        held = track.reserved
        if guest.vm is not None:
            held = guest.vm.held(track.kind) + (guest.vm.vcpus if track.kind is Kind.CPU else 0)
        guest.vm_fresh = False  # a state from before the request says nothing of it
        order = track.order
        track.begin(Phase.UNPLUGGING, amount, self.now, self.timing.unplug_progress_seconds, held)
        track.order = order
        track.repeat_at = self.now + self.timing.unplug_repeat_seconds
        self._request(guest, track.kind, amount)

    # ---- more ------------------------------------------------------------------------------------

    def grow(self, guest: GuestState, track: Track, amount: int) -> None:
        """Reserve `amount`, have it plugged, and offer it to the guest."""
        kind = track.kind
        sustained = guest.sustained(kind)
        bursting = amount > sustained >= track.reserved
        track.counters.bursts += bursting
        plugged = guest.vm.plugged(kind) if guest.vm else 0
        if kind is Kind.CPU and guest.vm:
            plugged = guest.vm.held(kind)
        track.begin(Phase.PLUGGING, amount, self.now, self.timing.plug_progress_seconds, plugged)
        guest.revision += 1
        track.order = self.order(guest)
        code = EventCode.BURST if bursting else EventCode.GROWING
        self.log(guest, track, code, f"growing to {kind.show(amount)}: {track.reason.text}", track.reserved, amount)
        self.reserve(guest, track, amount)
        self._request(guest, kind, amount)
        track.announce = False
        self.out.append(Send(guest.name, guest.session, self.grant(guest, track, amount, GrantStage.OFFERED)))

    def grant(self, guest: GuestState, track: Track, amount: int, stage: GrantStage) -> Grant:
        """The message for the order of the track: what of it is burst says so."""
        order = track.order or self.order(guest)
        burst = max(0, amount - guest.sustained(track.kind))
        if not burst or track.lend is None:
            return Grant(order, track.kind, amount, stage)
        return Grant(order, track.kind, amount, stage, track.lend.bucket.seconds_left(burst), burst)

    def announce(self, guest: GuestState, track: Track) -> None:
        """Tell the guest its grant where it may not know it: after hello, when a resize ended, and when a
        burst is about to end.
        """
        if not guest.connected or guest.vm is None or not guest.vm_fresh:
            return
        if guest.vm.status is not VmStatus.RUNNING or track.phase in (Phase.ASKING, Phase.UNPLUGGING):
            return
        ending = None if guest.observed else lend.notice_due(guest, track, self.timing)
        if not track.announce and ending is None:
            return
        track.announce = False
        guest.revision += 1
        plugging = track.phase is Phase.PLUGGING
        stage = GrantStage.OFFERED if plugging else GrantStage.SETTLED
        if ending is not None and track.lend is not None:
            track.lend.noticed = True
            stage = GrantStage.ENDING
            text = f"its burst ends in {ending:.0f} s"
            self.log(guest, track, EventCode.BURST, text, track.reserved, guest.sustained(track.kind))
        before, track.order = track.order, self.order(guest)
        message = self.grant(guest, track, track.reserved, stage)
        if not plugging:
            track.order = before
        self.out.append(Send(guest.name, guest.session, message))

    def tell_throttled(self, guest: GuestState) -> None:
        """Tell the guest what it cannot see for itself: that its quota holds it back. A period in which it was used up
        now and then is no news: a guest that uses just what it has would hear of it every second.
        """
        if guest.vm is None or not guest.connected or guest.observed:
            return
        new, told = guest.vm.cpu_throttled_permille, guest.throttled_permille
        if new < (_THROTTLE_OVER_PERMILLE if told else _THROTTLE_STEP_PERMILLE):
            new = 0
        if abs(new - told) >= _THROTTLE_STEP_PERMILLE or (new == 0) != (told == 0):
            guest.throttled_permille = new
            message = Throttle(guest.vm.cpu_quota_millicores, new)
            self.out.append(Send(guest.name, guest.session, message))

    # ---- only observed ---------------------------------------------------------------------------

    def let_go(self, guest: GuestState) -> None:
        """From now on it is only observed: end what is under way. A guest that was being asked for something hears what
        it has, as the last thing that it is told.
        """
        for track in guest.tracks.values():
            track.announce = track.phase in (Phase.ASKING, Phase.UNPLUGGING)
            if track.phase is not Phase.PLUGGING or track.kind is Kind.CPU:
                track.end()
            track.overdue = track.doubtful = track.settled = False
            track.kept = 0
        guest.vm_fresh = False  # a request may still wait at the hypervisor
        self.out = [one for one in self.out if one.guest != guest.name or isinstance(one, Log)]
        self.out.append(Observe(guest.name))

    def take_over(self, guest: GuestState) -> None:
        """It is served from now on: what it holds has to be durable, and it may not know its grant."""
        for track in guest.tracks.values():
            track.would, track.announce = None, True
            if track.phase is not Phase.IDLE:
                track.deadline = self.now + self.timing.plug_progress_seconds
        guest.vm_fresh = False  # it is seen with other eyes now, and put in order where that takes something
        self.out.append(Observe(guest.name))
        self.record(guest)

    def rehearse(self, guest: GuestState, track: Track, amount: int) -> None:
        """Say to what an observed guest would be resized."""
        growing = amount > (track.reserved if track.would is None else track.would)
        (track.grown_at if growing else track.shrunk_at).append(self.now)
        if growing:
            track.shrink_after = max(track.shrink_after, self.now + self.timing.cool_down_seconds)
        track.would = amount
        if amount != track.reserved:
            word = "grow" if amount > track.reserved else "shrink"
            text = f"would {word} to {track.kind.show(amount)}: {track.reason.text}"
            self.log(guest, track, EventCode.WOULD, text, track.reserved, amount)

    # ---- small parts -----------------------------------------------------------------------------

    def reserve(self, guest: GuestState, track: Track, amount: int) -> None:
        """Charge so much. What was held until now is taken from the burst's credit first."""
        if amount == track.reserved:
            return
        lend.flow(guest, track, self.now)
        track.reserved, track.would = amount, None
        self.books[track.kind].put(guest.name, amount, guest.limits.min.get(track.kind))
        self.record(guest)

    def record(self, guest: GuestState) -> None:
        """Have what is reserved made durable, and the credit where there is a bucket; nothing of an observed guest."""
        if guest.observed:
            return
        credit = None
        lends = {kind: track.lend for kind, track in guest.tracks.items()}
        if any(lends.values()):
            amounts = {kind: one.bucket.credit if one else 0 for kind, one in lends.items()}
            credit = Resources(amounts[Kind.CPU], amounts[Kind.MEMORY])
            for one in lends.values():
                if one is not None:
                    one.recorded_at = self.now
        self.out.append(Record(guest.name, guest.reserved, guest.revision, credit))

    def _request(self, guest: GuestState, kind: Kind, amount: int) -> None:
        """Ask the hypervisor for a whole amount; what of it is there already costs nothing."""
        if kind is Kind.MEMORY:
            self.out.append(RequestMemory(guest.name, amount))
            return
        count, vm = guest.vcpus_for(amount), guest.vm
        more = vm is None or vm.vcpus < count
        if guest.bounded and not more:
            self.out.append(RequestCpuQuota(guest.name, amount))
        if more or (vm is not None and vm.vcpus > count and not guest.parks):
            self.out.append(RequestVcpus(guest.name, count))
        if guest.bounded and more:
            self.out.append(RequestCpuQuota(guest.name, amount))

    def order(self, guest: GuestState) -> OrderId:
        """A new name for an order."""
        self._last_request += 1
        return OrderId(self.epoch, self._last_request, guest.revision)

    def log(
        self,
        guest: GuestState,
        track: Track,
        code: EventCode,
        text: str,
        before: int,
        after: int,
        reason: Reason | None = None,
    ) -> None:
        """Say it to people. Without a `reason` it is the target's."""
        inputs = known_inputs(guest, track, self.pools[track.kind], self.books[track.kind])
        self.out.append(Log(guest.name, track.kind, text, code, before, after, reason or track.reason, inputs))


def _may_deflate(track: Track, vm: VmState) -> bool:
    """Whether the VM may come to hold more by itself: a hypervisor tells what is in a balloon, not where that
    is going.
    """
    return track.kind is Kind.MEMORY and vm.memory_ballooned_bytes > 0
