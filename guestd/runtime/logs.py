"""Logs of both daemons: plain lines on stderr.

Under journald each line starts with its priority (`<4>`) and has no time, for the journal has one. Control
characters are escaped, so that a name from outside can neither forge a line nor drive a terminal.
"""

import logging
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TextIO

_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
_ESCAPES |= {0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t", 0x2028: "\\u2028", 0x2029: "\\u2029"}
_ESCAPES |= {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}  # bidi


def escape(text: str) -> str:
    """The text on one line, with control characters made visible."""
    return text.translate(_ESCAPES).encode("utf-8", "backslashreplace").decode()


class _Formatter(logging.Formatter):
    """One line per record, and one more per line of a traceback."""

    def __init__(self, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        texts = [escape(record.getMessage())]
        if record.exc_info:
            texts += ["  " + escape(line) for line in self.formatException(record.exc_info).splitlines()]
        if self._journal:
            prefix = f"<{_priority(record.levelno)}>"
        else:
            stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
            prefix = f"{stamp}.{int(record.msecs):03d} {record.levelname.lower()}: "
        return "\n".join(prefix + text for text in texts)


def _priority(level: int) -> int:
    return next((priority for least, priority in _PRIORITIES if level >= least), 7)


def under_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether `stream` goes to journald: the device and inode that systemd names are those of the stream."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):  # a stream without a file
        return False
    return environ.get("JOURNAL_STREAM", "") == f"{found.st_dev}:{found.st_ino}"


def setup(level: int = logging.INFO, stream: TextIO | None = None, environ: Mapping[str, str] | None = None) -> None:
    """Send the records of all loggers to `stream` (stderr), in place of any earlier arrangement."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Formatter(under_journal(stream, os.environ if environ is None else environ)))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    logging.raiseExceptions = False  # a reader that went away is no reason for tracebacks


class RateLimit:
    """Lets the first message of a key through and then one per interval, and counts the others.

    At most `keys` keys are remembered; the one used longest ago is forgotten first::

        if (suppressed := limit.allow("guest a: bad message")) is not None:
            log.warning("bad message (%d more not shown)", suppressed)
    """

    def __init__(
        self, interval_seconds: float = 10.0, keys: int = 1000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval, self._keys, self._clock = interval_seconds, keys, clock
        self._seen: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def allow(self, key: str) -> int | None:
        """How many were suppressed since the last one let through; None: suppress this one too."""
        now = self._clock()
        last, suppressed = self._seen.pop(key, (None, 0))
        if last is not None and now - last < self._interval:
            self._seen[key] = (last, suppressed + 1)
            return None
        self._seen[key] = (now, 0)
        if len(self._seen) > self._keys:
            self._seen.popitem(last=False)
        return suppressed
