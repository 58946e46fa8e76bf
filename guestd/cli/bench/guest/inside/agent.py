"""Carries out the bench's steps in the guest. Runs there as root, on Python's standard library alone.

Connects to the host over vsock, reads one line of JSON per step and answers with lines of JSON. All times are this
kernel's monotonic clock. Between the steps it sleeps in the kernel: nothing of it shows in an idle VM.
"""

import argparse
import base64
import json
import mmap
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

HOST_CID = 2
POLL_SECONDS = 0.005  # while a load runs; the bare loops look every millisecond
BARE_POLL_SECONDS = 0.001
AFTER_SECONDS = 0.3  # the load goes on a little after it got what it waited for
GROW_STEP_SECONDS = 0.05

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


def vmstat(root: Path, name: str) -> int:
    """One counter of /proc/vmstat."""
    for line in (root / "proc/vmstat").read_text().splitlines():
        if line.startswith(name + " "):
            return int(line.split()[1])
    raise ValueError(f"no {name} in /proc/vmstat")


def memory_available_bytes(root: Path) -> int:
    """MemAvailable."""
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ValueError("no MemAvailable in /proc/meminfo")


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
                Path("/proc/self/oom_score_adj").write_text("1000")
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


def cgroup_of(unit: str, root: Path) -> Path:
    """The control group of a service, in whatever slice it is."""
    found = next((root / "sys/fs/cgroup").glob(f"**/{unit}/cgroup.procs"), None)
    if found is None:
        raise ValueError(f"{unit} is not running")
    return found.parent


def process_usage(proc: Path, pid: int) -> tuple[int, int]:
    """Proportional set size in bytes, and context switches of all threads of one process."""
    rollup = (proc / str(pid) / "smaps_rollup").read_text()
    pss = next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
    switches = 0
    for status in (proc / str(pid) / "task").glob("*/status"):
        for line in status.read_text().splitlines():
            if "voluntary_ctxt_switches:" in line:  # and nonvoluntary_
                switches += int(line.split()[1])
    return pss, switches


def usage(proc: Path, cgroup: Path) -> Answer:
    """What a service has used until now. A process that is just ending counts for its CPU time only."""
    each = {}
    for line in (cgroup / "cgroup.procs").read_text().split():
        try:
            each[int(line)] = process_usage(proc, int(line))
        except (ProcessLookupError, FileNotFoundError, StopIteration):
            continue
    spent = next(line for line in (cgroup / "cpu.stat").read_text().splitlines() if line.startswith("usage_usec "))
    return {
        "t": time.monotonic(),
        "pids": sorted(each),
        "pss_bytes": sum(pss for pss, _ in each.values()),
        "cpu_seconds": int(spent.split()[1]) / 1e6,
        "context_switches": sum(switches for _, switches in each.values()),
    }


def put(path: Path, data: str, append: bool, mode: int) -> Answer:
    """Writes a part of a file that comes in base64."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab" if append else "wb") as file:
        file.write(base64.b64decode(data))
    path.chmod(mode)
    return {"bytes": path.stat().st_size}


def run(words: list[str], limit_seconds: float, root: Path) -> Answer:
    """Runs a program that may fall to the OOM killer, and nothing else may: what came of it, and of the VM."""

    def first_to_go() -> None:
        Path("/proc/self/oom_score_adj").write_text("1000")

    kills, swapped = vmstat(root, "oom_kill"), vmstat(root, "pswpout")
    began = time.monotonic()
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=limit_seconds, preexec_fn=first_to_go, check=False
        )
        code, out = done.returncode, (done.stdout + done.stderr)[-4000:]
    except subprocess.TimeoutExpired:
        code, out = -1, "not over in time"
    return {
        "exit": code,
        "out": out,
        "began": began,
        "seconds": time.monotonic() - began,
        "oom_kills": vmstat(root, "oom_kill") - kills,
        "swapped_pages": vmstat(root, "pswpout") - swapped,
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
            rate = int(str(step["bytes_per_second"]))
            most = memory_available_bytes(root) - int(str(step["leave_bytes"]))
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
        case "put":
            say(put(Path(str(step["path"])), str(step["data"]), bool(step["append"]), int(str(step["mode"]))))
        case "run":
            words = step["words"]
            assert isinstance(words, list)
            say(run([str(word) for word in words], limit, root))
        case "load-average":
            say({"load1": float((root / "proc/loadavg").read_text().split()[0])})
        case "usage":
            units = str(step["unit"]).split()
            say({unit: usage(root / "proc", cgroup_of(unit, root)) for unit in units})
        case other:
            say({"error": f"no such step: {other}"})


def main() -> None:
    """Serves the host's steps until it hangs up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    options = parser.parse_args()
    Path("/proc/self/oom_score_adj").write_text("-1000")
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
