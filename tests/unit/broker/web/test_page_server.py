"""What the page's server says: the whole state, changes, the past and why; on real sockets."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from broker_rig import eventually
from page_stage import Stage

from guestd.broker.outlets import Address
from guestd.broker.web.feed import Feed
from guestd.broker.web.page import serve_page
from guestd.model.event import EventCode
from guestd.model.resources import Kind

LOOPBACK = Address("127.0.0.1", 0)


@pytest.fixture
def stage() -> Stage:
    return Stage(3)


@pytest.fixture
async def url(stage: Stage) -> AsyncIterator[str]:
    runner = await serve_page(stage, LOOPBACK, ())
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as one:
        yield one


class Stream:
    """A browser's side of the stream."""

    def __init__(self, reply: aiohttp.ClientResponse) -> None:
        self._reply = reply

    async def next(self) -> tuple[str, Any]:
        """The next event's name, and what it says."""
        name, data = "", ""
        async with asyncio.timeout(5):
            while line := (await self._reply.content.readuntil(b"\n")).decode().rstrip("\n"):
                field, _, value = line.partition(": ")
                if field == "event":
                    name = value
                elif field == "data":
                    data = value
        return name, json.loads(data)

    async def change(self) -> Any:
        name, said = await self.next()
        assert name == "change"
        return said


async def _until(stream: Stream, field: str) -> Any:
    """The next change that says something of that."""
    while not (said := await stream.change())[field]:
        pass
    return said


async def test_the_stream_says_all_and_then_only_what_changed(
    stage: Stage, url: str, session: aiohttp.ClientSession
) -> None:
    stage.happen("api-1", EventCode.GROWN, "grown from 1 CPU to 2 CPU", Kind.CPU)
    async with session.get(f"{url}/api/stream") as reply:
        assert reply.headers["Content-Type"] == "text/event-stream"
        stream = Stream(reply)
        name, said = await stream.next()
        assert name == "snapshot"
        assert sorted(row["name"] for row in said["guests"]) == ["api-1", "batch-1", "build-1"]
        assert said["host"]["epoch"] == 7
        while not said["events"]:
            said = await stream.change()
        assert [event["text"] for event in said["events"]] == ["grown from 1 CPU to 2 CPU"]
        assert said["events"][0]["inputs"] is None

        stage.put(replace(stage.guests["api-1"], paused=True))
        said = await _until(stream, "guests")
        assert [(row["name"], row["paused"]) for row in said["guests"]] == [("api-1", True)]
        stage.drop("build-1")
        said = await _until(stream, "gone")
        assert (said["gone"], said["guests"], said["host"]["guests"]) == (["build-1"], [], 2)
        stage.happen("batch-1", EventCode.REFUSED, "refused")
        said = await _until(stream, "events")
        assert [(event["guest"], event["code"]) for event in said["events"]] == [("batch-1", "refused")]
        assert said["guests"] == []


async def test_a_guest_that_only_was_heard_of_is_no_news(
    stage: Stage, url: str, session: aiohttp.ClientSession
) -> None:
    async with session.get(f"{url}/api/stream") as reply:
        stream = Stream(reply)
        await stream.next()
        stage.put(replace(stage.guests["api-1"], last_seen_ago_seconds=0.0))
        stage.put(replace(stage.guests["batch-1"], paused=True))
        said = await _until(stream, "guests")
        assert [row["name"] for row in said["guests"]] == ["batch-1"]


async def test_changes_in_between_are_one(stage: Stage, url: str, session: aiohttp.ClientSession) -> None:
    async with session.get(f"{url}/api/stream") as reply:
        stream = Stream(reply)
        await stream.next()
        began = asyncio.get_running_loop().time()
        messages = 0
        for number in range(60):
            stage.put(replace(stage.guests["api-1"], hostname=f"name-{number}"))
            await asyncio.sleep(0.01)
        while True:
            said = await _until(stream, "guests")
            messages += 1
            assert len(said["guests"]) == 1
            if said["guests"][0]["hostname"] == "name-59":
                break
        assert messages <= 4 * (asyncio.get_running_loop().time() - began) + 2


async def test_the_state_is_what_the_broker_says(stage: Stage, url: str, session: aiohttp.ClientSession) -> None:
    async with session.get(f"{url}/api/state") as reply:
        said = await reply.json()
    guest = stage.guests["batch-1"]
    row = next(row for row in said["guests"] if row["name"] == "batch-1")
    for kind, shown in ((Kind.CPU, row["cpu"]), (Kind.MEMORY, row["memory"])):
        one = guest.resource(kind)
        assert (shown["min"], shown["max"]) == (guest.limits.min.get(kind), guest.limits.max.get(kind))
        assert shown["demand"] == one.demand
        assert shown["reserved"] == one.reserved
        assert shown["usable"] == one.usable
    assert row["cpu"]["burst"] == guest.limits.burst.cpu_millicores > 0
    assert said["host"]["free"]["memory_bytes"] == stage.host_view().free.memory_bytes
    assert not stage.watched


async def test_the_past_and_why(stage: Stage, url: str, session: aiohttp.ClientSession) -> None:
    async with session.get(f"{url}/api/history?guest=api-1&seconds=600") as reply:
        said = await reply.json()
    assert (len(said["points"]), said["step_seconds"]) == (300, 2.0)
    assert [one["kind"] for one in said["points"][0]["resources"]] == ["cpu", "memory"]
    async with session.get(f"{url}/api/explain?guest=api-1") as reply:
        said = await reply.json()
    assert said["guest"]["name"] == "api-1"
    assert said["resources"][0]["summary"].startswith("has ")


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/api/explain?guest=nobody", 404, "no guest named 'nobody'"),
        ("/api/history?guest=nobody", 404, "no guest named 'nobody'"),
        ("/api/explain", 400, "guest= is missing"),
        ("/api/history?guest=api-1&seconds=-5", 400, "within 1..31622400"),
        ("/api/history?guest=api-1&seconds=99999999999", 400, "within 1..31622400"),
        ("/api/history?guest=api-1&seconds=%D9%A1x", 400, "within 1..31622400"),
    ],
)
async def test_what_makes_no_sense_is_told_so(
    url: str, session: aiohttp.ClientSession, path: str, status: int, says: str
) -> None:
    async with session.get(url + path) as reply:
        assert reply.status == status
        assert says in (await reply.json())["error"]


async def test_nobody_who_watches_costs_nothing(stage: Stage, url: str, session: aiohttp.ClientSession) -> None:
    assert not stage.watched
    async with session.get(f"{url}/api/stream") as one, session.get(f"{url}/api/stream") as two:
        await Stream(one).next()
        await Stream(two).next()
        assert stage.watched
    await eventually(lambda: not stage.watched, "nobody watches any more", 5)
    async with session.get(f"{url}/api/stream") as again:
        assert len((await Stream(again).next())[1]["guests"]) == 3


async def test_who_is_one_too_many_is_told_so(url: str) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        streams = [await session.get(f"{url}/api/stream") for _ in range(32)]
        assert [reply.status for reply in streams] == [200] * 32
        async with session.get(f"{url}/api/stream") as reply:
            assert reply.status == 503
            assert "32 browsers watch this broker already" in (await reply.json())["error"]
        streams.pop().close()
        async with asyncio.timeout(5):
            while True:
                async with session.get(f"{url}/api/stream") as reply:
                    if reply.status == 200:
                        break
                await asyncio.sleep(0.02)
        for one in streams:
            one.close()


async def test_a_page_that_lost_track_sends_everybody_away_and_serves_again(
    stage: Stage, url: str, session: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    async with session.get(f"{url}/api/stream") as reply:
        await Stream(reply).next()
        good = stage.guests["api-1"]
        stage.put(replace(good, resources=None))  # type: ignore[arg-type]  # what no broker ever says
        async with asyncio.timeout(5):
            await reply.content.read()
    assert "the live page lost track" in caplog.text
    stage.put(good)
    async with session.get(f"{url}/api/stream") as reply:
        assert len((await Stream(reply).next())[1]["guests"]) == 3


async def test_the_files_are_there_and_nothing_else_is(url: str, session: aiohttp.ClientSession) -> None:
    async with session.get(url) as reply:
        assert reply.status == 200
        assert reply.content_type == "text/html"
        assert reply.headers["Cache-Control"] == "no-cache"
    for path, kind in (("main.js", "javascript"), ("page.css", "text/css"), ("vendor/uplot/LICENSE", "")):
        async with session.get(f"{url}/static/{path}") as reply:
            assert reply.status == 200
            assert kind in reply.content_type
    for path in ("/static/", "/static/../page.py", "/static/%2e%2e/page.py", "/page.py"):
        async with session.get(url + path) as reply:
            assert reply.status in (403, 404)


async def test_who_comes_while_the_last_one_goes_is_told_everything(stage: Stage) -> None:
    feed = Feed(stage)
    first, _ = await feed.join()
    leaving = asyncio.create_task(feed.leave(first))
    await asyncio.sleep(0)
    second, snapshot = await feed.join()
    await leaving
    assert len(json.loads(snapshot)["guests"]) == 3
    stage.drop("api-1")
    async with asyncio.timeout(5):
        await second.wait()
    assert json.loads(feed.news(second))["gone"] == ["api-1"]
    await feed.close()
    assert second.ended
    assert not stage.watched
