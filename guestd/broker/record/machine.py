"""A `BrokerMachine` all of whose inputs are recorded."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol

from guestd.broker.core.actions import Action, HypervisorAction
from guestd.broker.core.ledger import HostCapacity
from guestd.broker.core.machine import BrokerMachine
from guestd.broker.core.track import Timing
from guestd.broker.record.calls import PLAIN, named


class Tape(Protocol):
    """What it is recorded on."""

    def note(self, *entry: object) -> None:
        """One call: its name, its arguments, and for `next_actions` the actions with their names."""

    def may_begin(self, machine: BrokerMachine) -> None:
        """A moment at which a snapshot may be taken."""


class RecordedMachine(BrokerMachine):
    """Tells the tape of each call before it is carried out, and of actions when they are decided."""

    def __init__(
        self,
        tape: Tape,
        host: HostCapacity,
        epoch: int,
        heartbeat_seconds: float = 10.0,
        timing: Timing | None = None,
    ) -> None:
        super().__init__(host, epoch, heartbeat_seconds, timing)
        self._tape = tape
        tape.may_begin(self)

    def on_vm_failed(self, name: str, action: HypervisorAction, text: str, unknown: bool, now: float) -> None:
        self._tape.note("on_vm_failed", (name, (type(action).__name__, action), text, unknown, now))
        super().on_vm_failed(name, action, text, unknown, now)

    def explain(self, name: str, now: float) -> None:
        tracks = self.guests[name].tracks.values() if name in self.guests else ()
        before = [track.reason for track in tracks]
        super().explain(name, now)
        if before != [track.reason for track in tracks]:
            self._tape.note("explain", (name, now))

    def next_actions(self, now: float) -> list[Action]:
        try:
            actions = super().next_actions(now)
        except Exception:
            self._tape.note("next_actions", (now,), [])  # the broker dies of it: replayed, it fails in the same way
            raise
        self._tape.note("next_actions", (now,), named(actions))
        self._tape.may_begin(self)
        return actions


def _recorded(name: str) -> Callable[..., Any]:
    method = getattr(BrokerMachine, name)
    signature = inspect.signature(method)
    count = len(signature.parameters) - 1

    @functools.wraps(method)
    def call(self: RecordedMachine, *arguments: object, **words: object) -> object:
        if words or len(arguments) < count:
            bound = signature.bind(self, *arguments, **words)
            bound.apply_defaults()
            arguments = bound.args[1:]
        self._tape.note(name, arguments)
        return method(self, *arguments)

    return call


for _name in PLAIN:
    setattr(RecordedMachine, _name, _recorded(_name))
