"""Logs of both daemons: lines on stderr, plain or JSON.

Under journald each line starts with its priority (`<4>`), and a plain one has no time, for the journal has one. What is
not printable is escaped, so that a name from outside can neither forge a line nor drive a terminal, nor hide in one.
"""

import logging
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from datetime import UTC, datetime
from typing import TextIO

_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_EXTRA = ("guest", "kind", "code", "before", "after", "suppressed")
"""What a record may carry besides its message, by `extra=`, and by `_Handler` the last one."""
_LINES_ALIKE = 10  # in 10 s: a VM that grows step by step has each of them shown
_KEYS = 10_000


def escape(text: str) -> str:
    """The text on one line, with every control, format and unassigned character made visible."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


class _Formatter(logging.Formatter):
    """One plain line per record, and one more per line of a traceback."""

    def __init__(self, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        suppressed = getattr(record, "suppressed", 0)
        texts = [escape(record.getMessage()) + (f" ({suppressed} more like this not shown)" if suppressed else "")]
        if record.exc_info:
            texts += ["  " + escape(line) for line in self.formatException(record.exc_info).splitlines()]
        prefix = _prefix(record, self._journal)
        if not prefix:
            stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
            prefix = f"{stamp}.{int(record.msecs):03d} {record.levelname.lower()}: "
        return "\n".join(prefix + text for text in texts)


class _JsonFormatter(_Formatter):
    """One object per record: when, level, logger, message, what came by `extra=`, and the lines of a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": escape(record.getMessage()),
        }
        for name in _EXTRA:
            value = getattr(record, name, None)
            if value is not None:
                fields[name] = value if isinstance(value, int) else escape(str(value))
        if record.exc_info:
            fields["traceback"] = [escape(line) for line in self.formatException(record.exc_info).splitlines()]
        import json  # not in the guest

        return _prefix(record, self._journal) + json.dumps(fields)


class _Handler(logging.StreamHandler[TextIO]):
    """Writes few of the lines that are alike: of one message, about one guest (else with one first argument), and for
    decisions of one kind and code. How many were not shown is said with the next one of them, or, where none comes any
    more, with the next line of another sort or at the end. Details are not limited: who asked for them wants them all.
    """

    def __init__(self, stream: TextIO, limit: "RateLimit | None") -> None:
        super().__init__(stream)
        self._limit = limit
        self._not_shown: dict[Hashable, logging.LogRecord] = {}  # the first of each sort

    def emit(self, record: logging.LogRecord) -> None:
        if self._limit is not None and record.levelno >= logging.INFO:
            key = _sort(record)
            suppressed = self._limit.allow(key)
            if suppressed is None:
                self._not_shown.setdefault(key, record)
            else:
                self._not_shown.pop(key, None)
            for late, count in self._limit.overdue():
                self._tell(late, count)
            if suppressed is None:
                return
            if suppressed:
                record.suppressed = suppressed
        super().emit(record)

    def close(self) -> None:
        """See `Handler`: at the end of the process."""
        for late, count in self._limit.overdue(everything=True) if self._limit is not None else ():
            self._tell(late, count)
        super().close()

    def _tell(self, key: Hashable, count: int) -> None:
        first = self._not_shown.pop(key, None)
        if first is not None:
            fields = {name: getattr(first, name) for name in ("guest", "kind", "code") if hasattr(first, name)}
            text = f"before this: {first.getMessage()}"
            late = logging.LogRecord(first.name, first.levelno, first.pathname, first.lineno, text, (), None)
            late.__dict__ |= {**fields, "suppressed": count}
            super().emit(late)


def _sort(record: logging.LogRecord) -> Hashable:
    arguments = record.args if isinstance(record.args, tuple) else ()
    about = getattr(record, "guest", None) or str(arguments[:1])
    decision = getattr(record, "kind", None), getattr(record, "code", None)
    return record.name, str(record.msg), about, decision


def _prefix(record: logging.LogRecord, journal: bool) -> str:
    """The priority, for a journal."""
    if not journal:
        return ""
    priority = next((priority for least, priority in _PRIORITIES if record.levelno >= least), 7)
    return f"<{priority}>"


def under_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether `stream` goes to journald: the device and inode that systemd names are those of the stream."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):  # a stream without a file
        return False
    return environ.get("JOURNAL_STREAM", "") == f"{found.st_dev}:{found.st_ino}"


def setup(
    level: int = logging.INFO,
    stream: TextIO | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    as_json: bool = False,
    limit: "RateLimit | None" = None,
) -> None:
    """Send the records of all loggers to `stream` (stderr), in place of any earlier arrangement.

    :param limit: bounds how often lines that are alike are shown; None: all are.
    """
    stream = stream or sys.stderr
    handler = _Handler(stream, limit)
    formatter = _JsonFormatter if as_json else _Formatter
    handler.setFormatter(formatter(under_journal(stream, os.environ if environ is None else environ)))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    logging.raiseExceptions = False  # a reader that went away is no reason for tracebacks


class RateLimit:
    """Lets so many messages of a key through (the first one) per interval, and counts the others.

    At most `keys` keys are remembered; the one used longest ago is forgotten first, but for what is to be said of it::

        if (suppressed := limit.allow("guest a: bad message")) is not None:
            log.warning("bad message (%d more not shown)", suppressed)
    """

    def __init__(
        self,
        interval_seconds: float = 10.0,
        keys: int = 1000,
        clock: Callable[[], float] = time.monotonic,
        most: int = 1,
    ) -> None:
        self._interval, self._keys, self._clock, self._most = interval_seconds, keys, clock, most
        self._now = 0.0  # when it was last asked
        self._seen: OrderedDict[Hashable, tuple[float, int]] = OrderedDict()  # since when, and how many came
        self._owing: OrderedDict[Hashable, float] = OrderedDict()  # until when counts are awaited, about in this order
        self._forgotten: list[tuple[Hashable, int]] = []

    def allow(self, key: Hashable) -> int | None:
        """How many were suppressed since the last one let through; None: suppress this one too."""
        now = self._now = self._clock()
        since, came = self._seen.pop(key, (None, 0))
        if since is not None and now - since < self._interval:
            self._seen[key] = (since, came + 1)
            if came < self._most:
                return 0
            self._owing.setdefault(key, since + self._interval)
            return None
        self._seen[key] = (now, 1)
        self._owing.pop(key, None)
        if len(self._seen) > self._keys:
            oldest, (_, many) = self._seen.popitem(last=False)
            if self._owing.pop(oldest, None) is not None:
                self._forgotten.append((oldest, many - self._most))
        return max(0, came - self._most)

    def overdue(self, *, everything: bool = False) -> list[tuple[Hashable, int]]:
        """Keys of which some were suppressed, and none came any more when one would have been let through again, with
        how many; each is said once. `everything`: do not wait any longer.
        """
        found, self._forgotten = self._forgotten, []
        while self._owing:
            key, until = next(iter(self._owing.items()))
            if until > self._now and not everything:
                break
            del self._owing[key]
            found.append((key, self._seen.pop(key)[1] - self._most))
        return found


def few_alike() -> RateLimit:
    """The limit that a daemon's log has."""
    return RateLimit(keys=_KEYS, most=_LINES_ALIKE)
