"""Free memory, glanced at."""

import asyncio
import socket
import time
from collections.abc import Callable

from guestd.guest.glance import Glance, free_pages


class Memory:
    """Free pages as a test has them."""

    def __init__(self) -> None:
        self.pages, self.glances = 50_000, 0
        self.falls: list[int] = []

    def free(self) -> int:
        self.glances += 1
        return self.pages

    def fell(self) -> None:
        self.falls.append(self.pages)


def run(glance: Glance, test: Callable[[], object]) -> None:
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(glance)) as runner:
        runner.run(test())  # type: ignore[arg-type]


def test_a_fall_is_told_and_nothing_else() -> None:
    memory = Memory()
    glance = Glance((0.01, 0.01), 4 << 20, free=memory.free)

    async def test() -> None:
        glance.begin(memory.fell)
        for pages in (49_500, 60_000, 50_000, 49_990):  # a little less, more, much less, a little less
            memory.pages = pages
            await asyncio.sleep(0.05)

    run(glance, test)
    assert memory.falls == [50_000]


def test_a_slow_fall_and_a_rise_are_told_too() -> None:
    memory = Memory()
    glance = Glance((0.01, 0.01), 4 << 20, 64 << 20, memory.free)

    async def test() -> None:
        glance.begin(memory.fell)
        for pages in (49_000, 48_000, 47_000, 46_000, 45_500, 60_000, 61_000, 62_000):
            memory.pages = pages
            await asyncio.sleep(0.05)

    run(glance, test)
    assert memory.falls == [45_500, 62_000], "after 16 MiB less, and 64 MiB more"


def test_what_is_told_wakes_the_loop_at_once() -> None:
    memory = Memory()
    glance = Glance((0.01, 0.01), 4 << 20, free=memory.free)

    async def test() -> None:
        woken = asyncio.Event()
        glance.begin(woken.set)
        memory.pages = 0
        async with asyncio.timeout(20):  # the loop's only timer: without the wake it would wait for that
            await woken.wait()

    began = time.monotonic()
    run(glance, test)
    assert time.monotonic() - began < 10


def test_it_does_not_look_before_it_is_told_to() -> None:
    memory = Memory()

    async def test() -> None:
        await asyncio.sleep(0.05)

    run(Glance((0.01, 0.01), 4 << 20, free=memory.free), test)
    assert memory.glances == 0


def test_sockets_and_timers_are_served_between_glances_and_glances_between_them() -> None:
    memory = Memory()
    glance = Glance((0.02, 0.02), 4 << 20, free=memory.free)
    heard: list[bytes] = []

    async def test() -> None:
        glance.begin(memory.fell)
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            for _ in range(30):
                theirs.send(b"x")
                heard.append(await loop.sock_recv(ours, 1))
                await asyncio.sleep(0.005)  # always shorter than the time between two glances

    run(glance, test)
    assert heard == [b"x"] * 30
    assert memory.glances >= 4


def test_the_less_there_is_the_closer_it_looks() -> None:
    """At 256 MiB/s half of what is free is to be there at the next glance; pages are 4 KiB."""
    memory = Memory()
    glance = Glance((0.01, 0.4), 4 << 20, 64 << 20, memory.free)

    async def glances(pages: int, seconds: float) -> int:
        memory.pages = pages
        await asyncio.sleep(0.5)  # the pause was chosen by what was free when that was last told
        before = memory.glances
        await asyncio.sleep(seconds)
        return memory.glances - before

    async def test() -> None:
        glance.begin(memory.fell)
        assert 1 <= await glances(1 << 20, 1.0) <= 3, "plenty: every 0.4 s"
        assert 4 <= await glances(13_107, 1.0) <= 11, "51 MiB: every 0.1 s"
        assert 20 <= await glances(100, 1.0) <= 101, "nearly nothing: every 0.01 s"

    run(glance, test)


def test_there_are_free_pages_here() -> None:
    assert free_pages() > 0
