"""A snapshot is the whole machine, and decodes into nothing else."""

import json
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from recorded import HOST, LIMITS, eventful, files

from guestd.broker.core.machine import BrokerMachine
from guestd.broker.record import snapshot
from guestd.broker.record.frames import RecordFile
from guestd.cli.bench.broker_cores import Cores
from guestd.model.errors import RecordError
from guestd.model.resources import Kind, Resources


def parts(value: object) -> list[object]:
    """A machine and every object of `guestd.broker.core` in it that is no dataclass."""
    found, waiting = [], [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += one.values()
        elif type(one).__module__.startswith("guestd.broker.core") and hasattr(one, "__dict__"):
            found.append(one)
            waiting += vars(one).values()
    return found


def test_no_attribute_of_the_machine_is_forgotten() -> None:
    machine = BrokerMachine(HOST, 3)
    machine.add_guest("a", LIMITS, observe=True)
    machine.next_actions(1.0)
    found = parts(machine)
    assert {type(one) for one in found} == set(snapshot._PARTS)
    for one in found:
        assert vars(one).keys() == snapshot._PARTS[type(one)].keys(), type(one).__name__


def test_a_machine_comes_back_as_it_was_and_decides_the_same() -> None:
    cores = Cores(30)
    cores.run(12.0)
    data = snapshot.encode(cores.machine)
    again = snapshot.decode(data)
    in_order = msgspec.json.Encoder(enc_hook=snapshot._split, order="deterministic")  # sets have none
    assert in_order.encode(again) == in_order.encode(cores.machine)
    assert type(again) is BrokerMachine
    assert list(again.guests) == list(cores.machine.guests)
    chance = random.Random(2)
    for number in range(50):
        name = f"g{chance.randrange(30):05}"
        limits = LIMITS if chance.random() < 0.5 else cores.machine.guests[name].limits
        for one in (cores.machine, again):
            one.pause(name, number % 3 == 0)
            one.set_limits(name, limits)
        now = cores.now + number * 40
        assert again.next_actions(now) == cores.machine.next_actions(now)
        assert again.wake_at(now) == cores.machine.wake_at(now)


def test_credit_of_more_than_64_bits_and_arrays_come_back_exactly() -> None:
    machine = BrokerMachine(HOST, 3)
    machine.add_guest("a", LIMITS, credit=Resources(5, 1 << 60))
    machine.next_actions(1.0)
    track = machine.guests["a"].tracks[Kind.MEMORY]
    assert track.lend is not None
    track.lend.bucket.credit_microseconds = 10**25 + 7
    machine._expectations[Kind.CPU].note("a", 5, 1.0)
    forecaster = machine._expectations[Kind.CPU]._forecaster
    forecaster._ring[0, :3] = 0.1, np.nan, np.inf
    again = snapshot.decode(snapshot.encode(machine))
    lend = again.guests["a"].tracks[Kind.MEMORY].lend
    assert lend is not None
    assert lend.bucket.credit_microseconds == 10**25 + 7
    ring = again._expectations[Kind.CPU]._forecaster._ring
    assert ring.dtype == forecaster._ring.dtype
    assert np.array_equal(ring, forecaster._ring, equal_nan=True)


def changed(data: bytes, *path: str, to: object) -> bytes:
    root: dict[str, Any] = json.loads(data)
    one: Any = root
    for key in path[:-1]:
        one = one[key]
    one[path[-1]] = to
    return json.dumps(root).encode()


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("epoch",), "seven"),
        (("guests",), {"a": {"name": "a"}}),
        (("more",), 1),
        (("_resizer",), {"epoch": 1}),
        (("_resizer", "out"), [["Log"]]),
        (("_shares", "cpu", "_pool", "_table"), ["<i8", [1 << 40, 1 << 40], ""]),
        (("_shares", "cpu", "_pool", "_table"), ["O", [1], "AAAAAAAAAAA="]),
        (("_shares", "cpu", "_pool", "_table"), ["<i8", [-1], ""]),
        (("_shares", "cpu", "_pool", "_table"), {"__reduce__": "os.system"}),
    ],
)
def test_what_is_no_machine_is_refused(path: tuple[str, ...], to: object) -> None:
    machine = BrokerMachine(HOST, 3)
    machine.next_actions(1.0)
    data = snapshot.encode(machine)
    assert snapshot.decode(data).epoch == 3
    with pytest.raises(RecordError, match="its snapshot is not of this version's machine"):
        snapshot.decode(changed(data, *path, to=to))


def test_bytes_that_are_no_json_are_refused() -> None:
    for data in (b"", b"\x80\x04", b"[" * 100_000, b'{"a"', b'{"epoch": 1}'):
        with pytest.raises(RecordError):
            snapshot.decode(data)


def test_what_has_a_type_that_nobody_foresaw_is_no_snapshot() -> None:
    machine = BrokerMachine(HOST, 3)
    machine._touched = {object()}  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="object is not foreseen in a snapshot"):
        snapshot.encode(machine)


def test_every_file_of_a_record_begins_with_one(tmp_path: Path) -> None:
    eventful(tmp_path, seconds=8.0)
    with RecordFile(files(tmp_path)[0]) as file:
        assert snapshot.decode(file.snapshot).guests == {}
