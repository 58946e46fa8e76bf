"""Where a command prints: width, colours, wrapping and cutting."""

import os
import pty
import subprocess
import sys

import pytest

from guestd.cli.screen import Screen, cut, paragraph, width_of
from guestd.cli.table import Column, table


def on_terminal(environment: dict[str, str]) -> str:
    """What `screen()` finds on a terminal."""
    ours, theirs = pty.openpty()
    script = "from guestd.cli.screen import screen; one = screen(); print(one.width, one.terminal, one.colours)"
    plain = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES", "TERM")}
    try:
        subprocess.run([sys.executable, "-c", script], stdout=theirs, env=plain | environment, check=True, timeout=60)
        return os.read(ours, 4096).decode().strip()
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"TERM": "xterm", "COLUMNS": "72"}, "72 True True"),
        ({"TERM": "dumb", "COLUMNS": "72"}, "72 True False"),
        ({"TERM": "xterm", "COLUMNS": "40", "NO_COLOR": "1"}, "40 True False"),
        ({"TERM": "xterm", "COLUMNS": "40", "NO_COLOR": ""}, "40 True True"),
    ],
)
def test_a_terminal_has_a_width_and_colours_unless_it_is_told_otherwise(
    environment: dict[str, str], found: str
) -> None:
    assert on_terminal(environment) == found


def test_styles_are_escapes_only_where_there_are_colours() -> None:
    line = (("name", "bold"), ("  ", ""), ("gone", "red"))
    assert Screen().text(line) == "name  gone"
    assert Screen(colours=True).text(line) == "\x1b[1mname\x1b[0m  \x1b[31mgone\x1b[0m"


def test_a_paragraph_wraps_between_words_and_loses_none() -> None:
    words = " ".join(f"word{number}" for number in range(40))
    lines = [Screen().text(line) for line in paragraph((("head  ", "bold"),), words, 40)]
    assert max(map(len, lines)) <= 40
    assert " ".join(lines).split() == ["head", *words.split()]
    assert all(line.startswith("  ") for line in lines[1:])


def test_a_head_that_fills_the_line_is_followed_by_its_text() -> None:
    lines = [Screen().text(line) for line in paragraph((("x" * 38, ""),), "and the text", 40)]
    assert lines == ["x" * 38, "  and the text"]


@pytest.mark.parametrize("text", ["", " ", "and the text"])
def test_a_head_that_does_not_fit_is_folded_and_none_of_it_is_lost(text: str) -> None:
    head = (("x" * 64, "bold"), ("  ", ""), ("running", "green"))
    lines = [Screen().text(line) for line in paragraph(head, text, 40)]
    assert lines == ["x" * 40, f"{'x' * 24}  running", *(["  and the text"] if text.strip() else [])]
    wide = [Screen().text(line) for line in paragraph((("世" * 30, ""),), text, 41)]
    assert [width_of(line) for line in wide[:2]] == [40, 20 + len(text.rstrip())]


def test_wide_characters_are_counted_as_they_are_shown() -> None:
    assert width_of("世界") == 4
    assert cut("世界世界", 5) == "世界…"
    assert cut("plain", 5) == "plain"
    for line in paragraph((("h ", ""),), "世界 " * 30, 40):
        assert width_of(Screen().text(line)) <= 40


def test_the_least_important_columns_go_first_and_a_long_text_is_cut_with_a_sign() -> None:
    columns = (Column("NAME", 3, least=5), Column("AMOUNT", 2, right=True), Column("WORDS", 1))
    rows = [[("a-long-name", ""), ("12", ""), ("words", "")]]
    everything, narrow, narrower = (
        [Screen().text(line) for line in table(columns, rows, width)] for width in (None, 15, 13)
    )
    assert everything == ["NAME         AMOUNT  WORDS", "a-long-name      12  words"]
    assert narrow == ["NAME     AMOUNT", "a-long…      12"]
    assert narrower == ["NAME   AMOUNT", "a-lo…      12"]
