"""What the kernel's files about the load say: parsers, and descriptors that stay open. Nothing is kept or judged.

1. A file without a line that every kernel has, or with something else than a number in it, raises `SensorError`
   with the names of both: a wrong number would move memory.
2. A line that only some kernels have is None or 0 when it is not there.
"""

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from guestd.model.errors import GuestdError

_FIRST_READ_BYTES = 16 << 10
_IN_PARTS = ("vmstat",)
"""What the kernel hands out a page at a time, line by line. The other files it makes as wholes (`single_open` in
fs/seq_file.c), and one read that leaves room has all of it.
"""
_NOT_OFFERED = (errno.ENOENT, errno.ENOTDIR, errno.EOPNOTSUPP, errno.EACCES)


class SensorError(GuestdError):
    """A file of the kernel that does not say what it must say."""

    def __init__(self, source: str, missing: str) -> None:
        self.source, self.missing = source, missing
        super().__init__(f"{source}: {missing}")


@dataclass(frozen=True, slots=True)
class Memory:
    """`/proc/meminfo`, in bytes."""

    total: int
    free: int
    available: int
    swap_used: int


@dataclass(frozen=True, slots=True)
class Pages:
    """Counters of `/proc/vmstat`, since boot."""

    refaults: int = 0  # pages, file and anonymous
    swapped_in: int = 0  # pages
    oom_kills: int = 0


def parse_stat(text: bytes, tick_seconds: float) -> tuple[dict[int, float], dict[int, float], float, int]:
    """Busy and idle seconds by CPU number, steal seconds of all CPUs, and runnable tasks, from `/proc/stat`.

    Busy is user, nice, system, irq and softirq, idle is idle and iowait; the time of nested guests is part of
    user already. Steal is the first line's, where a CPU that is offline still counts: a sum over those that have a line
    would jump with each that comes or goes.

    :raise SensorError: When the CPUs' lines or `procs_running` are missing, or are not numbers.
    """
    if not text.startswith(b"cpu "):
        raise SensorError("stat", "its first line is not the sum of all CPUs")
    busy: dict[int, float] = {}
    idle: dict[int, float] = {}
    start = text.find(b"\n") + 1
    steal = _steal_ticks(text[: max(0, start - 1)])
    while start and text.startswith(b"cpu", start):
        end = text.find(b"\n", start)
        if end < 0:
            raise SensorError("stat", "a line of a CPU is cut off")
        fields = text[start + 3 : end].split()
        try:
            number, *ticks = map(int, fields)
        except ValueError:
            raise SensorError("stat", f"line {bytes(text[start:end])!r} is not numbers") from None
        if len(ticks) < 7 or min(ticks) < 0 or number < 0:
            raise SensorError("stat", f"line {bytes(text[start:end])!r} is not a CPU with at least 7 counters")
        busy[number] = (ticks[0] + ticks[1] + ticks[2] + ticks[5] + ticks[6]) * tick_seconds
        idle[number] = (ticks[3] + ticks[4]) * tick_seconds
        start = end + 1
    if not busy:
        raise SensorError("stat", "no line of a single CPU (cpu0, cpu1, …)")
    return busy, idle, steal * tick_seconds, parse_running(text)


def _steal_ticks(line: bytes) -> int:
    fields = line.split(None, 9)
    if len(fields) < 9:  # a kernel that does not count it
        return 0
    if not fields[8].isdigit():
        raise SensorError("stat", f"line {bytes(line)!r} is not numbers")
    return int(fields[8])


def parse_running(text: bytes) -> int:
    """Tasks that run or wait for a CPU now, from `/proc/stat`.

    :raise SensorError: When there is no such line.
    """
    running = _number_after(text, b"\nprocs_running ")
    if running is None:
        raise SensorError("stat", "no line procs_running")
    return running


def parse_meminfo(text: bytes) -> Memory:
    """The lines of `/proc/meminfo` that say how much there is.

    :raise SensorError: When one of the five lines is missing or is not a number.
    """
    text = b"\n" + text
    amounts = []
    for name in (b"MemTotal", b"MemFree", b"MemAvailable", b"SwapTotal", b"SwapFree"):
        value = _number_after(text, b"\n" + name + b":")
        if value is None:
            raise SensorError("meminfo", f"no line {name.decode()} with a number")
        amounts.append(value << 10)
    total, free, available, swap_total, swap_free = amounts
    return Memory(total, free, available, max(swap_total - swap_free, 0))


def parse_vmstat(text: bytes) -> Pages:
    """Counters of `/proc/vmstat`; one that this kernel does not count is 0. Before Linux 5.9 refaults of both kinds
    were one counter; `oom_kill` came with 4.13.

    :raise SensorError: When it is no vmstat, or a counter is not a number.
    """
    text = b"\n" + text
    if b"\nnr_free_pages " not in text:
        raise SensorError("vmstat", "no line nr_free_pages")
    refaults = (b"workingset_refault", b"workingset_refault_anon", b"workingset_refault_file")
    return Pages(sum(_count(text, name) for name in refaults), _count(text, b"pswpin"), _count(text, b"oom_kill"))


def parse_pressure(text: bytes) -> tuple[int | None, int | None]:
    """Microseconds of `some` and of `full` stall; None for a line that this kernel does not have."""
    totals: dict[bytes, int] = {}
    for line in text.splitlines():
        kind, _, rest = line.partition(b" ")
        total = _number_after(b" " + rest, b" total=")
        if kind in (b"some", b"full") and total is not None:
            totals[kind] = total
    return totals.get(b"some"), totals.get(b"full")


def _count(text: bytes, name: bytes) -> int:
    mark = b"\n" + name + b" "
    value = _number_after(text, mark)
    if value is not None:
        return value
    if mark in text:
        raise SensorError("vmstat", f"line {name.decode()} is not a number")
    return 0


def _number_after(text: bytes, mark: bytes) -> int | None:
    """The decimal number that follows `mark`, or None when either is not there."""
    found = text.find(mark)
    if found < 0:
        return None
    start = found + len(mark)
    words = text[start : start + 48].partition(b"\n")[0].split(None, 1)
    return int(words[0]) if words and words[0].isdigit() else None


class OpenFile:
    """One open file of the kernel's, read anew from its start each time."""

    __slots__ = ("_fd", "_in_parts", "_size")

    def __init__(self, path: Path) -> None:
        self._size, self._in_parts = _FIRST_READ_BYTES, path.name in _IN_PARTS
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> bytes:
        """All of it, as it is now.

        :raise OSError: When it can no longer be read.
        """
        while True:
            text = os.pread(self._fd, self._size, 0)
            while self._in_parts and (more := os.pread(self._fd, self._size, len(text))):
                text += more
            if self._in_parts or len(text) < self._size:
                return text
            self._size *= 2

    def close(self) -> None:
        """Close it; the object is of no further use."""
        os.close(self._fd)


def open_if_offered(path: Path) -> OpenFile | None:
    """The file, open, or None when this kernel does not offer it (psi=0: it exists and answers EOPNOTSUPP).

    :raise OSError: When it cannot be opened or read for another reason.
    """
    return _try(path)[0]


def read_if_offered(path: Path) -> bytes | None:
    """What the file says, or None when this kernel does not offer it.

    :raise OSError: When it cannot be opened or read for another reason.
    """
    file, text = _try(path)
    if file is not None:
        file.close()
    return text


def _try(path: Path) -> tuple[OpenFile, bytes] | tuple[None, None]:
    file = None
    try:
        file = OpenFile(path)
        return file, file.read()
    except OSError as error:
        if file is not None:
            file.close()
        if error.errno in _NOT_OFFERED:
            return None, None
        raise
