"""A table of text on whatever width there is.

What does not fit is left out by whole columns, the least important one first; only a text that may be long is cut,
and says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from guestd.cli.screen import Line, Part, cut, width_of

_GAP = 2
_SPACE = " " * _GAP


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
    all_rows = [[(column.title, "bold") for column in columns], *rows]
    sizes = [[width_of(text) for text, _ in row] for row in all_rows]
    longest = [max(size) for size in zip(*sizes, strict=True)]
    natural = [min(one, column.most or one) for one, column in zip(longest, columns, strict=True)]
    kept = _kept(columns, natural, width)
    widths = {number: natural[number] for number in kept}
    if width is not None:
        for number in kept:
            over = sum(widths.values()) + _GAP * (len(kept) - 1) - width
            if over > 0 and columns[number].least:
                widths[number] = max(columns[number].least, widths[number] - over)
    form = [(number, room, columns[number].right) for number, room in widths.items()]
    return [_line(form, row, size) for row, size in zip(all_rows, sizes, strict=True)]


def _kept(columns: Sequence[Column], natural: Sequence[int], width: int | None) -> list[int]:
    kept = list(range(len(columns)))

    def needed() -> int:
        least = (min(natural[number], columns[number].least or natural[number]) for number in kept)
        return sum(least) + _GAP * (len(kept) - 1)

    while width is not None and len(kept) > 1 and needed() > width:
        kept.remove(min(kept, key=lambda number: columns[number].rank))
    return kept


def _line(form: Sequence[tuple[int, int, bool]], row: Sequence[Part], sizes: Sequence[int]) -> Line:
    """One row; `form` has the number, the width and the side of each column."""
    parts: list[Part] = []
    for number, width, right in form:
        text, style = row[number]
        size = sizes[number]
        if size > width:
            text = cut(text, width)
            size = width_of(text)
        space = " " * (width - size)
        gap = _SPACE if parts else ""
        parts.append((f"{gap}{space}{text}" if right else f"{gap}{text}{space}", style))
    text, style = parts[-1]
    parts[-1] = (text.rstrip(), style)
    return tuple(parts)
