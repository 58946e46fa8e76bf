"""The calls that change a `BrokerMachine`, and their arguments as bytes and back.

`wake_at` is not among them: all it does is to forget alarms that would ring for nothing. `explain` is, when it
changed a reason, because a reason that was brought up to date may be told to a guest later.
"""

import functools
import inspect
import typing
from collections.abc import Sequence
from typing import Any

import msgspec

from guestd.broker.core.actions import Action, HypervisorAction, Log
from guestd.broker.core.machine import BrokerMachine
from guestd.broker.record.frames import Entry
from guestd.model.errors import RecordError

PLAIN = (
    "add_guest",
    "remove_guest",
    "set_limits",
    "set_host",
    "set_park",
    "pause",
    "observe",
    "reclaim",
    "on_vm_state",
    "on_connected",
    "on_disconnected",
    "on_demand",
    "on_heartbeat",
    "on_ack",
)
"""Calls whose arguments msgspec knows by their annotations. They end in an action or an error, but call no other."""
CALLS = (*PLAIN, "on_vm_failed", "explain", "next_actions")
_HYPERVISOR_ACTIONS = {one.__name__: one for one in typing.get_args(HypervisorAction)}


def named(actions: Sequence[Action]) -> list[tuple[str, object]]:
    """Actions with the names of their types. What a decision was made from is left out, it follows from the rest."""
    return [
        (
            type(one).__name__,
            (one.guest, one.kind, one.code, one.text, one.before, one.after, one.reason)
            if isinstance(one, Log)
            else one,
        )
        for one in actions
    ]


def arguments(entry: Entry) -> list[Any]:
    """The arguments of a call.

    :raise RecordError: When there is no such call, or it has other ones.
    """
    if entry.call not in CALLS:
        raise RecordError(f"holds a call that this version does not know: {entry.call!r}")
    kinds = _parameters(entry.call)
    if len(entry.arguments) != len(kinds):
        raise RecordError(f"holds a call of another version: {entry.call} with {len(entry.arguments)} arguments")
    try:
        return [_decoded(raw, kind) for raw, kind in zip(entry.arguments, kinds, strict=True)]
    except (msgspec.MsgspecError, RecursionError) as error:
        raise RecordError(f"holds a call of another version: {entry.call}: {error}") from error


def _decoded(raw: msgspec.Raw, kind: Any) -> Any:
    if kind is not HypervisorAction:
        return msgspec.msgpack.decode(raw, type=kind)
    name, action = msgspec.msgpack.decode(raw, type=tuple[str, msgspec.Raw])
    if name not in _HYPERVISOR_ACTIONS:
        raise msgspec.ValidationError(f"no action named {name!r}")
    return msgspec.msgpack.decode(action, type=_HYPERVISOR_ACTIONS[name])


@functools.cache
def _parameters(call: str) -> tuple[Any, ...]:
    """What each argument is, by the annotations of the machine itself."""
    method = getattr(BrokerMachine, call)
    hints = typing.get_type_hints(method)
    return tuple(hints[name] for name in list(inspect.signature(method).parameters)[1:])
