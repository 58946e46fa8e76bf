"""What the demo writes and says at its end, and how it ends when it cannot begin."""

import json
from pathlib import Path
from typing import Any

import pytest
from demo_worlds import good

from guestd.broker import config as broker_configuration
from guestd.cli.demo import run as demo_run
from guestd.cli.demo.timeline import Timeline, read_lines
from guestd.cli.demo.verify import Expected
from guestd.lab.errors import LabUnavailable
from guestd.model.units import GIB, MIB

EXPECTED = Expected()


def test_a_good_run_writes_its_files_and_passes(tmp_path: Path) -> None:
    summary = demo_run.write_results(good(), EXPECTED, None, tmp_path)
    assert summary["passed"] is True
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert len(read_lines((tmp_path / "timeline.jsonl").read_text().splitlines()).records) == len(good().records)
    assert (tmp_path / "timeline.svg").read_text().startswith("<svg")
    text = "\n".join(demo_run.verdict(summary, tmp_path))
    assert "CPUs, QMP    1         4         1" in text
    assert "memory, QMP  512 MiB   2 GiB     512 MiB" in text
    assert "VERIFIED" in text
    assert "0.60 s" in text


def test_a_run_that_broke_off_has_failed_whatever_was_seen(tmp_path: Path) -> None:
    summary = demo_run.write_results(good(), EXPECTED, "QEMU ended\x1b[2J", tmp_path)
    assert summary["passed"] is False
    assert summary["failures"] == ["QEMU ended\x1b[2J"]
    assert json.loads((tmp_path / "summary.json").read_text())["passed"] is False
    text = demo_run.verdict(summary, tmp_path)
    assert "NOT VERIFIED:" in text
    assert "  - QEMU ended\\x1b[2J" in text


def test_an_empty_run_has_a_verdict(tmp_path: Path) -> None:
    summary = demo_run.write_results(Timeline(()), EXPECTED, None, tmp_path)
    assert "CPUs, QMP    1         ?         ?" in "\n".join(demo_run.verdict(summary, tmp_path))


def test_the_broker_takes_its_configuration(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text(demo_run.broker_config(Path("/tmp/a/qmp.sock"), Path("/tmp/a/vsock"), Path("/tmp/b"), EXPECTED))
    config = broker_configuration.load(file)
    guest = config.guests["demo"]
    assert (guest.limits.min.cpu_millicores, guest.limits.max.cpu_millicores) == (1000, 4000)
    assert (guest.limits.min.memory_bytes, guest.limits.max.memory_bytes) == (512 * MIB, 3 * GIB)
    assert config.run_dir == Path("/tmp/b/run")
    assert config.port == EXPECTED.broker_port


@pytest.mark.parametrize("error", [LabUnavailable(["qemu-system-x86_64"]), KeyboardInterrupt()])
def test_a_demo_that_cannot_run_fails_and_leaves_no_old_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    async def broken(*arguments: Any) -> None:
        raise error

    (tmp_path / "summary.json").write_text('{"passed": true}')
    monkeypatch.setattr(demo_run, "_run", broken)
    assert demo_run.run_demo(load=True, accel=None, out_dir=tmp_path) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["passed"] is False
    expected = "stopped from outside" if isinstance(error, KeyboardInterrupt) else "qemu-system-x86_64"
    assert expected in summary["failures"][0]
    assert expected in capsys.readouterr().out
