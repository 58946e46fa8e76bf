"""What the broker shows of its state: pure pictures for monitor and admin."""

from collections.abc import Collection
from datetime import datetime

from guestd.broker.core.guest import GuestState
from guestd.broker.core.machine import BrokerMachine
from guestd.broker.core.track import Track
from guestd.model.resources import Kind, Resources
from guestd.model.units import MILLICORES_PER_VCPU
from guestd.model.view import GuestView, HostView, LimitsOrigin, ResizePhase, ResourceView
from guestd.model.vm import VmStatus


def host_view(machine: BrokerMachine, version: str, started_at: datetime) -> HostView:
    """The host as one pool."""
    host, guests = machine.host, machine.guests.values()
    overhead = host.overhead_per_guest

    def total(amounts: list[Resources]) -> Resources:
        return sum(amounts, Resources())

    return HostView(
        capacity=host.capacity,
        reserve=host.reserve,
        overhead=Resources(overhead.cpu_millicores * len(guests), overhead.memory_bytes * len(guests)),
        committed=total([guest.reserved for guest in guests]),
        minimums=total([guest.limits.min for guest in guests]),
        free=Resources(machine.free(Kind.CPU), machine.free(Kind.MEMORY)),
        epoch=machine.epoch,
        version=version,
        started_at=started_at,
        guests=len(guests),
        guests_connected=sum(guest.connected for guest in guests),
    )


def guest_view(
    guest: GuestState,
    now: float,
    origin: LimitsOrigin,
    origin_detail: str,
    channel: str,
    protocol_errors: int,
    at_rest: Collection[Kind] = (),
) -> GuestView:
    """One guest. `now` is of the machine's clock; `at_rest` has the kinds about which nothing is to be done."""
    identity = guest.identity
    return GuestView(
        name=guest.name,
        limits=guest.limits,
        limits_origin=origin,
        limits_origin_detail=origin_detail,
        vm_status=guest.vm.status if guest.vm else None,
        paused=guest.paused,
        connected=guest.connected,
        channel=channel,
        hostname=identity.hostname if identity else "",
        agent_version=identity.agent_version if identity else "",
        kernel=identity.kernel if identity else "",
        resources=tuple(_resource_view(guest, track, track.kind in at_rest) for track in guest.tracks.values()),
        demand_reasons=guest.demand.reasons if guest.demand else (),
        last_seen_ago_seconds=None if guest.last_seen is None else max(0.0, now - guest.last_seen),
        protocol_errors=protocol_errors,
        revision=guest.revision,
        degraded=_degraded(guest),
        observed=guest.observed,
    )


def _resource_view(guest: GuestState, track: Track, at_rest: bool) -> ResourceView:
    kind, usable, demand = track.kind, guest.usable, guest.demand
    cpu = kind is Kind.CPU
    used = 0
    if demand is not None:
        used = demand.cpu_used_millicores if cpu else demand.memory_used_bytes
    return ResourceView(
        kind=kind,
        demand=demand.needed.get(kind) if demand else 0,
        target=track.target,
        reserved=track.reserved,
        plugged=guest.vm.plugged(kind) if guest.vm else 0,
        onlined=usable.vcpus_online * MILLICORES_PER_VCPU if cpu else usable.memory_online_bytes,
        usable=usable.vcpus_online * MILLICORES_PER_VCPU if cpu else usable.memory_total_bytes,
        used=used,
        phase=ResizePhase(track.phase),
        reason=track.reason,
        grows=track.counters.grows,
        shrinks=track.counters.shrinks,
        partials=track.counters.partials,
        refusals=track.counters.refusals,
        failures=track.counters.failures,
        overdue=track.overdue,
        burst=guest.burst_held(kind),
        burst_credit=track.lend.bucket.credit if track.lend else 0,
        quota=guest.vm.cpu_quota_millicores if cpu and guest.vm else 0,
        throttled_permille=guest.vm.cpu_throttled_permille if cpu and guest.vm else 0,
        at_rest=at_rest,
    )


def _degraded(guest: GuestState) -> str:
    if guest.vm is None or guest.vm.status is VmStatus.UNREACHABLE:
        return "its QMP socket does not answer; it keeps what it has, and is tried again"
    missing = [kind for kind in Kind if guest.connected and not guest.can(kind)]
    if missing:
        return f"its guest daemon cannot bring {' or '.join(missing)} online; see `guestd check` in the guest"
    return ""
