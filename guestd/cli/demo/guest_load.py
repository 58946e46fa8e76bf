"""The load of the demo. Runs in the guest, on Python's standard library alone.

Started early, for its start is a load too, it waits until there is a line in a FIFO. Then there are as many busy
processes as CPUs to be had, then one process that grows steadily, holds its memory and exits. It knows nothing
of guestd, of a broker or of a hypervisor. Each event is a line of JSON on stdout with the guest's monotonic time.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

STEP_SECONDS = 0.1


def say(event: str, detail: str = "") -> None:
    """One event, in one write: two processes never mix their lines."""
    line = json.dumps({"source": "load", "guest_t": time.monotonic(), "event": event, "detail": detail})
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


def burn(seconds: float) -> None:
    """Keeps one CPU busy."""
    end = time.monotonic() + seconds
    number = 1
    while time.monotonic() < end:
        for _ in range(2000):
            number = number * 1_103_515_245 + 12_345 & 0x7FFFFFFF


def grow(total_bytes: int, bytes_per_second: int, hold_seconds: float) -> None:
    """Takes memory piece by piece and writes to all of it, never faster than the given rate, then holds it.

    In pieces, because the kernel refuses one request for more than the machine has at that time.
    """
    step = min(int(bytes_per_second * STEP_SECONDS), total_bytes)
    filled = b"\x5a" * step
    pieces = []
    say("memory-onset")
    due, done = time.monotonic(), 0
    while done < total_bytes:
        piece = bytearray(filled[: total_bytes - done])
        pieces.append(piece)
        done += len(piece)
        due = max(due + STEP_SECONDS, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))
    say("memory-full", f"{sum(map(len, pieces)) >> 20} MiB")
    time.sleep(hold_seconds)


def outcome(status: int) -> str:
    """How a process ended, in words."""
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return "ok"
    return f"killed by signal {-code}" if code < 0 else f"exit {code}"


def in_children(count: int, work: Callable[[], None]) -> list[str]:
    """Runs a function in processes of its own, all at once; how each ended."""
    children = []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            try:
                work()
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    return [outcome(os.waitpid(child, 0)[1]) for child in children]


def main() -> None:
    """The whole load."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--cpu-seconds", type=float, default=20.0)
    parser.add_argument("--pause-seconds", type=float, default=2.0)
    parser.add_argument("--memory-mib", type=int, default=1536)
    parser.add_argument("--mib-per-second", type=int, default=100)
    parser.add_argument("--hold-seconds", type=float, default=5.0)
    parser.add_argument("--go", type=Path, required=True, help="a FIFO: begin when there is a line in it")
    options = parser.parse_args()

    options.go.read_bytes()
    say("cpu-onset", f"{options.processes} busy processes")
    in_children(options.processes, lambda: burn(options.cpu_seconds))
    say("cpu-end")
    time.sleep(options.pause_seconds)
    ends = in_children(
        1,
        lambda: grow(options.memory_mib << 20, options.mib_per_second << 20, options.hold_seconds),
    )
    say("memory-end", ends[0])
    say("end")


if __name__ == "__main__":
    main()
