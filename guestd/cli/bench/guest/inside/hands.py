"""guestd's root helper at work, timed from the request to the last answer: beside it a bare loop on the same files.

Runs in the guest as root with guestd's environment. The helper is guestd's own process, forked as by guestd, and
asked by guestd's own client; what asks is not a daemon but this program.

    blocks FIRST COUNT ROUNDS     each round: COUNT blocks offline, online by the helper, offline, online by the loop
    cpu NUMBER ROUNDS             each round: the same with one CPU

Prints one line of JSON: seconds of each round, and what failed.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from guestd.guest import helper

WORK = str(Path(__file__).parent / "work")
WORD = "online_movable"


def loop(*words: object) -> tuple[float, int]:
    """The bare loop: seconds as it measured them itself, and how many writes failed."""
    out = subprocess.run([WORK, *map(str, words)], capture_output=True, text=True, check=True).stdout
    seconds, failed = out.split()
    return float(seconds), int(failed)


async def rounds(sock: socket.socket, what: str, numbers: Sequence[int], count: int) -> dict[str, object]:
    """Both in turn, and whoever is first changes from round to round."""
    from guestd.guest.core.ops import BlockOp, BlockTarget, CpuOp
    from guestd.guest.hands import RootHands

    hands = RootHands(sock)
    if what == "cpu":
        ops: list[BlockOp | CpuOp] = [CpuOp(number, True) for number in numbers]
        bare: tuple[object, ...] = ("cpu", numbers[0], 1)
        away: tuple[object, ...] = ("cpu", numbers[0], 0)
    else:
        ops = [BlockOp(number, BlockTarget.ONLINE_MOVABLE) for number in numbers]
        bare, away = ("blocks", WORD, numbers[0], len(numbers)), ("blocks", "offline", numbers[0], len(numbers))

    async def by_helper() -> tuple[float, int]:
        began = time.monotonic()
        results = await hands.batch(ops, 60.0)
        took = time.monotonic() - began
        seconds["writes"].append(sum(result.elapsed_seconds for result in results))
        return took, sum(not result.ok for result in results)

    # "writes": of guestd's time, what its helper spent writing to the files and reading them back
    seconds: dict[str, list[float]] = {"guestd": [], "loop": [], "writes": []}
    failed = 0
    for number in range(count):
        order = ("guestd", "loop") if number % 2 else ("loop", "guestd")
        for who in order:
            failed += loop(*away)[1]
            await asyncio.sleep(0.05)
            took, lost = await by_helper() if who == "guestd" else loop(*bare)
            seconds[who].append(took)
            failed += lost
    hands.close()
    return {**seconds, "failed": failed}


def main() -> None:
    """Forks the helper before anything large is imported, as guestd does."""
    what, numbers = sys.argv[1], [int(word) for word in sys.argv[2:]]
    count = numbers.pop()
    chosen = list(range(numbers[0], numbers[0] + numbers[1])) if what == "blocks" else numbers
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child:
        theirs.close()
        sys.exit(helper.run(ours, child))
    ours.close()
    print(json.dumps(asyncio.run(rounds(theirs, what, chosen, count))), flush=True)


if __name__ == "__main__":
    main()
