"""Tax: what it costs that a helper in Python switches things on, and not a bare loop in C on the same sysfs files.

16 memory blocks of virtio-mem are plugged over QMP, in one VM with two CPUs, and then go offline and online again, in
turn by guestd's helper (asked by guestd's client, from the request to the last answer) and by the loop (from its
first write to its last). So neither contains what the hypervisor does. A CPU likewise.
"""

import json
from dataclasses import dataclass
from typing import Any

from guestd.cli.bench.guest import report
from guestd.cli.bench.guest.agent import BenchError
from guestd.cli.bench.guest.rig import BLOCK_BYTES, GUEST_DIR, GUEST_PYTHON, Rig

BLOCKS_TARGET = 1.25
CPU_TARGET = 1.05
_CPU = 1
_LIMIT_SECONDS = 240.0
_POLICY = "/sys/devices/system/memory/auto_online_blocks"


@dataclass(frozen=True, slots=True)
class Plan:
    """How often."""

    blocks: int = 16
    block_rounds: int = 10
    cpu_rounds: int = 40


@dataclass(frozen=True, slots=True)
class Measured:
    """What `inside/hands.py` printed."""

    blocks: dict[str, Any]
    cpu: dict[str, Any]


async def measure(rig: Rig, plan: Plan) -> Measured:
    """The whole benchmark, in a VM that has CPU 1 at boot. Ends with guestd running."""
    async with rig.by_hand():
        await rig.shell(f"echo online_movable > {_POLICY}")
        amount = plan.blocks * BLOCK_BYTES
        known = await _blocks(rig)
        await rig.request_memory(amount)
        await rig.until(lambda: _has(rig, amount), "the blocks to be plugged")
        await rig.until(lambda: _so_many(rig, len(known) + plan.blocks), "the blocks to be seen")
        first = min(set(await _blocks(rig)) - set(known))
        blocks = await _inside(rig, "blocks", first, plan.blocks, plan.block_rounds)
        rig.say(f"tax: blocks: {_in_words(blocks)}")
        cpu = await _inside(rig, "cpu", _CPU, plan.cpu_rounds)
        rig.say(f"tax: CPU: {_in_words(cpu)}")
        await rig.emptied()
        await rig.shell(f"echo offline > {_POLICY}")
    return Measured(blocks, cpu)


async def _inside(rig: Rig, *words: object) -> dict[str, Any]:
    command = [GUEST_PYTHON, f"{GUEST_DIR}/hands.py", *map(str, words)]
    answer = await rig.agent.ask("run", limit_seconds=_LIMIT_SECONDS, words=command)
    line = str(answer["out"]).partition("\n")[0]
    if not line.startswith("{"):
        raise BenchError(f"hands.py in the guest: exit {answer['exit']}: {answer['out']}")
    found: dict[str, Any] = json.loads(line)
    return found


async def _has(rig: Rig, amount: int) -> bool:
    return await rig.plugged() == amount


async def _blocks(rig: Rig) -> list[int]:
    listing = await rig.shell("grep -l online /sys/devices/system/memory/memory*/state")
    return sorted(int(line.split("/")[-2].removeprefix("memory")) for line in listing.split())


async def _so_many(rig: Rig, count: int) -> bool:
    return len(await _blocks(rig)) == count


def _in_words(one: dict[str, Any]) -> str:
    return f"guestd {report.seconds(report.median(one['guestd']))}, loop {report.seconds(report.median(one['loop']))}"


def document(measured: Measured) -> dict[str, Any]:
    """Judged, by the medians."""
    rows = {}
    targets = []
    wanted = (("16 blocks", measured.blocks, BLOCKS_TARGET), ("one CPU", measured.cpu, CPU_TARGET))
    for name, one, target in wanted:
        both = {who: report.summary(one[who]) for who in ("guestd", "writes", "loop")}
        rows[name] = {**both, "failed": one["failed"]}
        value = report.ratio(both["guestd"]["p50"], both["loop"]["p50"])
        note = f"{one['failed']} writes failed" if one["failed"] else ""
        targets.append(
            report.Target(f"tax: {name}, guestd's helper to a loop in C", value, target, at_most=True, note=note)
        )
    return {"rows": rows, "targets": [one.document() for one in targets]}


def lines(part: dict[str, Any]) -> list[str]:
    """The table."""
    rows = []
    for name, one in part["rows"].items():
        guestd, loop = one["guestd"], one["loop"]
        tax = report.times(report.ratio(guestd["p50"], loop["p50"]))
        values = (guestd["p50"], guestd["max"], one["writes"]["p50"], loop["p50"], loop["max"])
        shown = [report.seconds(value) for value in values]
        rows.append([name, str(guestd["rounds"]), *shown, tax])
    head = ["Tax of switching on", "rounds", "guestd p50", "max", "its writes p50", "loop p50", "max", "tax"]
    return [*report.grid(head, rows), ""]
