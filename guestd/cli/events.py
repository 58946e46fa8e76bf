"""What `guestctl events` shows, as a pure function of an event."""

from datetime import datetime

from guestd.cli.screen import Line, cut, paragraph
from guestd.cli.text import printable
from guestd.cli.when import shown
from guestd.model.event import Event, EventCode, SeenEvent

_STYLE = {
    EventCode.FAILED: "red",
    EventCode.OVERDUE: "red",
    EventCode.REFUSED: "yellow",
    EventCode.ENDED_SHORT: "yellow",
    EventCode.BURST: "yellow",
    EventCode.GROWN: "green",
    EventCode.SHRUNK: "green",
    EventCode.WOULD: "cyan",
    EventCode.OPERATOR: "cyan",
}
_NAME_WIDTH = 12
_CODE_WIDTH = max(len(code) for code in EventCode)


def render(seen: SeenEvent, now: datetime, width: int | None = None) -> list[Line]:
    """The event, and before it how many were missed; `width` in columns, None: as wide as it is."""
    lines: list[Line] = []
    if seen.missed:
        lines += paragraph((), f"… {seen.missed} events missed here: this reader was too slow", width)
    event = seen.event
    name = printable(event.guest) or "-"
    if width is not None:
        name = cut(name, max(_NAME_WIDTH, width // 4))
    head = ((f"{shown(event.at, now, width)}  ", "dim"), (name.ljust(_NAME_WIDTH), "bold"), ("  ", ""))
    return [*lines, *_with_code(head, event, width)]


def of_one_guest(event: Event, now: datetime, width: int | None = None) -> list[Line]:
    """An event without its guest's name."""
    return _with_code(((f"  {shown(event.at, now, width)}  ", "dim"),), event, width)


def _with_code(head: Line, event: Event, width: int | None) -> list[Line]:
    code = (event.code.value.ljust(_CODE_WIDTH), _STYLE.get(event.code, ""))
    about = f"{event.kind}: " if event.kind is not None and not event.text.startswith(str(event.kind)) else ""
    return paragraph((*head, code, ("  ", "")), f"{about}{printable(event.text)}", width, indent=4)
