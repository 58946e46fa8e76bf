"""A guest's outbox and its allowance."""

import asyncio

import pytest

from guestd.broker import session as module
from guestd.broker.failpoint import Failpoint
from guestd.broker.session import CONNECTION_MESSAGES, MESSAGES_BURST, MESSAGES_PER_SECOND, Allowance, Session
from guestd.model.errors import FloodError, SupersededError
from guestd.model.messages import Grant, Heartbeat, OrderId, Reclaim, ReclaimStage, Throttle, Welcome
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Resources

WELCOME = Welcome(1, "a", 1, 10.0, Resources(), Resources())


def grant(kind: Kind, amount: int) -> Grant:
    return Grant(OrderId(1, amount, amount), kind, amount)


async def taken(session: Session, count: int) -> list[object]:
    return [await asyncio.wait_for(session.next(), 1) for _ in range(count)]


async def test_welcome_comes_first() -> None:
    session = Session(WELCOME)
    session.put(grant(Kind.CPU, 1))
    assert await taken(session, 2) == [WELCOME, grant(Kind.CPU, 1)]


async def test_the_newest_of_each_sort_waits_in_the_order_of_its_coming() -> None:
    session = Session(WELCOME)
    reclaim = Reclaim(OrderId(1, 9, 9), Kind.MEMORY, 9, ReclaimStage.ASK, 5.0, Reason("", ""))
    for amount in range(1000):
        session.put(grant(Kind.CPU, amount))
        session.put(grant(Kind.MEMORY, amount))
        session.put(Heartbeat())
        session.put(Throttle(1000, amount))
    session.put(reclaim)
    assert await taken(session, 5) == [WELCOME, grant(Kind.CPU, 999), Heartbeat(), Throttle(1000, 999), reclaim]
    with pytest.raises(TimeoutError):
        await taken(session, 1)
    session.put(Heartbeat())
    assert await taken(session, 1) == [Heartbeat()]


async def test_an_end_is_told_before_anything_that_waits() -> None:
    session = Session(WELCOME)
    session.end(SupersededError("newer"))
    for _ in range(2):
        with pytest.raises(SupersededError, match="newer"):
            await session.next()


async def test_an_end_wakes_who_waits() -> None:
    session = Session(WELCOME)
    await session.next()
    waiting = asyncio.create_task(session.next())
    await asyncio.sleep(0)
    session.end(SupersededError("newer"))
    with pytest.raises(SupersededError):
        await asyncio.wait_for(waiting, 1)


def test_a_burst_is_allowed_and_then_so_many_a_second() -> None:
    allowance = Allowance(100.0)
    for _ in range(int(MESSAGES_BURST)):
        allowance.count(100.0)
    with pytest.raises(FloodError, match="more than 50 messages a second"):
        allowance.count(100.0)
    for _ in range(int(MESSAGES_PER_SECOND)):
        allowance.count(101.0)
    with pytest.raises(FloodError):
        allowance.count(101.0)


def test_a_new_stream_counts_as_several_messages() -> None:
    allowance = Allowance(0.0)
    for _ in range(int(MESSAGES_BURST / CONNECTION_MESSAGES)):
        allowance.count(0.0, CONNECTION_MESSAGES)
    with pytest.raises(FloodError):
        allowance.count(0.0, CONNECTION_MESSAGES)


def test_a_clock_that_goes_back_gives_nothing() -> None:
    allowance = Allowance(100.0)
    for _ in range(int(MESSAGES_BURST)):
        allowance.count(100.0)
    with pytest.raises(FloodError):
        allowance.count(50.0)


def test_silence_is_saved_up_to_the_burst_only() -> None:
    allowance = Allowance(0.0)
    for _ in range(int(MESSAGES_BURST)):
        allowance.count(1e6)
    with pytest.raises(FloodError):
        allowance.count(1e6)


async def test_an_order_counts_as_answered_when_the_next_message_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the service has written it to the stream."""
    reached: list[Failpoint] = []
    monkeypatch.setattr(module, "reach", reached.append)
    session = Session(WELCOME)
    session.put(Heartbeat())
    session.put(grant(Kind.CPU, 1))
    await taken(session, 3)
    assert reached == []
    session.put(Heartbeat())
    await taken(session, 1)
    assert reached == [Failpoint.ANSWERED]
