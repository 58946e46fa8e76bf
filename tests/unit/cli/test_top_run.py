"""How `guestctl top` starts, and refuses to."""

import contextlib
import pty
import sys
from collections.abc import Iterator

import pytest
from top_worlds import FakeBroker, guest

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
    assert run_top(FakeBroker().connect) == 2
    assert (
        capsys.readouterr().err
        == "guestctl top: needs a terminal that can place its cursor; without one use: guestctl status\n"
    )


@pytest.mark.parametrize("kind", ["", "dumb"])
def test_a_terminal_that_cannot_place_its_cursor_is_none(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    with on_terminal(monkeypatch, kind):
        assert run_top(FakeBroker().connect) == 2


def test_a_broker_that_was_never_there_is_an_error_and_no_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = FakeBroker({"a": guest("a")}, gone="/run/x does not exist")
    with on_terminal(monkeypatch), pytest.raises(UnreachableError, match="does not exist"):
        run_top(broker.connect)
    assert broker.clients == 1
