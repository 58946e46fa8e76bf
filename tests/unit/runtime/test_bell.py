"""A bell wakes its one waiter."""

import asyncio

import pytest

from guestd.runtime.bell import Bell


async def test_who_waits_is_woken_and_who_comes_later_need_not_wait() -> None:
    bell = Bell()
    waiting = asyncio.create_task(bell.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    bell.ring()
    bell.ring()
    await asyncio.wait_for(waiting, 1)
    await asyncio.wait_for(bell.wait(), 1)
    bell.clear()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(bell.wait(), 0.01)


async def test_a_ring_that_was_cleared_before_the_waiter_ran_is_no_ring() -> None:
    bell = Bell()
    waiting = asyncio.create_task(bell.wait())
    await asyncio.sleep(0)
    bell.ring()
    bell.clear()
    await asyncio.sleep(0)
    assert not waiting.done()
    bell.ring()
    await asyncio.wait_for(waiting, 1)


async def test_a_waiter_that_gave_up_is_not_rung_for() -> None:
    bell = Bell()
    waiting = asyncio.create_task(bell.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    bell.ring()
    assert waiting.cancelled()
    await asyncio.wait_for(bell.wait(), 1)  # the ring is kept for who waits next
