"""The load, looked at once: descriptors that stay open, read with `pread`.

How it works:

1. On Linux the five files of the fast lane (`stat`, `meminfo`, `vmstat`, two of `pressure`) are opened once
   and read from offset 0 for each sample: a third of the time of a psutil sample, and no path is
   looked up again.
2. Where `/proc/stat` or `/proc/meminfo` does not exist, psutil gives the same `Sample`; it is imported only then.
3. Counters are handed on as the kernel gives them. Differences are the estimator's matter, and it has the
   CPU numbers to do them right across hotplug.
4. A file without a line that must be there raises `SensorError` with the names of both. PSI that does
   not exist or is switched off is None; a kernel without `vmstat` has seen 0 refaults.
"""

import errno
import os
from pathlib import Path

from guestd.model.errors import GuestdError
from guestd.model.guest import Sample

_FIRST_READ_BYTES = 16 << 10
_NOT_OFFERED = (errno.ENOENT, errno.ENOTDIR, errno.EOPNOTSUPP, errno.EACCES)


class SensorError(GuestdError):
    """A file of the kernel that does not say what it must say."""

    def __init__(self, source: str, missing: str) -> None:
        self.source, self.missing = source, missing
        super().__init__(f"{source}: {missing}")


def parse_stat(text: bytes, tick_seconds: float) -> tuple[dict[int, float], dict[int, float], float, int]:
    """Busy and idle seconds by CPU number, steal seconds of all CPUs, and runnable tasks, from `/proc/stat`.

    Busy is user, nice, system, irq and softirq, idle is idle and iowait; the time of nested guests is part of
    user already.

    :raise SensorError: When the CPUs' lines or `procs_running` are missing, or are not numbers.
    """
    if not text.startswith(b"cpu "):
        raise SensorError("stat", "its first line is not the sum of all CPUs")
    busy: dict[int, float] = {}
    idle: dict[int, float] = {}
    steal = 0
    start = text.find(b"\n") + 1  # the first line is the sum of all CPUs
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
        steal += ticks[7] if len(ticks) > 7 else 0
        start = end + 1
    if not busy:
        raise SensorError("stat", "no line of a single CPU (cpu0, cpu1, …)")
    running = _number_after(text, b"\nprocs_running ")
    if running is None:
        raise SensorError("stat", "no line procs_running")
    return busy, idle, steal * tick_seconds, running


def parse_meminfo(text: bytes) -> tuple[int, int, int]:
    """Bytes in all, bytes available and bytes of swap in use, from `/proc/meminfo`.

    :raise SensorError: When one of the four lines is missing or is not a number.
    """
    text = b"\n" + text
    amounts = []
    for name in (b"MemTotal", b"MemAvailable", b"SwapTotal", b"SwapFree"):
        value = _number_after(text, b"\n" + name + b":")
        if value is None:
            raise SensorError("meminfo", f"no line {name.decode()} with a number")
        amounts.append(value << 10)
    total, available, swap_total, swap_free = amounts
    return total, available, max(swap_total - swap_free, 0)


def parse_refaults(text: bytes) -> int:
    """Refaulted pages, file and anonymous, from `/proc/vmstat`; one counter for both before Linux 5.9."""
    text = b"\n" + text
    both = _number_after(text, b"\nworkingset_refault ") or 0
    return sum((_number_after(text, b"\nworkingset_refault_%s " % kind) or 0 for kind in (b"anon", b"file")), both)


def parse_pressure(text: bytes) -> tuple[int | None, int | None]:
    """Microseconds of `some` and of `full` stall; None for a line that this kernel does not have."""
    totals: dict[bytes, int] = {}
    for line in text.splitlines():
        kind, _, rest = line.partition(b" ")
        total = _number_after(b" " + rest, b" total=")
        if kind in (b"some", b"full") and total is not None:
            totals[kind] = total
    return totals.get(b"some"), totals.get(b"full")


def _number_after(text: bytes, mark: bytes) -> int | None:
    """The decimal number that follows `mark`, or None when either is not there."""
    found = text.find(mark)
    if found < 0:
        return None
    start = found + len(mark)
    words = text[start : start + 48].partition(b"\n")[0].split(None, 1)
    return int(words[0]) if words and words[0].isdigit() else None


class _File:
    """One open file of the kernel's, read anew from its start each time."""

    __slots__ = ("_fd", "_size", "path")

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = _FIRST_READ_BYTES
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> bytes:
        while True:
            text = os.pread(self._fd, self._size, 0)
            if len(text) < self._size:
                return text
            self._size *= 2

    def close(self) -> None:
        os.close(self._fd)


def _open_if_offered(path: Path) -> _File | None:
    try:
        file = _File(path)
    except OSError as error:
        if error.errno in _NOT_OFFERED:
            return None
        raise
    try:
        file.read()
    except OSError as error:
        file.close()
        if error.errno in _NOT_OFFERED:  # psi=0: the file exists and answers EOPNOTSUPP
            return None
        raise
    return file


class Sensors:
    """The sensors of this machine, or of a tree that looks like it.

    :param root: Where `proc` is.
    """

    def __init__(self, root: Path | str = "/") -> None:
        proc = Path(root) / "proc"
        self._root = Path(root)
        self._tick_seconds = 1.0 / os.sysconf("SC_CLK_TCK")
        files = {
            name: _open_if_offered(proc / name)
            for name in ("stat", "meminfo", "vmstat", "pressure/cpu", "pressure/memory")
        }
        self._stat, self._meminfo, self._vmstat = files["stat"], files["meminfo"], files["vmstat"]
        self._cpu_pressure, self._memory_pressure = files["pressure/cpu"], files["pressure/memory"]

    @property
    def offers_pressure(self) -> bool:
        """Whether samples carry PSI totals."""
        return self._cpu_pressure is not None and self._memory_pressure is not None

    def sample(self) -> Sample:
        """One look at the load, some tens of microseconds.

        :raise SensorError: When a file does not say what it must say.
        :raise OSError: When an open file can no longer be read.
        """
        cpu_some, _ = parse_pressure(self._cpu_pressure.read()) if self._cpu_pressure else (None, None)
        some, full = parse_pressure(self._memory_pressure.read()) if self._memory_pressure else (None, None)
        if self._stat is None or self._meminfo is None:
            return _psutil_sample(self._root, cpu_some, some, full)
        busy, idle, steal, running = parse_stat(self._stat.read(), self._tick_seconds)
        total, available, swap_used = parse_meminfo(self._meminfo.read())
        return Sample(
            cpu_busy_seconds=busy,
            cpu_idle_seconds=idle,
            cpu_steal_seconds=steal,
            runnable=max(running - 1, 0),
            cpu_some_us=cpu_some,
            memory_some_us=some,
            memory_full_us=full,
            memory_total_bytes=total,
            memory_available_bytes=available,
            swap_used_bytes=swap_used,
            refaults=parse_refaults(self._vmstat.read()) if self._vmstat else 0,
        )

    def close(self) -> None:
        """Close all descriptors; the object is of no further use."""
        files = (self._stat, self._meminfo, self._vmstat, self._cpu_pressure, self._memory_pressure)
        for file in files:
            if file is not None:
                file.close()
        self._stat = self._meminfo = self._vmstat = self._cpu_pressure = self._memory_pressure = None


def _psutil_sample(root: Path, cpu_some: int | None, some: int | None, full: int | None) -> Sample:
    """The same look through psutil. Its CPU list has no numbers, so they are taken from sysfs when the two agree;
    runnable tasks are the load of the last minute.
    """
    import psutil

    from guestd.guest.sysfs import read_cpus

    times = psutil.cpu_times(percpu=True)
    online = sorted(read_cpus(root, "online"))
    numbers = online if len(online) == len(times) else range(len(times))
    memory = psutil.virtual_memory()
    return Sample(
        cpu_busy_seconds={number: _busy_seconds(one) for number, one in zip(numbers, times, strict=True)},
        cpu_idle_seconds={
            number: one.idle + getattr(one, "iowait", 0.0) for number, one in zip(numbers, times, strict=True)
        },
        cpu_steal_seconds=sum(getattr(one, "steal", 0.0) for one in times),
        runnable=round(psutil.getloadavg()[0]),
        cpu_some_us=cpu_some,
        memory_some_us=some,
        memory_full_us=full,
        memory_total_bytes=memory.total,
        memory_available_bytes=memory.available,
        swap_used_bytes=psutil.swap_memory().used,
        refaults=0,
    )


def _busy_seconds(times: object) -> float:
    """What psutil has of user, nice, system, irq and softirq on this platform."""
    return float(sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq")))
