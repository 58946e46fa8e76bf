"""`guestctl config`: what the broker would take, and where it comes from."""

import json
from pathlib import Path

import pytest

from guestd.cli.main import main

MAIN = """
[host]
cpus = 8
[guests.web-1]
cpu = { min = 1, max = 4 }
memory = { min = "512MiB", max = "2GiB" }
qmp_socket = "/run/web-1.qmp"
cid = 10
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "broker.toml"
    path.write_text(MAIN)
    (tmp_path / "broker.toml.d").mkdir()
    (tmp_path / "broker.toml.d" / "10-more.toml").write_text("[guests.web-1]\ncpu.max = 6\n[log]\nformat = 'json'\n")
    return path


def test_a_sound_configuration(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}, {file}.d/10-more.toml: fine, 1 guest\n"


@pytest.mark.parametrize("command", ["check", "show"])
def test_what_is_wrong_names_file_key_and_way_out(file: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    bad = file.with_name("broker.toml.d") / "20-bad.toml"
    bad.write_text("[host]\ncpu = 3\n")
    assert main(["config", command, str(file)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"guestctl: {bad}: host: has no key 'cpu'; take it out or correct its spelling\n"


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", str(tmp_path / "none.toml")]) == 2
    assert f"{tmp_path}/none.toml: cannot be read" in capsys.readouterr().err


def test_every_value_comes_from_the_file_that_wins_or_is_a_default(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "show", str(file), "-o", "json"]) == 0
    found = {one["key"]: (one["value"], one["origin"]) for one in json.loads(capsys.readouterr().out)["settings"]}
    drop_in = f"{file}.d/10-more.toml"
    assert found["host.cpus"] == (8, str(file))
    assert found["guests.web-1.cpu.min"] == (1, str(file))
    assert found["guests.web-1.cpu.max"] == (6, drop_in)
    assert found["guests.web-1.cpu.weight"] == (100, "default")
    assert found["log.format"] == ("json", drop_in)
    assert found["broker.mode"] == ("serve", "default")
    assert "host.memory" not in found


def test_origins_are_shown_beside_the_values(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", str(file), "--origin"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"guests.web-1.cpu.max = 6  # {file}.d/10-more.toml" in lines
    assert 'broker.mode = "serve"  # default' in lines
    assert main(["config", "show", str(file)]) == 0
    assert 'broker.mode = "serve"' in capsys.readouterr().out.splitlines()
