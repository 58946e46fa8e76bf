"""Free memory, glanced at between samples: one system call, no file, and Python hardly wakes for it.

A sample says much and costs much; seldom is often enough for it while nothing happens. That tasks wait for a
CPU or stall on memory the kernel tells by itself (`psi`), but not that a program begins to take memory while there
is some: that is what is looked for here. Free memory falls for other reasons too (page cache): a fall says only
that a sample is worth its while.
"""

import asyncio
import os
from collections.abc import Callable

from guestd.model.units import MIB

_FREE_PAGES = os.sysconf_names["SC_AVPHYS_PAGES"]


def free_pages() -> int:
    """Pages of memory that are used for nothing at all."""
    return os.sysconf(_FREE_PAGES)


class Glance:
    """Calls `callback` when free memory fell noticeably from one glance to the next. Begins at once.

    :param free: how many pages are free; tests have their own.
    """

    def __init__(
        self,
        callback: Callable[[], object],
        loop: asyncio.AbstractEventLoop,
        seconds: float = 0.25,
        fall_bytes: int = 4 * MIB,
        free: Callable[[], int] = free_pages,
    ) -> None:
        self._callback, self._loop, self._seconds, self._free = callback, loop, seconds, free
        self._fall_pages = fall_bytes // os.sysconf("SC_PAGE_SIZE")
        self._last = free()
        self._timer = loop.call_later(seconds, self._look)

    def _look(self) -> None:
        self._timer = self._loop.call_later(self._seconds, self._look)
        free = self._free()
        fallen, self._last = self._last - free, free
        if fallen > self._fall_pages:
            self._callback()

    def close(self) -> None:
        """Look no more; a second call does nothing."""
        self._timer.cancel()
