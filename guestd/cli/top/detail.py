"""The selected guest: where it stands, why, what it would take to get more, and its last events."""

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from guestd.cli.status import amount_text, status_word
from guestd.cli.text import printable
from guestd.cli.top.columns import STATUS_STYLE
from guestd.cli.top.styles import STYLES
from guestd.model.event import Event, EventCode
from guestd.model.explanation import GuestExplanation
from guestd.model.resources import Kind
from guestd.model.view import GuestView

_CODE_STYLE = {
    EventCode.GROWN: "good",
    EventCode.GROWING: "good",
    EventCode.SHRUNK: "info",
    EventCode.SHRINKING: "info",
    EventCode.ASKING: "info",
    EventCode.REFUSED: "warn",
    EventCode.ENDED_SHORT: "warn",
    EventCode.OVERDUE: "bad",
    EventCode.FAILED: "bad",
    EventCode.WOULD: "warn",
}


def details(
    guest: GuestView, events: Sequence[Event], explained: GuestExplanation | str | None, no_events: str
) -> RenderableType:
    """Everything, most important first.

    :param events: newest first.
    :param explained: what the broker said, or why it did not; None when nobody asked.
    :param no_events: why there are none.
    """
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True, style=STYLES["heading"], min_width=6)
    grid.add_column(ratio=1, overflow="fold")
    for kind in Kind:
        grid.add_row("CPU" if kind is Kind.CPU else "memory", _resource(guest, kind, explained))
    for label, text in _notes(guest):
        grid.add_row(label, Text(printable(text), STYLES["plain"]))
    if isinstance(explained, str):
        grid.add_row("why", Text(f"cannot be told: {printable(explained)}", STYLES["warn"]))
    log = Table.grid(padding=(0, 1, 0, 0))
    log.add_column(no_wrap=True, style=STYLES["dim"])
    log.add_column(no_wrap=True)
    log.add_column(ratio=1, overflow="fold")
    for event in events:
        code = Text(event.code.value, STYLES[_CODE_STYLE.get(event.code, "plain")])
        log.add_row(f"{event.at.astimezone():%H:%M:%S}", code, Text(printable(event.text), STYLES["plain"]))
    parts: list[RenderableType] = [_title(guest), grid]
    if events:
        parts.append(log)
    elif no_events:
        parts.append(Text(f"no events: {printable(no_events)}", STYLES["warn"]))
    return Group(*parts)


def _title(guest: GuestView) -> Text:
    word = status_word(guest)
    facts = [f"as {guest.hostname}" if guest.hostname else ""]
    facts += [guest.channel, f"kernel {guest.kernel}" if guest.kernel else "", f"limits from {guest.limits_origin}"]
    shown = [printable(fact, 64) for fact in facts if fact]
    return Text.assemble(
        (printable(guest.name), STYLES["title"]),
        "  ",
        (word, STYLES[STATUS_STYLE[word]]),
        ("  observed: never touched" if guest.observed else "", STYLES["warn"]),
        (f"  {', '.join(shown)}", STYLES["dim"]),
        no_wrap=True,
        overflow="ellipsis",
    )


def _resource(guest: GuestView, kind: Kind, explained: GuestExplanation | str | None) -> Text:
    one = guest.resource(kind)
    found = None
    if isinstance(explained, GuestExplanation):
        found = next((resource for resource in explained.resources if resource.kind is kind), None)
    text = Text(style=STYLES["plain"])
    if found is not None:
        text.append(printable(found.summary))
        for number, step in enumerate(found.to_get_more, 1):
            text.append(f"\n  {'to get more: ' if number == 1 else '         or: '}", STYLES["heading"])
            text.append(printable(step.text), STYLES["good"])
        return text
    least, most = (amount_text(kind, amount) for amount in (guest.limits.min.get(kind), guest.limits.ceiling(kind)))
    text.append(f"needs {kind.show(one.demand)}, has {kind.show(one.reserved)}", STYLES["strong"])
    text.append(f" of {least} to {most}")
    if one.used:
        text.append(f", {kind.show(one.used)} in use")
    if one.reason.text:
        text.append(f": {printable(one.reason.text)}")
    return text


def _notes(guest: GuestView) -> Iterator[tuple[str, str]]:
    if guest.degraded:
        yield "wrong", guest.degraded
    says = "; ".join(reason.text for reason in guest.demand_reasons if reason.text)
    if says:
        yield "says", says
    if guest.protocol_errors:
        yield "", f"{guest.protocol_errors} of its messages made no sense"
