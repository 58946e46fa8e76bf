"""What it would take for a guest to get more: advice for the operator, with the numbers of the case.

What comes first stands in the way of all that follows.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from guestd.broker.core import judge
from guestd.broker.core.guest import GuestState
from guestd.broker.core.track import Phase, Timing, Track
from guestd.model.event import DecisionInputs
from guestd.model.guest import Capability
from guestd.model.messages import Demand
from guestd.model.reason import Reason
from guestd.model.resources import Kind
from guestd.model.units import MIB, MILLICORES_PER_VCPU, format_cpus, round_up
from guestd.model.vm import VmState, VmStatus

_MOST_WEIGHT = 10_000
_HOLDERS = 3
_UNCLEAR = {
    VmStatus.FROZEN: Reason("vm-frozen", "the VM is paused or migrating at its hypervisor: let it run"),
    VmStatus.GONE: Reason("vm-gone", "the VM's process is gone: start it"),
    VmStatus.UNREACHABLE: Reason("vm-unreachable", "its hypervisor does not answer: look after its QMP socket"),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of one guest, and what else is known."""

    guest: GuestState
    track: Track
    inputs: DecisionInputs
    timing: Timing
    stale_seconds: float
    now: float
    others: Collection[GuestState]

    @property
    def kind(self) -> Kind:
        return self.track.kind

    @property
    def has(self) -> int:
        """What is reserved and there; what is reserved for a grow under way is not there yet."""
        vm, reserved = self.guest.vm, self.track.reserved
        return (
            min(reserved, vm.plugged(self.kind)) if vm is not None and self.track.phase is Phase.PLUGGING else reserved
        )

    def show(self, amount: int) -> str:
        return self.kind.show(amount)


def to_get_more(case: Case) -> tuple[Reason, ...]:
    """What stands in the way of more; empty when the guest has all that it asks for."""
    guest, demand = case.guest, case.guest.demand
    if demand is not None and demand.needed.get(case.kind) <= case.has and not _lacks_online(case):
        return ()
    found = list(_about_mode(case))
    if demand is None:
        return tuple(found)
    if guest.vm is not None and guest.vm.status is VmStatus.RUNNING:
        found += _about_limits(case, demand, guest.vm)
    found += _about_pool(case, demand)
    found += _about_time(case)
    if _lacks_online(case):
        found.append(_not_online(case))
    return tuple(found)


def _about_mode(case: Case) -> Iterator[Reason]:
    """Why nothing is decided or done at all."""
    guest, vm = case.guest, case.guest.vm
    if guest.paused:
        yield Reason("paused", f"decisions about it are paused: guestctl resume {guest.name}")
    if guest.observed:
        yield Reason("observed", 'it is only observed: take mode = "observe" out of the configuration, and reload')
    if vm is None:
        yield Reason("vm-unknown", "its hypervisor has not answered yet: look after its QMP socket")
    elif vm.status in _UNCLEAR:
        yield _UNCLEAR[vm.status]
    if not guest.connected:
        yield Reason("away", "its guest daemon is away: start guestd in the guest; `guestd check` there says more")
    elif guest.last_seen is not None and guest.stale(case.now, case.stale_seconds):
        silent = f"its guest daemon was not heard of for {case.now - guest.last_seen:.0f} s"
        yield Reason("stale", f"{silent}, which is more than {case.stale_seconds:.0f} s: is the guest stuck?")
    elif guest.demand is None:
        yield Reason("no-demand", "its guest daemon has not said yet what it needs")
    if guest.identity is not None and Capability.DRY_RUN in guest.identity.capabilities:
        yield Reason("dry-run", "its guest daemon runs with --dry-run: start it without")
    if case.track.overdue:
        above = guest.burst_held(case.kind)
        what = f"{case.show(above)} above its max" if above else f"{case.show(case.track.reserved)}"
        yield Reason("overdue", f"it holds {what} and did not give back in time: nothing more until it has")


def _about_limits(case: Case, demand: Demand, vm: VmState) -> Iterator[Reason]:
    """Why it may not have more for good."""
    guest, kind = case.guest, case.kind
    needed, high = demand.needed.get(kind), guest.sustained(kind)
    if needed <= high:
        return
    most = vm.vcpus_max * MILLICORES_PER_VCPU if kind is Kind.CPU else vm.memory_max_bytes
    limit = guest.limits.max.get(kind)
    if limit < most:
        wanted = min(round_up(needed, _whole(case)), most)
        yield Reason("max", f"its max is {case.show(limit)}: {_set_limit(case, 'max', wanted)}")
    if needed > most:
        yield _too_small(case, most)
    yield from _about_burst(case, needed)


def _too_small(case: Case, most: int) -> Reason:
    if case.kind is Kind.CPU:
        text = f"the VM has slots for {format_cpus(most)} vCPUs: start it with more (-smp maxcpus=)"
        return Reason("vcpus-max", text)
    text = f"the VM has room for {case.show(most)}: start it with a larger virtio-mem device, or more slots for DIMMs"
    return Reason("memory-max", text)


def _about_burst(case: Case, needed: int) -> Iterator[Reason]:
    guest, kind, lend = case.guest, case.kind, case.track.lend
    burst = guest.limits.burst.get(kind)
    if lend is None or needed <= guest.sustained(kind):
        return
    if lend.open:
        if needed > burst:
            yield Reason("burst", f"its burst ends at {case.show(burst)}: {_set_limit(case, 'burst', needed)}")
        return
    threshold = judge.burst_threshold(guest, kind, case.timing)
    wait = lend.bucket.seconds_until(threshold, guest.limits.burst_refill.get(kind))
    if wait == float("inf"):
        yield Reason("burst-credit", "its burst credit is used up, and its refill is 0")
    else:
        yield Reason("burst-credit", f"its burst credit is used up: it may burst again in {wait:.0f} s")


def _about_pool(case: Case, demand: Demand) -> Iterator[Reason]:
    """Why it does not have what it may have."""
    guest, kind, track, inputs = case.guest, case.kind, case.track, case.inputs
    wanted = min(round_up(demand.needed.get(kind), _whole(case)), guest.sustained(kind))
    if wanted <= case.has:
        return
    if track.target >= wanted and inputs.free < wanted - track.reserved and track.phase is Phase.IDLE:
        text = f"it is to have {case.show(track.target)}, but {case.show(inputs.free)} are free: others give back first"
        yield Reason("not-free", text)
    if not inputs.scarce or track.target >= wanted:
        return
    weight, share = guest.limits.weight.get(kind), max(track.target, 1)
    text = f"the pool is scarce and its share is {case.show(track.target)} at weight {weight}"
    for name, spare in _holders(case):
        text_of = f"{name} holds {case.show(spare)} more than it needs: guestctl reclaim {name}"
        yield Reason("holder", text_of)
    if weight < _MOST_WEIGHT:
        more = min(_MOST_WEIGHT, max(weight + 1, -(-weight * wanted // share)))
        yield Reason("weight", f"{text}: guestctl set-limits {guest.name} --{kind}-weight {more}")
    yield Reason("min", f"only a minimum is guaranteed: {_set_limit(case, 'min', wanted)}")
    short = case.show(wanted - track.target)
    yield Reason(
        "capacity", f"the host has {case.show(inputs.capacity)} for all guests, {short} too little for this one"
    )


def _holders(case: Case) -> list[tuple[str, int]]:
    """Who holds most above need and minimum."""
    spare: list[tuple[int, str]] = []
    for other in case.others:
        if other is case.guest or other.demand is None or other.observed or other.paused:
            continue
        keeps = max(round_up(other.demand.needed.get(case.kind), other.unit(case.kind)), other.least(case.kind))
        if other.tracks[case.kind].reserved > keeps:
            spare.append((other.tracks[case.kind].reserved - keeps, other.name))
    spare.sort(key=lambda one: (-one[0], one[1]))
    return [(name, amount) for amount, name in spare[:_HOLDERS]]


def _about_time(case: Case) -> Iterator[Reason]:
    """What only takes time."""
    track, timing, now = case.track, case.timing, case.now
    if track.phase is Phase.PLUGGING:
        yield Reason("growing", f"it is growing to {case.show(track.amount)}: wait")
    elif now < track.grow_after:
        yield Reason("retry", f"the last try failed: the next one is in {track.grow_after - now:.0f} s")
    elif not track.in_budget(now, timing, shrinking=False):
        back = track.budget_back_at(now, timing) or now
        begun = f"{timing.budget_grows} grows began within {timing.budget_window_seconds:.0f} s"
        yield Reason("budget", f"{begun}, as many as may: the next one is in {max(0.0, back - now):.0f} s")


def _lacks_online(case: Case) -> bool:
    """Whether the guest cannot use what it has been given."""
    guest = case.guest
    return guest.connected and (not guest.can(case.kind) or judge.has_not_taken(guest, case.track))


def _not_online(case: Case) -> Reason:
    guest, kind = case.guest, case.kind
    if not guest.can(kind):
        text = f"its guest daemon cannot bring {kind} online; `guestd check` in the guest says why"
        return Reason("cannot-online", text)
    online = guest.usable.vcpus_online * MILLICORES_PER_VCPU
    if kind is Kind.MEMORY:
        online = guest.usable.memory_online_bytes
    text = f"it has been given {case.show(case.track.reserved)}, but has {case.show(online)} online"
    return Reason("not-online", f"{text}; the guest's log and `guestd check` there say why")


def _whole(case: Case) -> int:
    """A need is met in whole vCPUs and blocks, whatever a quota is counted in."""
    return MILLICORES_PER_VCPU if case.kind is Kind.CPU else case.guest.unit(case.kind)


def _set_limit(case: Case, limit: str, amount: int) -> str:
    """The command that sets it, to whole CPUs or MiB."""
    shown = f"{-(-amount // MIB)}MiB"
    if case.kind is Kind.CPU:
        shown = format_cpus(amount)
    return f"guestctl set-limits {case.guest.name} --{case.kind}-{limit} {shown}"
