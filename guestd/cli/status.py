"""What `guestctl status` shows, as a pure function of what the broker said: a table, or JSON.

Two rows per guest, CPUs and GiB, so that the table can be read at 80 columns; below it a line for all
that needs words. JSON carries `"schema": 1`: fields may be added to it, none is ever renamed or removed.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from guestd.cli.text import printable
from guestd.model.resources import Kind, Resources
from guestd.model.units import GIB, MILLICORES_PER_VCPU, format_cpus, format_size
from guestd.model.view import GuestView, HostView, ResizePhase, ResourceView
from guestd.model.vm import VmStatus

SCHEMA = 1

_STYLE = {
    "running": "green",
    "no agent": "yellow",
    "paused": "cyan",
    "frozen": "cyan",
    "degraded": "yellow",
    "unknown": "dim",
    "unreachable": "red",
    "gone": "red",
}
_LABEL = {Kind.CPU: "CPUs", Kind.MEMORY: "GiB"}
_NAME_WIDTH = 18


def status_word(guest: GuestView) -> str:
    """The one word that matters most about a guest."""
    match guest.vm_status:
        case None:
            return "unknown"
        case VmStatus.GONE | VmStatus.UNREACHABLE | VmStatus.FROZEN:
            return guest.vm_status.value
    if guest.paused:
        return "paused"
    if not guest.connected:
        return "no agent"
    return "degraded" if guest.degraded else "running"


def amount_text(kind: Kind, amount: int) -> str:
    """A number without its unit: CPUs, or GiB to two decimals at most."""
    if kind is Kind.CPU:
        return f"{round(amount / MILLICORES_PER_VCPU, 2):g}"
    return f"{round(amount / GIB, 2):g}" if amount < 100 * GIB else f"{amount / GIB:.0f}"


def render(host: HostView, guests: Sequence[GuestView]) -> RenderableType:
    """The host in a line, the guests in a table, and notes."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", show_edge=False)
    table.add_column("GUEST", no_wrap=True, overflow="ellipsis", max_width=_NAME_WIDTH)
    table.add_column("STATUS", no_wrap=True)
    table.add_column("", no_wrap=True, style="dim")
    for title in ("NEEDS", "TARGET", "PLUGGED", "ONLINE"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("MIN..MAX", no_wrap=True)
    table.add_column("PHASE", no_wrap=True)
    for guest in guests:
        _add_rows(table, guest)
    parts: list[RenderableType] = [_host_line(host), Text()]
    parts.append(table if guests else Text("No guests. Add one to the configuration of guestd-broker."))
    notes = [note for guest in guests for note in _notes(guest)]
    if notes:
        parts.extend([Text(), *notes])
    return Group(*parts)


def _add_rows(table: Table, guest: GuestView) -> None:
    word = status_word(guest)
    first = [Text(printable(guest.name)), Text(word, style=_STYLE[word])]
    for kind in Kind:
        resource = guest.resource(kind)
        limits = f"{amount_text(kind, guest.limits.min.get(kind))}..{amount_text(kind, guest.limits.max.get(kind))}"
        if guest.limits.burst.get(kind):
            limits += f"+{amount_text(kind, guest.limits.burst.get(kind) - guest.limits.max.get(kind))}"
        table.add_row(
            *(first if kind is Kind.CPU else ("", "")),
            _LABEL[kind],
            *(
                amount_text(kind, amount)
                for amount in (resource.demand, resource.target, resource.plugged, resource.onlined)
            ),
            limits,
            _phase(resource),
        )


def _phase(resource: ResourceView) -> Text:
    if resource.overdue:
        return Text("overdue", style="red")
    if resource.burst and resource.phase is ResizePhase.IDLE:
        return Text("burst", style="yellow")
    quiet = resource.phase in (ResizePhase.IDLE, ResizePhase.UNKNOWN)
    return Text(resource.phase.value, style="dim" if quiet else "yellow")


def _host_line(host: HostView) -> Text:
    return Text.assemble(
        ("host", "bold"),
        f"  free {_pair(host.free)} of {_pair(host.capacity)}; ",
        f"{host.guests_connected} of {host.guests} guests connected",
    )


def _pair(resources: Resources) -> str:
    cpus = format_cpus(resources.cpu_millicores)
    return f"{cpus} {'CPU' if cpus == '1' else 'CPUs'} and {format_size(resources.memory_bytes)}"


def _notes(guest: GuestView) -> Iterable[Text]:
    texts = [guest.degraded] if guest.degraded else []
    for kind in Kind:
        resource = guest.resource(kind)
        if resource.reason.text and resource.phase is not ResizePhase.IDLE:
            texts.append(f"{kind}: {resource.reason.text}")
    texts.extend(f"says: {reason.text}" for reason in guest.demand_reasons if reason.text)
    if guest.protocol_errors:
        texts.append(f"{guest.protocol_errors} messages made no sense")
    if "unproven" in guest.channel:
        texts.append(f"channel: {guest.channel}")
    for text in texts:
        yield Text.assemble((printable(guest.name), "bold"), f"  {printable(text)}")


def as_json(host: HostView, guests: Iterable[GuestView]) -> dict[str, Any]:
    """The whole status, for programs."""
    return {
        "schema": SCHEMA,
        "host": {
            "capacity": _resources_json(host.capacity),
            "reserve": _resources_json(host.reserve),
            "overhead": _resources_json(host.overhead),
            "committed": _resources_json(host.committed),
            "minimums": _resources_json(host.minimums),
            "free": _resources_json(host.free),
            "epoch": host.epoch,
            "version": host.version,
            "started_at": None if host.started_at is None else host.started_at.isoformat(),
            "guests": host.guests,
            "guests_connected": host.guests_connected,
        },
        "guests": [guest_json(guest) for guest in guests],
    }


def guest_json(guest: GuestView) -> dict[str, Any]:
    """One guest, for programs."""
    return {
        "name": guest.name,
        "status": status_word(guest),
        "vm_status": guest.vm_status,
        "paused": guest.paused,
        "connected": guest.connected,
        "channel": guest.channel,
        "hostname": guest.hostname,
        "agent_version": guest.agent_version,
        "kernel": guest.kernel,
        "limits_origin": guest.limits_origin,
        "limits_origin_detail": guest.limits_origin_detail,
        "cpu": _resource_json(guest, Kind.CPU, "millicores"),
        "memory": _resource_json(guest, Kind.MEMORY, "bytes"),
        "demand_reasons": [{"code": one.code, "text": one.text} for one in guest.demand_reasons],
        "last_seen_ago_seconds": guest.last_seen_ago_seconds,
        "protocol_errors": guest.protocol_errors,
        "revision": guest.revision,
        "degraded": guest.degraded,
    }


def _resource_json(guest: GuestView, kind: Kind, unit: str) -> dict[str, Any]:
    resource = guest.resource(kind)
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
        "reason": {"code": resource.reason.code, "text": resource.reason.text},
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
    }


def _resources_json(resources: Resources) -> dict[str, int]:
    return {"cpu_millicores": resources.cpu_millicores, "memory_bytes": resources.memory_bytes}
