"""How things look: a piece of a line is its text and a word for its style, and here is what the words mean."""

from collections.abc import Mapping, Sequence
from typing import Final

from rich.style import Style
from rich.text import Text

Piece = tuple[str, str]

STYLES: Final[Mapping[str, Style]] = {
    word: Style.parse(text)
    for word, text in {
        "": "",
        "plain": "#c8d0da",
        "strong": "bold #e8edf2",
        "name": "#e8edf2",
        "dim": "#7a8594",
        "heading": "bold #9aa7b5",
        "sorted": "bold #e8edf2",
        "good": "#6cc487",
        "warn": "#e5b454",
        "bad": "bold #ef6b6b",
        "info": "#62b5e5",
        "cpu": "#4f9fe0",
        "cpu-min": "#2d6da8",
        "memory": "#a98bea",
        "memory-min": "#7457b8",
        "rest": "#3a424d",
        "title": "bold #e8edf2",
    }.items()
}


def as_text(pieces: Sequence[Piece]) -> Text:
    """One line, for a widget that takes rich's texts. No markup is read."""
    return Text.assemble(*((text, STYLES[word]) for text, word in pieces), no_wrap=True, overflow="crop")
