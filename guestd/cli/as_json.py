"""What `--output json` prints, described for programs by `guestd/cli/schema/v1.json`.

The version is in `"schema": "guestd/v1/…"`. Within it fields may be added; none is ever renamed or removed, and
none changes its meaning. Units are in the names of fields, or in a `unit` beside them.
"""

from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from typing import Any

from guestd.cli.status import status_word
from guestd.model.event import DecisionInputs, Event
from guestd.model.explanation import GuestExplanation, ReclaimedResource
from guestd.model.history import History, HistoryResource
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Resources
from guestd.model.view import GuestView, HostView

_UNIT = {Kind.CPU: "millicores", Kind.MEMORY: "bytes"}


def status_json(host: HostView, guests: Iterable[GuestView]) -> dict[str, Any]:
    """Host and guests."""
    return {"host": host_json(host), "guests": [guest_json(guest) for guest in guests]}


def host_json(host: HostView) -> dict[str, Any]:
    """The host as one pool."""
    return {
        "capacity": _resources(host.capacity),
        "reserve": _resources(host.reserve),
        "overhead": _resources(host.overhead),
        "committed": _resources(host.committed),
        "minimums": _resources(host.minimums),
        "free": _resources(host.free),
        "epoch": host.epoch,
        "version": host.version,
        "started_at": None if host.started_at is None else _time(host.started_at),
        "guests": host.guests,
        "guests_connected": host.guests_connected,
    }


def guest_json(guest: GuestView) -> dict[str, Any]:
    """One guest."""
    return {
        "name": guest.name,
        "status": status_word(guest),
        "vm_status": guest.vm_status,
        "paused": guest.paused,
        "observed": guest.observed,
        "connected": guest.connected,
        "channel": guest.channel,
        "hostname": guest.hostname,
        "agent_version": guest.agent_version,
        "kernel": guest.kernel,
        "limits_origin": guest.limits_origin,
        "limits_origin_detail": guest.limits_origin_detail,
        "cpu": _resource(guest, Kind.CPU),
        "memory": _resource(guest, Kind.MEMORY),
        "demand_reasons": [_reason(one) for one in guest.demand_reasons],
        "last_seen_ago_seconds": guest.last_seen_ago_seconds,
        "protocol_errors": guest.protocol_errors,
        "revision": guest.revision,
        "degraded": guest.degraded,
    }


def _resource(guest: GuestView, kind: Kind) -> dict[str, Any]:
    resource, unit = guest.resource(kind), _UNIT[kind]
    return {
        f"min_{unit}": guest.limits.min.get(kind),
        f"max_{unit}": guest.limits.max.get(kind),
        f"burst_limit_{unit}": guest.limits.burst.get(kind),
        f"burst_credit_limit_{unit.removesuffix('s')}_seconds": guest.limits.burst_credit.get(kind),
        f"burst_refill_{unit}": guest.limits.burst_refill.get(kind),
        "weight": guest.limits.weight.get(kind),
        f"demand_{unit}": resource.demand,
        f"target_{unit}": resource.target,
        f"reserved_{unit}": resource.reserved,
        f"plugged_{unit}": resource.plugged,
        f"onlined_{unit}": resource.onlined,
        f"usable_{unit}": resource.usable,
        f"used_{unit}": resource.used,
        "phase": resource.phase,
        "reason": _reason(resource.reason),
        "grows": resource.grows,
        "shrinks": resource.shrinks,
        "partials": resource.partials,
        "refusals": resource.refusals,
        "failures": resource.failures,
        "overdue": resource.overdue,
        f"burst_{unit}": resource.burst,
        f"burst_credit_{unit.removesuffix('s')}_seconds": resource.burst_credit,
        f"quota_{unit}": resource.quota,
        "throttled_permille": resource.throttled_permille,
        "at_rest": resource.at_rest,
    }


def event_json(event: Event) -> dict[str, Any]:
    """One event; `before` and `after` are in `unit`."""
    return {
        "id": event.id,
        "at": _time(event.at),
        "guest": event.guest,
        "kind": event.kind,
        "code": event.code,
        "text": event.text,
        "unit": None if event.kind is None else _UNIT[event.kind],
        "before": event.before,
        "after": event.after,
        "reason": None if event.reason is None else _reason(event.reason),
        "inputs": _inputs(event.inputs, event.kind),
    }


def explanation_json(explanation: GuestExplanation, at: datetime | None) -> dict[str, Any]:
    """Why; `at` is the time that was asked for."""
    return {
        "at": None if at is None else _time(at),
        "unknown_time": explanation.unknown_time,
        "guest": guest_json(explanation.guest),
        "resources": [
            {
                "kind": one.kind,
                "unit": _UNIT[one.kind],
                "summary": one.summary,
                "reason": _reason(one.reason),
                "inputs": _inputs(one.inputs, one.kind),
                "demand_reasons": [_reason(reason) for reason in one.demand_reasons],
                "to_get_more": [_reason(reason) for reason in one.to_get_more],
                "events": [event_json(event) for event in one.events],
            }
            for one in explanation.resources
        ],
    }


def history_json(guest: str, history: History, kinds: Collection[Kind] = tuple(Kind)) -> dict[str, Any]:
    """A guest's past, of these kinds."""
    return {
        "guest": guest,
        "step_seconds": history.step_seconds,
        "points": [
            {"at": _time(point.at), **{one.kind: _past(one) for one in point.resources if one.kind in kinds}}
            for point in history.points
        ],
    }


def reclaim_json(resources: Iterable[ReclaimedResource], guest: GuestView, dry_run: bool) -> dict[str, Any]:
    """What was, or would be, asked back."""
    return {
        "dry_run": dry_run,
        "guest": guest_json(guest),
        "resources": [
            {
                "kind": one.kind,
                "unit": _UNIT[one.kind],
                "reserved": one.reserved,
                "goal": one.goal,
                "reason": _reason(one.reason),
            }
            for one in resources
        ],
    }


def _past(resource: HistoryResource) -> dict[str, int]:
    unit = _UNIT[resource.kind]
    return {
        f"demand_{unit}": resource.demand,
        f"reserved_{unit}": resource.reserved,
        f"plugged_{unit}": resource.plugged,
        f"usable_{unit}": resource.usable,
        f"used_{unit}": resource.used,
    }


def _inputs(inputs: DecisionInputs | None, kind: Kind | None) -> dict[str, Any] | None:
    if inputs is None or kind is None:
        return None
    return {
        "demand": inputs.demand,
        "used": inputs.used,
        "min": inputs.limits.min.get(kind),
        "max": inputs.limits.max.get(kind),
        "burst_limit": inputs.limits.burst.get(kind),
        "weight": inputs.limits.weight.get(kind),
        "reserved": inputs.reserved,
        "plugged": inputs.plugged,
        "target": inputs.target,
        "expected": inputs.expected,
        "kept": inputs.kept,
        "burst_credit": inputs.burst_credit,
        "capacity": inputs.capacity,
        "free": inputs.free,
        "scarce": inputs.scarce,
        "idle_tax_permille": inputs.idle_tax_permille,
    }


def _reason(reason: Reason) -> dict[str, str]:
    return {"code": reason.code, "text": reason.text}


def _resources(resources: Resources) -> dict[str, int]:
    return {"cpu_millicores": resources.cpu_millicores, "memory_bytes": resources.memory_bytes}


def _time(at: datetime) -> str:
    return at.astimezone(UTC).isoformat()
