"""Log lines and their rate limit."""

import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.runtime import logs
from guestd.runtime.logs import RateLimit, escape


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, shout = root.handlers[:], root.level, logging.raiseExceptions
    yield
    root.handlers[:], logging.raiseExceptions = handlers, shout
    root.setLevel(level)


def test_plain_lines_have_a_time() -> None:
    stream = io.StringIO()
    logs.setup(stream=stream, environ={})
    logging.getLogger("guestd.x").warning("short of %s", "memory")
    logging.getLogger("guestd.x").debug("not shown")
    (line,) = stream.getvalue().splitlines()
    assert line.endswith(" warning: short of memory") and line[2] == ":" == line[5]


def test_under_journald_lines_have_a_priority(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with path.open("w") as stream:
        found = os.fstat(stream.fileno())
        logs.setup(logging.DEBUG, stream, {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"})
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
            logging.getLogger().log(level, "x")
    assert path.read_text().split() == ["<7>x", "<6>x", "<4>x", "<3>x", "<2>x"]


def test_a_traceback_is_priority_lines_too(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with path.open("w") as stream:
        found = os.fstat(stream.fileno())
        logs.setup(stream=stream, environ={"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"})
        try:
            raise ValueError("bad\nnews")
        except ValueError:
            logging.getLogger().exception("failed")
    lines = path.read_text().splitlines()
    assert lines[0] == "<3>failed" and all(line.startswith("<3>  ") for line in lines[1:])


def test_somebody_elses_journal_is_not_ours(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as stream:
        assert not logs.under_journal(stream, {"JOURNAL_STREAM": "1:2"})
    assert not logs.under_journal(io.StringIO(), {"JOURNAL_STREAM": "1:2"})


def test_a_second_setup_replaces_the_first() -> None:
    first, second = io.StringIO(), io.StringIO()
    logs.setup(stream=first, environ={})
    logs.setup(stream=second, environ={})
    logging.getLogger().info("once")
    assert first.getvalue() == "" and second.getvalue().count("once") == 1


def test_a_message_cannot_forge_a_line() -> None:
    stream = io.StringIO()
    logs.setup(stream=stream, environ={})
    logging.getLogger().info("guest %s", "a\n<0>forged\x1b[2J\x9b\u202e\ud800")
    assert stream.getvalue().endswith("guest a\\n<0>forged\\x1b[2J\\x9b\\u202e\\ud800\n")


@given(st.text())
def test_escaped_text_is_one_printable_line(text: str) -> None:
    escaped = escape(text)
    assert len(escaped.splitlines()) <= 1
    assert not any(ord(letter) < 0x20 or 0x7F <= ord(letter) < 0xA0 for letter in escaped)
    escaped.encode()


def test_rate_limit() -> None:
    now = 0.0
    limit = RateLimit(10.0, keys=2, clock=lambda: now)
    assert limit.allow("a") == 0
    assert limit.allow("a") is None
    assert limit.allow("a") is None
    assert limit.allow("b") == 0
    now = 10.0
    assert limit.allow("a") == 2
    assert limit.allow("a") is None
    assert limit.allow("c") == 0  # forgets b
    assert limit.allow("b") == 0
    now = 25.0
    assert limit.allow("a") == 0  # was forgotten too: memory is bounded


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0, 5))))
def test_rate_limit_loses_no_count(events: list[tuple[str, float]]) -> None:
    now = 0.0
    limit = RateLimit(7.0, keys=10, clock=lambda: now)
    shown = {key: [0, 0] for key in "abcd"}
    for key, pause in events:
        now += pause
        suppressed = limit.allow(key)
        shown[key][0] += 1
        if suppressed is not None:
            shown[key][1] += 1 + suppressed
    now += 100
    for key, (asked, accounted) in shown.items():
        assert asked == accounted + (limit.allow(key) or 0)
