"""A whole broker is recorded while all sorts of things happen, and what it decided is decided again elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from broker_rig import BrokerRig, eventually, guest_table, host_table, short_directory

from guestd.broker.core import judge
from guestd.broker.record.replay import replay
from guestd.model.event import EventCode, EventQuery
from guestd.model.units import MIB
from guestd.model.view import LimitsChange
from guestd.wire.client import BrokerClient


def elsewhere(file: Path, hash_seed: int) -> dict[str, Any]:
    """What `guestctl replay` says of it in a process with other hashes."""
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    command = [sys.executable, "-m", "guestd.cli.main", "replay", str(file), "--output", "json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    shown: dict[str, Any] = json.loads(done.stdout)
    return shown


async def live(root: Path) -> None:
    """A broker's life: grows, shrinks, new limits, a pause, a reload, guests that go away, a restart."""
    tables = {name: guest_table(root, name) for name in "abc"}
    async with BrokerRig(root, host_table(root) + "".join(tables.values())) as rig, BrokerClient(rig.run_dir) as client:
        a, b, c = (rig.guest(name) for name in "abc")
        await eventually(lambda: all(map(rig.connected, "abc")), "connected")
        a.load.tasks, a.load.memory_bytes = 5, 900 * MIB
        b.load.tasks = 2.5
        await eventually(lambda: len(a.kernel.online_cpus) == 4, "four CPUs online")
        await eventually(lambda: a.vm.guest_memory_bytes >= 1152 * MIB, "memory for 900 MiB in use")
        await client.set_limits("a", LimitsChange(cpu_max_millicores=2000))
        await eventually(lambda: len(a.vm.guest_cpus) == 2, "down to the new maximum")
        await client.pause_guest("b")
        b.load.tasks = 0.1
        await c.stop()
        await eventually(lambda: not rig.connected("c"), "a daemon is away")
        await rig.reload(host_table(root, cpus=7) + tables["a"] + guest_table(root, "b", cpus=(1, 3)))
        await client.resume_guest("b")
        a.load.tasks, a.load.memory_bytes = 0.1, 120 * MIB
        await eventually(lambda: a.has(1, 512 * MIB) and len(b.vm.guest_cpus) == 1, "back at the minimum")
        await rig.stop()
        await rig.start()
        await eventually(lambda: rig.connected("a"), "the daemon is back by itself")
        a.load.tasks = 1.7
        await eventually(lambda: len(a.kernel.online_cpus) == 2, "and grows")


async def test_a_broker_s_life_is_replayed_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with short_directory() as root:
        await live(root)
        first, second = sorted((root / "state" / "record").iterdir())
        results = [replay(file) for file in (first, second)]
        assert [result.difference for result in results] == [None, None]
        assert results[1].header.epoch == results[0].header.epoch + 1
        codes = {event.code for event in results[0].decisions}
        assert codes >= {EventCode.GROWING, EventCode.GROWN, EventCode.ASKING, EventCode.SHRUNK}
        assert {event.code for event in results[1].decisions} >= {EventCode.GROWING}
        for file, result in zip((first, second), results, strict=True):
            for seed in (1, 2):
                shown = elsewhere(file, seed)
                assert shown["difference"] is None
                assert (shown["rounds"], shown["decisions"]) == (result.rounds, len(result.decisions))
        monkeypatch.setattr(judge, "may_grow", lambda *_: False)
        changed = replay(first)
        assert changed.difference is not None
        assert "growing to" in changed.difference.recorded


async def test_a_record_that_cannot_be_made_is_an_event_and_counted_and_all_goes_on() -> None:
    with short_directory() as root:
        (root / "state").mkdir()
        (root / "state" / "record").touch()  # where its directory is to be
        async with BrokerRig(root, host_table(root) + guest_table(root, "a")) as rig:
            rig.guest("a")
            await eventually(lambda: rig.engine.tally.record_interruptions > 0, "counted")
            await eventually(lambda: rig.connected("a"), "the guest is served all the same")
            async with BrokerClient(rig.run_dir) as client:
                said = [one.text for one in await client.events(EventQuery()) if "not recorded" in one.text]
    assert len(said) == 1
    assert said[0].startswith("decisions are not recorded now, the broker goes on without: ")
    assert f"{root}/state/record" in said[0]
