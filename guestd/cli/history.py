"""What `guestctl history` shows: a plot, or a table where there is no room for one."""

import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Final

from guestd.cli.screen import BLANK, Line, Screen
from guestd.cli.status import amount_text
from guestd.cli.table import Column, table
from guestd.cli.text import printable
from guestd.model.history import History, HistoryPoint, HistoryResource
from guestd.model.resources import Kind
from guestd.model.units import GIB, MILLICORES_PER_VCPU

_NARROWEST_PLOT: Final = 60
_PLOT_ROWS: Final = 15
_MOST_COLUMNS: Final = 160
_TITLE = {Kind.CPU: "CPUs", Kind.MEMORY: "memory, GiB"}
_TICKS: Final = 3
_CURVES: Final[tuple[tuple[str, str, str, Callable[[HistoryResource], int]], ...]] = (
    ("usable", "·", "cyan", lambda one: one.usable),
    ("plugged", "+", "yellow", lambda one: one.plugged),
    ("granted", "o", "green", lambda one: one.reserved),
    ("needs", "•", "red", lambda one: one.demand),
)
"""Name, sign, colour and value; what comes later is drawn over what came before."""
_ESCAPE: Final = re.compile(r"\x1b\[[0-9;]*m")
_COLUMNS = (
    Column("TIME", 9),
    Column("NEEDS", 8, right=True),
    Column("GRANTED", 7, right=True),
    Column("PLUGGED", 6, right=True),
    Column("USABLE", 5, right=True),
    Column("USED", 4, right=True),
)


def render(guest: str, history: History, kinds: Sequence[Kind], screen: Screen) -> list[Line]:
    """One part for each kind."""
    lines: list[Line] = []
    for kind in kinds:
        title = ((printable(guest), "bold"), (f"  {_TITLE[kind]}", ""))
        lines += [BLANK, title] if lines else [title]
        if screen.terminal and screen.width is not None and screen.width >= _NARROWEST_PLOT:
            lines += _plot(history, kind, screen.width, screen.colours)
        else:
            lines += _table(history, kind, screen.width)
    return lines


def _of(point: HistoryPoint, kind: Kind) -> HistoryResource:
    found = (one for one in point.resources if one.kind is kind)
    return next(found, HistoryResource(kind, 0, 0, 0, 0, 0))


def _table(history: History, kind: Kind, width: int | None) -> list[Line]:
    one_day = _one_day(history)
    form = "%H:%M:%S" if one_day else "%m-%d %H:%M" if width is not None and width < 80 else "%Y-%m-%d %H:%M:%S"
    rows = []
    for point in history.points:
        one = _of(point, kind)
        amounts = (one.demand, one.reserved, one.plugged, one.usable, one.used)
        rows.append([(f"{point.at.astimezone():{form}}", ""), *((amount_text(kind, amount), "") for amount in amounts)])
    return table(_COLUMNS, rows, width)


def _plot(history: History, kind: Kind, width: int, colours: bool) -> list[Line]:
    """Four curves over time, with signs that differ without colours too."""
    import plotext

    unit = MILLICORES_PER_VCPU if kind is Kind.CPU else GIB
    figure = plotext.figure
    figure.clear()
    figure.theme("colorless")
    figure.plot_size(min(width, _MOST_COLUMNS), _PLOT_ROWS)
    figure.legend(False)
    highest = 0.0
    for _, sign, colour, value in _CURVES:
        for stretch in _stretches(history):
            amounts = [value(_of(point, kind)) / unit for point in stretch]
            highest = max(highest, *amounts)
            times = [point.at.timestamp() for point in stretch]
            figure.draw(figure.signal(times, amounts, marker=plotext.marker(sign, colour)).lines(True))
    figure.ruler("y").lim(0, highest * 1.05 or 1)
    first, last = history.points[0].at.timestamp(), history.points[-1].at.timestamp()
    ticks = [first + (last - first) * number / (_TICKS - 1) for number in range(_TICKS)] if last > first else [first]
    form = "%H:%M" if _one_day(history) else "%m-%d %H:%M"
    figure.ruler("x").ticks(ticks, [f"{datetime.fromtimestamp(tick).astimezone():{form}}" for tick in ticks])
    drawn = str(figure.build()).rstrip("\n")
    rows = (drawn if colours else _ESCAPE.sub("", drawn)).split("\n")
    legend = tuple(
        part for name, sign, colour, _ in reversed(_CURVES) for part in ((f"{sign} ", colour), (f"{name}  ", ""))
    )
    return [legend, *(((row, ""),) for row in rows)]


def _stretches(history: History) -> Iterator[list[HistoryPoint]]:
    """Points without a gap between them."""
    stretch: list[HistoryPoint] = []
    for point in history.points:
        if stretch and (point.at - stretch[-1].at).total_seconds() > 1.5 * history.step_seconds:
            yield stretch
            stretch = []
        stretch.append(point)
    if stretch:
        yield stretch


def _one_day(history: History) -> bool:
    return len({point.at.astimezone().date() for point in history.points}) == 1
