"""A program in a transient systemd unit of its own, waited for, and what it prints in our log.

The unit, not this process, is what bounds it: systemd ends it at its time with SIGTERM and a second later with SIGKILL,
and everything that it started.
"""

import os
import select
import signal
import time

from guestd.guest.helper.log import log

KILL_SECONDS = 1  # between SIGTERM and SIGKILL
DEFAULT_RETRY_SECONDS = 30
MAX_RETRY_SECONDS = 86_400
MAX_LINES = 20
MAX_LINE_CHARACTERS = 200

_LINE_BYTES = 4 * MAX_LINE_CHARACTERS  # UTF-8 takes up to four for one
_READ_BYTES = 4096
_DRAIN_READS = 16  # what a pipe holds; more can only come from something that was left behind
_LATE_SECONDS = 1.0  # beyond the end of the unit: systemd itself is late


class Output:
    """What a program prints: the first lines go to the log, the rest is only looked through for `retry-after`."""

    __slots__ = ("_line", "_lines", "_name", "retry_seconds")

    def __init__(self, name: str) -> None:
        self._name, self._line, self._lines = name, b"", 0
        self.retry_seconds = DEFAULT_RETRY_SECONDS

    def feed(self, data: bytes) -> None:
        first, *others = data.split(b"\n")
        self._line = (self._line + first)[:_LINE_BYTES]
        for one in others:
            self.end()
            self._line = one[:_LINE_BYTES]

    def end(self) -> None:
        """The line is complete."""
        text = self._line.decode("utf-8", "replace")[:MAX_LINE_CHARACTERS].rstrip()
        self._line = b""
        if not text:
            return
        words = text.split()
        if len(words) == 2 and words[0] == "retry-after" and words[1].isascii() and words[1].isdigit():
            self.retry_seconds = min(max(int(words[1]), 1), MAX_RETRY_SECONDS)
        self._lines += 1
        if self._lines <= MAX_LINES:
            log(f"<6>{self._name}: {''.join(one if one.isprintable() else '?' for one in text)}")
        elif self._lines == MAX_LINES + 1:
            log(f"<5>{self._name} prints more than {MAX_LINES} lines, ignoring the rest")


def run_unit(
    systemd_run: str, unit: str, command: list[str], environment: dict[str, str], seconds: float, output: Output
) -> int:
    """Run `command` as root in a unit of its own to its end; its exit code, 1 when it was ended.

    :param seconds: How long it may take before systemd ends it.
    :raise OSError: When `systemd_run` cannot be started.
    """
    options = ["--wait", "--pipe", "--collect", "--quiet", "--no-ask-password", f"--unit={unit}"]
    options += ["-p", f"RuntimeMaxSec={max(int(seconds * 1000), 1)}ms", "-p", f"TimeoutStopSec={KILL_SECONDS}s"]
    for variable, value in environment.items():
        options += ["-E", f"{variable}={value}"]
    gives_up_at = time.monotonic() + seconds + KILL_SECONDS + _LATE_SECONDS
    return _spawn([systemd_run, *options, *command], output, gives_up_at)


def _spawn(command: list[str], output: Output, gives_up_at: float) -> int:
    """Run a command to its end; its exit code.

    Not until its output ends: something that it left behind may hold that open.

    :raise OSError: When it cannot be started.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    nothing = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.set_blocking(writing, True)
        pid = os.posix_spawn(
            command[0],
            command,
            {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, nothing, 0),
                (os.POSIX_SPAWN_DUP2, writing, 1),
                (os.POSIX_SPAWN_DUP2, writing, 2),
            ],
            setsigdef=[signal.SIGPIPE],
        )
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(nothing)
        os.close(writing)
    ended = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(reading, select.POLLIN)
        poll.register(ended, select.POLLIN)
        while True:
            ready = dict(poll.poll(max(int((gives_up_at - time.monotonic()) * 1000), 0)))
            if reading in ready and not _take(reading, output):
                poll.unregister(reading)
            if ended in ready:
                break
            if not ready or time.monotonic() >= gives_up_at:
                os.kill(pid, signal.SIGKILL)  # systemd is late; it ends the unit without us
                break
        _, status = os.waitpid(pid, 0)
        for _ in range(_DRAIN_READS):
            if not _take(reading, output):
                break
        output.end()
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 1
    finally:
        os.close(ended)
        os.close(reading)


def _take(reading: int, output: Output) -> bool:
    """Read once; whether there may be more."""
    try:
        data = os.read(reading, _READ_BYTES)
    except BlockingIOError:
        return False
    output.feed(data)
    return bool(data)
