"""Where a command prints: how wide it is, whether it takes colours, and lines of styled text on it.

1. A terminal has its width, or that of COLUMNS. A file or a pipe has none, unless COLUMNS names one: what goes
   there is neither cut nor wrapped.
2. Colours are for terminals, without NO_COLOR, and not for TERM=dumb.
3. What does not fit is wrapped between words, a long name at the edge; where it must be cut, it ends in "…".

Texts are printable already (`guestd.cli.text`): the only escapes that come out here are the styles' own.
"""

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

Part = tuple[str, str]
"""Text, and a name of `_STYLES` or nothing."""
Line = tuple[Part, ...]

BLANK: Final[Line] = ()
SCHEMA: Final = "guestd/v1"
_STYLES: Final[Mapping[str, str]] = {
    "bold": "1",
    "dim": "2",
    "red": "31",
    "green": "32",
    "yellow": "33",
    "cyan": "36",
}


@dataclass(frozen=True, slots=True)
class Screen:
    """What stdout is. `width` in columns; None: as long as a line is."""

    width: int | None = None
    height: int | None = None  # rows; None where there are none
    colours: bool = False

    @property
    def terminal(self) -> bool:
        """Whether somebody looks at it as it is written."""
        return self.height is not None

    def show(self, lines: Iterable[Line]) -> None:
        """Print them."""
        _write("".join(f"{self.text(line)}\n" for line in lines))

    def text(self, line: Line) -> str:
        """The line as it is written."""
        if not self.colours:
            return "".join(text for text, _ in line).rstrip()
        return "".join(f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if style and text else text for text, style in line)


def screen() -> Screen:
    """What stdout is now."""
    if not sys.stdout.isatty():
        named = os.environ.get("COLUMNS", "")
        return Screen(int(named) if named.isdigit() and int(named) > 0 else None)
    size = shutil.get_terminal_size()
    return Screen(size.columns, size.lines, not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb")


def show_json(kind: str, fields: Mapping[str, Any]) -> None:
    """Print one value for programs, on one line; `kind` names its part of the schema."""
    _write(json.dumps({"schema": f"{SCHEMA}/{kind}", **fields}) + "\n")


def _write(text: str) -> None:
    """Write it all; a reader that has read enough ends the program without a word, and without a fault."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in its buffer
        sys.exit(0)


def width_of(text: str) -> int:
    """How many columns the text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def cut(text: str, width: int) -> str:
    """The text in at most that many columns; "…" stands for what is missing."""
    if width_of(text) <= width:
        return text
    while text and width_of(text) > width - 1:
        text = text[:-1]
    return f"{text}…"


def paragraph(head: Line, text: str, width: int | None, indent: int = 2) -> list[Line]:
    """A text that begins on the head's line; what does not fit there follows, indented."""
    if width is None:
        return [(*head, (text, ""))]
    room = max(width, indent + 8)
    *above, head = _folded(head, room)
    start = sum(width_of(part) for part, _ in head)
    if start + width_of(text) <= width:
        return [*above, (*head, (text, ""))]
    wide = not text.isascii()  # such characters may take two columns
    beside = start < room - 8
    wrapped = textwrap.wrap(
        text,
        max(room // 2 if wide else room, indent + 8),
        initial_indent=" " * (start if beside else indent),
        subsequent_indent=" " * indent,
    ) or [""]
    first, rest = wrapped[0], [((line, ""),) for line in wrapped[1:]]
    if beside:
        return [*above, (*head, (first[start:], "")), *rest]
    return [*above, head, ((first, ""),), *rest]


def _folded(head: Line, width: int) -> list[Line]:
    """A head on as many lines as it takes: a name has no place to wrap it at, and is wanted whole."""
    lines: list[list[Part]] = [[]]
    room = width
    for text, style in head:
        while width_of(text) > room:
            fits = len(text)
            while width_of(text[:fits]) > room:
                fits -= 1
            lines[-1].append((text[:fits], style))
            lines.append([])
            text, room = text[fits:], width
        lines[-1].append((text, style))
        room -= width_of(text)
    return [tuple(line) for line in lines]
