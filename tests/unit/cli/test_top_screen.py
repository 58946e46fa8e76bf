"""The screen of `guestctl top`, on terminals of several sizes."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import Input
from top_worlds import FakeBroker, busy_host, event, guest

from guestd.cli.top.app import Help, Top
from guestd.cli.top.feed import Feed
from guestd.cli.top.table import GuestTable
from guestd.model.event import EventCode

SIZES = [(40, 20), (80, 24), (200, 60)]


class Screen:
    """A running top, and what is on its screen."""

    def __init__(self, top: Top, pilot: Pilot[None], broker: FakeBroker) -> None:
        self.top, self.pilot, self.broker = top, pilot, broker

    @property
    def table(self) -> GuestTable:
        return self.top.screen_stack[0].query_one(GuestTable)

    @property
    def lines(self) -> list[str]:
        strips = self.top.screen._compositor.render_strips()
        return ["".join(segment.text for segment in strip) for strip in strips]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def words(self) -> str:
        """The text as if no line had an end."""
        return " ".join(self.text.split())

    def line(self, part: str) -> str:
        return next(line for line in self.lines if part in line)

    async def until(self, holds: Callable[[], bool]) -> None:
        end = time.monotonic() + 10
        while not holds():
            assert time.monotonic() < end, f"not in time:\n{self.text}"
            await self.pilot.pause(0.02)

    async def shows(self, *parts: str) -> None:
        await self.until(lambda: all(part in self.words for part in parts))


@asynccontextmanager
async def top_of(broker: FakeBroker, size: tuple[int, int] = (80, 24), plain: bool = False) -> AsyncIterator[Screen]:
    top = Top(Feed(broker.connect, retry_seconds=0.01), plain=plain)
    async with top.run_test(size=size) as pilot:
        screen = Screen(top, pilot, broker)
        await screen.until(lambda: len(screen.table.shown) == len(broker.guests))
        yield screen


@pytest.mark.parametrize("size", SIZES)
async def test_everything_is_there_at_every_size(size: tuple[int, int]) -> None:
    async with top_of(busy_host(), size) as screen:
        await screen.shows("connected", "24 guests", "build-1", "needs", "Quit", "Help")
        assert [len(line) for line in screen.lines] == [size[0]] * size[1]
        assert screen.line(" CPU ").rstrip().endswith("free 30.5 of 153.5")
        assert "3▲" not in screen.text
        assert ("unreachable" in screen.text) == (size[0] > 40)
        assert ("its QMP socket does not answer" in screen.text) == (size[0] == 200)


async def test_a_realistic_screen_is_written_to_be_looked_at() -> None:
    out = Path("build/top")
    out.mkdir(parents=True, exist_ok=True)
    async with top_of(busy_host(), (120, 34)) as screen:
        await screen.pilot.press("end", "up", "up", "up", "enter")
        await screen.shows("raise its weight", "refused")
        (out / "top.svg").write_text(screen.top.export_screenshot())
    assert "raise" in (out / "top.svg").read_text()


async def test_keys_select_guests_and_the_details_follow() -> None:
    async with top_of(busy_host()) as screen:
        await screen.pilot.press("down")
        assert screen.table.selected == "build-2"
        await screen.shows("holds 2 GiB more than it is to have")
        await screen.pilot.press("end")
        assert screen.table.selected == "web-4"
        await screen.shows("web-4")
        assert "build-1 " not in screen.text
        await screen.pilot.press("home", "pagedown", "up", "up")
        assert screen.table.selected is not None
        at = [one.name for one in screen.table.shown].index(screen.table.selected)
        assert 0 < at < 24
        await screen.pilot.press("home")
        await screen.shows("build-1 ")


async def test_a_click_selects_what_is_under_it() -> None:
    async with top_of(busy_host()) as screen:
        await screen.pilot.click(GuestTable, offset=(5, 4))
        await screen.until(lambda: screen.table.selected == "build-3")


async def test_sorting_goes_through_the_columns_and_keeps_the_selection() -> None:
    async with top_of(busy_host()) as screen:
        await screen.pilot.press("s")
        assert screen.table.order.key == "status"
        assert screen.table.shown[0].name == "cache-2"
        assert screen.table.selected == "build-1"
        await screen.pilot.press("s")
        assert screen.table.order.key == "cpu-need"
        assert screen.table.shown[0].name == "db-1"
        assert "need▼" in screen.text
        await screen.pilot.press("S")
        assert screen.table.shown[-1].name == "db-1"
        assert screen.table.selected == "build-1"
        assert "build-1 " in screen.text  # in view


async def test_the_filter_narrows_while_it_is_typed() -> None:
    async with top_of(busy_host()) as screen:
        await screen.pilot.press("slash", "d", "b")
        assert [one.name for one in screen.table.shown] == ["db-1", "db-2", "db-3", "db-4"]
        await screen.shows("4 of 24 guests")
        await screen.pilot.press("enter", "down")
        assert screen.table.selected == "db-2"
        await screen.pilot.press("slash", "end", "q")  # a letter, and no command
        assert screen.top.query_one(Input).value == "dbq"
        await screen.shows("No guest like that")
        await screen.pilot.press("escape")
        assert len(screen.table.shown) == 24
        assert screen.table.has_focus


async def test_enter_explains_what_it_would_take_to_get_more() -> None:
    async with top_of(busy_host()) as screen:
        await screen.pilot.press("end", "up", "up", "up")
        assert screen.table.selected == "web-1"
        await screen.shows("its share of a scarce pool is 2 CPU")
        assert screen.broker.explained == 0
        await screen.pilot.press("enter")
        await screen.shows("to get more: raise its weight: guestctl set-limits web-1 --cpu-weight 200", "or: let")
        await screen.pilot.press("down")
        await screen.shows("guestctl set-limits web-2 --cpu-weight 200")
        await screen.pilot.press("escape")
        await screen.until(lambda: "to get more" not in screen.text)


async def test_events_come_in_live_newest_first() -> None:
    async with top_of(busy_host(), (120, 40)) as screen:
        await screen.pilot.press("end", "up", "up", "up")
        await screen.shows("gave 384 MiB of 512 MiB", "grows from 1 CPU to 2 CPU")
        screen.broker.happen(event(160, "web-1", "has 3 CPU", EventCode.GROWN), event(161, "web-2", "not shown"))
        await screen.shows("has 3 CPU")
        assert "not shown" not in screen.text
        lines = screen.lines
        newest = next(index for index, line in enumerate(lines) if "has 3 CPU" in line)
        assert "gave 384 MiB" in lines[newest + 1]


async def test_names_and_reasons_are_never_markup_nor_control_characters() -> None:
    hostile = "[bold red]x[/] [@click=app.quit]go[/] \x1b[2J\x07 \u202egnp"
    bad = guest("a[b]c", why=hostile)
    broker = FakeBroker({bad.name: bad}, past=[event(1, bad.name, hostile)])
    async with top_of(broker, (200, 60)) as screen:
        shown = "[bold red]x[/] [@click=app.quit]go[/] \\x1b[2J\\x07 \\u202egnp"
        await screen.until(lambda: screen.text.count(shown) == 3)  # table, details, event
        assert "a[b]c" in screen.text


async def test_a_broker_that_is_gone_is_said_and_its_return_needs_nobody() -> None:
    async with top_of(busy_host()) as screen:
        screen.broker.go("/run/x: nobody answers")
        await screen.shows("broker gone for", "trying again: /run/x: nobody answers")
        assert "build-1" in screen.text
        screen.broker.go("")
        await screen.shows("23 of 24 connected")
        assert "gone for" not in screen.text


async def test_without_guests_it_says_what_to_do() -> None:
    async with top_of(FakeBroker()) as screen:
        await screen.shows("No guests. Add one")
        await screen.pilot.press("down", "end", "enter", "s")
        screen.broker.change(guest("first"))
        await screen.shows("1 guest ─", "first")


async def test_help_and_quit() -> None:
    async with top_of(busy_host()) as screen:
        await screen.pilot.press("question_mark")
        assert isinstance(screen.top.screen, Help)
        await screen.shows("needed beyond that")
        await screen.pilot.press("escape")
        assert not isinstance(screen.top.screen, Help)
        await screen.pilot.press("q")
        await screen.until(lambda: not screen.top.is_running)
    assert screen.top.return_code == 0


async def test_without_colours_the_selection_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    async with top_of(busy_host(), plain=True) as screen:
        await screen.shows("build-1")
        styles = [
            segment.style
            for y in range(screen.table.size.height)
            for strip in [screen.table.render_line(y)]
            for filter_ in screen.top._filters
            for segment in filter_.apply(list(strip), screen.table.background_colors[1])
        ]
        assert any(style is not None and style.reverse for style in styles)


async def test_a_terminal_that_changes_its_size_is_followed() -> None:
    async with top_of(busy_host(), (200, 60)) as screen:
        await screen.shows("its QMP socket does not answer")
        await screen.pilot.resize_terminal(40, 20)
        await screen.until(lambda: len(screen.lines) == 20 and "unreachable" not in screen.text)
        assert all(len(line) == 40 for line in screen.lines)
        await screen.pilot.resize_terminal(10, 5)  # nothing useful, and no error
        await screen.pilot.resize_terminal(80, 24)
        await screen.shows("unreachable", "Quit")


async def test_a_thousand_guests_that_all_change_are_drawn_at_most_four_times_a_second() -> None:
    broker = FakeBroker({name: guest(name) for name in (f"g{index:05}" for index in range(1000))})
    async with top_of(broker) as screen:
        drawn = 0
        show = screen.table.show

        def counted(guests: object) -> None:
            nonlocal drawn
            drawn += 1
            show(guests)  # type: ignore[arg-type]

        screen.table.show = counted  # type: ignore[method-assign]
        began = time.monotonic()
        for round_ in range(20):
            broker.change(*(guest(f"g{index:05}", cpu=(1000 + round_, 1000, 4000)) for index in range(1000)))
            await asyncio.sleep(0.02)
        await screen.until(lambda: screen.table.shown[0].resources[0].demand == 1019)
        assert 1 <= drawn <= (time.monotonic() - began) * 4 + 2
        await screen.pilot.press("end")
        await screen.shows("g00999", "1,000 guests")
