"""The table of `guestctl top`: columns, bars and order."""

from dataclasses import replace

import pytest
from rich.cells import cell_len
from top_worlds import NOW, busy_host, guest, host

from guestd.cli.top.bars import fit, guest_bar, stacked
from guestd.cli.top.columns import COLUMNS, ORDERS, chosen, headings, layout, phase_text, row, why
from guestd.cli.top.pool import pools, span, title
from guestd.model.resources import Kind
from guestd.model.view import ResizePhase

GUESTS = list(busy_host().guests.values())


def order(key: str) -> list[str]:
    found = next(one for one in ORDERS if one.key == key)
    return [one.name for one in chosen(GUESTS, "", found, down=found.down)]


@pytest.mark.parametrize("width", [38, 39, 60, 79, 80, 100, 120, 200, 500])
def test_lines_fit_into_every_width(width: int) -> None:
    columns = layout(width)
    for one in GUESTS:
        text = "".join(piece for piece, _ in row(one, columns))
        assert cell_len(text.rstrip()) <= width
    above, titles = headings(columns, "24 guests", ORDERS[0], down=False)
    for pieces in (above, titles):
        assert cell_len("".join(piece for piece, _ in pieces).rstrip()) <= width


def test_columns_go_in_the_order_in_which_they_matter_least() -> None:
    assert [column.title for column, _ in layout(39)] == ["guest", "need", "grant", "need", "grant"]
    assert "status" in [column.title for column, _ in layout(60)]
    assert [column.title for column, _ in layout(79)] == [column.title for column in COLUMNS[:-2]]
    assert [column for column, _ in layout(120)] == list(COLUMNS)


def test_a_name_may_hold_wide_characters_and_escapes() -> None:
    hostile = replace(guest("x"), name="漢字\x1b[2J[bold]漢字漢字漢字")
    for width in (39, 120):
        text = "".join(piece for piece, _ in row(hostile, layout(width)))
        assert "\x1b" not in text
        assert cell_len(text.rstrip()) <= width
    wide = "".join(piece for piece, _ in row(hostile, layout(200)))
    assert "\\x1b[2J[bold]" in wide


def test_order_by_need_and_by_trouble() -> None:
    assert order("name") == sorted(one.name for one in GUESTS)
    needs = {one.name: one.resource(Kind.CPU).demand for one in GUESTS}
    assert [needs[name] for name in order("cpu-need")] == sorted(needs.values(), reverse=True)
    assert order("status")[:2] == ["cache-2", "build-1"]
    assert set(order("phase")[:3]) == {"build-2", "db-2", "web-1"}


def test_the_filter_looks_at_name_status_and_phase() -> None:
    def names(text: str) -> set[str]:
        return {one.name for one in chosen(GUESTS, text, ORDERS[0], down=False)}

    assert names("WEB") == {"web-1", "web-2", "web-3", "web-4"}
    assert names("unreach") == {"cache-2"}
    assert names("plugging") == {"web-1"}
    assert names("no such thing") == set()


def test_what_moves_in_words() -> None:
    one = guest("a", cpu=(3000, 1000, 4000))
    assert phase_text(one) == "cpu plugging"
    both = tuple(replace(resource, phase=ResizePhase.ASKING) for resource in one.resources)
    assert phase_text(replace(one, resources=both)) == "both asking"
    assert phase_text(guest("b")) == ""


def test_the_reason_that_matters_most() -> None:
    assert why(guest("a")) == ("cpu: has what it asks for", False)
    assert why(guest("a", cpu=(3000, 1000, 4000), why="too little")) == ("cpu: too little", True)
    short = guest("a", gib=(3, 2, 4))
    assert why(short) == ("memory: has what it asks for", True)
    assert why(replace(short, degraded="no QMP")) == ("no QMP", True)


def test_bars_have_the_width_that_they_are_given() -> None:
    for grant in range(0, 5001, 250):
        for need in (0, 1000, 4000, 9000):
            assert sum(len(text) for text, _ in guest_bar(need, grant, 4000, 7, "cpu")) == 7
    assert guest_bar(4000, 2000, 4000, 8, "cpu")[:2] == [("━━━━", "cpu"), ("╍╍╍╍", "warn")]
    assert guest_bar(1, 1, 0, 4, "cpu") == [("····", "rest")]


def test_parts_of_the_pool_are_seen_however_small_and_never_overflow() -> None:
    parts = [(1, "a", ""), (0, "b", ""), (998, "c", ""), (1, "d", "")]
    text = "".join(piece for piece, _ in stacked(parts, 1000, 10))
    assert text[0] == "a"
    assert len(text) == 10
    assert "".join(piece for piece, _ in stacked([(900, "a", ""), (900, "b", "")], 1000, 10)) == "a" * 9 + "b"


def test_cut_text_ends_in_an_ellipsis() -> None:
    assert fit("abcdef", 4) == "abc…"
    assert fit("abc", 4, right=True) == " abc"
    assert fit("漢字漢字", 4) == "漢… "
    assert fit("abc", 0) == ""


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_pool_in_numbers(width: int) -> None:
    view = host(GUESTS)
    lines = pools(view, width)
    assert all(cell_len(line.plain.rstrip()) <= width for line in lines.values())
    assert "free 30.5 of 153.5" in lines[Kind.CPU].plain
    if width >= 80:
        assert "min 24  committed 122" in lines[Kind.CPU].plain


def test_the_title_says_which_broker_it_is_or_what_is_wrong() -> None:
    view = host(GUESTS)
    assert title(view, NOW, "", 80).plain.split("  ")[:2] == [" guestd 0.5.0", "epoch 7, up 3 d 4 h"]
    assert title(view, NOW, "", 80).plain.endswith("23 of 24 connected ")
    assert title(view, NOW, "gone \x1b[31m", 80).plain.strip() == "gone \\x1b[31m"
    assert title(None, NOW, "", 80).plain == " asking the broker"


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (65, "1 min 5 s"), (7300, "2 h 1 min"), (90000, "1 d 1 h")])
def test_spans_have_two_units(seconds: int, text: str) -> None:
    assert span(seconds) == text
