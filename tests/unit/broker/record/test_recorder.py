"""The recorder: nothing that fails around it reaches the broker, and what it writes has no gap."""

import errno
import inspect
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from recorded import HOST, LIMITS, files

from guestd.broker.core.machine import BrokerMachine
from guestd.broker.metrics.tally import Tally
from guestd.broker.record import recorder as recorder_module
from guestd.broker.record import segments
from guestd.broker.record.calls import CALLS
from guestd.broker.record.frames import RecordFile
from guestd.broker.record.machine import RecordedMachine
from guestd.broker.record.recorder import Recorder
from guestd.broker.record.replay import replay
from guestd.model.errors import NotFoundError
from guestd.model.vm import VmState, VmStatus

READING = {"wake_at", "free", "scarce", "inputs", "explain_resource", "at_rest"}
"""Calls that change nothing that is decided by, but for reasons, by way of `explain`."""


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "_FLUSH_SECONDS", 0.01)


def until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.002)


def rounds(file: Path) -> int:
    return replay(file).rounds


def go(machine: BrokerMachine, now: float) -> None:
    """One eventful round."""
    machine.set_limits("a", LIMITS)
    machine.next_actions(now)


def test_every_public_call_of_the_machine_is_recorded_or_known_to_change_nothing() -> None:
    calls = {name for name, _ in inspect.getmembers(BrokerMachine, inspect.isfunction) if not name.startswith("_")}
    assert calls == set(CALLS) | READING
    assert all(getattr(RecordedMachine, name) is not getattr(BrokerMachine, name) for name in CALLS)


def test_no_recorded_call_makes_another_one() -> None:
    """It would be recorded twice."""
    methods = dict(inspect.getmembers(BrokerMachine, inspect.isfunction))
    source = "".join(inspect.getsource(method) for name, method in methods.items() if name not in READING)
    assert re.findall(rf"\bself\.({'|'.join(CALLS)})\(", source) == []


def test_without_room_nothing_is_recorded(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "record", 0)
    assert type(recorder.machine(HOST, 1)) is BrokerMachine
    recorder.close()
    assert not (tmp_path / "record").exists()


def test_calls_by_keyword_and_calls_that_fail_are_recorded_too(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 1 << 20)
    machine = recorder.machine(HOST, 1)
    machine.add_guest("a", LIMITS, park=True)
    with pytest.raises(NotFoundError):
        machine.pause(name="b", paused=True)
    machine.next_actions(5.0)
    recorder.close()
    with RecordFile(files(tmp_path)[0]) as file:
        entries = list(file.entries())
    assert [entry.call for entry in entries] == ["add_guest", "pause", "next_actions"]
    assert len(entries[0].arguments) == len(inspect.signature(BrokerMachine.add_guest).parameters) - 1
    assert rounds(files(tmp_path)[0]) == 1


def test_what_was_noted_is_on_disk_soon_without_a_close(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 1 << 20)
    machine = recorder.machine(HOST, 1)
    machine.add_guest("a", LIMITS)
    machine.next_actions(5.0)
    until(lambda: bool(files(tmp_path)) and rounds(files(tmp_path)[0]) == 1, "written within a moment")
    recorder.close()


def test_a_reason_that_explain_did_not_change_is_not_recorded(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 1 << 20)
    machine = recorder.machine(HOST, 1)
    machine.add_guest("a", LIMITS)
    for _ in range(3):
        machine.explain("a", 5.0)
    recorder.close()
    with RecordFile(files(tmp_path)[0]) as file:
        assert [entry.call for entry in file.entries()] == ["add_guest", "explain"]


def test_a_full_disk_is_said_once_and_recording_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tally, told = Tally(), list[str]()
    recorder = Recorder(tmp_path, 1 << 20, retry_seconds=0.0, tally=tally, told=told.append)
    machine = recorder.machine(HOST, 1)
    machine.add_guest("a", LIMITS)
    machine.next_actions(5.0)
    until(lambda: bool(files(tmp_path)), "begun")
    assert tally.record_interruptions == 0
    failed = 0

    def write(descriptor: int, data: bytes) -> int:
        nonlocal failed
        failed += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(segments.os, "write", write)
        for number in range(100_000):
            go(machine, 6.0 + number)
            if failed >= 3:
                break
            time.sleep(0.001)
    assert failed >= 3
    until(lambda: (go(machine, 200_000.0), len(files(tmp_path)) > 1)[1], "a new file")
    go(machine, 200_001.0)
    recorder.close()
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    full_disk = f"{tmp_path}: [Errno 28] No space left on device: the disk is full; make room on the file system of "
    assert warnings[0].endswith(f"{full_disk}{tmp_path}")
    assert warnings[1] == "decisions are recorded again"
    assert told == warnings
    assert tally.record_interruptions >= 3, "each try is counted"
    assert all(replay(file).difference is None for file in files(tmp_path))
    assert rounds(files(tmp_path)[-1]) >= 1


def test_a_disk_that_hangs_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recorder_module, "_CHUNK_BYTES", 1000)
    going = threading.Event()

    def write(descriptor: int, data: bytes) -> int:
        assert going.wait(30)
        return real(descriptor, data)

    real = os.write
    monkeypatch.setattr(segments.os, "write", write)
    recorder = Recorder(tmp_path, 1 << 20, retry_seconds=0.0)
    machine = recorder.machine(HOST, 1)
    machine.add_guest("a", LIMITS)
    for number in range(3000):
        go(machine, 5.0 + number)
    assert f"the disk of {tmp_path} is too slow" in caplog.text
    going.set()
    until(lambda: (go(machine, 5000.0), len(files(tmp_path)) > 1)[1], "a new file")
    recorder.close()
    assert all(replay(file).difference is None for file in files(tmp_path))


def test_what_cannot_be_encoded_ends_the_file_and_the_next_one_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(tmp_path, 1 << 20, retry_seconds=0.0)
    machine = recorder.machine(HOST, 1)
    machine.add_guest("a", LIMITS)
    machine.next_actions(1.0)
    machine.on_vm_state("a", VmState(VmStatus.RUNNING, memory_held_bytes=1 << 70), 2.0)
    until(lambda: "on_vm_state cannot be recorded" in caplog.text, "it is named")
    machine.on_vm_state("a", VmState(VmStatus.RUNNING), 3.0)
    machine.next_actions(4.0)
    machine.next_actions(5.0)
    recorder.close()
    assert [rounds(file) for file in files(tmp_path)] == [1, 1]


def test_what_cannot_be_encoded_takes_along_what_was_noted_after_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "_FLUSH_SECONDS", 60.0)
    recorder = Recorder(tmp_path, 1 << 20)
    machine = recorder.machine(HOST, 1)
    machine.add_guest("a", LIMITS)
    machine.next_actions(1.0)
    machine.on_vm_state("a", VmState(VmStatus.RUNNING, resets=1 << 70), 2.0)
    for number in range(100):
        machine.next_actions(3.0 + number)
    assert "on_vm_state cannot be recorded" in caplog.text, "encoded in the loop when so many wait"
    recorder.close()
    assert [rounds(file) for file in files(tmp_path)] == [1]


@pytest.mark.parametrize("encoded_at_once", [1, 7, 1000])
def test_a_new_file_begins_without_a_gap_however_many_calls_wait_to_be_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded_at_once: int
) -> None:
    monkeypatch.setattr(recorder_module, "_ENCODED_AT_ONCE", encoded_at_once)
    recorder = Recorder(tmp_path, 1 << 30)
    machine = recorder.machine(HOST, 1)
    machine.add_guest("a", LIMITS)
    for number in range(300):
        if number == 150:
            recorder._begin_at = 0.0  # as when the first file is full
        go(machine, float(number))
    recorder.close()
    assert sum(rounds(file) for file in files(tmp_path)) == 300
    assert [replay(file).difference for file in files(tmp_path)] == [None, None]


def test_a_bound_that_is_too_small_is_said_and_the_broker_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(tmp_path, 100)
    machine = recorder.machine(HOST, 1)
    until(lambda: "record.size is 100 B" in caplog.text, "the bound is named")
    machine.add_guest("a", LIMITS)
    assert machine.next_actions(1.0)
    recorder.close()
    assert files(tmp_path) == []
