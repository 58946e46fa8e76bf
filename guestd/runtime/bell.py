"""A wake-up for one waiter: thousands of guests feel the 0.7 to 2.5 KiB of an `asyncio.Event` or `Queue` each."""

import asyncio


class Bell:
    """Rung until it is cleared; at most one may wait."""

    __slots__ = ("_rung", "_waiter")

    def __init__(self, rung: bool = False) -> None:
        self._rung = rung
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        """Wake the waiter, or the next one."""
        self._rung = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def clear(self) -> None:
        """From now on one has to wait for the next ring."""
        self._rung = False

    async def wait(self) -> None:
        """Until it was rung."""
        while not self._rung:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
