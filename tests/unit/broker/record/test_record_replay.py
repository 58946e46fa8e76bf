"""A record decided again: the same in another process, and what is different is found."""

import random
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
import pytest
from recorded import HOST, LIMITS, PLAIN, eventful, files, replayed_elsewhere

from guestd.broker.core import judge
from guestd.broker.core.actions import Action
from guestd.broker.core.machine import BrokerMachine
from guestd.broker.record import recorder as recorder_module
from guestd.broker.record import snapshot
from guestd.broker.record.frames import MAGIC, Header, entries_payload, frame
from guestd.broker.record.recorder import Recorder
from guestd.broker.record.replay import replay
from guestd.cli.bench import broker_cores
from guestd.model.errors import RecordError
from guestd.model.event import EventCode
from guestd.model.resources import Kind


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of some eventful minutes."""
    directory = tmp_path_factory.mktemp("record")
    eventful(directory)
    (file,) = files(directory)
    return file


def test_an_eventful_host_is_decided_the_same_again(record: Path) -> None:
    result = replay(record)
    assert result.difference is None
    assert result.rounds > 100
    codes = {event.code for event in result.decisions}
    assert codes >= {EventCode.GROWING, EventCode.GROWN, EventCode.ASKING, EventCode.SHRUNK, EventCode.FAILED}
    assert [event.id for event in result.decisions] == list(range(1, len(result.decisions) + 1))
    assert all(event.inputs is not None for event in result.decisions)
    assert (datetime.now(UTC) - result.decisions[0].at).total_seconds() < 600


def test_other_hashes_change_nothing(record: Path) -> None:
    here = replay(record)
    for seed in (1, 2):
        there = replayed_elsewhere(record, seed)
        assert there["difference"] is None
        assert (there["rounds"], there["decisions"]) == (here.rounds, len(here.decisions))
        assert [event["text"] for event in there["events"]] == [event.text for event in here.decisions]


def test_a_rule_that_was_changed_is_found(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "may_shrink", lambda *_: False)
    result = replay(record)
    assert result.difference is not None
    assert "asking down to" in result.difference.recorded
    assert result.difference.recorded != result.difference.replayed
    assert all(event.at <= result.difference.at for event in result.decisions)
    monkeypatch.undo()
    assert 0 < result.rounds < replay(record).rounds


def test_what_the_broker_died_of_is_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(tmp_path, 1 << 20)
    machine = recorder.machine(HOST, 1)
    machine.add_guest("a", LIMITS)
    machine.next_actions(1.0)

    def broken(*_: object) -> bool:
        raise KeyError("a bug")

    monkeypatch.setattr(BrokerMachine, "next_actions", broken)
    with pytest.raises(KeyError):
        machine.next_actions(2.0)
    recorder.close()
    (file,) = files(tmp_path)
    monkeypatch.undo()
    assert replay(file).rounds == 2, "a core that is mended gets over it"

    whole = BrokerMachine.next_actions

    def broken_at_2(self: BrokerMachine, now: float) -> list[Action]:
        if now == 2.0:
            raise KeyError("a bug")
        return whole(self, now)

    monkeypatch.setattr(BrokerMachine, "next_actions", broken_at_2)
    with pytest.raises(RecordError, match="the core fails at next_actions: KeyError: 'a bug'"):
        replay(file)


def test_each_of_many_files_is_replayed_alone_and_the_bound_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "_CHUNK_BYTES", 4000)
    monkeypatch.setattr(recorder_module, "_MOST_CHUNKS", 10_000)
    eventful(tmp_path, limit_bytes=90_000, seconds=60.0, seed=3)
    found = files(tmp_path)
    assert len(found) >= 3
    assert found[0].name > "0000000001.record"
    assert sum(file.stat().st_size for file in found) <= 90_000
    results = [replay(file) for file in found]
    assert all(result.difference is None for result in results)
    assert any(result.decisions for result in results[1:])


def test_what_was_learned_in_hours_is_in_a_snapshot_and_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(tmp_path, 64 << 20, retry_seconds=0.0)
    monkeypatch.setattr(broker_cores, "BrokerMachine", lambda *a, **b: recorder.machine(*a, **b))
    cores = broker_cores.Cores(60)
    chance = random.Random(1)
    for number in range(44):
        if number == 30:
            recorder._begin_at = 0.0  # a new file
        cores.now += 300.0
        cores._tick(chance.sample(list(cores.guests.values()), 40))
        cores._tick([])
    recorder.close()
    law = cores.machine._expectations[Kind.MEMORY]._forecaster._law
    assert law._learned > 1000
    assert any(guest.tracks[kind].expected for guest in cores.machine.guests.values() for kind in Kind)
    first, second = files(tmp_path)
    for file in (first, second):
        assert replayed_elsewhere(file, 3)["difference"] is None
    assert replay(second).rounds == 2 * 14 - 1


def made(tmp_path: Path, machine: BrokerMachine, *entries: tuple[object, ...], clock: float = 0.0) -> Path:
    """A file that no broker wrote."""
    header = Header("0.0.9", 1, 1_700_000_000.0, clock)
    payload = entries_payload(len(entries), b"".join(map(msgspec.msgpack.encode, entries)))
    path = tmp_path / "made.record"
    path.write_bytes(MAGIC + frame(msgspec.json.encode(header)) + frame(snapshot.encode(machine)) + frame(payload))
    return path


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (("__init__", ()), "a call that this version does not know: '__init__'"),
        (("_guest", ("a",)), "does not know: '_guest'"),
        (("pause", ("a",)), "a call of another version: pause with 1 arguments"),
        (("pause", ("a", "yes")), "a call of another version: pause: Expected `bool`"),
        (("on_vm_failed", ("a", ("Log", {}), "", False, 1.0)), "no action named 'Log'"),
        (("next_actions", (1.0,), 7), "holds actions that no broker records"),
        (("next_actions", (float("inf"),), []), "holds a time that cannot be"),
        (("set_host", ({"capacity": {}, "idle_tax": "much"}, {})), "a call of another version: set_host"),
    ],
)
def test_calls_that_no_broker_records_are_refused(tmp_path: Path, entry: tuple[object, ...], words: str) -> None:
    machine = BrokerMachine(HOST, 1)
    machine.next_actions(0.0)
    with pytest.raises(RecordError, match=words):
        replay(made(tmp_path, machine, entry))


def test_another_version_is_named_when_it_cannot_be_read(tmp_path: Path) -> None:
    machine = BrokerMachine(HOST, 1)
    with pytest.raises(RecordError, match=r"made\.record: .*written by guestd 0\.0\.9"):
        replay(made(tmp_path, machine, ("sing", ())))


def test_a_core_that_fails_on_a_state_is_no_traceback(tmp_path: Path) -> None:
    machine = BrokerMachine(HOST, 1)
    machine.add_guest("a", LIMITS)
    machine.next_actions(0.0)
    machine._shares[Kind.CPU]._pool._table = np.zeros((1, 1), np.int64)
    with pytest.raises(RecordError, match="the core fails at next_actions"):
        replay(made(tmp_path, machine, ("set_limits", ("a", PLAIN)), ("next_actions", (5.0,), [])))


def test_a_call_that_failed_then_fails_now_and_is_no_difference(tmp_path: Path) -> None:
    machine = BrokerMachine(HOST, 1)
    result = replay(made(tmp_path, machine, ("pause", ("gone", True)), ("next_actions", (5.0,), [])))
    assert (result.rounds, result.difference) == (1, None)
