"""A table of text on whatever width there is.

What does not fit is left out by whole columns, the least important one first; only a text that may be long is cut,
and says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from guestd.cli.screen import Line, Part, cut, width_of

_GAP = 2


@dataclass(frozen=True, slots=True)
class Column:
    """One column. The one with the lowest `rank` is left out first; widths in columns of the terminal."""

    title: str
    rank: int = 0
    right: bool = False
    least: int = 0  # what is longer may be cut to this; 0: never
    most: int = 0  # what is longer is always cut to this; 0: never


def table(columns: Sequence[Column], rows: Sequence[Sequence[Part]], width: int | None) -> list[Line]:
    """The heading and the rows."""
    natural = [_natural(column, number, rows) for number, column in enumerate(columns)]
    kept = _kept(columns, natural, width)
    widths = {number: natural[number] for number in kept}
    if width is not None:
        for number in kept:
            over = sum(widths.values()) + _GAP * (len(kept) - 1) - width
            if over > 0 and columns[number].least:
                widths[number] = max(columns[number].least, widths[number] - over)
    heading = [(column.title, "bold") for column in columns]
    return [_line(columns, widths, row) for row in (heading, *rows)]


def _natural(column: Column, number: int, rows: Sequence[Sequence[Part]]) -> int:
    longest = max((width_of(row[number][0]) for row in rows), default=0)
    longest = max(longest, width_of(column.title))
    return min(longest, column.most) if column.most else longest


def _kept(columns: Sequence[Column], natural: Sequence[int], width: int | None) -> list[int]:
    kept = list(range(len(columns)))

    def needed() -> int:
        least = (min(natural[number], columns[number].least or natural[number]) for number in kept)
        return sum(least) + _GAP * (len(kept) - 1)

    while width is not None and len(kept) > 1 and needed() > width:
        kept.remove(min(kept, key=lambda number: columns[number].rank))
    return kept


def _line(columns: Sequence[Column], widths: dict[int, int], row: Sequence[Part]) -> Line:
    parts: list[Part] = []
    for number, width in widths.items():
        text = cut(row[number][0], width)
        space = " " * (width - width_of(text))
        gap = " " * _GAP if parts else ""
        if columns[number].right:
            parts += [(gap + space, ""), (text, row[number][1])]
        else:
            parts += [(gap, ""), (text, row[number][1]), (space, "")]
    while parts and not parts[-1][0].strip():
        parts.pop()
    return tuple(parts)
