"""The host as one pool: a title line, and a bar for each kind of resource."""

from datetime import datetime
from typing import Final

from rich.cells import cell_len
from rich.text import Text

from guestd.cli.status import amount_text
from guestd.cli.text import printable
from guestd.cli.top.bars import fit, stacked
from guestd.cli.top.styles import as_text
from guestd.model.resources import Kind
from guestd.model.view import HostView

_LABEL: Final = {Kind.CPU: "CPU", Kind.MEMORY: "Memory"}
_LABEL_WIDTH: Final = 8
_BAR_LEAST: Final = 10


def title(host: HostView | None, now: datetime, problem: str, width: int) -> Text:
    """Which broker this is, for how long, and what is wrong with it.

    :param problem: why what is shown is old; empty while it is not.
    """
    if problem:
        return as_text([(fit(f" {printable(problem)}", width), "bad")])
    if host is None:
        return as_text([(" asking the broker", "dim")])
    left = f" guestd {printable(host.version, 24)} "
    middle = f" epoch {host.epoch}{_uptime(host.started_at, now)}"
    right = f"{host.guests_connected:,} of {host.guests:,} connected "
    if cell_len(left + middle + right) >= width:
        left = ""
    room = width - cell_len(left + middle + right)
    style = "good" if host.guests_connected == host.guests else "warn"
    return as_text([(left, "title"), (middle, "dim"), (" " * max(1, room), ""), (right, style)])


def _uptime(started_at: datetime | None, now: datetime) -> str:
    if started_at is None:
        return ""
    return f", up {span(max(0, int((now - started_at).total_seconds())))}"


def span(seconds: int) -> str:
    """A time in its two largest units."""
    for unit, lower, size, small in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // small} {lower}"
    return f"{seconds} s"


def pools(host: HostView, width: int) -> dict[Kind, Text]:
    """A line for each kind: a bar of what is promised, granted above that, free, and kept by the host; and numbers."""
    numbers = {kind: _numbers(host, kind) for kind in Kind}
    for names in (("min", "committed", "free"), ("min", "held", "free"), ("", "", "free")):
        widest = [max(len(one[index]) for one in numbers.values()) for index in range(len(names))]
        legends = {
            kind: "  ".join(
                f"{name} {text:{'<' if name == 'free' else '>'}{most}}"
                for name, text, most in zip(names, numbers[kind], widest, strict=True)
                if name
            )
            for kind in Kind
        }
        room = width - _LABEL_WIDTH - max(len(legend) for legend in legends.values()) - 3
        if room >= _BAR_LEAST:
            break
    return {kind: _pool(host, kind, legends[kind], max(1, room)) for kind in Kind}


def _numbers(host: HostView, kind: Kind) -> tuple[str, ...]:
    least, committed, free, capacity = (
        amount_text(kind, amount.get(kind)) for amount in (host.minimums, host.committed, host.free, host.capacity)
    )
    return least, committed, f"{free} of {capacity}{'' if kind is Kind.CPU else ' GiB'}"


def _pool(host: HostView, kind: Kind, legend: str, width: int) -> Text:
    capacity, free, least = host.capacity.get(kind), host.free.get(kind), host.minimums.get(kind)
    own = host.reserve.get(kind) + host.overhead.get(kind)
    above = max(0, capacity - own - free - least)
    parts = [(least, "█", f"{kind}-min"), (above, "▄", kind.value), (free, "▁", "rest"), (own, "·", "dim")]
    bar = stacked(parts, capacity, width)
    return as_text([(f" {_LABEL[kind]:<{_LABEL_WIDTH - 1}}", "heading"), *bar, (f"  {legend}", "plain")])
