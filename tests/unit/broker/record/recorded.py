"""Recorders on an eventful host in virtual time, and records as other processes replay them."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from guestd.broker.core.ledger import HostCapacity
from guestd.broker.hypervisor.fake import Fault
from guestd.broker.record.recorder import Recorder
from guestd.model.errors import GuestdError
from guestd.model.explanation import ReclaimRequest
from guestd.model.resources import Limits, Resources
from guestd.model.units import GIB, MIB
from guestd.sim.world import World

HOST = HostCapacity(Resources(8000, 9 * GIB))
LIMITS = Limits(
    Resources(1000, 512 * MIB),
    Resources(3000, 2 * GIB),
    burst=Resources(4000, 3 * GIB),
    burst_credit=Resources(20_000, 1 << 45),
    burst_refill=Resources(10, MIB),
)
PLAIN = Limits(Resources(1000, GIB), Resources(4000, 4 * GIB))


def eventful(directory: Path, limit_bytes: int = 64 << 20, seconds: float = 80.0, seed: int = 1) -> Recorder:
    """All that can happen to five guests, recorded; the recorder is closed."""
    world = World(HOST)
    recorder = Recorder(directory, limit_bytes, lambda: world.broker_now)
    world.broker = machine = recorder.machine(HOST, 1, timing=world.timing)
    for name in "abcde":
        world.add(name, LIMITS if name in "ab" else PLAIN)
    chance = random.Random(seed)
    while world.now < 1000 + seconds:
        for guest in world.guests.values():
            guest.load.tasks = chance.choice([0.1, 1.5, 4.0])
            guest.load.memory_bytes = chance.choice([120, 700, 2500]) * MIB
        one = world.guests[chance.choice("abcde")]
        match chance.randrange(9):
            case 0:
                world.set_limits(one.name, chance.choice([PLAIN, LIMITS]))
            case 1:
                world.pause(one.name, one.name not in world.paused)
            case 2:
                world.set_host(HostCapacity(Resources(8000, chance.choice([7, 9]) * GIB), idle_tax=0.5))
            case 3:
                world.hang_up(one)
            case 4:
                world.reboot(one)
            case 5:
                one.vm.fail_next(Fault.REFUSED)
            case 6:
                one.vm.fail_next(Fault.LOST_DONE, Fault.LOST_NOT_DONE)
            case 7:
                machine.set_park(one.name, True)
                machine.explain(one.name, world.broker_now)
            case 8:
                with contextlib.suppress(GuestdError):  # recorded all the same
                    machine.reclaim(one.name, ReclaimRequest(), world.broker_now)
        world.run(4.0)
        while len(recorder._waiting) > 1:  # virtual time is faster than the thread that writes
            time.sleep(0.001)
    recorder.close()
    return recorder


def files(directory: Path) -> list[Path]:
    """The record's files, oldest first."""
    return sorted(directory.glob("*.record"))


def replayed_elsewhere(file: Path, hash_seed: int) -> dict[str, Any]:
    """What `guestctl replay` says of it in a process with other hashes."""
    done = subprocess.run(
        [sys.executable, "-m", "guestd.cli.main", "replay", str(file), "--output", "json"],
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode in (0, 1), done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result
