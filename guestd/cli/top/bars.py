"""Bars of characters, as pieces: a text and the word for its style (see `styles`).

Each part has a character of its own, so that a bar can be read without colours.
"""

from collections.abc import Sequence
from typing import Final

from rich.cells import cell_len, set_cell_size

from guestd.cli.top.styles import Piece

_GRANTED: Final = "━"
_HALF: Final = "╸"
_WANTED: Final = "╍"
_REST: Final = "·"


def stacked(parts: Sequence[tuple[int, str, str]], total: int, width: int) -> list[Piece]:
    """Parts of a whole, side by side: amount, character and style of each. Their ends are rounded, not their lengths,
    so that nothing adds up to more than the width; a part that is there at all is seen if there is room.
    """
    pieces: list[Piece] = []
    amount = at = 0
    for part, character, style in parts:
        amount += max(0, part)
        end = min(width, round(width * amount / total)) if total > 0 else 0
        if part > 0 and end == at and at < width:
            end = at + 1
        if end > at:
            pieces.append((character * (end - at), style))
            at = end
    return pieces if at == width else [*pieces, (" " * (width - at), "")]


def guest_bar(need: int, grant: int, ceiling: int, width: int, style: str) -> list[Piece]:
    """What a guest has of the most that it may ever have, and in another way what it needs beyond."""
    if ceiling <= 0:
        return [(_REST * width, "rest")]
    halves = min(width * 2, round(width * 2 * grant / ceiling))
    filled = _GRANTED * (halves // 2) + _HALF * (halves % 2)
    wanted = max(0, min(width, -(-width * need // ceiling)) - len(filled)) if need > grant else 0
    return [(filled, style), (_WANTED * wanted, "warn"), (_REST * (width - len(filled) - wanted), "rest")]


def fit(text: str, width: int, *, right: bool = False) -> str:
    """Exactly so many cells; what is cut ends in an ellipsis."""
    if cell_len(text) > width:
        return set_cell_size(set_cell_size(text, width - 1).rstrip() + "…", width) if width > 0 else ""
    padding = " " * (width - cell_len(text))
    return padding + text if right else text + padding
