"""Man pages and shell completion come from the commands themselves."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from guestd.cli.main import main
from guestd.cli.manpage import pages
from guestd.model.errors import UnreachableError

PAGES = pages()


def test_every_command_has_a_page_and_the_first_page_names_them_all() -> None:
    assert {"guestctl.1", "guestctl-status.1", "guestctl-set-limits.1", "guestctl-config-show.1"} <= set(PAGES)
    for name in PAGES:
        assert name == "guestctl.1" or f"See {name.removesuffix('.1')}(1)".replace("-", "\\-") in PAGES["guestctl.1"]


@pytest.mark.parametrize("name", sorted(PAGES))
def test_a_page_is_sound(name: str, tmp_path: Path) -> None:
    text = PAGES[name]
    assert text.isascii()
    assert text.startswith(f".TH {name.removesuffix('.1').upper()} 1 ")
    for section in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS"):
        assert f"\n.SH {section}\n" in text
    requests = {line.split()[0] for line in text.splitlines() if line.startswith((".", "'"))}
    assert requests <= {".TH", ".SH", ".PP", ".TP", ".B", ".BR"}
    assert not re.search(r"\\(?![efI\-&\[])", text.replace("\\fR", "\\fI").replace("\\fB", "\\fI"))
    if shutil.which("groff"):
        page = tmp_path / name
        page.write_text(text)
        done = subprocess.run(["groff", "-man", "-ww", "-z", page], capture_output=True, text=True, check=True)
        assert done.stderr == ""


def test_options_and_exit_codes_are_told() -> None:
    assert "\\-\\-cpu\\-max CPUS" in PAGES["guestctl-set-limits.1"]
    for code in "012345":
        assert f"\\fB{code}\\fR" in PAGES["guestctl.1"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_completion_for(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_GUESTCTL_COMPLETE", f"source_{shell}")
    assert main([]) == 0
    assert f"_GUESTCTL_COMPLETE=complete_{shell}" in capsys.readouterr().out


def test_bash_completes_commands_and_says_nothing_without_a_broker(tmp_path: Path) -> None:
    program = tmp_path / "guestctl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m guestd.cli.main "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    source = [sys.executable, "-m", "guestd.cli.main"]
    environment = os.environ | {"_GUESTCTL_COMPLETE": "source_bash"}
    script = subprocess.run(source, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout
    script += """
complete_as() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _guestctl_completion guestctl; echo "${COMPREPLY[*]}"; }
complete_as guestctl ev
complete_as guestctl config ""
complete_as guestctl get --run-dir /nonexistent we
"""
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == ["events", "check show", ""]
    assert done.stderr == ""


def test_guest_names_are_completed_with_those_that_the_broker_has(
    client: type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def completed(words: str) -> list[str]:
        monkeypatch.setenv("_GUESTCTL_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
        assert main([]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out.split()

    assert completed("guestctl explain --run-dir /x de") == ["demo"]
    assert ("open", Path("/x")) in client.calls
    assert completed("guestctl explain x") == []
    client.error = UnreachableError("gone")
    assert completed("guestctl pause ") == []
