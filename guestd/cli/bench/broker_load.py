"""The bench's load generator process: a swarm that does what it is told on stdin, a line of JSON each, and answers on
stdout likewise. One of these per bench, on a core of its own.

``python -m guestd.cli.bench.broker_load RUN_DIR COUNT``, or with ``--flood INDEX SECONDS`` one guest at full speed.
"""

import asyncio
import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guestd.sim.swarm import Swarm, Waits, flood


async def _serve(run_dir: Path, count: int) -> None:
    swarm = Swarm(run_dir, count)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        order = json.loads(line)
        print(json.dumps(await _do(swarm, order)), flush=True)
    await swarm.close()


async def _do(swarm: Swarm, order: dict[str, Any]) -> dict[str, Any]:
    match order["do"]:
        case "start":
            swarm.start()
            return {}
        case "settled":
            at, missing = await swarm.settled(order["epoch"], order["seconds"])
            return {"at": at, "missing": missing}
        case "steady":
            return _waits(await swarm.steady(order["seconds"], order["period_seconds"], order["seed"]))
        case "rush":
            return {"done": await swarm.rush(order["seconds"], order["outstanding"])}
        case unknown:
            raise ValueError(unknown)


def _waits(waits: Waits) -> dict[str, Any]:
    return {
        "up_seconds": waits.up,
        "down_seconds": waits.down,
        "missed": waits.missed,
        "late_seconds": waits.late,
    }


def main(arguments: Sequence[str]) -> None:
    """Run until stdin ends."""
    gc.disable()  # its pauses would count as the broker's; what is left in cycles in these few minutes is little
    run_dir = Path(arguments[0])
    if arguments[1] == "--flood":
        messages, streams = asyncio.run(flood(run_dir, int(arguments[2]), float(arguments[3])))
        print(json.dumps({"messages": messages, "streams": streams}))
    else:
        asyncio.run(_serve(run_dir, int(arguments[1])))


if __name__ == "__main__":
    main(sys.argv[1:])
