"""What a whole broker tells about the past: its own decisions with what they were made from, over a restart."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from broker_rig import BrokerRig, eventually, guest_table, host_table, short_directory

from guestd.model.errors import NotFoundError
from guestd.model.event import EventCode, EventQuery, SeenEvent
from guestd.model.resources import Kind
from guestd.model.units import MIB
from guestd.model.view import LimitsChange


@pytest.fixture
def root() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@pytest.fixture
async def rig(root: Path) -> AsyncIterator[BrokerRig]:
    async with BrokerRig(root, host_table(root) + guest_table(root, "web-1") + guest_table(root, "web-2")) as one:
        yield one


async def seen(rig: BrokerRig, code: EventCode, stream: list[SeenEvent]) -> None:
    await eventually(lambda: any(one.event.code is code for one in stream), f"{code} was not seen")


async def test_why_it_was_shrunk_is_told_from_what_was_known_then(rig: BrokerRig) -> None:
    stream: list[SeenEvent] = []

    async def follow() -> None:
        async for one in rig.engine.follow_events("web-1", 0):
            stream.append(one)

    following = asyncio.create_task(follow())
    guest = rig.guest("web-1")
    guest.load.tasks = 4.2
    await eventually(lambda: guest.has(4, 512 * MIB), "grown")
    await seen(rig, EventCode.GROWN, stream)
    guest.load.tasks = 0.1
    await eventually(lambda: guest.has(1, 512 * MIB), "shrunk")
    await seen(rig, EventCode.SHRUNK, stream)
    shrunk = next(one.event for one in stream if one.event.code is EventCode.SHRUNK)

    told = await rig.engine.explain("web-1", shrunk.at + timedelta(milliseconds=1))
    assert not told.unknown_time
    cpu, memory = told.resources
    assert (cpu.kind, memory.kind) == tuple(Kind)
    assert cpu.summary.startswith(shrunk.text)
    assert cpu.inputs is not None
    assert cpu.inputs == shrunk.inputs
    assert cpu.inputs.demand < 4000
    assert cpu.inputs.limits == rig.engine.machine.guests["web-1"].limits
    assert cpu.reason.text
    steps = [EventCode.GROWING, EventCode.GROWN, EventCode.ASKING, EventCode.SHRUNK]
    assert [one.code for one in cpu.events if one.code in steps][:4] == steps
    assert all(one.guest == "web-1" and one.kind is Kind.CPU for one in cpu.events)

    grown = next(one.event for one in stream if one.event.code is EventCode.GROWN)
    before = (await rig.engine.explain("web-1", grown.at + timedelta(microseconds=1))).resources[0]
    assert before.inputs is not None
    assert before.inputs.demand >= 4000

    now = await rig.engine.explain("web-1", None)
    assert now.resources[0].summary
    assert {one.id for one in now.resources[0].events} >= {one.id for one in cpu.events}
    assert (await rig.engine.explain("web-1", shrunk.at - timedelta(days=1))).unknown_time
    with pytest.raises(NotFoundError):
        await rig.engine.explain("web-9", None)

    followed = [one.event for one in stream]  # what comes while the list is made may be in either
    listed = await rig.engine.events(EventQuery("web-1"))
    numbers = {one.id for one in followed}
    assert [one for one in listed if one.id in numbers] == followed
    history = await rig.engine.history("web-1", None, None, 0)
    assert max(point.resources[0].plugged for point in history.points) == 4000
    assert max(point.resources[0].demand for point in history.points) >= 4000
    following.cancel()


async def test_what_operators_and_the_broker_did_is_there_after_a_restart(rig: BrokerRig, root: Path) -> None:
    engine = rig.engine
    await engine.change_limits("web-1", LimitsChange(cpu_max_millicores=2000, cpu_weight=300))
    await engine.pause_guest("web-1", True)
    await engine.pause_guest("web-1", False)
    await engine.reset_limits("web-1")
    table = host_table(root) + guest_table(root, "web-1", cpus=(1, 3)) + guest_table(root, "web-3")
    await rig.reload(table)
    await rig.stop()
    await rig.start()
    found = await rig.engine.events(EventQuery())
    told = [(one.guest, one.text) for one in found if one.code is EventCode.OPERATOR]
    assert told == [
        ("web-1", "limits set: cpu max 4 CPU -> 2 CPU, cpu weight 100 -> 300"),
        ("web-1", "paused"),
        ("web-1", "resumed"),
        ("web-1", "limits reset to the file's: cpu max 2 CPU -> 4 CPU, cpu weight 300 -> 100"),
        ("web-2", "removed"),
        ("web-1", "limits changed by a reload: cpu max 4 CPU -> 3 CPU"),
        ("web-3", "added by a reload"),
    ]
    starts = [one.text for one in found if one.code is EventCode.BROKER]
    assert [text.split(",")[-1] for text in starts] == [" epoch 1: 2 guests", "broker stops", " epoch 2: 2 guests"]
    numbers = [one.id for one in found]
    assert numbers == sorted(set(numbers))
    assert (await rig.engine.events(EventQuery("web-2", until=datetime.now(UTC))))[-1].text == "removed"


async def test_guests_that_come_and_go_are_told(rig: BrokerRig) -> None:
    guest = rig.guest("web-1")
    await eventually(lambda: rig.connected("web-1"), "connected")
    await guest.stop()
    await eventually(lambda: not rig.connected("web-1"), "away")
    found = await rig.engine.events(EventQuery("web-1"))
    assert [one.text for one in found if one.code is EventCode.CHANNEL] == [
        "guest daemon rig connected (unix, process-unproven)",
        "guest daemon is away",
    ]
    assert [one.text for one in found if one.code is EventCode.VM][:1] == ["VM is running"]
