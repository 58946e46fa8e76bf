"""The widget that shows guests: only the lines on the screen are ever made, so their number does not matter."""

from collections.abc import Iterable, Mapping
from typing import ClassVar, Final

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from guestd.cli.top.columns import ORDERS, Column, Order, chosen, headings, layout, row
from guestd.cli.top.styles import STYLES, Piece
from guestd.model.view import GuestView

_HEAD: Final = 2
_STRIPE: Final = Style.parse("on #1a1f26")
_CURSOR: Final = Style.parse("on #2b4a6b")
_CURSOR_PLAIN: Final = Style(reverse=True)


class GuestTable(ScrollView, can_focus=True):
    """Guests, one line each, below two lines of headings; one is selected, and stays so wherever it moves."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False),
        Binding("down,j", "move(1)", "Down", show=False),
        Binding("pageup", "page(-1)", "Page up", show=False),
        Binding("pagedown", "page(1)", "Page down", show=False),
        Binding("home,g", "edge(-1)", "First", show=False),
        Binding("end,G", "edge(1)", "Last", show=False),
    ]

    class Selected(Message):
        """Another guest is selected; None: there is none."""

        def __init__(self, name: str | None) -> None:
            super().__init__()
            self.name = name

    def __init__(self) -> None:
        super().__init__(id="guests")
        self.order: Order = ORDERS[0]
        self.down = False
        self.wanted = ""
        self.selected: str | None = None
        self._known: Mapping[str, GuestView] = {}
        self._shown: list[GuestView] = []
        self._at = 0

    @property
    def shown(self) -> list[GuestView]:
        """The guests that are listed, in their order."""
        return self._shown

    def show(self, guests: Mapping[str, GuestView]) -> None:
        """Take over what is known now."""
        self._known = guests
        self._list()

    @property
    def _columns(self) -> tuple[tuple[Column, int], ...]:
        return layout(self.scrollable_content_region.width)

    @property
    def orders(self) -> list[Order]:
        """Those whose column is there now."""
        seen = {column.sort for column, _ in self._columns}
        return [order for order in ORDERS if order.key in seen]

    def sort(self, order: Order, *, down: bool) -> None:
        """List in another order."""
        self.order, self.down = order, down
        self._list()
        self._into_view()

    def filter(self, wanted: str) -> None:
        """List only what holds that text."""
        self.wanted = wanted
        self._list()
        self._into_view()

    def _list(self) -> None:
        self._shown = chosen(self._known.values(), self.wanted, self.order, down=self.down)
        before = self.selected
        at = next((index for index, guest in enumerate(self._shown) if guest.name == before), None)
        self._at = min(self._at, max(0, len(self._shown) - 1)) if at is None else at
        self.selected = self._shown[self._at].name if self._shown else None
        self.virtual_size = Size(0, len(self._shown) + _HEAD)
        self.refresh()
        if self.selected != before:
            self.post_message(self.Selected(self.selected))

    def action_move(self, by: int) -> None:
        """Select the next guest, or the one before."""
        self._select(self._at + by)

    def action_page(self, by: int) -> None:
        """Go on by a screen."""
        self._select(self._at + by * max(1, self.size.height - _HEAD - 1))

    def action_edge(self, side: int) -> None:
        """Go to the first or the last guest."""
        self._select(0 if side < 0 else len(self._shown) - 1)

    def _select(self, at: int) -> None:
        if not self._shown:
            return
        self._at = max(0, min(at, len(self._shown) - 1))
        self.selected = self._shown[self._at].name
        self._into_view()
        self.refresh()
        self.post_message(self.Selected(self.selected))

    def _into_view(self) -> None:
        """The headings lie over the first two lines, so a line is above the view when it is behind them."""
        region = Region(0, self._at, 1, 1 + _HEAD)
        self.scroll_to_region(region, animate=False, force=True, immediate=True, x_axis=False)

    def on_click(self, event: events.Click) -> None:
        """Select what was clicked at."""
        if event.y >= _HEAD and event.y - _HEAD + self.scroll_offset.y < len(self._shown):
            self._select(event.y - _HEAD + self.scroll_offset.y)

    def on_resize(self, event: events.Resize) -> None:
        """Keep the selected guest in view."""
        self.virtual_size = Size(0, len(self._shown) + _HEAD)
        self.call_after_refresh(self._into_view)

    def render_line(self, y: int) -> Strip:
        """One line of the screen."""
        width = self.scrollable_content_region.width
        if y < _HEAD:
            return self._strip(self._head()[y], width, self.rich_style)
        index = y - _HEAD + self.scroll_offset.y
        if index >= len(self._shown):
            text = self._nothing() if index == 0 else ""
            return self._strip([(text, "dim")], width, self.rich_style)
        style = self.rich_style
        if index == self._at:
            style += _CURSOR_PLAIN if self.app.no_color else _CURSOR
        elif index % 2:
            style += _STRIPE
        return self._strip(row(self._shown[index], self._columns), width, style)

    def _head(self) -> tuple[list[Piece], list[Piece]]:
        all_, shown = len(self._known), len(self._shown)
        counted = f"{shown:,} of {all_:,} guests" if self.wanted else f"{all_:,} guest{'' if all_ == 1 else 's'}"
        return headings(self._columns, counted, self.order, down=self.down)

    def _nothing(self) -> str:
        if self._known:
            return "No guest like that. Escape takes the filter away."
        return "No guests. Add one to the configuration of guestd-broker."

    def _strip(self, pieces: Iterable[Piece], width: int, style: Style) -> Strip:
        segments = [Segment(text, style + STYLES[word]) for text, word in pieces if text]
        return Strip(segments).adjust_cell_length(width, style)
