"""A load that is steady in the mean and never still: what a daemon should sit out. Standard library alone.

    CPUs BYTES SPREAD_BYTES      so many processes, each busy for 10 to 100 ms and then idle about two thirds as long;
                                 and one that holds BYTES, and of SPREAD_BYTES more another share every second or so

Seeded: every run makes the same noise.
"""

import mmap
import os
import random
import signal
import sys
import time

_CHUNK = 4 << 20
_BUSY_SECONDS = (0.01, 0.1)
_IDLE_PER_BUSY = 0.67
_HOLD_SECONDS = (0.3, 1.7)


def busy(number: int) -> None:
    """For ever."""
    noise = random.Random(number)  # noqa: S311 - noise, not a secret
    while True:
        until = time.monotonic() + noise.uniform(*_BUSY_SECONDS)
        while time.monotonic() < until:
            pass
        time.sleep(noise.uniform(*_BUSY_SECONDS) * _IDLE_PER_BUSY)


def chunks(noise: random.Random, spread: int) -> int:
    """How many chunks to hold for the next moment."""
    return noise.randint(0, spread // _CHUNK)


def hold(base: int, spread: int) -> None:
    """For ever."""
    noise = random.Random(0)  # noqa: S311
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    held = [mmap.mmap(-1, _CHUNK, flags=flags) for _ in range(base // _CHUNK)]
    floor = len(held)
    while True:
        wanted = floor + chunks(noise, spread)
        while len(held) > wanted:
            held.pop().close()
        while len(held) < wanted:
            held.append(mmap.mmap(-1, _CHUNK, flags=flags))
        time.sleep(noise.uniform(*_HOLD_SECONDS))


def main(processes: int, base: int, spread: int) -> None:
    """Makes noise until it is ended."""
    for number in range(processes):
        if os.fork() == 0:
            busy(number)
    if os.fork() == 0:
        hold(base, spread)
    signal.pause()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
