"""Numbers of events, and those who follow them."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from guestd.broker.history.feed import QUEUE, TAIL, Feed
from guestd.model.event import Event, EventCode, EventQuery

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def event(feed: Feed, guest: str = "a") -> Event:
    number = feed.take_id()
    made = Event(number, BEGIN + timedelta(seconds=number), guest, None, EventCode.VM, f"{number}")
    feed.put(made)
    return made


def new_feed(next_id: int = 1, reserved: int | None = 1 << 40) -> Feed:
    feed = Feed(lambda: 1_800_000_000.0)
    feed.begin(next_id, reserved)
    return feed


async def test_a_follower_has_an_event_before_put_returns() -> None:
    feed = new_feed()
    followers = [feed.follow("", 0), feed.follow("a", 0), feed.follow("b", 0)]
    first, second = event(feed, "a"), event(feed, "b")
    assert [(await followers[0].next()).event for _ in range(2)] == [first, second]
    assert (await followers[1].next()).event == first
    assert (await followers[2].next()).event == second
    waiting = asyncio.ensure_future(followers[1].next())
    await asyncio.sleep(0)
    assert not waiting.done()
    third = event(feed, "a")
    assert (await waiting).event == third
    for one in followers:
        feed.leave(one)
    event(feed)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await followers[1].next()


async def test_a_slow_follower_loses_the_oldest_and_is_told_how_many() -> None:
    feed = new_feed()
    slow, other = feed.follow("a", 0), feed.follow("b", 0)
    for _ in range(QUEUE + 7):
        event(feed, "a")
    seen = [await slow.next() for _ in range(QUEUE)]
    assert [one.missed for one in seen] == [7] + [0] * (QUEUE - 1)
    assert [one.event.id for one in seen] == list(range(8, QUEUE + 8))
    kept = event(feed, "b")
    assert (await other.next()).event == kept


async def test_a_follower_begins_after_an_event_that_is_in_memory() -> None:
    feed = new_feed()
    made = [event(feed, "ab"[number % 2]) for number in range(TAIL + 10)]
    assert feed.oldest_id == 11
    late = feed.follow("a", 5000)
    expected = [one.id for one in made if one.guest == "a" and one.id > 5000]
    assert [(await late.next()).event.id for _ in expected] == expected


def test_numbers_that_nobody_reserved_are_above_all_that_were_counted() -> None:
    feed = new_feed(next_id=7, reserved=9)
    assert [feed.take_id() for _ in range(4)] == [7, 8, 1_800_000_000_000, 1_800_000_000_001]
    feed.reserve(1_800_000_000_010)
    assert feed.take_id() == 1_800_000_000_002
    unknown = Feed(lambda: 1_800_000_000.0)
    unknown.begin(None, None)
    assert unknown.take_id() == 1_800_000_000_000


def test_what_is_in_memory_answers_like_the_file() -> None:
    feed = new_feed()
    made = [event(feed, "ab"[number % 2]) for number in range(100)]
    query = EventQuery("a", BEGIN + timedelta(seconds=20), BEGIN + timedelta(seconds=90), after_id=30, limit=5)
    assert [one.id for one in feed.events(query)] == [31, 33, 35, 37, 39]
    newest = EventQuery("", until=made[49].at, limit=3, newest=True)
    assert [one.id for one in feed.events(newest)] == [47, 48, 49]
