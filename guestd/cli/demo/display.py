"""Shows a run while it runs: in place on a terminal, as plain lines elsewhere.

Times are those of the recorder: what is passed as `now`.

`Board` is the state that both show, fed with records and free of any terminal; `frame` and `plain_line`
turn it into something to look at.
"""

import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.text import Text

from guestd.cli.demo.timeline import Broker, Guest, Hypervisor, Load, Record
from guestd.cli.demo.verify import Expected
from guestd.cli.text import printable
from guestd.model.units import GIB, MILLICORES_PER_VCPU, format_size

_SPARKS = " ▁▂▃▄▅▆▇█"
_EVENTS_SHOWN = 9
_BUSY_OVER_SECONDS = 1.0
_BAR = 40
_LOAD_WORDS = {
    "cpu-onset": "load in the guest: {detail} start",
    "cpu-end": "load in the guest: they end",
    "memory-onset": "load in the guest: a process starts to grow",
    "memory-full": "load in the guest: it has all its memory",
    "memory-end": "load in the guest: it exits ({detail})",
}


@dataclass(frozen=True, slots=True)
class Moment:
    """The values of one second, for the sparklines."""

    busy: float
    online: int
    used_bytes: int
    given_bytes: int


@dataclass(slots=True)
class Board:
    """What is known now. CPUs busy are averaged over about a second."""

    expected: Expected
    broker: Broker | None = None
    hypervisor: Hypervisor | None = None
    guest: Guest | None = None
    busy: float = 0.0
    history: deque[Moment] = field(default_factory=lambda: deque(maxlen=400))
    events: list[tuple[float, str]] = field(default_factory=list)
    _recent: deque[Guest] = field(default_factory=deque)
    _second: int = -1

    def see(self, record: Record) -> None:
        """Takes a record in."""
        match record:
            case Broker():
                self.broker = record
            case Hypervisor():
                self.hypervisor = record
            case Guest():
                self._see_guest(record)
            case Load() if record.event in _LOAD_WORDS:
                self.say(record.t, _LOAD_WORDS[record.event].format(detail=record.detail))
            case _:
                pass

    def say(self, t: float, text: str) -> None:
        """Takes an event in."""
        self.events.append((t, printable(text)))

    def _see_guest(self, guest: Guest) -> None:
        self.guest = guest
        self._recent.append(guest)
        while len(self._recent) > 2 and guest.guest_t - self._recent[1].guest_t >= _BUSY_OVER_SECONDS:
            self._recent.popleft()
        first = self._recent[0]
        passed = guest.guest_t - first.guest_t
        if passed > 0.1:
            self.busy = max((guest.busy_seconds - first.busy_seconds) / passed, 0.0)
        if self.hypervisor is not None and int(guest.t) > self._second:
            self._second = int(guest.t)
            self.history.append(Moment(self.busy, guest.cpus_online, self.used_bytes, self.hypervisor.memory_bytes))

    @property
    def used_bytes(self) -> int:
        """Memory in use in the guest."""
        if self.guest is None:
            return 0
        return self.guest.memory_total_bytes - self.guest.memory_available_bytes


def plain_line(board: Board) -> str:
    """The state in a line; "" while nothing is known."""
    guest, hypervisor, broker = board.guest, board.hypervisor, board.broker
    if guest is None or hypervisor is None or broker is None:
        return ""
    return (
        f"CPUs: {board.busy:.1f} busy, {broker.cpu_demand_millicores / MILLICORES_PER_VCPU:.1f} needed, "
        f"{hypervisor.vcpus} given, {guest.cpus_online} online | GiB: {_gib(board.used_bytes)} used, "
        f"{_gib(broker.memory_demand_bytes)} needed, {_gib(hypervisor.memory_bytes)} given, "
        f"{_gib(guest.memory_total_bytes)} usable"
    )


def _steady(board: Board) -> tuple[int, ...]:
    """What makes a plain line worth printing when it changes: the amounts, not the noise of the load."""
    guest, hypervisor = board.guest, board.hypervisor
    if guest is None or hypervisor is None:
        return ()
    return (
        round(board.busy),
        hypervisor.vcpus,
        guest.cpus_online,
        hypervisor.memory_bytes,
        guest.memory_total_bytes,
        board.used_bytes // (GIB // 8),
    )


def frame(board: Board, t: float, width: int) -> RenderableType:
    """The whole picture for a terminal."""
    lines = [
        Text.assemble(("guestd demo", "bold"), f"   {t:5.1f} s", ("   Ctrl-C stops everything", "dim")),
        Text(),
        *_cpu_lines(board, width),
        Text(),
        *_memory_lines(board, width),
        Text(),
    ]
    lines.extend(
        Text.assemble((f"{at:6.1f} s  ", "dim"), text, no_wrap=True, overflow="ellipsis")
        for at, text in board.events[-_EVENTS_SHOWN:]
    )
    return Padding(Group(*lines), (1, 2))


def _cpu_lines(board: Board, width: int) -> list[Text]:
    online = board.guest.cpus_online if board.guest else 0
    given = board.hypervisor.vcpus if board.hypervisor else 0
    needed = board.broker.cpu_demand_millicores / MILLICORES_PER_VCPU if board.broker else 0.0
    most = board.expected.cpu_max
    boxes = Text()
    for number in range(most):
        style = "bright_blue" if number < online else "blue" if number < given else "bright_black"
        boxes.append("█████" if number < online else "▒▒▒▒▒" if number < given else "·····", style)
        boxes.append(" ")
    numbers = f"{online} online, {given} given, {needed:.1f} needed, {board.busy:.1f} busy"
    moments = _window(board, width)
    return [
        Text.assemble(("CPUs     ", "bold"), boxes, f"  {numbers}", no_wrap=True, overflow="ellipsis"),
        Text.assemble(("  load   ", "dim"), (sparkline([one.busy for one in moments], most), "bright_black")),
        Text.assemble(("  online ", "dim"), (sparkline([one.online for one in moments], most), "bright_blue")),
    ]


def _memory_lines(board: Board, width: int) -> list[Text]:
    usable = board.guest.memory_total_bytes if board.guest else 0
    given = board.hypervisor.memory_bytes if board.hypervisor else 0
    needed = board.broker.memory_demand_bytes if board.broker else 0
    most = board.expected.memory_max_bytes
    used_cells, usable_cells, given_cells = (
        min(round(amount / most * _BAR), _BAR) for amount in (board.used_bytes, usable, given)
    )
    bar = Text("█" * used_cells, "bright_black")
    bar.append("█" * max(usable_cells - used_cells, 0), "bright_blue")
    bar.append("▒" * max(given_cells - usable_cells, 0), "blue")
    bar.append("·" * max(_BAR - max(given_cells, usable_cells), 0), "bright_black")
    numbers = f"{_gib(usable)} usable, {_gib(given)} given, {_gib(needed)} needed of {format_size(most)}"
    moments = _window(board, width)
    peak = max([one.given_bytes for one in moments] + [GIB])
    return [
        Text.assemble(("Memory   ", "bold"), bar, no_wrap=True, overflow="ellipsis"),
        Text.assemble("         ", f"{_gib(board.used_bytes)} used, {numbers}", no_wrap=True),
        Text.assemble(("  used   ", "dim"), (sparkline([one.used_bytes for one in moments], peak), "bright_black")),
        Text.assemble(("  given  ", "dim"), (sparkline([one.given_bytes for one in moments], peak), "bright_blue")),
    ]


def sparkline(values: "list[float] | list[int]", highest: float) -> str:
    """One character per value."""
    last = len(_SPARKS) - 1
    return "".join(_SPARKS[min(max(round(value / highest * last), 0), last)] for value in values)


def _window(board: Board, width: int) -> list[Moment]:
    return list(board.history)[-max(width - 16, 10) :]


def _gib(amount_bytes: int) -> str:
    return f"{amount_bytes / GIB:.2f}"


class Display(Protocol):
    """What a run shows itself on."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def say(self, text: str) -> None:
        """An event of the run."""

    def see(self, record: Record) -> None:
        """A record that was made."""


class PlainDisplay:
    """Lines: every event at once, the state when it changed and at most once a second."""

    def __init__(
        self,
        expected: Expected,
        now: Callable[[], float],
        write: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        self._board = Board(expected)
        self._now, self._write = now, write
        self._shown: tuple[int, ...] = ()
        self._shown_at = float("-inf")
        self._events = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write_events()

    def say(self, text: str) -> None:
        self._board.say(self._now(), text)
        self._write_events()

    def see(self, record: Record) -> None:
        self._board.see(record)
        self._write_events()
        steady = _steady(self._board)
        line = plain_line(self._board)
        if line and steady != self._shown and self._now() - self._shown_at >= 1.0:
            self._shown, self._shown_at = steady, self._now()
            self._write(f"{self._now():6.1f} s  {line}")

    def _write_events(self) -> None:
        for at, text in self._board.events[self._events :]:
            self._write(f"{at:6.1f} s  {text}")
        self._events = len(self._board.events)


class LiveDisplay:
    """In place on a terminal; when it is over, the last picture stays."""

    def __init__(self, expected: Expected, now: Callable[[], float], console: Console) -> None:
        self._board = Board(expected)
        self._now, self._console = now, console
        self._live = Live(console=console, get_renderable=self._frame, refresh_per_second=5)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def say(self, text: str) -> None:
        self._board.say(self._now(), text)

    def see(self, record: Record) -> None:
        self._board.see(record)

    def _frame(self) -> RenderableType:
        return frame(self._board, self._now(), self._console.width)


def choose_display(expected: Expected, now: Callable[[], float]) -> Display:
    """In place where stdout is a terminal, lines elsewhere."""
    if sys.stdout.isatty():
        return LiveDisplay(expected, now, Console(highlight=False, markup=False, emoji=False))
    return PlainDisplay(expected, now)
