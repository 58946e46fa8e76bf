"""`guestctl simulate` and `guestctl scoreboard`: options, files, exit codes, what is said when something is wrong."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from guestd.cli.main import main
from guestd.cli.simulate import parse_duration, parse_limits
from guestd.model.errors import ConfigError
from guestd.model.resources import Limits, Resources
from guestd.model.units import GIB, MIB

ONE = Limits(Resources(1000, GIB), Resources(4000, 4 * GIB))


def test_a_made_up_load_writes_table_json_and_pictures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["simulate", "--load", "steps", "--vms", "2", "--duration", "40s", "--refusals", "0.1"]
    assert main([*arguments, "--output", str(tmp_path / "one")]) == 0
    out = capsys.readouterr().out
    assert "vm-01" in out
    assert "unmet %" in out
    assert "VM-seconds per second" in out
    assert main([*arguments, "--output", str(tmp_path / "two")]) == 0
    first, second = ((tmp_path / name / "simulate.json").read_text() for name in ("one", "two"))
    assert first == second, "the same seed gives the same JSON"
    shown = json.loads(first)
    assert (shown["schema"], shown["seconds"], shown["seed"]) == (1, 40.0, 1)
    assert shown["behaviour"]["refusals"] == 0.1
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["cpu-host.png", "cpu-vms.png", "memory-host.png", "memory-vms.png", "simulate.json"]


def test_traces_limits_and_host_are_used(tmp_path: Path) -> None:
    lines = "".join(f"{second},{700_000_000 + second * 9_000_000},1,1,4294967296\n" for second in range(0, 40, 2))
    header = "time_s,used_bytes,cached_bytes,host_rss_bytes,total_bytes\n"
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress((header + lines).encode()))
    arguments = ["simulate", "--traces", str(tmp_path / "t.csv.gz"), "--vms", "2", "--host-memory", "6GiB"]
    limits = ["--limits", "memory=1GiB..3GiB,weight=50", "--limits", "t.2:memory=512MiB..2GiB..4GiB"]
    assert main([*arguments, *limits, "--output", str(tmp_path / "out")]) == 0
    shown = json.loads((tmp_path / "out" / "simulate.json").read_text())
    assert shown["host"]["memory_bytes"] == 6 * GIB
    assert shown["vms"]["t"]["limits"]["max"]["memory_bytes"] == 3 * GIB
    assert shown["vms"]["t.2"]["limits"]["burst"]["memory_bytes"] == 4 * GIB
    assert shown["vms"]["t.2"]["limits"]["weight"] == {"cpu": 50, "memory": 50}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--traces/--load"),
        (["--load", "steps", "--traces", "x"], "--traces/--load"),
        (["--traces", "/gone"], "/gone: no such file or folder"),
        (["--load", "steps", "--duration", "soon"], "--duration = 'soon'"),
        (["--load", "steps", "--limits", "memory=4GiB..1GiB"], "min 4 GiB is above max 1 GiB"),
        (["--load", "steps", "--limits", "memory=1GiB..4GiB..2GiB"], "burst 2 GiB is not above max 4 GiB"),
        (["--load", "steps", "--limits", "disk=1..2"], "'disk=1..2'"),
        (["--load", "steps", "--limits", "cpu=many..2"], "'many' is not a number of CPUs"),
        (["--load", "steps", "--limits", "cpu=2"], "'cpu=2' is not MIN..MAX"),
        (["--load", "steps", "--limits", "web:cpu=1..2"], "no VM is called 'web'; there are vm-00, vm-01"),
        (["--load", "steps", "--host-memory", "2GiB"], "the minimums of 4 guests add up to 4 GiB"),
        (["--load", "steps", "--host-cpus", "0"], "--host-cpus"),
        (["--load", "steps", "--plug-rate", "fast"], "--plug-rate"),
        (["--load", "steps", "--failures", "0.7", "--lost-answers", "0.7"], "together 1 at most"),
        (["--load", "steps", "--refusals", "2"], "--refusals"),
        (["--load", "nothing"], "nothing"),
    ],
)
def test_bad_input_is_named_and_ends_with_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], words: str
) -> None:
    assert main(["simulate", *arguments, "--output", str(tmp_path / "out")]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    arguments = ["simulate", "--load", "ramp", "--vms", "1", "--duration", "5s", "--output", str(tmp_path / "file")]
    assert main(arguments) == 2
    assert "--output" in capsys.readouterr().err


def test_a_missing_library_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["simulate", "--load", "steps", "--duration", "5s"]) == 2
    assert "pip install 'guestd[sim]'" in capsys.readouterr().err
    assert main(["scoreboard", "--traces", "/gone"]) == 2
    assert "pip install 'guestd[sim]'" in capsys.readouterr().err


def test_the_command_line_imports_neither_numpy_nor_matplotlib() -> None:
    code = "import sys, guestd.cli.app; print(*({'numpy', 'matplotlib', 'guestd.sim'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_limits_of_one_vm_win_over_those_of_all() -> None:
    found = parse_limits(["b:cpu=250m..2", "cpu=1..8,memory=1GiB..2GiB"], ["a", "b"], [ONE, ONE])
    assert [one.max.cpu_millicores for one in found] == [8000, 2000]
    assert found[1].min == Resources(250, GIB)
    assert [one.max.memory_bytes for one in found] == [2 * GIB, 2 * GIB]


def test_a_burst_lasts_for_ten_minutes() -> None:
    (found,) = parse_limits(["memory=512MiB..1GiB..3GiB"], ["a"], [ONE])
    assert found.burst.memory_bytes == 3 * GIB
    assert found.burst_credit.memory_bytes == 2 * GIB * 600
    assert found.burst_refill.memory_bytes == 2 * GIB // 6
    assert found.min.memory_bytes == 512 * MIB


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-3s", "3d", "10000h"])
def test_no_durations(text: str) -> None:
    with pytest.raises(ConfigError, match="--duration"):
        parse_duration(text)


@pytest.mark.parametrize("folder", ["gone", "."])
def test_a_scoreboard_needs_traces(capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: str) -> None:
    assert main(["scoreboard", "--traces", str(tmp_path / folder), "--output", str(tmp_path / "out")]) == 2
    assert "traces" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_scoreboard_of_what_there_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = "".join(",".join(str((row * 7 + column * column) % 60) for column in range(40)) + "\n" for row in range(12))
    (tmp_path / "planetlab").mkdir()
    (tmp_path / "planetlab" / "day.csv.gz").write_bytes(gzip.compress(rows.encode()))
    assert main(["scoreboard", "--traces", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert "57.4/4.8/3.2" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["scoreboard.json", "slow.svg"]
    shown = json.loads((tmp_path / "out" / "scoreboard.json").read_text())
    assert shown["slow"]["data"]["planetlab cpu"]["static peak"]["unmet"] == 0
    assert shown["fast"]["data"] == {}
