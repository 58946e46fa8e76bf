"""The whole machine as bytes, and back.

The decisions' dataclasses are encoded as they are, by their own annotations; of the few classes around them that are
none, `_PARTS` names every attribute with its type. So a file decodes into just these types or not at all:
nothing in it can name a class, a function or a length that is then believed, which a pickle could even when what
it may load is restricted. It is also the simpler way: msgspec does the work in C, and a unit test finds what a
list here has forgotten.

JSON, because a bucket's credit is an exact integer of more than 64 bits, which MessagePack has not. What is no plain
number stays out of it: arrays are written as bytes, and times and amounts of the machine are finite.

A snapshot may be taken right after `next_actions` only: no action is left in the machine then.
"""

import math
from typing import Any

import msgspec
import numpy as np

from guestd.broker.core.actions import Observe
from guestd.broker.core.alarms import Alarms
from guestd.broker.core.allocate import Claim, Pool
from guestd.broker.core.expect import Expectation, _Mean
from guestd.broker.core.forecast import Forecaster, _Law
from guestd.broker.core.guest import GuestState
from guestd.broker.core.inputs import PoolFacts
from guestd.broker.core.ledger import Book, HostCapacity
from guestd.broker.core.machine import BrokerMachine
from guestd.broker.core.resize import Resizer
from guestd.broker.core.shares import Shares
from guestd.broker.core.track import Timing
from guestd.model.errors import RecordError
from guestd.model.resources import Kind

_PARTS: dict[type, dict[str, Any]] = {
    BrokerMachine: {
        "host": HostCapacity,
        "epoch": int,
        "heartbeat_seconds": float,
        "timing": Timing,
        "guests": dict[str, GuestState],
        "_resizer": Resizer,
        "_observed": set[str],
        "_shares": dict[Kind, Shares],
        "_last_session": int,
        "_touched": set[str],
        "_hungry": dict[Kind, set[str]],
        "_expectations": dict[Kind, Expectation],
        "_plenty": dict[Kind, bool],
        "_alarms": Alarms,
    },
    Resizer: {
        "epoch": int,
        "timing": Timing,
        "now": float,
        "out": list[Observe],  # empty
        "books": dict[Kind, Book],
        "pools": dict[Kind, PoolFacts],
        "_last_request": int,
    },
    Alarms: {"_heap": list[tuple[float, str]], "_of": dict[str, float]},
    Book: {"_lines": dict[str, tuple[int, int]], "charged": int, "reserved": int, "minimums": int},
    Shares: {"kind": Kind, "idle_tax": float, "_pool": Pool, "_rehearsal": Pool | None},
    Pool: {
        "kind": Kind,
        "scarce": bool,
        "_grain": int,
        "_keep": int,
        "_names": list[str],
        "_claims": list[Claim],
        "_row": dict[str, int],
        "_table": np.ndarray,
        "_in_order": bool,
        "_level": int,
        "_burst_level": int,
        "_solved": tuple[int, int] | None,
    },
    Expectation: {
        "_means": dict[str, _Mean],
        "_free_slots": list[int],
        "_forecaster": Forecaster,
        "next_at": float | None,
    },
    Forecaster: {
        "_ring": np.ndarray,
        "_last": np.ndarray,
        "_change": np.ndarray,
        "_changes": np.ndarray,
        "_steps": int,
        "_features": np.ndarray,
        "_law": _Law,
    },
    _Law: {
        "risk": float,
        "_weights": np.ndarray,
        "_curvature": np.ndarray | None,
        "_short": np.ndarray,
        "_unmet": np.ndarray,
        "_waste": np.ndarray,
        "_loss": np.ndarray,
        "_use": float,
        "_learned": int,
    },
}
_DTYPES = ("<i8", "<f8", "<f4")


class _Array(msgspec.Struct, array_like=True):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def encode(machine: BrokerMachine) -> bytes:
    """The machine as it is.

    :raise TypeError: When something in it has a type that nobody foresaw.
    """
    return _ENCODER.encode(machine)


def decode(data: bytes) -> BrokerMachine:
    """A machine that decides as the one that was encoded would have.

    :raise RecordError: When it is no snapshot of this version's machine.
    """
    try:
        return msgspec.json.decode(data, type=BrokerMachine, dec_hook=_join)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RecordError(f"its snapshot is not of this version's machine: {error}") from error


def _split(value: object) -> object:
    """What msgspec does not know by itself."""
    if isinstance(value, np.ndarray):
        return _Array(value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, np.generic):
        return value.item()
    for part, attributes in _PARTS.items():
        if isinstance(value, part):
            return {name: getattr(value, name) for name in attributes}
    raise TypeError(f"{type(value).__name__} is not foreseen in a snapshot")


def _join(wanted: type, value: Any) -> object:
    """The reverse."""
    if wanted is np.ndarray:
        array = msgspec.convert(value, _Array)
        if array.dtype not in _DTYPES or len(array.data) != math.prod(array.shape) * np.dtype(array.dtype).itemsize:
            raise ValueError("an array of another size or type than it says")
        return np.frombuffer(array.data, array.dtype).reshape(array.shape).copy()
    attributes = _PARTS[wanted]
    if not isinstance(value, dict) or value.keys() != attributes.keys():
        raise ValueError(f"{wanted.__name__} has other parts")
    made: object = wanted.__new__(wanted)  # type: ignore[call-overload]
    for name, kind in attributes.items():
        setattr(made, name, msgspec.convert(value[name], kind, dec_hook=_join))
    return made


_ENCODER = msgspec.json.Encoder(enc_hook=_split)
