"""Log lines and their rate limit."""

import io
import json
import logging
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.cli.text import printable
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
    logging.getLogger().info("guest %s", "a\n<0>forged\x1b[2J\x9b\u202e\u200f\ud800")
    assert stream.getvalue().endswith("guest a\\n<0>forged\\x1b[2J\\x9b\\u202e\\u200f\\ud800\n")


@pytest.mark.parametrize("hidden", ["\u200b", "\ufeff", "\u00ad", "\u2066", "\U000e0041", "\ue000", "\u2029", "\ud800"])
def test_what_cannot_be_seen_is_made_visible_as_guestctl_does(hidden: str) -> None:
    assert escape(f"a{hidden}b") == printable(f"a{hidden}b")
    assert escape(f"a{hidden}b").isascii()
    assert escape("Zürich 世界\\n") == "Zürich 世界\\n"


@given(st.text())
def test_escaped_text_is_one_printable_line(text: str) -> None:
    escaped = escape(text)
    assert len(escaped.splitlines()) <= 1
    assert escaped.isprintable()
    escaped.encode()


def _json_lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_json_line_has_the_numbers_of_a_decision() -> None:
    stream = io.StringIO()
    logs.setup(stream=stream, environ={}, as_json=True)
    decision = {"guest": "web-1", "kind": "cpu", "code": "growing", "before": 1000, "after": 3000}
    logging.getLogger("guestd.broker.engine").info("%s %s: %s", "web-1", "cpu", "growing", extra=decision)
    logging.getLogger("guestd.x").warning("no more")
    first, second = _json_lines(stream)
    moment = datetime.fromisoformat(str(first.pop("time")))
    assert moment.utcoffset() is not None and abs((datetime.now(moment.tzinfo) - moment).total_seconds()) < 60
    assert first == {"level": "info", "logger": "guestd.broker.engine", "message": "web-1 cpu: growing"} | decision
    assert set(second) == {"time", "level", "logger", "message"}


def test_what_a_json_line_says_is_escaped_for_whoever_prints_it() -> None:
    stream = io.StringIO()
    logs.setup(stream=stream, environ={}, as_json=True)
    logging.getLogger().info("%s", "a\n\x1b[2J\u202e\ud800", extra={"guest": "b\x9b"})
    (line,) = _json_lines(stream)
    assert line["message"] == "a\\n\\x1b[2J\\u202e\\ud800" and line["guest"] == "b\\x9b"


def test_a_traceback_is_in_its_json_line() -> None:
    stream = io.StringIO()
    logs.setup(stream=stream, environ={}, as_json=True)
    try:
        raise ValueError("bad\nnews\x1b")
    except ValueError:
        logging.getLogger().exception("failed")
    (line,) = _json_lines(stream)
    traceback = line["traceback"]
    assert isinstance(traceback, list) and traceback[-2:] == ["ValueError: bad", "news\\x1b"]


def test_json_under_journald_has_its_priority_before_it(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with path.open("w") as stream:
        found = os.fstat(stream.fileno())
        logs.setup(stream=stream, environ={"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}, as_json=True)
        logging.getLogger().error("x")
    assert path.read_text().startswith('<3>{"time": ')


def test_lines_that_are_alike_are_shown_a_few_times_and_then_counted() -> None:
    now, stream = 0.0, io.StringIO()
    logs.setup(logging.DEBUG, stream, {}, limit=RateLimit(10.0, clock=lambda: now, most=2))
    log = logging.getLogger("guestd.x")
    for amount in range(6):
        log.info(
            "%s %s: %s", "a", "cpu", f"growing to {amount}", extra={"guest": "a", "kind": "cpu", "code": "growing"}
        )
    log.info("%s %s: %s", "a", "cpu", "grown", extra={"guest": "a", "kind": "cpu", "code": "grown"})
    log.info("%s %s: %s", "b", "cpu", "growing", extra={"guest": "b", "kind": "cpu", "code": "growing"})
    for name in "aaab":
        log.warning("%s: VM is gone", name)
    for _ in range(3):
        log.debug("details")
    now = 10.0
    log.info("%s %s: %s", "a", "cpu", "growing to 9", extra={"guest": "a", "kind": "cpu", "code": "growing"})
    assert [line.partition(": ")[2] for line in stream.getvalue().splitlines()] == [
        "a cpu: growing to 0",
        "a cpu: growing to 1",
        "a cpu: grown",
        "b cpu: growing",
        *("a: VM is gone", "a: VM is gone", "b: VM is gone"),
        *("details", "details", "details"),
        "before this: a: VM is gone (1 more like this not shown)",
        "a cpu: growing to 9 (4 more like this not shown)",
    ]


def test_what_was_not_shown_is_counted_though_none_of_it_comes_any_more() -> None:
    now, stream = 0.0, io.StringIO()
    logs.setup(logging.DEBUG, stream, {}, limit=RateLimit(10.0, keys=2, clock=lambda: now))
    log = logging.getLogger("guestd.x")
    for name in "aaab":
        log.warning("%s: VM is gone", name)
    now = 9.0
    log.info("other")  # forgets what was said of a
    for _ in range(3):
        log.info("other")
    now = 30.0
    log.info("calm")
    for _ in range(2):
        log.info("calm")
    logging.getLogger().handlers[0].close()
    assert [line.partition(" ")[2] for line in stream.getvalue().splitlines()] == [
        "warning: a: VM is gone",
        "warning: b: VM is gone",
        "warning: before this: a: VM is gone (2 more like this not shown)",
        "info: other",
        "info: before this: other (3 more like this not shown)",
        "info: calm",
        "info: before this: calm (2 more like this not shown)",
    ]


def test_a_json_line_of_what_was_not_shown_has_its_guest() -> None:
    now, stream = 0.0, io.StringIO()
    logs.setup(stream=stream, environ={}, as_json=True, limit=RateLimit(10.0, clock=lambda: now))
    for _ in range(3):
        logging.getLogger("guestd.x").info("%s", "grown", extra={"guest": "a", "kind": "cpu", "code": "grown"})
    now = 10.0
    logging.getLogger("guestd.x").info("calm")
    told = _json_lines(stream)[1]
    assert {name: told[name] for name in ("message", "guest", "kind", "code", "suppressed", "logger")} == {
        "message": "before this: grown", "guest": "a", "kind": "cpu", "code": "grown", "suppressed": 2,
        "logger": "guestd.x",
    }  # fmt: skip


def test_a_json_line_counts_what_was_not_shown() -> None:
    stream, clock = io.StringIO(), iter((0.0, 1.0, 2.0, 10.0))
    logs.setup(stream=stream, environ={}, as_json=True, limit=RateLimit(10.0, clock=clock.__next__))
    for _ in range(4):
        logging.getLogger().info("again")
    assert [line.get("suppressed") for line in _json_lines(stream)] == [None, 2]


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
    assert limit.overdue() == [("a", 1)]  # was forgotten too: memory is bounded
    now = 25.0
    assert limit.allow("a") == 0
    assert limit.overdue() == []


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0, 5), st.booleans())), st.integers(1, 3), st.integers(1, 10)
)
def test_rate_limit_loses_no_count(events: list[tuple[str, float, bool]], most: int, keys: int) -> None:
    now = 0.0
    limit = RateLimit(7.0, keys=keys, clock=lambda: now, most=most)
    shown = {key: [0, 0] for key in "abcd"}
    for key, pause, look in events:
        now += pause
        suppressed = limit.allow(key)
        shown[key][0] += 1
        if suppressed is not None:
            shown[key][1] += 1 + suppressed
        for late, count in limit.overdue() if look else ():
            assert isinstance(late, str) and count > 0
            shown[late][1] += count
    for late, count in limit.overdue(everything=True):
        shown[str(late)][1] += count
    assert all(asked == accounted for asked, accounted in shown.values())
