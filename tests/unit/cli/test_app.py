"""`guestctl`: options, exit codes, and what it says when something is wrong."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from fake_client import FakeClient
from test_status import GUEST

import guestd
from guestd.cli.main import main
from guestd.model.errors import AdmissionError, ConfigError, DeniedError, GuestdError, NotFoundError, UnreachableError
from guestd.model.view import GuestRemoved, LimitsChange

pytestmark = pytest.mark.usefixtures("client")


def test_status_table(capsys: pytest.CaptureFixture[str], client: type[FakeClient]) -> None:
    assert main(["status"]) == 0
    assert "plugging" in capsys.readouterr().out
    assert client.calls == [("open", Path("/run/guestd-broker")), ("close",)]


def test_status_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--output", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "guestd/v1/status"


def test_run_dir_by_option_and_environment(
    client: type[FakeClient], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GUESTD_RUN_DIR", "/from/environment")
    assert main(["status"]) == 0
    assert main(["status", "--run-dir", str(tmp_path)]) == 0
    assert [call[1] for call in client.calls if call[0] == "open"] == [Path("/from/environment"), tmp_path]


def test_watch_json_is_a_line_for_each_change_until_the_broker_goes(
    capsys: pytest.CaptureFixture[str], client: type[FakeClient]
) -> None:
    client.changes = [GuestRemoved("demo"), GUEST, UnreachableError("the socket: gone")]
    assert main(["status", "--watch", "--output", "json"]) == 5
    out, err = capsys.readouterr()
    names = [[guest["name"] for guest in json.loads(line)["guests"]] for line in out.splitlines()]
    assert names == [["demo"], [], ["demo"]]
    assert "the socket: gone" in err


def test_ctrl_c_ends_it_without_a_word(client: type[FakeClient], capsys: pytest.CaptureFixture[str]) -> None:
    client.changes = [KeyboardInterrupt()]
    assert main(["status", "--watch", "--output", "json"]) == 130
    assert capsys.readouterr().err == ""


def test_set_limits(client: type[FakeClient], capsys: pytest.CaptureFixture[str]) -> None:
    options = "--cpu-min 250m --cpu-max 1.5 --cpu-weight 7 --memory-min 512MiB --memory-max 1.5GiB"
    assert main(["set-limits", "demo", *options.split(), "--memory-weight", "300"]) == 0
    change = LimitsChange(250, 1500, 7, 512 << 20, 3 << 29, 300)
    assert ("set", "demo", change) in client.calls
    assert capsys.readouterr().out == ("demo: CPUs 1..4 weight 100, memory 512 MiB..3 GiB weight 100 (from file)\n")


def test_set_limits_leaves_the_rest_alone(client: type[FakeClient], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["set-limits", "demo", "--cpu-max", "2", "-o", "json"]) == 0
    assert ("set", "demo", LimitsChange(cpu_max_millicores=2000)) in client.calls
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["guest"]["name"]) == ("guestd/v1/guest", "demo")


def test_reset_limits(client: type[FakeClient]) -> None:
    assert main(["set-limits", "demo", "--reset"]) == 0
    assert ("reset", "demo") in client.calls


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cpu-min", "2x"], ["--cpu-min", "'2x'", "for example 2, 1.5 or 250m"]),
        (["--cpu-min=-1"], ["--cpu-min", "'-1'"]),
        (["--cpu-max", "nan"], ["--cpu-max", "'nan'"]),
        (["--cpu-max", "0"], ["--cpu-max", "'0'", "above 0"]),
        (["--cpu-max", "0.0001"], ["--cpu-max", "finer than a millicore"]),
        (["--cpu-max", "9" * 400], ["--cpu-max", "highest possible"]),
        (["--memory-min", "512MB"], ["--memory-min", "'512MB'", "512MiB or 4GiB"]),
        (["--memory-max", "99999999TiB"], ["--memory-max", "highest possible"]),
        (["--cpu-weight", "0"], ["--cpu-weight", "'0'", "1..10000"]),
        (["--memory-weight", "10001"], ["--memory-weight", "'10001'", "1..10000"]),
        (["--cpu-min", "3", "--cpu-max", "2"], ["--cpu-min", "3 is above --cpu-max 2"]),
        (["--memory-min", "2GiB", "--memory-max", "1GiB"], ["--memory-min", "2 GiB is above --memory-max 1 GiB"]),
        (["--reset", "--cpu-min", "1"], ["--reset", "alone"]),
        ([], ["nothing to change"]),
        (["--output", "xml", "--reset"], ["--output", "xml"]),
        (["--reset", "--timeout", "5s"], ["--timeout", "--wait"]),
        (["--reset", "--wait", "--timeout", "soon"], ["--timeout", "'soon'", "90s, 30m, 1h or 2d"]),
    ],
)
def test_bad_values_name_option_value_and_what_is_expected(
    client: type[FakeClient], capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    assert main(["set-limits", "demo", *arguments]) == 2
    text = " ".join(capsys.readouterr().err.split())
    for word in words:
        assert word in text
    assert client.calls == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFoundError("no guest 'demo'; guestctl status lists those that there are"), 4),
        (DeniedError("admin.sock may not be opened by this user; try with sudo"), 3),
        (AdmissionError("minimums: 9 GiB of 8 GiB"), 1),
        (GuestdError("INTERNAL"), 1),
        (ConfigError("refused by the broker", "", None, "cpu: min 5 is above max 4"), 2),
    ],
)
def test_the_brokers_refusals(
    client: type[FakeClient], capsys: pytest.CaptureFixture[str], error: GuestdError, code: int
) -> None:
    client.error = NotFoundError("no guest 'demo'") if isinstance(error, NotFoundError) else error
    assert main(["set-limits", "demo", "--cpu-min", "1"]) == code
    assert capsys.readouterr().err == f"guestctl: {error}\n"


def test_unreachable_names_the_socket_and_says_what_to_do(tmp_path: Path) -> None:
    """With the real client, in a process of its own: no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "guestd.cli.main", "status", "--run-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 5
    assert done.stdout == ""
    assert done.stderr == (
        f"guestctl: {tmp_path}/monitor.sock does not exist; is guestd-broker running? "
        "See: systemctl status guestd-broker\n"
    )


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["status", "--nonsense"], ["set-limits"], ["demo", "--accel", "x"]]
)
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "Usage: guestctl" in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"guestctl {guestd.__version__}\n"
    assert main(["--help"]) == 0
    wanted = {"status", "top", "get", "explain", "events", "history", "set-limits", "pause", "resume", "reclaim"}
    assert wanted | {"config", "lab", "demo"} <= set(capsys.readouterr().out.split())


def test_help_needs_neither_grpc_nor_the_lab() -> None:
    script = (
        "import sys; from guestd.cli.main import main; code = main(['--help']);"
        "heavy = [name for name in ('grpc', 'rich', 'qemu', 'guestd.cli.demo.run') if name in sys.modules];"
        "sys.exit(code or (f'imported: {heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert done.returncode == 0


def test_demo_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from guestd.cli.demo import run

    seen: list[dict[str, Any]] = []

    def run_demo(**options: Any) -> int:
        seen.append(options)
        return 1

    monkeypatch.setattr(run, "run_demo", run_demo)
    assert main(["demo", "--no-load", "--accel", "tcg", "--out", str(tmp_path)]) == 1
    assert main(["demo"]) == 1
    assert seen == [
        {"load": False, "accel": "tcg", "out_dir": tmp_path},
        {"load": True, "accel": None, "out_dir": Path("build/demo")},
    ]


@pytest.mark.parametrize(("module", "command"), [("guestd.cli.lab", "lab"), ("guestd.cli.demo.run", "demo")])
def test_a_missing_lab_is_said_clearly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str, command: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main([command]) == 2
    assert capsys.readouterr().err == (
        f"guestctl {command}: {module} is missing; install it with: pip install 'guestd[lab]'\n"
    )


def test_lab_gets_its_arguments_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from guestd.cli import lab

    seen: list[list[str]] = []
    fake = typer.Typer()

    @fake.callback()
    def top() -> None:
        pass

    @fake.command()
    def run(command: list[str]) -> None:
        seen.append(command)
        raise typer.Exit(3)

    monkeypatch.setattr(lab, "app", fake)
    assert main(["lab", "run", "--", "ls", "-l"]) == 3
    assert seen == [["ls", "-l"]]


def test_a_missing_cli_extra_is_said_clearly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "guestd.cli.app")
    monkeypatch.setitem(sys.modules, "typer", None)
    assert main(["status"]) == 2
    assert capsys.readouterr().err == "guestctl: typer is missing; install it with: pip install 'guestd[cli]'\n"
