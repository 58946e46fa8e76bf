"""`guestctl replay`: what it prints, and its exit codes."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from guestd.broker.core import judge
from guestd.broker.core.ledger import HostCapacity
from guestd.broker.record.recorder import Recorder
from guestd.cli.main import main
from guestd.model.resources import Limits, Resources
from guestd.model.units import GIB, MIB
from guestd.sim.world import World

LIMITS = Limits(Resources(1000, 512 * MIB), Resources(4000, 4 * GIB))
HOST = HostCapacity(Resources(8000, 8 * GIB))
NASTY = "b\x1b[31m\n"


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two guests that grow and shrink; one has a name that would colour the terminal."""
    directory = tmp_path_factory.mktemp("record")
    world = World(HOST)
    recorder = Recorder(directory, 1 << 20, lambda: world.broker_now)
    world.broker = recorder.machine(HOST, 1, timing=world.timing)
    for name in ("a", NASTY):
        world.add(name, LIMITS).load.tasks = 3.0
    world.run(10.0)
    for guest in world.guests.values():
        guest.load.tasks = 0.1
    world.run(30.0)
    recorder.close()
    (file,) = directory.iterdir()
    return file


def test_decisions_are_printed_with_time_and_reason(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(record)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("growing" in line and "needs 3" in line for line in lines)
    assert any("asking" in line and "min is 1 CPU" in line for line in lines)
    assert lines[-1].endswith("rounds replayed, all the same")
    assert int(lines[-1].split()[0]) == len(lines) - 1
    assert any("b\\x1b[31m\\n" in line for line in lines)
    assert not any("\x1b" in line for line in lines)


def test_one_guest_is_picked_and_all_are_counted(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(record), "--guest", "a", "--output", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["schema"] == "guestd/v1/replay"
    schema = json.loads((files("guestd.cli") / "schema" / "v1.json").read_text())
    (part,) = [one for one in schema["oneOf"] if one["properties"]["schema"]["const"] == shown["schema"]]
    assert shown.keys() == part["properties"].keys()
    assert list(Draft202012Validator(schema).iter_errors(shown)) == []
    assert {event["guest"] for event in shown["events"]} == {"a"}
    assert shown["decisions"] > len(shown["events"]) > 2
    assert shown["difference"] is None
    assert {"growing", "grown", "asking", "shrunk"} <= {event["code"] for event in shown["events"]}


def test_a_difference_is_printed_and_fails(
    record: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "may_grow", lambda *_: False)
    assert main(["replay", str(record)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "0 decisions in" in lines[-3]
    assert "the same, then a difference at" in lines[-3]
    assert lines[-2].startswith("  recorded  ")
    assert "growing to 3 CPU" in lines[-2]
    assert lines[-1] == "  replayed  nothing"


def test_a_file_that_was_cut_off_is_replayed_up_to_there(
    record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut.record"
    cut.write_bytes(record.read_bytes()[:-3])
    assert main(["replay", str(cut)]) == 0
    assert "ends in the middle of an entry" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"#!/bin/sh\n", "is no record of a broker"),
        (b"guestd-record 9\n", "another version's format"),
        (b"guestd-record 1\n\x01", "is cut off before there is anything to replay"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_usage_error(
    content: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x\x1b[2J.record"
    file.write_bytes(content)
    assert main(["replay", str(file)]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "x\\x1b[2J.record" in said


def test_no_file_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "/gone.record"]) == 2
    assert "/gone.record: cannot be read: No such file or directory" in capsys.readouterr().err
