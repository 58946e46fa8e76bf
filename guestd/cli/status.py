"""What `guestctl status` shows, as a pure function of what the broker said.

Two rows per guest, CPUs and GiB, so that the table can be read at 80 columns; below it a line for all
that needs words. On a narrow terminal the status is below the name, and columns are left out.
"""

from collections.abc import Iterable, Sequence

from guestd.cli.screen import BLANK, Line, Part, cut, paragraph
from guestd.cli.table import Column, table
from guestd.cli.text import printable
from guestd.model.resources import Kind, Resources
from guestd.model.units import GIB, MILLICORES_PER_VCPU, format_cpus, format_size
from guestd.model.view import GuestView, HostView, ResizePhase, ResourceView
from guestd.model.vm import VmStatus

_STYLE = {
    "running": "green",
    "observed": "cyan",
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
_LEAST_NAME_WIDTH = 11  # of the longest status, which is below the name on a narrow terminal
_NARROW = 80
_COLUMNS = (
    Column("GUEST", 9, least=_LEAST_NAME_WIDTH, most=_NAME_WIDTH),
    Column("STATUS", 8),
    Column("", 7),
    Column("NEEDS", 6, right=True),
    Column("TARGET", 4, right=True),
    Column("PLUGGED", 5, right=True),
    Column("ONLINE", 1, right=True),
    Column("MIN..MAX", 2),
    Column("PHASE", 3),
)


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
    if guest.degraded:
        return "degraded"
    return "observed" if guest.observed else "running"


def status_part(guest: GuestView) -> Part:
    """That word in its colour."""
    word = status_word(guest)
    return word, _STYLE[word]


def amount_text(kind: Kind, amount: int) -> str:
    """A number without its unit: CPUs, or GiB to two decimals at most."""
    if kind is Kind.CPU:
        return f"{round(amount / MILLICORES_PER_VCPU, 2):g}"
    return f"{round(amount / GIB, 2):g}" if amount < 100 * GIB else f"{amount / GIB:.0f}"


def render(host: HostView, guests: Sequence[GuestView], width: int | None = None) -> list[Line]:
    """The host in a line, the guests in a table, and notes; `width` in columns, None: as wide as it is."""
    lines = [*_host_lines(host, width), BLANK]
    if not guests:
        text = "No guests. Add one to the configuration of guestd-broker."
        return [*lines, *paragraph((), text, width)]
    stacked = width is not None and width < _NARROW
    columns = [column for column in _COLUMNS if not (stacked and column.title == "STATUS")]
    rows = [row for guest in guests for row in _rows(guest, stacked)]
    lines += table(columns, rows, width)
    notes = [note for guest in guests for note in _notes(guest, width)]
    return [*lines, BLANK, *notes] if notes else lines


def fitted(lines: Sequence[Line], height: int) -> list[Line]:
    """So many of the lines as there are rows, and how many there are more."""
    if len(lines) <= height:
        return list(lines)
    kept = max(0, height - 1)
    return [*lines[:kept], ((f"… {len(lines) - kept} more lines", "dim"),)]


def _rows(guest: GuestView, stacked: bool) -> Iterable[list[Part]]:
    name = (printable(guest.name), "")
    word = status_part(guest)
    for kind in Kind:
        resource = guest.resource(kind)
        first = kind is Kind.CPU
        heads = [name if first else word] if stacked else [name, word] if first else [("", ""), ("", "")]
        limits = f"{amount_text(kind, guest.limits.min.get(kind))}..{amount_text(kind, guest.limits.max.get(kind))}"
        if guest.limits.burst.get(kind):
            limits += f"+{amount_text(kind, guest.limits.burst.get(kind) - guest.limits.max.get(kind))}"
        yield [
            *heads,
            (_LABEL[kind], "dim"),
            *(
                (amount_text(kind, amount), "")
                for amount in (resource.demand, resource.target, resource.plugged, resource.onlined)
            ),
            (limits, ""),
            phase_part(resource),
        ]


def phase_part(resource: ResourceView) -> Part:
    """What is going on, in its colour."""
    if resource.overdue:
        return "overdue", "red"
    if resource.burst and resource.phase is ResizePhase.IDLE:
        return "burst", "yellow"
    quiet = resource.phase in (ResizePhase.IDLE, ResizePhase.UNKNOWN)
    return resource.phase.value, "dim" if quiet else "yellow"


def _host_lines(host: HostView, width: int | None) -> list[Line]:
    text = (
        f"free {_pair(host.free)} of {_pair(host.capacity)}; {host.guests_connected} of {host.guests} guests connected"
    )
    return paragraph((("host", "bold"), ("  ", "")), text, width)


def _pair(resources: Resources) -> str:
    cpus = format_cpus(resources.cpu_millicores)
    return f"{cpus} {'CPU' if cpus == '1' else 'CPUs'} and {format_size(resources.memory_bytes)}"


def _notes(guest: GuestView, width: int | None) -> Iterable[Line]:
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
    if not texts:
        return
    name = printable(guest.name)
    head = ((name if width is None else cut(name, max(8, width // 2)), "bold"), ("  ", ""))
    for text in texts:
        yield from paragraph(head, printable(text), width)
