"""Reclaim under load: how much of what is asked back comes, how fast, and what the application feels of it.

A VM with its memory plugged runs an application on a fragmented heap, beside a warm page cache or many small
files, which are memory of the kernel's own. Then memory is asked back: with guestd by the broker, from a guest that
brought its memory online as guestd does; *blindly* by lowering `requested-size`, in a guest without guestd whose
kernel brought it online by itself, with its default policy (`online`) and with `online_movable`. All take turns, each
ask in a VM of its own: what one of them leaves in the kernel's zones would be in the way of the next.

An ask is over when all has come, or nothing more came for `still_seconds` (the driver tries again only after 50 s).
The application's slow-down is its operations per second from the ask to its end, against the seconds before.
"""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

from guestd.cli.bench.guest import report
from guestd.cli.bench.guest.rig import WORK, Rig
from guestd.cli.demo.run import GUEST_NAME
from guestd.model.units import GIB, MIB
from guestd.model.view import LimitsChange

GUESTD = "guestd"
BLIND = ("online", "online_movable")
_POLICY = "/sys/devices/system/memory/auto_online_blocks"
_LOG = "/run/bench-heap"
_CACHE = "/var/tmp/bench-cache"  # noqa: S108 - in the guest
_FILES = "/run/bench-files"
_LOOK_SECONDS = 0.05
LOW_SHARE = 0.8
GOOD_SHARE = 0.95
GOOD_TIMES = 1.2


@dataclass(frozen=True, slots=True)
class Workload:
    """What runs in the VM."""

    name: str
    heap_mib: int = 0  # taken at first
    kept_mib: int = 0  # of it, in single pages
    cache_mib: int = 0
    files: int = 0
    boot_bytes: int = 512 * MIB
    plugged_bytes: int = 2 * GIB  # of virtio-mem
    left_bytes: int = 256 * MIB  # of it, that is not asked back


WORKLOADS = (
    Workload("fragmented heap", heap_mib=1600, kept_mib=250),
    Workload("heap and warm cache", heap_mib=900, kept_mib=200, cache_mib=1000),
    Workload("heap, cache and files", heap_mib=600, kept_mib=150, cache_mib=600, files=80_000),
    Workload(
        "very many files",
        heap_mib=300,
        kept_mib=60,
        files=420_000,
        boot_bytes=GIB,
        plugged_bytes=1280 * MIB,
        left_bytes=128 * MIB,
    ),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How often, and for how long."""

    rounds: int = 1
    limit_seconds: float = 45.0
    still_seconds: float = 9.0
    before_seconds: float = 2.5
    settle_seconds: float = 6.0  # after what the load needed itself: the broker takes nothing for 5 s after it gave


@dataclass(frozen=True, slots=True)
class Asked:
    """One ask."""

    requested_bytes: int
    reclaimed_bytes: int
    seconds: float  # from the ask to the last byte that came
    operations_before: float  # per second
    operations_during: float
    longest_pause_seconds: float  # of the application, during
    oom_kills: int

    @property
    def share(self) -> float:
        """Of what was asked; a last block may be more."""
        return min(1.0, self.reclaimed_bytes / self.requested_bytes)

    @property
    def gib_per_second(self) -> float:
        """Of what came."""
        return self.reclaimed_bytes / GIB / max(self.seconds, _LOOK_SECONDS)

    @property
    def application(self) -> float | None:
        """Throughput during the ask in shares of that before."""
        return self.operations_during / self.operations_before if self.operations_before else None


@dataclass(slots=True)
class Measured:
    """All asks by workload and way."""

    asks: dict[str, dict[str, list[Asked]]] = field(default_factory=dict)


async def measure(boot: Callable[[int], AbstractAsyncContextManager[Rig]], plan: Plan) -> Measured:
    """The whole benchmark.

    :param boot: a new VM with so much memory at boot, bytes.
    """
    measured = Measured()
    for number in range(plan.rounds):
        for workload in WORKLOADS:
            ways = (GUESTD, *BLIND)
            turn = number % len(ways)
            for way in ways[turn:] + ways[:turn]:
                async with boot(workload.boot_bytes) as rig:
                    ask = await (
                        _by_guestd(rig, plan, workload) if way == GUESTD else _blindly(rig, plan, workload, way)
                    )
                    measured.asks.setdefault(workload.name, {}).setdefault(way, []).append(ask)
                    rig.say(
                        f"reclaim: {workload.name}, {way}: {ask.share:.0%} in {ask.seconds:.1f} s, "
                        f"application at {ask.application or 0:.0%}, longest pause {ask.longest_pause_seconds:.2f} s"
                    )
    return measured


async def _by_guestd(rig: Rig, plan: Plan, workload: Workload) -> Asked:
    config = rig.machine.config
    least = config.boot_memory_bytes
    await rig.broker.set_limits(GUEST_NAME, LimitsChange(memory_min_bytes=least + workload.plugged_bytes))
    await rig.until(lambda: _has(rig, workload.plugged_bytes), "the memory to be there")
    await _begin(rig, workload)
    limits = LimitsChange(memory_min_bytes=least, memory_max_bytes=least + workload.left_bytes)

    async def ask() -> None:
        await rig.broker.set_limits(GUEST_NAME, limits)

    return await _ask(rig, plan, workload, ask)


async def _blindly(rig: Rig, plan: Plan, workload: Workload, policy: str) -> Asked:
    await rig.broker.pause_guest(GUEST_NAME)
    await rig.use("")
    await rig.shell(f"echo {policy} > {_POLICY}")
    await rig.request_memory(workload.plugged_bytes)
    await rig.until(lambda: _has(rig, workload.plugged_bytes), "the memory to be there")
    await _begin(rig, workload)

    async def ask() -> None:
        await rig.request_memory(workload.left_bytes)

    return await _ask(rig, plan, workload, ask)


async def _begin(rig: Rig, workload: Workload) -> None:
    """Starts all of it; the heap is there when the application writes its first line."""
    if workload.files:
        await rig.shell(
            f"mkdir -p {_FILES} && mount -t tmpfs -o nr_inodes=0,size=16m bench {_FILES} && "
            f"{WORK} files {_FILES} {workload.files}",
            240.0,
        )
    words = f"{WORK} heap {workload.heap_mib} {workload.kept_mib} {_LOG}"
    await rig.shell(f"rm -f {_LOG}")
    await rig.machine.console.spawn(f"echo 500 > /proc/self/oom_score_adj; exec {words}")
    await rig.until(lambda: _works(rig), "the application to work")
    if workload.cache_mib:
        # A hole in a file is cached like any other page of it, and read without the disk's speed.
        await rig.shell(f"truncate -s {workload.cache_mib}M {_CACHE}; cat {_CACHE} {_CACHE} > /dev/null", 240.0)


async def _works(rig: Rig) -> bool:
    return bool((await rig.shell(f"cat {_LOG} 2>/dev/null || true")).strip())


async def _ask(rig: Rig, plan: Plan, workload: Workload, ask: Callable[[], Awaitable[None]]) -> Asked:
    await asyncio.sleep(plan.settle_seconds + plan.before_seconds)
    kills = await rig.machine.oom_kills()
    before = await rig.plugged()
    began_in_guest = float((await rig.agent.ask("clock"))["t"])
    began = changed_at = time.monotonic()
    last = before
    await ask()
    while (now := time.monotonic()) < began + plan.limit_seconds and now < changed_at + plan.still_seconds:
        size = await rig.plugged()
        if size != last:
            last, changed_at = size, time.monotonic()
        if size <= workload.left_bytes:
            break
        await asyncio.sleep(_LOOK_SECONDS)
    took = changed_at - began
    until = began_in_guest + max(took, 0.5)
    log = _parsed(await rig.shell(f"cat {_LOG}"))
    return Asked(
        before - workload.left_bytes,
        before - last,
        took,
        rate(log, began_in_guest - plan.before_seconds, began_in_guest),
        rate(log, began_in_guest, until),
        longest_pause(log, began_in_guest, until),
        await rig.machine.oom_kills() - kills,
    )


async def _has(rig: Rig, amount: int) -> bool:
    return await rig.plugged() == amount


Log = list[tuple[float, int]]


def _parsed(text: str) -> Log:
    pairs = [line.split() for line in text.splitlines()]
    return [(float(pair[0]), int(pair[1])) for pair in pairs if len(pair) == 2]


def rate(log: Log, start: float, end: float) -> float:
    """Operations per second between the first and the last line within a time; 0 where there are not two."""
    inside = [entry for entry in log if start <= entry[0] <= end]
    if len(inside) < 2:
        return 0.0
    return (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])


def longest_pause(log: Log, start: float, end: float) -> float:
    """The longest time between two lines of which the later one is within a time."""
    pairs = itertools.pairwise(log)
    return max((later[0] - earlier[0] for earlier, later in pairs if start <= later[0] <= end), default=0.0)


def document(measured: Measured) -> dict[str, Any]:
    """Judged, by the medians of the rounds."""
    rows = {workload: {way: _row(asks) for way, asks in ways.items()} for workload, ways in measured.asks.items()}
    pairs = [(w, way, ways[GUESTD], one) for w, ways in rows.items() for way, one in ways.items() if way in BLIND]
    low = [pair for pair in pairs if pair[3]["share"] < LOW_SHARE]
    beats = [g["share"] >= GOOD_SHARE or g["share"] >= GOOD_TIMES * one["share"] for _, _, g, one in low]
    worst_share = min(pairs, key=lambda p: p[2]["share"] / max(p[3]["share"], 1e-9), default=None)
    worst_speed = min(pairs, key=lambda p: p[2]["gib_per_second"] / max(p[3]["gib_per_second"], 1e-9), default=None)
    kills = sum(ways[GUESTD]["oom_kills"] for ways in rows.values())
    where = "; ".join(f"{w} ({way}): {one['share']:.0%}, guestd {g['share']:.0%}" for w, way, g, one in low)
    targets = [
        _never_worse("share of the request", "share", worst_share),
        _never_worse("GiB/s", "gib_per_second", worst_speed),
        report.Target(
            f"reclaim: {GOOD_SHARE:.0%} or {GOOD_TIMES:g} times blind's, where blind gets less than {LOW_SHARE:.0%}",
            sum(beats) / len(beats) if beats else None,
            1.0,
            unit="of 1",
            note=where or f"blind got {LOW_SHARE:.0%} or more everywhere",
        ),
        report.Target("reclaim: OOM kills with guestd", float(kills), 0.0, unit="kills", at_most=True),
    ]
    return {"rows": rows, "targets": [one.document() for one in targets]}


def _never_worse(what: str, key: str, worst: Any) -> report.Target:
    if worst is None:
        return report.Target(f"reclaim: {what}, guestd to blind, the worst", None, 1.0)
    workload, way, guestd, blind = worst
    value = report.ratio(guestd[key], blind[key])
    # Two measurements of the same thing differ by some: equal is what differs by 2 % at most.
    shown = None if value is None else 1.0 if 0.98 <= value < 1.0 else value
    return report.Target(f"reclaim: {what}, guestd to blind, the worst", shown, 1.0, note=f"{workload}, {way}")


def _row(asks: list[Asked]) -> dict[str, Any]:
    application = [ask.application for ask in asks if ask.application is not None]
    return {
        "share": report.median([ask.share for ask in asks]),
        "gib_per_second": report.median([ask.gib_per_second for ask in asks]),
        "seconds": report.median([ask.seconds for ask in asks]),
        "application": report.median(application),
        "longest_pause_seconds": max(ask.longest_pause_seconds for ask in asks),
        "oom_kills": sum(ask.oom_kills for ask in asks),
        "asks": [asdict(ask) for ask in asks],
    }


def lines(part: dict[str, Any]) -> list[str]:
    """The table."""
    rows = []
    for workload, ways in part["rows"].items():
        for way, one in ways.items():
            application = "?" if one["application"] is None else f"{one['application']:.0%}"
            name = f"{workload}, {way if way == GUESTD else 'blind ' + way}"
            shown = [f"{one['share']:.0%}", f"{one['gib_per_second']:.2f}", report.seconds(one["seconds"])]
            shown += [application, report.seconds(one["longest_pause_seconds"]), str(one["oom_kills"])]
            rows.append([name, *shown])
    head = ["Reclaim under load", "share", "GiB/s", "took", "application", "longest pause", "OOM kills"]
    return [*report.grid(head, rows), ""]
