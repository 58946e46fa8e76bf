"""What is shown while the demo runs."""

import io
from itertools import pairwise

from demo_worlds import ONSET, good
from rich.console import Console

from guestd.cli.demo.display import Board, LiveDisplay, PlainDisplay, frame, plain_line, sparkline
from guestd.cli.demo.timeline import Load
from guestd.cli.demo.verify import Expected


def seen(until: float) -> Board:
    board = Board(Expected())
    for record in sorted(good().records, key=lambda one: one.t):
        if record.t <= until:
            board.see(record)
    return board


def shown(board: Board, t: float, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(frame(board, t, width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_frame_at_the_peak_of_the_load() -> None:
    text = shown(seen(40.0), 40.0)
    assert "█████ █████ █████ █████" in text
    assert "4 online, 4 given, 4.0 needed, 4.0 busy" in text
    assert "4 busy processes start" in text


def test_the_frame_keeps_to_80_columns() -> None:
    for t in (0.0, 20.0, 26.0, 60.0, 95.0):
        assert max(len(line) for line in shown(seen(t), t).splitlines()) <= 80


def test_the_frame_before_anything_is_known() -> None:
    assert "0 online, 0 given" in shown(Board(Expected()), 0.0)


def test_plugged_but_not_online_looks_different() -> None:
    board = seen(20.0)
    assert board.hypervisor is not None
    board.see(type(board.hypervisor)(20.1, 3, 512 << 20, 512 << 20))
    assert "█████ ▒▒▒▒▒ ▒▒▒▒▒ ·····" in shown(board, 20.1)


def test_busy_comes_from_the_kernels_counter() -> None:
    assert round(seen(ONSET + 10).busy, 1) == 4.0
    assert seen(20.0).busy < 0.2


def test_events_cannot_steer_the_terminal() -> None:
    board = Board(Expected())
    board.see(Load(1.0, 1.0, "memory-end", "\x1b[31mred"))
    assert "\x1b[31m" not in shown(board, 1.0)
    assert "\\x1b[31mred" in shown(board, 1.0)


def test_sparkline() -> None:
    assert sparkline([0, 1, 2, 4, 9], 4) == " ▂▄██"


def test_plain_lines_come_at_most_once_a_second_and_only_for_news() -> None:
    now = [0.0]
    out: list[str] = []
    with PlainDisplay(Expected(), lambda: now[0], out.append) as display:
        display.say("hello")
        assert out == ["   0.0 s  hello"]
        for record in sorted(good().records, key=lambda one: one.t):
            now[0] = record.t
            display.see(record)
    states = [line for line in out if "CPUs:" in line]
    times = [float(line.split()[0]) for line in states]
    assert all(after - before >= 0.99 for before, after in pairwise(times))
    assert sum(time < ONSET for time in times) == 1  # nothing changed before
    assert sum(74 > time > 69 for time in times) <= 1  # nor after the load, before memory goes back
    assert any("4 given, 4 online" in line for line in states)
    assert any("it exits (ok)" in line for line in out)


def test_plain_line_without_views_is_empty() -> None:
    assert plain_line(Board(Expected())) == ""


def test_live_display_on_a_terminal() -> None:
    file = io.StringIO()
    console = Console(file=file, width=100, force_terminal=True, color_system=None)
    with LiveDisplay(Expected(), lambda: 5.0, console) as display:
        display.say("booting")
        for record in good().records:
            display.see(record)
    assert "booting" in file.getvalue()
    assert "1 online, 1 given" in file.getvalue()
