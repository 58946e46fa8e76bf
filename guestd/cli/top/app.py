"""The screen of `guestctl top`: the pool above, guests in the middle, the selected one below, keys at the bottom."""

import asyncio
import contextlib
import signal
import time
from datetime import UTC, datetime
from typing import ClassVar, Final

from rich.table import Table
from rich.text import Text
from textual import events, on
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Footer, Input, Static

from guestd.cli.top.detail import details
from guestd.cli.top.feed import Feed
from guestd.cli.top.pool import pools, span, title
from guestd.cli.top.styles import STYLES
from guestd.cli.top.table import GuestTable
from guestd.model.explanation import GuestExplanation
from guestd.model.resources import Kind

_REDRAW_SECONDS: Final = 0.25
_CLOCK_SECONDS: Final = 1.0
_SETTLE_SECONDS: Final = 0.15  # a selection that moves on at once asks for nothing
_EXPLAIN_SECONDS: Final = 1.0

_HELP: Final = (
    ("Keys", ""),
    ("up, down, page up, page down, home, end", "select a guest"),
    ("Enter", "why it has what it has, and what it would take to get more"),
    ("/", "list only guests whose name, status or phase holds a text"),
    ("s, S", "sort by the next column; the other way round"),
    ("Tab", "to the details, to scroll them, and back"),
    ("Escape", "back: closes what is open, takes the filter away"),
    ("q", "quit"),
    ("", ""),
    ("Bars", ""),
    ("the host", "█ minimums, ▄ granted above them, ▁ free, · kept for the host itself"),
    ("a guest", "━ granted, ╍ needed beyond that, · up to the most that it may have"),
    ("", ""),
    ("Signs", ""),
    ("before a name", "! trouble, = paused or frozen, ~ observed and never touched, ? not known yet"),
    ("after a grant", "▲ more is plugged, ? asked to give back, ▼ taken back, ! overdue"),
)


class Help(ModalScreen[None]):
    """What the keys and signs mean."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,question_mark,q,enter", "dismiss", "Close")]

    def compose(self) -> ComposeResult:
        """The text in a frame."""
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(max_width=22)
        grid.add_column(ratio=1)
        for left, right in _HELP:
            grid.add_row(Text(left, STYLES["strong" if right else "sorted"]), Text(right, STYLES["plain"]))
        with VerticalScroll(id="help"):
            yield Static(grid)


class Top(App[None]):
    """See the module."""

    ENABLE_COMMAND_PALETTE = False
    TITLE = "guestctl top"
    CSS = """
    Screen { background: #11151a; }
    VerticalScroll, GuestTable {
        scrollbar-size-vertical: 1;
        scrollbar-color: #3a4654;
        scrollbar-color-hover: #62b5e5;
        scrollbar-color-active: #62b5e5;
        scrollbar-background: #11151a;
        scrollbar-background-hover: #11151a;
        scrollbar-background-active: #11151a;
    }
    #title { height: 1; background: #1d2530; }
    #title.lost { background: #4a1d22; }
    .pool { height: 1; }
    #guests { height: 1fr; overflow-x: hidden; scrollbar-gutter: stable; background: #11151a; }
    #details { height: auto; border-top: solid #3a4654; padding: 0 1; }
    #details:focus { border-top: solid #62b5e5; }
    #filter { height: 1; border: none; padding: 0 1; background: #1d2530; }
    Footer { background: #1d2530; }
    Help { align: center middle; background: #000000 60%; }
    #help { width: 92; max-width: 100%; height: auto; max-height: 100%; border: round #62b5e5; padding: 0 1;
            background: #161b22; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("ctrl+c", "quit", "Quit", show=False, priority=True),
        Binding("slash", "filter", "Filter", key_display="/", priority=True),
        Binding("s", "sort", "Sort"),
        Binding("S", "reverse", "Reverse", show=False),
        Binding("enter", "explain", "Why", key_display="Enter"),
        Binding("question_mark", "help", "Help", key_display="?"),
        Binding("escape", "close", "Back", show=False),
        Binding("tab", "other", "Other part", show=False, priority=True),
    ]

    def __init__(self, feed: Feed, *, plain: bool = False) -> None:
        super().__init__(ansi_color=True if plain else None)
        self._feed = feed
        self._explaining = False
        self._explained: GuestExplanation | str | None = None
        self._title = Static(id="title")
        self._pools = {kind: Static(classes="pool") for kind in Kind}
        self._guests = GuestTable()
        self._detail = Static()
        self._details = VerticalScroll(self._detail, id="details")
        self._filter = Input(
            id="filter", placeholder="name, status or phase; Enter keeps it, Escape does not", compact=True
        )

    def compose(self) -> ComposeResult:
        """The parts, from above."""
        yield self._title
        yield from self._pools.values()
        yield self._guests
        yield self._details
        self._filter.display = False
        yield self._filter
        yield Footer(compact=True)

    def on_mount(self) -> None:
        """Begin to follow the broker."""
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.exit)
        self._guests.focus()
        self.run_worker(self._feed.run(), group="feed")
        self.set_interval(_REDRAW_SECONDS, self._redraw)
        self.set_interval(_CLOCK_SECONDS, self._draw_title)
        self.set_interval(_EXPLAIN_SECONDS, self._explain_again)

    def on_resize(self, event: events.Resize) -> None:
        """Have the parts share the new height."""
        self._share_height(event.size.height)
        self._feed.board.changed = True
        self.call_after_refresh(self._redraw)

    def _share_height(self, height: int) -> None:
        share = height * 3 // 5 if self._explaining else max(6, height // 3)
        self._details.styles.max_height = max(4, min(share, height - 9))

    def _redraw(self) -> None:
        """Draw what changed since the last time: at most 4 times a second, however much comes in."""
        board = self._feed.board
        if not board.changed:
            return
        board.changed = False
        self._draw_title()
        if board.host is not None:
            for kind, line in pools(board.host, self.size.width).items():
                self._pools[kind].update(line)
        self._guests.show(board.guests)
        self._draw_details()

    def _draw_title(self) -> None:
        board, now = self._feed.board, datetime.now(UTC)
        problem = board.problem
        if problem:
            ago = span(int(time.monotonic() - board.lost_at))
            problem = f"broker gone for {ago}, trying again: {problem}"
        self._title.set_class(bool(problem), "lost")
        self._title.update(title(board.host, now, problem, self.size.width))

    def _draw_details(self) -> None:
        board, name = self._feed.board, self._guests.selected
        guest = board.guests.get(name) if name is not None else None
        self._details.display = guest is not None
        if guest is not None:
            explained = self._explained if self._explaining else None
            shown = details(guest, board.events(guest.name), explained, board.no_events)
            self._detail.update(shown)

    @on(GuestTable.Selected)
    def _selected(self) -> None:
        self._explained = None
        self._draw_details()
        self._details.scroll_home(animate=False)
        self.run_worker(self._ask(), group="ask", exclusive=True)

    async def _ask(self) -> None:
        """Ask about the selected guest what the streams do not tell."""
        name = self._guests.selected
        await asyncio.sleep(_SETTLE_SECONDS)
        if name is None:
            return
        await self._feed.fetch_events(name)
        await self._explain(name)

    async def _explain(self, name: str) -> None:
        if not self._explaining:
            return
        explained = await self._feed.explain(name)
        if name == self._guests.selected:
            self._explained = explained
            self._draw_details()

    def _explain_again(self) -> None:
        name = self._guests.selected
        if self._explaining and name is not None and not self._feed.board.problem:
            self.run_worker(self._explain(name), group="explain", exclusive=True)

    def action_explain(self) -> None:
        """Open the explanation, or close it."""
        self._explaining = not self._explaining and self._guests.selected is not None
        self._explained = None
        self._share_height(self.size.height)
        self._draw_details()
        self._explain_again()

    def action_sort(self) -> None:
        """Sort by the next column."""
        table, orders = self._guests, self._guests.orders
        at = orders.index(table.order) if table.order in orders else -1
        order = orders[(at + 1) % len(orders)]
        table.sort(order, down=order.down)

    def action_reverse(self) -> None:
        """Sort the other way round."""
        self._guests.sort(self._guests.order, down=not self._guests.down)

    def action_filter(self) -> None:
        """Have a filter typed in."""
        self._filter.display = True
        self.screen.set_focus(self._filter)  # at once, as its key has priority: what is typed next is meant for it

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """A slash in the filter's text is only a slash."""
        return not (action == "filter" and self._filter.has_focus)

    def action_other(self) -> None:
        """To the details, or back to the guests."""
        (self._details if self._guests.has_focus else self._guests).focus()

    def action_help(self) -> None:
        """Say what keys and signs mean."""
        self.push_screen(Help())

    def action_close(self) -> None:
        """Close what is open, the last one first."""
        if self._explaining and not self._filter.has_focus:
            self.action_explain()
        else:
            self._filter.value = ""
            self._close_filter()

    @on(Input.Changed, "#filter")
    def _filter_changed(self, event: Input.Changed) -> None:
        self._guests.filter(event.value.strip())

    @on(Input.Submitted, "#filter")
    def _close_filter(self) -> None:
        self._filter.display = bool(self._filter.value)
        self.screen.set_focus(self._guests)
