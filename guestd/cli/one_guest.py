"""What `guestctl get` shows, as a pure function of a guest."""

from collections.abc import Iterator

from guestd.cli.screen import BLANK, Line, Part, paragraph
from guestd.cli.status import phase_part, status_part
from guestd.cli.table import Column, table
from guestd.cli.text import printable
from guestd.model.resources import Kind
from guestd.model.view import GuestView

_COLUMNS = (Column("", 3), Column("CPU", 2, right=True), Column("MEMORY", 1, right=True))
_LABEL_WIDTH = 14


def render(guest: GuestView, width: int | None = None) -> list[Line]:
    """All that is known of it; `width` in columns, None: as wide as it is."""
    lines = [*paragraph(((printable(guest.name), "bold"), ("  ", ""), status_part(guest)), "", width), BLANK]
    lines += table(_COLUMNS, list(_amounts(guest)), width)
    lines.append(BLANK)
    for label, text in _facts(guest):
        lines += paragraph(((label.ljust(_LABEL_WIDTH), "dim"),), printable(text), width)
    return lines


def _amounts(guest: GuestView) -> Iterator[list[Part]]:
    limits = guest.limits

    def row(label: str, cpu: int, memory: int) -> list[Part]:
        return [(label, "dim"), (Kind.CPU.show(cpu), ""), (Kind.MEMORY.show(memory), "")]

    cpu, memory = guest.resource(Kind.CPU), guest.resource(Kind.MEMORY)
    yield row("needs", cpu.demand, memory.demand)
    yield row("uses", cpu.used, memory.used)
    yield row("target", cpu.target, memory.target)
    yield row("reserved", cpu.reserved, memory.reserved)
    yield row("plugged", cpu.plugged, memory.plugged)
    yield row("online", cpu.onlined, memory.onlined)
    yield row("usable", cpu.usable, memory.usable)
    yield row("min", limits.min.cpu_millicores, limits.min.memory_bytes)
    yield row("max", limits.max.cpu_millicores, limits.max.memory_bytes)
    if limits.burst.cpu_millicores or limits.burst.memory_bytes:
        yield row("burst", limits.burst.cpu_millicores, limits.burst.memory_bytes)
    yield [("weight", "dim"), (str(limits.weight.cpu_millicores), ""), (str(limits.weight.memory_bytes), "")]
    yield [("phase", "dim"), phase_part(cpu), phase_part(memory)]


def _facts(guest: GuestView) -> Iterator[tuple[str, str]]:
    if guest.degraded:
        yield "degraded", guest.degraded
    if guest.observed:
        yield "mode", "observe: decided about and shown, never touched"
    for kind in Kind:
        reason = guest.resource(kind).reason
        if reason.text:
            yield f"why {kind}", reason.text
    for reason in guest.demand_reasons:
        yield "says", reason.text or reason.code
    origin = f" ({guest.limits_origin_detail})" if guest.limits_origin_detail else ""
    yield "limits from", f"{guest.limits_origin}{origin}"
    channel = guest.channel or "none"
    seen = guest.last_seen_ago_seconds
    heard = "never heard of" if seen is None else f"last heard of {seen:.0f} s ago"
    yield "channel", f"{channel}, {'open' if guest.connected else 'closed'}, {heard}"
    for label, text in (("calls itself", guest.hostname), ("guestd", guest.agent_version), ("kernel", guest.kernel)):
        if text:
            yield label, text
    if guest.protocol_errors:
        yield "nonsense", f"{guest.protocol_errors} messages"
