"""Carries out the bench's steps in the guest. Runs there as root, on Python's standard library alone.

Connects to the host over vsock, reads one line of JSON per step and answers with lines of JSON. All times are
this kernel's monotonic clock. Between the steps it sleeps in the kernel: nothing of it shows in an idle VM.
"""

import argparse
import json
import mmap
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

HOST_CID = 2
POLL_SECONDS = 0.005  # while a load runs; the bare loops look every millisecond
BARE_POLL_SECONDS = 0.001
AFTER_SECONDS = 0.3  # the load goes on a little after it got what it waited for
GROW_STEP_SECONDS = 0.05
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")

Answer = dict[str, object]
Say = Callable[[Answer], None]


def count_cpus(text: str) -> int:
    """The number of CPUs in a list of the kernel, such as ``0-2,5``."""
    count = 0
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            count += int(last or first) - int(first) + 1
    return count


def online_cpus(root: Path) -> int:
    """How many CPUs are online."""
    return count_cpus((root / "sys/devices/system/cpu/online").read_text())


def memory_total_bytes(root: Path) -> int:
    """MemTotal."""
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    raise ValueError("no MemTotal in /proc/meminfo")


def burn() -> None:
    """Keeps one CPU busy for ever."""
    number = 1
    while True:
        for _ in range(2000):
            number = number * 1_103_515_245 + 12_345 & 0x7FFFFFFF


def grow(bytes_per_second: int, limit_bytes: int) -> None:
    """Takes memory, all of it really there, at a steady rate up to a limit, then holds it for ever."""
    step = int(bytes_per_second * GROW_STEP_SECONDS)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE  # emulated page faults would slow it down
    pieces: list[mmap.mmap] = []
    due = time.monotonic()
    while len(pieces) * step < limit_bytes:
        pieces.append(mmap.mmap(-1, step, flags=flags))
        due = max(due + GROW_STEP_SECONDS, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))
    signal.pause()


def start(count: int, work: Callable[[], None]) -> list[int]:
    """Runs a function in processes of ordinary priority; their ids."""
    children = []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            try:
                os.setpriority(os.PRIO_PROCESS, 0, 0)
                work()
            finally:
                os._exit(1)
        children.append(child)
    return children


def end(children: list[int]) -> None:
    """Ends processes of `start`."""
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)


def under_load(count: int, work: Callable[[], None], amount: Callable[[], int], limit_seconds: float) -> Answer:
    """Starts a load, and looks until an amount has grown: when each was.

    The onset is taken before the first process is made, so that nothing is left out.
    """
    before = amount()
    onset = looked = time.monotonic()
    children = start(count, work)
    gap, grown, grown_at = 0.0, before, None
    try:
        while (now := time.monotonic()) < onset + limit_seconds:
            gap, looked = max(gap, now - looked), now
            grown = amount()
            if grown > before:
                grown_at = time.monotonic()
                break
            time.sleep(POLL_SECONDS)
        time.sleep(AFTER_SECONDS)
    finally:
        end(children)
    return {"onset": onset, "grown_at": grown_at, "before": before, "after": grown, "longest_gap_seconds": gap}


def offline_cpus(root: Path) -> list[Path]:
    """The switches of CPUs that are present and offline."""
    found = []
    for switch in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/online"):
        try:
            if switch.read_text().strip() == "0":
                found.append(switch)
        except OSError:
            continue  # it has just gone
    return sorted(found)


def offline_blocks(root: Path) -> list[Path]:
    """The switches of memory blocks that are offline."""
    found = []
    for switch in (root / "sys/devices/system/memory").glob("memory[0-9]*/state"):
        try:
            if switch.read_text().strip() == "offline":
                found.append(switch)
        except OSError:
            continue
    return sorted(found)


def bare_loop(switches: Callable[[], list[Path]], word: str, amount: Callable[[], int], limit_seconds: float) -> Answer:
    """Switches on whatever appears, at once, until an amount has grown: the least that any daemon would take."""
    before = amount()
    began = time.monotonic()
    while time.monotonic() < began + limit_seconds:
        for switch in switches():
            switch.write_text(word)
        if amount() > before:
            return {"grown_at": time.monotonic(), "before": before, "after": amount()}
        time.sleep(BARE_POLL_SECONDS)
    return {"grown_at": None, "before": before, "after": amount()}


def cgroup_processes(unit: str) -> list[int]:
    """All processes of a service."""
    return [int(line) for line in Path(f"/sys/fs/cgroup/system.slice/{unit}/cgroup.procs").read_text().split()]


def process_usage(proc: Path, pid: int) -> tuple[int, float, int]:
    """Proportional set size in bytes, CPU seconds, and context switches of all threads of one process."""
    rollup = (proc / str(pid) / "smaps_rollup").read_text()
    pss = next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
    fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
    seconds = (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND
    switches = 0
    for status in (proc / str(pid) / "task").glob("*/status"):
        for line in status.read_text().splitlines():
            if "voluntary_ctxt_switches:" in line:  # and nonvoluntary_
                switches += int(line.split()[1])
    return pss, seconds, switches


def usage(proc: Path, pids: list[int]) -> Answer:
    """What processes have used together until now."""
    each = [process_usage(proc, pid) for pid in pids]
    return {
        "t": time.monotonic(),
        "pids": pids,
        "pss_bytes": sum(one[0] for one in each),
        "cpu_seconds": sum(one[1] for one in each),
        "context_switches": sum(one[2] for one in each),
    }


def perform(step: Answer, say: Say, root: Path = Path("/")) -> None:
    """Does one step and says what came of it."""

    def cpus() -> int:
        return online_cpus(root)

    def memory() -> int:
        return memory_total_bytes(root)

    limit = float(str(step.get("limit_seconds", 20.0)))
    match step["do"]:
        case "clock":
            say({"t": time.monotonic()})
        case "cpu-load":
            say(under_load(int(str(step["processes"])), burn, cpus, limit))
        case "memory-load":
            rate, most = int(str(step["bytes_per_second"])), int(str(step["limit_bytes"]))
            say(under_load(1, lambda: grow(rate, most), memory, limit))
        case "cpu-bare":
            say({"ready": time.monotonic()})
            say(bare_loop(lambda: offline_cpus(root), "1", cpus, limit))
        case "memory-bare":
            say({"ready": time.monotonic()})
            say(bare_loop(lambda: offline_blocks(root), "online_movable", memory, limit))
        case "cpu-offline":
            for switch in sorted((root / "sys/devices/system/cpu").glob("cpu[1-9]*/online")):
                switch.write_text("0")
            say({"online": cpus()})
        case "usage":
            units = str(step["unit"]).split()
            say({unit: usage(root / "proc", cgroup_processes(unit)) for unit in units})
        case other:
            say({"error": f"no such step: {other}"})


def main() -> None:
    """Serves the host's steps until it hangs up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    options = parser.parse_args()
    os.setpriority(os.PRIO_PROCESS, 0, -15)  # it looks at the right time also while all CPUs are busy
    family: int = socket.AF_VSOCK
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.bind((socket.VMADDR_CID_ANY, 900))  # the lab's device lets only ports below 1024 through
        sock.connect((HOST_CID, options.port))

        def say(answer: Answer) -> None:
            sock.sendall(json.dumps(answer).encode() + b"\n")

        with sock.makefile("rb") as lines:
            for line in lines:
                try:
                    perform(json.loads(line), say)
                except (OSError, ValueError, KeyError) as error:
                    say({"error": repr(error)})


if __name__ == "__main__":
    main()
