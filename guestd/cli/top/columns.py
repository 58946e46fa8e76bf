"""The table of guests as pure functions: its columns, which of them fit, and in which order guests come."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from guestd.cli.status import amount_text, status_word
from guestd.cli.text import printable
from guestd.cli.top.bars import fit, guest_bar
from guestd.cli.top.styles import Piece
from guestd.model.resources import Kind
from guestd.model.view import GuestView, ResizePhase, ResourceView

STATUS_STYLE: Final = {
    "running": "good",
    "observed": "info",
    "no agent": "warn",
    "paused": "info",
    "frozen": "info",
    "degraded": "warn",
    "unknown": "dim",
    "unreachable": "bad",
    "gone": "bad",
}
_MARK: Final = {"running": " ", "observed": "~", "paused": "=", "frozen": "=", "unknown": "?"}
_ARROW: Final = {
    ResizePhase.PLUGGING: ("▲", "good"),
    ResizePhase.ASKING: ("?", "warn"),
    ResizePhase.UNPLUGGING: ("▼", "info"),
}
_GAP: Final = 1

Cell = Callable[[GuestView, int], list[Piece]]


@dataclass(frozen=True, slots=True)
class Column:
    """One column. `rank` tells in which order columns go when there is no room: the highest first."""

    title: str
    width: int
    rank: int
    cell: Cell
    right: bool = False
    group: str = ""
    sort: str = ""  # key of the order that this column stands for
    grows: int = 0  # by at most so many cells
    share: int = 0  # of what is over


@dataclass(frozen=True, slots=True)
class Order:
    """One way to sort. Names break ties, upwards."""

    key: str
    value: Callable[[GuestView], Any]
    down: bool  # as it comes first: the largest on top


def _is(kind: Kind, field: str) -> Callable[[GuestView], int]:
    return lambda guest: int(getattr(guest.resource(kind), field))


def _moving(guest: GuestView) -> int:
    return sum(
        2 * guest.resource(kind).overdue + (guest.resource(kind).phase not in (ResizePhase.IDLE, ResizePhase.UNKNOWN))
        for kind in Kind
    )


_SEVERITY: Final = ("gone", "unreachable", "degraded", "no agent", "unknown", "frozen", "paused", "observed", "running")

ORDERS: Final = (
    Order("name", lambda guest: guest.name, down=False),
    Order("status", lambda guest: _SEVERITY.index(status_word(guest)), down=False),
    Order("cpu-need", _is(Kind.CPU, "demand"), down=True),
    Order("cpu-grant", _is(Kind.CPU, "reserved"), down=True),
    Order("memory-need", _is(Kind.MEMORY, "demand"), down=True),
    Order("memory-grant", _is(Kind.MEMORY, "reserved"), down=True),
    Order("phase", _moving, down=True),
)


def chosen(guests: Iterable[GuestView], wanted: str, order: Order, *, down: bool) -> list[GuestView]:
    """The guests whose name, status or phase holds the wanted text, in order."""
    text = wanted.lower()
    found = [guest for guest in guests if not text or text in _haystack(guest)]
    found.sort(key=lambda guest: guest.name)
    found.sort(key=order.value, reverse=down)
    return found


def _haystack(guest: GuestView) -> str:
    return f"{guest.name.lower()} {status_word(guest)} {phase_text(guest)}"


def phase_text(guest: GuestView) -> str:
    """What moves, in words; empty when nothing does."""
    moving = [(kind, one) for kind in Kind if (one := _phase_word(guest.resource(kind)))]
    if len(moving) == len(Kind) and len({word for _, word in moving}) == 1:
        return f"both {moving[0][1]}"
    return ", ".join(f"{'mem' if kind is Kind.MEMORY else kind} {word}" for kind, word in moving)


def _phase_word(resource: ResourceView) -> str:
    if resource.overdue:
        return "overdue"
    if resource.phase in (ResizePhase.IDLE, ResizePhase.UNKNOWN):
        return "burst" if resource.burst else ""
    return resource.phase.value


def why(guest: GuestView) -> tuple[str, bool]:
    """The reason that matters most, and whether it is about more than rest: trouble, what moves, then what is held
    short of its need.
    """
    if guest.degraded:
        return guest.degraded, True
    resources = [guest.resource(kind) for kind in Kind]
    restless = [one for one in resources if _phase_word(one)] + [one for one in resources if one.demand > one.reserved]
    for one in (*restless, *resources):
        if one.reason.text:
            return f"{one.kind}: {one.reason.text}", bool(restless)
    return "", False


def _name(guest: GuestView, width: int) -> list[Piece]:
    word = status_word(guest)
    style = "name" if word == "running" else STATUS_STYLE[word]
    return [(_MARK.get(word, "!"), style), (fit(printable(guest.name), width - 1), style)]


def _status(guest: GuestView, width: int) -> list[Piece]:
    word = status_word(guest)
    return [(fit(word, width), STATUS_STYLE[word])]


def _need(kind: Kind) -> Cell:
    def cell(guest: GuestView, width: int) -> list[Piece]:
        one = guest.resource(kind)
        style = "warn" if one.demand > one.reserved else "plain"
        return [(fit(amount_text(kind, one.demand), width, right=True), style)]

    return cell


def _grant(kind: Kind) -> Cell:
    def cell(guest: GuestView, width: int) -> list[Piece]:
        one = guest.resource(kind)
        arrow = ("!", "bad") if one.overdue else _ARROW.get(one.phase, (" ", ""))
        return [(fit(amount_text(kind, one.reserved), width - 1, right=True), "strong"), arrow]

    return cell


def _max(kind: Kind) -> Cell:
    def cell(guest: GuestView, width: int) -> list[Piece]:
        return [(fit(amount_text(kind, guest.limits.ceiling(kind)), width, right=True), "dim")]

    return cell


def _bar(kind: Kind) -> Cell:
    def cell(guest: GuestView, width: int) -> list[Piece]:
        one = guest.resource(kind)
        return guest_bar(one.demand, one.reserved, guest.limits.ceiling(kind), width, kind.value)

    return cell


def _phase(guest: GuestView, width: int) -> list[Piece]:
    overdue = any(guest.resource(kind).overdue for kind in Kind)
    return [(fit(phase_text(guest) or "idle", width), "bad" if overdue else "info" if phase_text(guest) else "dim")]


def _why(guest: GuestView, width: int) -> list[Piece]:
    text, matters = why(guest)
    return [(fit(printable(text), width), "plain" if matters else "dim")]


def _of(kind: Kind, rank: int) -> tuple[Column, ...]:
    group = "CPU" if kind is Kind.CPU else "memory GiB"
    return (
        Column("need", 5, 1, _need(kind), right=True, group=group, sort=f"{kind}-need"),
        Column("grant", 6, 0, _grant(kind), right=True, group=group, sort=f"{kind}-grant"),
        Column("max", 5, 4 + rank, _max(kind), right=True, group=group),
        Column("", 5, 6 + rank, _bar(kind), group=group, grows=7, share=1),
    )


COLUMNS: Final = (
    Column("guest", 12, 0, _name, sort="name", grows=20, share=1),
    Column("status", 11, 2, _status, sort="status"),
    *_of(Kind.CPU, 0),
    *_of(Kind.MEMORY, 1),
    Column("phase", 14, 8, _phase, sort="phase"),
    Column("why", 16, 9, _why, grows=1000, share=3),
)


@lru_cache(maxsize=8)
def layout(width: int) -> tuple[tuple[Column, int], ...]:
    """The columns that fit into so many cells, and how wide each is: names, bars and reasons share what is over."""
    shown = list(COLUMNS)
    while _needed(shown) > width and max(column.rank for column in shown) > 0:
        shown.remove(max(reversed(shown), key=lambda column: column.rank))
    widths = [column.width for column in shown]
    spare, shares = max(0, width - _needed(shown)), sum(column.share for column in shown)
    for index, column in enumerate(shown):
        if column.share:
            grown = min(spare * column.share // shares, column.grows)
            widths[index] += grown
            spare, shares = spare - grown, shares - column.share
    return tuple(zip(shown, widths, strict=True))


def _needed(columns: Sequence[Column]) -> int:
    return sum(column.width + _GAP for column in columns) - _GAP


def headings(
    columns: Sequence[tuple[Column, int]], counted: str, order: Order, *, down: bool
) -> tuple[list[Piece], list[Piece]]:
    """Two lines above the table: how many guests and what the groups are, and the columns' titles."""
    above: list[Piece] = []
    titles: list[Piece] = []
    groups: list[tuple[str, int]] = []
    for column, width in columns:
        arrow = ("▼" if down else "▲") if column.sort == order.key else ""
        titles.append((fit(f"{column.title}{arrow}", width, right=column.right), "sorted" if arrow else "heading"))
        titles.append((" " * _GAP, ""))
        if groups and groups[-1][0] == column.group:
            groups[-1] = (column.group, groups[-1][1] + width + _GAP)
        else:
            groups.append((column.group, width + _GAP))
    for index, (group, width) in enumerate(groups):
        if group:
            above.append((f"─ {group} ".ljust(width - _GAP, "─")[: width - _GAP] + " " * _GAP, "dim"))
        else:
            above.append((fit(counted if index == 0 else "", width - _GAP) + " " * _GAP, "heading"))
    return above, titles


def row(guest: GuestView, columns: Sequence[tuple[Column, int]]) -> list[Piece]:
    """One guest's line."""
    pieces: list[Piece] = []
    for column, width in columns:
        pieces += column.cell(guest, width)
        pieces.append((" " * _GAP, ""))
    return pieces
