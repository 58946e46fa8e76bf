"""The load, looked at once: through psutil at rest, through descriptors that stay open while something moves.

How it works:

1. `regular` asks psutil: it knows other systems than Linux, and kernels that lack a line. psutil lists CPUs without
   their numbers; those are taken from sysfs, read before and after, so that hotplug cannot shift them. What psutil does
   not have (runnable tasks, PSI, refaults) comes from `/proc` where there is one.
2. `quick` reads six files of `/proc` that are opened when it is first called and stay open: no path is looked up again,
   and only what is used is parsed. It takes about an eighth of the time. `/proc/vmstat`, which the kernel adds up over
   all CPUs and which would be half of the work, and stalls on I/O are read every `slow_seconds`: their rates are taken
   over a second. Where `/proc/stat` or `/proc/meminfo` cannot be read it is `regular`. At rest the files are kept: that
   takes 25 KiB of the kernel's memory, and opening them anew would take it just when there is little.
3. Both give the same for the same files, but for how old what is read seldom is. Counters are handed on as the kernel
   gives them; differences are the estimator's matter, and it has the CPU numbers to do them right across hotplug.
4. A file that makes no sense to `quick` is looked at by `regular`, once more and otherwise; where that fails as well
   there is no sample (`SensorError`). A wrong one would be worse: it could give memory away.

Weak spot: without `/proc` runnable tasks are the load average of the last minute.
"""

import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any

from guestd.guest.procfs import (
    OpenFile,
    Pages,
    SensorError,
    open_if_offered,
    parse_meminfo,
    parse_pressure,
    parse_running,
    parse_stat,
    parse_vmstat,
    read_if_offered,
)
from guestd.guest.sysfs import read_cpus
from guestd.model.guest import Sample

_log = logging.getLogger(__name__)
_TRIES = 3  # to read the CPUs' times while none comes or goes
_BUSY = ("user", "nice", "system", "irq", "softirq")
_PRESSURES = ("pressure/cpu", "pressure/memory", "pressure/io")
_NAMES = ("stat", "meminfo", "vmstat", *_PRESSURES)
_TICK_SECONDS = 1.0 / os.sysconf("SC_CLK_TCK")


class Sensors:
    """The sensors of this machine.

    :param root: Where `proc` and `sys` are. psutil does not know of it and looks at this machine.
    :param slow_seconds: How old what is read seldom may be.
    """

    def __init__(self, root: Path | str = "/", slow_seconds: float = 0.2) -> None:
        self._root, self._slow_seconds = Path(root), slow_seconds
        self._pages, self._slow_due = Pages(), 0.0
        self._io_some: int | None = None
        self._files: dict[str, OpenFile | None] = {}
        self.failures = 0
        """Quick samples that made no sense."""

    def sample(self, quick: bool) -> Sample:
        """One look at the load; a quick one that fails is taken again the regular way.

        :raise SensorError: When there is no sample to be had.
        """
        if quick:
            try:
                return self.quick()
            except (SensorError, OSError) as error:
                self.close()  # to be opened anew: a file may have been replaced
                self.failures += 1
                if is_worth_saying(self.failures):
                    _log.warning("sensors: %s; asking psutil instead (%d so far)", error, self.failures)
        return self.regular()

    def regular(self) -> Sample:
        """A sample through psutil, about 0.2 ms.

        :raise SensorError: When psutil cannot make sense of the system either.
        """
        import psutil

        try:
            numbers, times = self._cpu_times()
            steal = _sum(psutil.cpu_times(), ("steal",))  # of the kernel's sum, which hotplug does not shift
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # of what this system does not count
                memory, swap = psutil.virtual_memory(), psutil.swap_memory()
            texts = {name: read_if_offered(self._root / "proc" / name) for name in _NAMES if name != "meminfo"}
        except (OSError, ValueError, KeyError, IndexError, TypeError, ZeroDivisionError, psutil.Error) as error:
            raise SensorError("psutil", f"{type(error).__name__}: {error}") from error
        if not times:
            raise SensorError("psutil", "it knows of no CPU")
        stat, vmstat = texts["stat"], texts["vmstat"]
        # psutil gives bytes in pages of 4 KiB, whatever the page is
        pages = parse_vmstat(vmstat) if vmstat is not None else Pages(swapped_in=swap.sin >> 12)
        cpu_some, memory_some, io_some = (_stalls(name, texts[name]) for name in _PRESSURES)
        return Sample(
            cpu_busy_seconds=dict(zip(numbers, (_sum(one, _BUSY) for one in times), strict=True)),
            cpu_idle_seconds=dict(zip(numbers, (_sum(one, ("idle", "iowait")) for one in times), strict=True)),
            cpu_steal_seconds=steal,
            runnable=max(parse_running(stat) - 1, 0) if stat is not None else round(psutil.getloadavg()[0]),
            cpu_some_us=cpu_some[0],
            memory_some_us=memory_some[0],
            memory_full_us=memory_some[1],
            memory_total_bytes=memory.total,
            memory_available_bytes=memory.available,
            swap_used_bytes=max(swap.used, 0),
            refaults=pages.refaults,
            memory_free_bytes=memory.free,
            io_some_us=io_some[0],
            swap_in_pages=pages.swapped_in,
            oom_kills=pages.oom_kills,
        )

    def quick(self) -> Sample:
        """A sample from descriptors that stay open, some tens of microseconds.

        :raise SensorError: When a file does not say what it must say.
        :raise OSError: When a file can no longer be read.
        """
        if not self._files:
            self._files = {name: open_if_offered(self._root / "proc" / name) for name in _NAMES}
        files = self._files
        stat, meminfo, vmstat = files["stat"], files["meminfo"], files["vmstat"]
        if stat is None or meminfo is None:
            return self.regular()
        busy, idle, steal, running = parse_stat(stat.read(), _TICK_SECONDS)
        memory = parse_meminfo(meminfo.read())
        now = time.monotonic()
        if now >= self._slow_due:
            self._pages = parse_vmstat(vmstat.read()) if vmstat else Pages()
            self._io_some = self._stalled("pressure/io")[0]
            self._slow_due = now + self._slow_seconds
        cpu_some = self._stalled("pressure/cpu")[0]
        memory_some, memory_full = self._stalled("pressure/memory")
        return Sample(
            cpu_busy_seconds=busy,
            cpu_idle_seconds=idle,
            cpu_steal_seconds=steal,
            runnable=max(running - 1, 0),
            cpu_some_us=cpu_some,
            memory_some_us=memory_some,
            memory_full_us=memory_full,
            memory_total_bytes=memory.total,
            memory_available_bytes=memory.available,
            swap_used_bytes=memory.swap_used,
            refaults=self._pages.refaults,
            memory_free_bytes=memory.free,
            io_some_us=self._io_some,
            swap_in_pages=self._pages.swapped_in,
            oom_kills=self._pages.oom_kills,
        )

    def _stalled(self, name: str) -> tuple[int | None, int | None]:
        file = self._files[name]
        return _stalls(name, None if file is None else file.read())

    def close(self) -> None:
        """Close all descriptors; the next quick sample opens them again."""
        for file in self._files.values():
            if file is not None:
                file.close()
        self._files, self._slow_due = {}, 0.0

    def _cpu_times(self) -> tuple[list[int], list[Any]]:
        """The CPUs' numbers, and psutil's times in the same order.

        Where the two lists stay of different length (a container that shows some of the host's CPUs) the numbers are
        the places in the list: nothing is plugged there.
        """
        import psutil

        for _ in range(_TRIES):
            before = read_cpus(self._root, "online")
            times = psutil.cpu_times(percpu=True)
            if len(before) == len(times) and before == read_cpus(self._root, "online"):
                return sorted(before), times
        return list(range(len(times))), times


def is_worth_saying(count: int) -> bool:
    """Whether the so manyth of the same failures is to be logged: the first, the second, the fourth, the eighth, …"""
    return count & (count - 1) == 0


def _stalls(name: str, text: bytes | None) -> tuple[int | None, int | None]:
    """PSI totals of one file in µs: some and full.

    :raise SensorError: When it is there and has no line `some`.
    """
    some, full = parse_pressure(text) if text is not None else (None, None)
    if text is not None and some is None:
        raise SensorError(name, "no line some with a total")
    return some, full


def _sum(times: object, names: tuple[str, ...]) -> float:
    """What psutil has of these on this platform, in seconds."""
    return float(sum(getattr(times, name, 0.0) for name in names))
