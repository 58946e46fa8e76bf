"""Need → usable: from the onset of a load to the first CPU online or new memory usable, in the VM's own clock.

Rounds of guestd, of each poller and of the kernel's own step take turns. The kernel's own time is that of a loop in
the guest which does nothing but look and switch on, asked for over QMP while no daemon runs; it is subtracted from
the others' medians: what is left is the daemon's (and the broker's) own share. Each round begins at another place of
a poller's interval, so that the medians are not those of one lucky phase.

The CPU step is more busy processes than CPUs. The memory step takes all but `leave_bytes` of what is available, so
fast as the VM can. The two slowest pollers are measured in fewer rounds: of theirs no target is made.
"""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from guestd.cli.bench.guest import report
from guestd.cli.bench.guest.rig import BLOCK_BYTES, Rig
from guestd.model.units import MIB

KERNEL = "kernel"
GUESTD = "guestd"
LOAD1 = "neon-load1"
KINDS = ("cpu", "memory")
_CPU = "bench-cpu"
_GOLDEN = 0.618  # places that fill an interval evenly, however many rounds there are


@dataclass(frozen=True, slots=True)
class Poller:
    """One of `inside/poller.py`'s."""

    name: str
    interval_seconds: dict[str, float]  # of its laws; a kind that is missing it has no law for
    share: float = 1.0  # of the rounds in which it takes part


POLLERS = (
    Poller(LOAD1, {"cpu": 5.0}, share=0.34),
    Poller("neon-utilisation", {"cpu": 5.0, "memory": 0.1}),
    Poller("cpuplugd", {"cpu": 1.0, "memory": 1.0}),
    Poller("proxmox", {"memory": 10.0}, share=0.5),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done, and how long it may take."""

    rounds: int = 3
    guestd_turns: int = 2  # in each round: guestd's are short
    processes: int = 4
    bytes_per_second: int = 400 * MIB
    leave_bytes: int = 24 * MIB
    limit_seconds: float = 45.0
    calm_load1: float = 0.3  # what earlier loads left of it would help the poller that looks at it


@dataclass(slots=True)
class Measured:
    """Seconds of each daemon and kind; None where nothing came."""

    seconds: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    doubt_seconds: float = 0.0  # how much the two clocks of the kernel's own step may disagree, at most
    longest_gap_seconds: float = 0.0  # between two looks of the watcher
    load1_at_onset: list[float] = field(default_factory=list)  # of neon-load1

    def add(self, daemon: str, kind: str, value: float | None) -> None:
        """One step."""
        self.seconds.setdefault(daemon, {}).setdefault(kind, []).append(value)


async def measure(rig: Rig, plan: Plan) -> Measured:
    """The whole benchmark. Ends with guestd running.

    :raise BenchError: When a step cannot be done.
    """
    measured = Measured()
    for number in range(plan.rounds):
        for turn in range(plan.guestd_turns):
            place = (number * plan.guestd_turns + turn) * _GOLDEN % 1
            for kind in KINDS:
                await _step(rig, plan, measured, GUESTD, kind, place * 0.5)
        await rig.at_minimum(0.0)
        async with rig.by_hand():
            await _bare_cpu(rig, plan, measured)
            await _bare_memory(rig, plan, measured)
        for poller in POLLERS:
            if number * poller.share % 1 >= poller.share and number:
                continue
            if poller.name == LOAD1:
                await rig.until(lambda: _calm(rig, plan), "the load average to fall")
            await rig.use(poller.name)
            for kind, interval in poller.interval_seconds.items():
                if poller.name == LOAD1:
                    measured.load1_at_onset.append(await _load1(rig))
                await _step(rig, plan, measured, poller.name, kind, number * _GOLDEN % 1 * interval)
            await rig.use(GUESTD)
            await rig.at_minimum(0.0)  # not every poller gives all of it back, and the next one may not either
        rig.say(f"reaction: round {number + 1} of {plan.rounds}: {_last(measured)}")
    return measured


async def _load1(rig: Rig) -> float:
    return float((await rig.agent.ask("load-average"))["load1"])


async def _calm(rig: Rig, plan: Plan) -> bool:
    return await _load1(rig) < plan.calm_load1


async def _step(rig: Rig, plan: Plan, measured: Measured, daemon: str, kind: str, pause_seconds: float) -> None:
    await rig.at_minimum(more_seconds=pause_seconds)
    words: dict[str, Any] = {"limit_seconds": plan.limit_seconds}
    if kind == "cpu":
        answer = await rig.agent.ask("cpu-load", processes=plan.processes, **words)
    else:
        words |= {"bytes_per_second": plan.bytes_per_second, "leave_bytes": plan.leave_bytes}
        answer = await rig.agent.ask("memory-load", **words)
    grown_at = answer["grown_at"]
    rig.say(f"reaction: {daemon}, {kind}: {report.seconds(grown_at and float(grown_at) - float(answer['onset']))}")
    measured.add(daemon, kind, None if grown_at is None else float(grown_at) - float(answer["onset"]))
    measured.longest_gap_seconds = max(measured.longest_gap_seconds, float(answer["longest_gap_seconds"]))


async def _bare_cpu(rig: Rig, plan: Plan, measured: Measured) -> None:
    slots = [slot for slot in await rig.qmp("query-hotpluggable-cpus") if "qom-path" not in slot]
    slot = min(slots, key=lambda one: sorted(one["props"].items()))
    device = {"driver": slot["type"], "id": _CPU, **slot["props"]}
    await _bare(rig, plan, measured, "cpu", "device_add", device)
    await rig.agent.ask("cpu-offline")
    await rig.qmp("device_del", {"id": _CPU})
    await rig.at_minimum(0.0)


async def _bare_memory(rig: Rig, plan: Plan, measured: Measured) -> None:
    size = {"path": "/machine/peripheral/vm0", "property": "requested-size"}
    await _bare(rig, plan, measured, "memory", "qom-set", {**size, "value": BLOCK_BYTES})
    await rig.emptied()


async def _bare(rig: Rig, plan: Plan, measured: Measured, kind: str, command: str, arguments: dict[str, Any]) -> None:
    """From the command's sending to what the loop in the guest waits for."""
    offset, doubt = await rig.agent.clock_offset()
    rig.agent.send(f"{kind}-bare", plan.limit_seconds)
    await rig.agent.answer(plan.limit_seconds)
    await asyncio.sleep(0.05)
    began = time.monotonic()
    await rig.qmp(command, arguments)
    grown_at = (await rig.agent.answer(plan.limit_seconds))["grown_at"]
    measured.add(KERNEL, kind, None if grown_at is None else float(grown_at) - offset - began)
    measured.doubt_seconds = max(measured.doubt_seconds, doubt)


def _last(measured: Measured) -> str:
    words = []
    for daemon, kinds in measured.seconds.items():
        words.append(f"{daemon} " + "/".join(report.seconds(values[-1]) for values in kinds.values()))
    return ", ".join(words)


def document(measured: Measured) -> dict[str, Any]:
    """Judged. `own` is the median less the kernel's in the same run."""
    rows: dict[str, Any] = {}
    for kind in KINDS:
        kernel = report.median(measured.seconds.get(KERNEL, {}).get(kind, []))
        for daemon, kinds in measured.seconds.items():
            if kind in kinds:
                one = report.summary(kinds[kind])
                own = None if daemon == KERNEL else report.less(one["p50"], kernel)
                rows.setdefault(kind, {})[daemon] = {**one, "own": own}
    targets = [
        _target(rows, "cpu", "neon-utilisation", 10.0, "the 5 s utilisation poller"),
        _target(rows, "cpu", "cpuplugd", 2.0, "the 1 s poller"),
        _target(rows, "memory", "cpuplugd", 2.0, "the 1 s poller"),
    ]
    return {
        "rows": rows,
        "kernel_doubt_seconds": measured.doubt_seconds,
        "longest_gap_seconds": measured.longest_gap_seconds,
        "load1_at_onset": measured.load1_at_onset,
        "targets": [one.document() for one in targets],
    }


def _target(rows: dict[str, Any], kind: str, poller: str, target: float, words: str) -> report.Target:
    found = rows.get(kind, {})
    own = {name: found.get(name, {}).get("own") for name in (GUESTD, poller)}
    note, value = "", report.ratio(own[poller], own[GUESTD])
    if value is None and own[GUESTD] and poller in found:
        # It did not come at all in half of the rounds: not less than the time that was waited.
        note = f"{poller} did not come in half of its rounds"
    return report.Target(f"{kind}: guestd's own share against {words} ({poller})", value, target, note=note)


def lines(part: dict[str, Any]) -> list[str]:
    """The table."""
    found = []
    for kind, daemons in part["rows"].items():
        guestd = daemons.get(GUESTD, {}).get("own")
        rows = []
        for daemon, one in daemons.items():
            compared = "" if daemon in (KERNEL, GUESTD) else report.times(report.ratio(one["own"], guestd))
            own = "" if daemon == KERNEL else report.seconds(one["own"])
            p99 = "-" if one["p99"] is None else report.seconds(one["p99"])
            shown = [report.seconds(one["p50"]), p99, report.seconds(one["max"]), own, compared]
            rows.append([daemon, str(one["rounds"]), *shown])
        head = [f"Need to usable: {kind}", "rounds", "p50", "p99", "max", "own share", "to guestd's"]
        found += [*report.grid(head, rows), ""]
    return found
