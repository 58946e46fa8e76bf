"""Free memory, glanced at."""

import asyncio

from guestd.guest.glance import Glance, free_pages


async def test_a_fall_is_told_and_nothing_else() -> None:
    free = [50_000]
    calls: list[int] = []
    glance = Glance(lambda: calls.append(free[0]), asyncio.get_running_loop(), 0.01, 4 << 20, lambda: free[0])
    for pages in (49_500, 60_000, 50_000, 49_990):  # a little less, more, much less, a little less
        free[0] = pages
        await asyncio.sleep(0.05)
    glance.close()
    assert calls == [50_000]
    free[0] = 0
    await asyncio.sleep(0.03)
    assert calls == [50_000]


def test_there_are_free_pages_here() -> None:
    assert free_pages() > 0
