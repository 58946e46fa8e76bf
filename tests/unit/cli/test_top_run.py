"""How `guestctl top` starts, and refuses to."""

import contextlib
import pty
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestd.cli.broker import Target
from guestd.cli.top.app import Top
from guestd.cli.top.run import run_top
from guestd.model.errors import UnreachableError


@contextlib.contextmanager
def on_terminal(monkeypatch: pytest.MonkeyPatch, kind: str = "xterm-256color") -> Iterator[None]:
    """Have stdin and stdout be terminals."""
    outer, inner = pty.openpty()
    with open(outer), open(inner, "w") as stream, monkeypatch.context() as patch:  # noqa: PTH123
        patch.setattr(sys, "stdin", stream)
        patch.setattr(sys, "stdout", stream)
        patch.setenv("TERM", kind)
        yield


def test_without_a_terminal_it_says_what_to_use_instead(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_top(Target()) == 2
    assert (
        capsys.readouterr().err
        == "guestctl top: needs a terminal that can place its cursor; without one use: guestctl status\n"
    )


@pytest.mark.parametrize("kind", ["", "dumb"])
def test_a_terminal_that_cannot_place_its_cursor_is_none(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    with on_terminal(monkeypatch, kind):
        assert run_top(Target()) == 2


def test_a_broker_that_was_never_there_is_an_error_and_no_screen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with on_terminal(monkeypatch), pytest.raises(UnreachableError, match=r"monitor\.sock does not exist; is guestd"):
        run_top(Target(run_dir=tmp_path))


@pytest.mark.parametrize(("value", "plain"), [(None, False), ("", False), ("1", True)])
def test_colours_are_there_unless_no_color_is_set_and_not_empty(
    monkeypatch: pytest.MonkeyPatch, value: str | None, plain: bool
) -> None:
    seen: list[bool] = []
    monkeypatch.delenv("NO_COLOR", raising=False)
    if value is not None:
        monkeypatch.setenv("NO_COLOR", value)
    monkeypatch.setattr(Target, "run", lambda self, work: None)
    monkeypatch.setattr(Top, "run", lambda self: seen.append(self.no_color))
    with on_terminal(monkeypatch):
        assert run_top(Target()) == 0
    assert seen == [plain]
