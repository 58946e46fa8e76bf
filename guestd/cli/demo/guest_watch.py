"""Watches the guest's own /proc and /sys. Runs in the guest, on Python's standard library alone.

Looks at the two amounts that matter (CPUs online, memory in all) every 20 ms, and writes a line of JSON
with everything whenever one of them changed, or when it has been silent for a while. The time of a change
is therefore known to 20 ms, by the guest's monotonic clock, whatever the console does.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path


def count_cpus(text: str) -> int:
    """The number of CPUs in a list of the kernel, such as ``0-2,5``."""
    count = 0
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            count += int(last or first) - int(first) + 1
    return count


class Files:
    """Files of the kernel that are read again and again, kept open."""

    def __init__(self, root: Path) -> None:
        self._online = os.open(root / "sys/devices/system/cpu/online", os.O_RDONLY)
        self._meminfo = os.open(root / "proc/meminfo", os.O_RDONLY)
        self._stat = os.open(root / "proc/stat", os.O_RDONLY)
        self._vmstat = os.open(root / "proc/vmstat", os.O_RDONLY)
        self._ticks: dict[str, tuple[int, int]] = {}
        self._looked_at = 0.0
        self._busy_seconds = 0.0

    def quick(self) -> tuple[int, int]:
        """CPUs online, and the pages of memory in all (what MemTotal says, but cheaper)."""
        return count_cpus(_read(self._online)), os.sysconf("SC_PHYS_PAGES")

    def all(self) -> dict[str, float]:
        """Everything, as a record of the timeline without its host time."""
        memory = _numbers(_read(self._meminfo))
        stat = _read(self._stat).splitlines()
        running = next((int(line.split()[1]) for line in stat if line.startswith("procs_running ")), 1)
        return {
            "cpus_online": count_cpus(_read(self._online)),
            "memory_total_bytes": memory["MemTotal"] * 1024,
            "memory_available_bytes": memory["MemAvailable"] * 1024,
            "busy_seconds": self._busy(stat, time.monotonic()),
            "runnable": max(running - 1, 0),
            "oom_kills": _numbers(_read(self._vmstat)).get("oom_kill", 0),
        }

    def _busy(self, stat: list[str], now: float) -> float:
        """CPU seconds in use since the first look: each CPU's busy share of the time that was accounted for.

        Of a vCPU that the host lets run only now and then, ticks are lost: neither busy nor idle. A CPU that
        is new counts from its second look on.
        """
        seen = {}
        for line in stat:
            fields = line.split()
            if fields and fields[0].startswith("cpu") and fields[0] != "cpu":
                # user nice system idle iowait irq softirq: steal is neither, guest times are part of user's
                ticks = [int(field) for field in fields[1:8]]
                seen[fields[0]] = (sum(ticks) - ticks[3] - ticks[4], ticks[3] + ticks[4])
        for name in seen.keys() & self._ticks.keys():
            busy, idle = seen[name][0] - self._ticks[name][0], seen[name][1] - self._ticks[name][1]
            share = busy / (busy + idle) if busy + idle > 0 else 1.0
            self._busy_seconds += share * (now - self._looked_at)
        self._ticks, self._looked_at = seen, now
        return self._busy_seconds


def _read(descriptor: int) -> str:
    parts = []
    offset = 0
    while part := os.pread(descriptor, 65_536, offset):
        parts.append(part)
        offset += len(part)
    return b"".join(parts).decode()


def _numbers(text: str) -> dict[str, int]:
    """The numbers of ``Name: 1 kB`` or ``name 1`` lines."""
    fields = (line.split() for line in text.splitlines())
    return {field[0].rstrip(":"): int(field[1]) for field in fields if len(field) > 1}


def main() -> None:
    """Watches until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interval-seconds", type=float, default=0.02)
    parser.add_argument("--silence-seconds", type=float, default=0.25)
    parser.add_argument("--for-seconds", type=float, default=600.0)
    parser.add_argument("--root", type=Path, default=Path("/"))
    options = parser.parse_args()
    files = Files(options.root)
    last, written = (0, 0), 0.0
    end = time.monotonic() + options.for_seconds
    while (now := time.monotonic()) < end:
        quick = files.quick()
        if quick != last or now - written >= options.silence_seconds:
            record = {"source": "guest", "guest_t": now, **files.all()}
            os.write(sys.stdout.fileno(), f"{json.dumps(record)}\n".encode())
            last, written = quick, now
        time.sleep(options.interval_seconds)


if __name__ == "__main__":
    main()
