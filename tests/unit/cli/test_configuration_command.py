"""`guestctl config`: what the broker would take, and where it comes from."""

import json
from datetime import timedelta
from pathlib import Path

import pytest
from pki import CA

from guestd.cli.main import main
from guestd.wire.tls import TlsFiles

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


def tls_table(files: TlsFiles) -> str:
    return (
        f'[monitor]\nlisten = "127.0.0.1:4748"\ncertificate = "{files.certificate}"\n'
        f'key = "{files.key}"\nclient_ca = "{files.ca}"\n'
    )


def test_certificates_are_checked_too(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = CA.issue("broker").write(file.parent, CA)
    file.write_text(MAIN + tls_table(files))
    assert main(["config", "check", str(file)]) == 0
    late = CA.issue("broker", ends=-timedelta(hours=1)).write(file.parent, CA, "late")
    file.write_text(MAIN + tls_table(late))
    assert main(["config", "check", str(file)]) == 2
    assert f"{late.certificate}: has expired; renew it" in capsys.readouterr().err
    files.key.unlink()
    file.write_text(MAIN + tls_table(files))
    assert main(["config", "check", str(file)]) == 2
    assert capsys.readouterr().err == (
        f"guestctl: {files.key}: cannot be read: No such file or directory; see to the file and its mode\n"
    )


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
