"""Timelines made by hand: a run in which everything went well, to be spoiled by the tests."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

from guestd.cli.demo.timeline import (
    Broker,
    Guest,
    Hypervisor,
    Load,
    Machine,
    Record,
    Service,
    Socket,
    Timeline,
)
from guestd.model.units import MIB

GUEST_CLOCK = 1000.0  # guest_t - t
BLOCK = 128 * MIB
ONSET, CPU_END, MEMORY_ONSET, MEMORY_FULL, MEMORY_END, END = 25.0, 45.0, 47.0, 62.4, 67.4, 95.0

_Kind = TypeVar("_Kind", bound=Record)


def cpus_at(t: float) -> int:
    """1, then one more every 0.6 s after the onset, and down again from 50 s on."""
    if t < ONSET + 0.4:
        return 1
    if t < 50:
        return min(1 + int((t - ONSET + 0.2) / 0.6), 4)
    return max(4 - int((t - 50) / 1.5) - 1, 1)


def used_at(t: float) -> int:
    base = 150 * MIB
    if t < MEMORY_ONSET or t >= MEMORY_END:
        return base
    return base + int(min((t - MEMORY_ONSET) * 100, 1536)) * MIB


def memory_at(t: float) -> int:
    """In whole blocks, ahead of what is used; down again block by block after the exit."""
    if t < MEMORY_END + 6:
        ahead = used_at(min(t + 1.5, MEMORY_END - 0.1)) + 250 * MIB
        return max(512 * MIB, -(-ahead // BLOCK) * BLOCK)
    return max(512 * MIB, 2048 * MIB - int((t - MEMORY_END - 6) / 0.9) * BLOCK)


def good_records() -> Iterator[Record]:
    """A run as it is to be, sampled four times a second."""
    yield Machine(15.0, accel="tcg", guest_kernel="6.1.0-56-cloud-amd64", boot_seconds=14.7)
    yield Service(24.0, state="active", active_since_us=9_000_000, restarts=0, main_pid=300)
    yield Socket(24.1, 300, "AF_VSOCK", "established", 3, 1023, 2, 4747)
    busy = 0.0
    for tick in range(int((END - 18.0) * 4)):
        t = 18.0 + tick / 4
        loaded = ONSET <= t < CPU_END
        busy += 0.25 * (cpus_at(t) if loaded else 0.3 if MEMORY_ONSET <= t < MEMORY_FULL else 0.04)
        vcpus, memory = cpus_at(t + 0.1), memory_at(t + 0.1)
        demand = 4000 if ONSET + 0.3 < t < CPU_END + 1 else 300
        wanted = used_at(t + 1.2) + 250 * MIB
        yield Broker(t, True, demand, vcpus * 1000, vcpus * 1000, wanted, memory, memory, "vsock")
        yield Hypervisor(t + 0.05, vcpus=vcpus, memory_bytes=memory, memory_requested_bytes=memory)
        yield Guest(
            t=t + 0.1,
            guest_t=t + 0.1 + GUEST_CLOCK,
            cpus_online=cpus_at(t),
            memory_total_bytes=memory_at(t) - 40 * MIB,
            memory_available_bytes=memory_at(t) - 40 * MIB - used_at(t),
            busy_seconds=busy,
            runnable=4 if loaded else 0,
            oom_kills=0,
        )
    for event, at, detail in (
        ("cpu-onset", ONSET, "4 busy processes"),
        ("cpu-end", CPU_END, ""),
        ("memory-onset", MEMORY_ONSET, ""),
        ("memory-full", MEMORY_FULL, ""),
        ("memory-end", MEMORY_END, "ok"),
        ("end", MEMORY_END + 0.01, ""),
    ):
        yield Load(at, at + GUEST_CLOCK, event, detail)
    yield Service(END, state="active", active_since_us=9_000_000, restarts=0, main_pid=300)
    yield Socket(END, 300, "AF_VSOCK", "established", 3, 1023, 2, 4747)


def good() -> Timeline:
    return Timeline(tuple(good_records()))


def without(timeline: Timeline, wrong: Callable[[Record], bool]) -> Timeline:
    """The timeline without the records for which `wrong` holds."""
    return Timeline(tuple(record for record in timeline.records if not wrong(record)))


def changed(timeline: Timeline, kind: type[_Kind], change: Callable[[_Kind], dict[str, object]]) -> Timeline:
    """The timeline with fields of one kind of record replaced."""
    return Timeline(
        tuple(
            replace(record, **change(record)) if isinstance(record, kind) else record  # type: ignore[type-var]
            for record in timeline.records
        )
    )
