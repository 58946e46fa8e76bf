"""What `guestctl top` knows of a broker, and how it keeps that up to date."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from top_worlds import FakeBroker, event, guest

from guestd.cli.top.feed import EVENTS_KEPT, Board, Feed
from guestd.model.explanation import GuestExplanation


@asynccontextmanager
async def following(broker: FakeBroker) -> AsyncIterator[Feed]:
    feed = Feed(broker.connect, retry_seconds=0.01)
    running = asyncio.create_task(feed.run())
    try:
        yield feed
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


async def test_guests_come_change_and_go() -> None:
    broker = FakeBroker({"a": guest("a")})
    async with following(broker) as feed:
        await until(lambda: set(feed.board.guests) == {"a"})
        assert feed.board.host is not None
        assert feed.board.host.guests == 1
        broker.change(guest("a", cpu=(3000, 2000, 4000)), guest("b"))
        await until(lambda: set(feed.board.guests) == {"a", "b"})
        assert feed.board.guests["a"].resources[0].demand == 3000
        broker.remove("a")
        await until(lambda: set(feed.board.guests) == {"b"})


async def test_a_broker_that_goes_is_said_and_one_that_comes_back_is_read_anew() -> None:
    broker = FakeBroker({"a": guest("a"), "b": guest("b")})
    async with following(broker) as feed:
        await until(lambda: len(feed.board.guests) == 2)
        broker.happen(event(5, "a", "before"))
        await until(lambda: feed.board.last_event_id == 5)
        broker.go("nobody answers")
        await until(lambda: feed.board.problem == "nobody answers")
        assert set(feed.board.guests) == {"a", "b"}  # old, and said to be
        assert await feed.explain("a") == "the broker does not answer"
        broker.remove("b")
        broker.happen(event(6, "a", "meanwhile"))
        broker.go("")
        await until(lambda: not feed.board.problem)
        await until(lambda: len(feed.board.events("a")) == 2)
        assert set(feed.board.guests) == {"a"}
        assert [one.text for one in feed.board.events("a")] == ["meanwhile", "before"]


async def test_a_broker_without_events_is_followed_all_the_same() -> None:
    broker = FakeBroker({"a": guest("a")}, no_events="UNIMPLEMENTED")
    async with following(broker) as feed:
        await until(lambda: feed.board.no_events == "UNIMPLEMENTED")
        broker.change(guest("b"))
        await until(lambda: "b" in feed.board.guests)
        assert not feed.board.problem


async def test_what_happened_before_is_read_on_demand_and_nothing_is_listed_twice() -> None:
    broker = FakeBroker({"a": guest("a")}, past=[event(1, "a", "one"), event(2, "a", "two"), event(3, "b", "other")])
    async with following(broker) as feed:
        await until(lambda: bool(feed.board.guests))
        broker.happen(event(4, "a", "four"))
        await until(lambda: feed.board.last_event_id == 4)
        await feed.fetch_events("a")
        await feed.fetch_events("a")
        assert [one.text for one in feed.board.events("a")] == ["four", "two", "one"]


async def test_an_explanation_or_why_there_is_none() -> None:
    broker = FakeBroker({"a": guest("a")})
    async with following(broker) as feed:
        await until(lambda: bool(feed.board.guests))
        assert isinstance(await feed.explain("a"), GuestExplanation)
        assert await feed.explain("nobody") == "no guest named 'nobody'"


def test_events_kept_are_bounded_and_the_newest() -> None:
    board = Board()
    board.add_events(event(number, "a", str(number)) for number in range(1, 3 * EVENTS_KEPT))
    kept = board.events("a")
    assert len(kept) == EVENTS_KEPT
    assert kept[0].id == 3 * EVENTS_KEPT - 1
    board.add_events([event(1, "a", "late")])  # older than all that is kept
    assert board.events("a") == kept
