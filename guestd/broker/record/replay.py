"""Has the production core decide a recorded stretch again, and compares.

The same version's core must come to the same actions, byte for byte; another version's need not, and then the first
difference is what one wants to know.

Weak spot: what guests are likely to need again (`core.forecast`) is learned in floating point. On a CPU of another make
numpy may round in another way, which can show as a difference an hour after the broker's start or later.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

import guestd
from guestd.broker.core.actions import Action, Log
from guestd.broker.core.machine import BrokerMachine
from guestd.broker.record import calls, snapshot
from guestd.broker.record.frames import Entry, Header, RecordFile
from guestd.model.errors import GuestdError, RecordError
from guestd.model.event import Event

_NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Difference:
    """Where the core did something else than what was recorded: the first action that is not the same, as JSON."""

    at: datetime  # UTC
    recorded: str
    replayed: str


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What came of it: the `decisions` of so many `rounds` that came out the same, numbered from 1. Nothing after a
    `difference` was looked at. `cut`: the file ends within a frame.
    """

    header: Header
    rounds: int
    decisions: tuple[Event, ...]
    difference: Difference | None = None
    cut: bool = False


def replay(path: Path) -> ReplayResult:
    """Decide again what a file holds.

    :raise RecordError: When it is no record, of another version, damaged, or nothing that a core can be told.
    """
    with RecordFile(path) as file:
        try:
            machine = snapshot.decode(file.snapshot)
            return _replay(file, machine)
        except RecordError as error:
            raise error if str(error).startswith(str(path)) else RecordError(f"{path}: {_hint(file, error)}") from error


def _hint(file: RecordFile, error: RecordError) -> str:
    here = guestd.__version__
    other = "" if file.header.guestd == here else f" (it was written by guestd {file.header.guestd}, this is {here})"
    return f"{error}{other}"


def _replay(file: RecordFile, machine: BrokerMachine) -> ReplayResult:
    rounds, decisions = 0, list[Event]()
    difference = None
    for entry in file.entries():
        arguments = calls.arguments(entry)
        actions = _call(machine, entry.call, arguments)
        if actions is None:
            continue
        at = _time(file.header, arguments[0])
        difference = _difference(at, entry, actions)
        if difference is not None:
            break
        rounds += 1
        for log in (action for action in actions if isinstance(action, Log)):
            known = (log.kind, log.code, log.text, log.before, log.after, log.reason, log.inputs)
            decisions.append(Event(len(decisions) + 1, at, log.guest, *known))
    return ReplayResult(file.header, rounds, tuple(decisions), difference, file.cut)


def _call(machine: BrokerMachine, call: str, arguments: list[Any]) -> list[Action] | None:
    """Tell the machine; what it wants done, if it was asked."""
    try:
        result = getattr(machine, call)(*arguments)
    except GuestdError:  # then as now: its caller was told
        return None
    except Exception as error:
        # Either the core has a bug, and the broker died of it, or the file was made by nobody's broker.
        raise RecordError(f"the core fails at {call}: {type(error).__name__}: {error}") from error
    return result if call == "next_actions" else None


def _difference(at: datetime, entry: Entry, actions: list[Action]) -> Difference | None:
    replayed = msgspec.msgpack.encode(calls.named(actions))
    if replayed == bytes(entry.actions):
        return None
    for before, now in _pairs(_plain(entry.actions), _plain(replayed)):
        if before != now:
            return Difference(at, before, now)
    return Difference(at, "another encoding", "of the same actions")


def _pairs(before: list[str], now: list[str]) -> Iterator[tuple[str, str]]:
    for index in range(max(len(before), len(now))):
        yield (before[index : index + 1] or [_NOTHING])[0], (now[index : index + 1] or [_NOTHING])[0]


def _plain(actions: bytes | msgspec.Raw) -> list[str]:
    """Actions as text, one by one.

    :raise RecordError: When that is no list of actions.
    """
    try:
        return [
            f"{name} {msgspec.json.encode(action).decode()}"
            for name, action in msgspec.msgpack.decode(actions, type=list[tuple[str, Any]])
        ]
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise RecordError(f"holds actions that no broker records: {error}") from error


def _time(header: Header, clock: float) -> datetime:
    """Wall time of a time of the machine's clock.

    :raise RecordError: When there is no such time.
    """
    try:
        return datetime.fromtimestamp(header.wall, UTC) + timedelta(seconds=clock - header.clock)
    except (OverflowError, ValueError, OSError) as error:
        raise RecordError(f"holds a time that cannot be: {error}") from error
