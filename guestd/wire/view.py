"""What the monitor shows, to the wire and back: `guestd.model.view` in the words of monitor.proto.

What a newer broker says that is not known here reads as unknown.
"""

from datetime import UTC

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from guestd.model.reason import Reason
from guestd.model.resources import Limits, Resources
from guestd.model.view import GuestView, HostView, LimitsOrigin, ResizePhase, ResourceView
from guestd.model.vm import VmStatus
from guestd.v1 import common_pb2, monitor_pb2
from guestd.wire.amounts import KIND, KIND_BACK, limits_to_wire, reason_to_wire, resources_to_wire

_PHASE = {
    ResizePhase.IDLE: monitor_pb2.RESIZE_PHASE_IDLE,
    ResizePhase.PLUGGING: monitor_pb2.RESIZE_PHASE_PLUGGING,
    ResizePhase.ASKING: monitor_pb2.RESIZE_PHASE_ASKING,
    ResizePhase.UNPLUGGING: monitor_pb2.RESIZE_PHASE_UNPLUGGING,
}
_STATUS = {
    VmStatus.RUNNING: monitor_pb2.VM_STATUS_RUNNING,
    VmStatus.FROZEN: monitor_pb2.VM_STATUS_FROZEN,
    VmStatus.GONE: monitor_pb2.VM_STATUS_GONE,
    VmStatus.UNREACHABLE: monitor_pb2.VM_STATUS_UNREACHABLE,
}
_ORIGIN = {
    LimitsOrigin.FILE: monitor_pb2.LIMITS_ORIGIN_FILE,
    LimitsOrigin.ADMIN: monitor_pb2.LIMITS_ORIGIN_ADMIN,
}
_PHASE_BACK = {number: phase for phase, number in _PHASE.items()}
_STATUS_BACK = {number: status for status, number in _STATUS.items()}
_ORIGIN_BACK = {number: origin for origin, number in _ORIGIN.items()}


def host_to_wire(host: HostView) -> monitor_pb2.Host:
    """The host as one pool."""
    started_at = Timestamp()
    if host.started_at is not None:
        started_at.FromDatetime(host.started_at)
    return monitor_pb2.Host(
        capacity=resources_to_wire(host.capacity),
        reserve=resources_to_wire(host.reserve),
        overhead=resources_to_wire(host.overhead),
        committed=resources_to_wire(host.committed),
        minimums=resources_to_wire(host.minimums),
        free=resources_to_wire(host.free),
        epoch=host.epoch,
        version=host.version,
        started_at=started_at,
        guests=host.guests,
        guests_connected=host.guests_connected,
    )


def guest_to_wire(guest: GuestView) -> monitor_pb2.Guest:
    """One guest."""
    ago = guest.last_seen_ago_seconds
    return monitor_pb2.Guest(
        name=guest.name,
        limits=limits_to_wire(guest.limits),
        limits_origin=_ORIGIN.get(guest.limits_origin, monitor_pb2.LIMITS_ORIGIN_UNSPECIFIED),
        limits_origin_detail=guest.limits_origin_detail,
        vm_status=monitor_pb2.VM_STATUS_UNSPECIFIED if guest.vm_status is None else _STATUS[guest.vm_status],
        paused=guest.paused,
        connected=guest.connected,
        channel=guest.channel,
        hostname=guest.hostname,
        agent_version=guest.agent_version,
        kernel=guest.kernel,
        resources=[_resource_to_wire(one) for one in guest.resources],
        demand_reasons=[reason_to_wire(reason) for reason in guest.demand_reasons],
        last_seen_ago=None if ago is None else Duration(seconds=int(ago), nanos=int(ago % 1 * 1e9)),
        protocol_errors=guest.protocol_errors,
        revision=guest.revision,
        degraded=guest.degraded,
        observed=guest.observed,
    )


def _resource_to_wire(one: ResourceView) -> monitor_pb2.GuestResource:
    return monitor_pb2.GuestResource(
        kind=KIND[one.kind],
        demand=one.demand,
        target=one.target,
        reserved=one.reserved,
        plugged=one.plugged,
        onlined=one.onlined,
        usable=one.usable,
        used=one.used,
        phase=_PHASE.get(one.phase, monitor_pb2.RESIZE_PHASE_UNSPECIFIED),
        reason=reason_to_wire(one.reason),
        grows=one.grows,
        shrinks=one.shrinks,
        partials=one.partials,
        refusals=one.refusals,
        failures=one.failures,
        overdue=one.overdue,
        burst=one.burst,
        burst_credit=one.burst_credit,
        quota=one.quota,
        throttled_permille=one.throttled_permille,
        at_rest=one.at_rest,
    )


def host_view(host: monitor_pb2.Host) -> HostView:
    """The host, from its message."""
    return HostView(
        capacity=_resources(host.capacity),
        reserve=_resources(host.reserve),
        overhead=_resources(host.overhead),
        committed=_resources(host.committed),
        minimums=_resources(host.minimums),
        free=_resources(host.free),
        epoch=host.epoch,
        version=host.version,
        started_at=host.started_at.ToDatetime(UTC) if host.HasField("started_at") else None,
        guests=host.guests,
        guests_connected=host.guests_connected,
    )


def guest_view(guest: monitor_pb2.Guest) -> GuestView:
    """A guest, from its message."""
    return GuestView(
        name=guest.name,
        limits=limits_view(guest.limits),
        limits_origin=_ORIGIN_BACK.get(guest.limits_origin, LimitsOrigin.UNKNOWN),
        limits_origin_detail=guest.limits_origin_detail,
        vm_status=_STATUS_BACK.get(guest.vm_status),
        paused=guest.paused,
        connected=guest.connected,
        channel=guest.channel,
        hostname=guest.hostname,
        agent_version=guest.agent_version,
        kernel=guest.kernel,
        resources=tuple(_resource_view(one) for one in guest.resources if one.kind in KIND_BACK),
        demand_reasons=tuple(reason_view(reason) for reason in guest.demand_reasons),
        last_seen_ago_seconds=(guest.last_seen_ago.ToNanoseconds() / 1e9 if guest.HasField("last_seen_ago") else None),
        protocol_errors=guest.protocol_errors,
        revision=guest.revision,
        degraded=guest.degraded,
        observed=guest.observed,
    )


def _resource_view(resource: monitor_pb2.GuestResource) -> ResourceView:
    return ResourceView(
        kind=KIND_BACK[resource.kind],
        demand=resource.demand,
        target=resource.target,
        reserved=resource.reserved,
        plugged=resource.plugged,
        onlined=resource.onlined,
        usable=resource.usable,
        used=resource.used,
        phase=_PHASE_BACK.get(resource.phase, ResizePhase.UNKNOWN),
        reason=reason_view(resource.reason),
        grows=resource.grows,
        shrinks=resource.shrinks,
        partials=resource.partials,
        refusals=resource.refusals,
        failures=resource.failures,
        overdue=resource.overdue,
        burst=resource.burst,
        burst_credit=resource.burst_credit,
        quota=resource.quota,
        throttled_permille=resource.throttled_permille,
        at_rest=resource.at_rest,
    )


def limits_view(limits: common_pb2.Limits) -> Limits:
    """Limits, from their message."""
    return Limits(
        min=_resources(limits.min),
        max=_resources(limits.max),
        weight=_resources(limits.weight),
        burst=_resources(limits.burst),
        burst_credit=_resources(limits.burst_credit),
        burst_refill=_resources(limits.burst_refill),
    )


def reason_view(reason: common_pb2.Reason) -> Reason:
    """A reason, from its message."""
    return Reason(reason.code, reason.text)


def _resources(message: common_pb2.Resources) -> Resources:
    return Resources(message.cpu_millicores, message.memory_bytes)
