"""What the broker logs: decisions with their numbers, and JSON where it is asked for."""

import asyncio
import json
import logging
import sys
from datetime import datetime

import pytest
from broker_rig import BrokerRig, RawGuest, demand, eventually, guest_table, host_table, short_directory

from guestd.model.units import MIB


async def test_a_decision_is_one_line_with_its_numbers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with short_directory() as root:
        async with BrokerRig(root, host_table(root) + guest_table(root, "a")) as rig, RawGuest(root, "a") as guest:
            await eventually(lambda: rig.engine.machine.guests["a"].vm is not None, "the hypervisor answers")
            await guest.hello()
            await guest.send(demand(1, 3000, 512 * MIB))
            await eventually(lambda: rig.engine.tally.decisions["grown"] == 1, "it has grown")
    told = [vars(record) for record in caplog.records if "code" in vars(record)]
    grown = [one for one in told if one["code"] == "grown" and one["kind"] == "cpu"]
    assert len(grown) == 1 and (grown[0]["guest"], grown[0]["after"]) == ("a", 3000)
    assert all(one["levelname"] == "INFO" and one["guest"] == "a" for one in told)
    assert rig.engine.tally.decisions.total() == len(told)


async def test_a_log_in_json_is_nothing_else() -> None:
    with short_directory() as root:
        config = root / "broker.toml"
        config.write_text('[log]\nformat = "json"\n' + host_table(root) + guest_table(root, "a"))
        broker = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "guestd.broker.main", "run", "--config", str(config),
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert broker.stderr is not None
        lines: list[dict[str, object]] = []
        while not lines or "1 guests" not in str(lines[-1]["message"]):
            lines.append(json.loads(await broker.stderr.readline()))
        broker.terminate()
        lines += [json.loads(line) for line in (await broker.stderr.read()).splitlines()]
        assert await broker.wait() == 0
    assert all(datetime.fromisoformat(str(line["time"])).utcoffset() is not None for line in lines)
    assert {"level": "info", "message": "a: VM is unreachable", "guest": "a"}.items() <= lines[1].items()
