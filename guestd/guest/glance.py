"""Free memory, glanced at between samples: one system call, no file, and Python hardly wakes for it.

A sample says much and costs much; seldom is often enough for it while nothing happens. That tasks wait for a
CPU or stall on memory the kernel tells by itself (`psi`), but not that a program begins to take memory while there
is some, or lets go of it: that is what is looked for here. Free memory falls for other reasons too (page cache): a fall
says only that a sample is worth its while. A slow fall counts once it has come to four times as much as a quick one.

How often: half of what is free must still be there at the next glance if it is used up by `_FASTEST_BYTES_PER_SECOND`,
and then there is as much time again for a plug. So a VM with little left is looked at more closely than one with
plenty.

The event loop waits in its selector, so that is where the glances are, in few steps: in a guest that does nothing they
are most of what this daemon costs at all, and it is the code that is met anew after each wait, not the call, that makes
a glance dear. What the selector finds ready is handed on at once and never asked for a second time: to ask takes a PSI
trigger's event away (`psi`).
"""

import os
import selectors
import time
from collections.abc import Callable

from guestd.model.units import GIB, MIB

_SLOW = 4
_FREE_PAGES = os.sysconf_names.get("SC_AVPHYS_PAGES", -1)
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_FASTEST_BYTES_PER_SECOND = GIB // 4  # of what takes more nobody could look often enough: PSI tells


def free_pages() -> int:
    """Pages of memory that are used for nothing at all."""
    return os.sysconf(_FREE_PAGES)


class Glance(selectors.DefaultSelector):
    """A selector for an event loop; once told to `begin` it looks at free memory while it waits.

    :param seconds: between two glances, the least and the most.
    :param fall_bytes: a fall from one glance to the next that counts.
    :param rise_bytes: a rise since it was last told that counts.
    :param free: how many pages are free; tests have their own.
    """

    offered = _FREE_PAGES >= 0
    """Whether this system tells (Linux and some others do)."""

    def __init__(
        self,
        seconds: tuple[float, float] = (0.25, 1.0),
        fall_bytes: int = 4 * MIB,
        rise_bytes: int = 64 * MIB,
        free: Callable[[], int] = free_pages,
    ) -> None:
        super().__init__()
        self._seconds, self._free = seconds, free
        self._fall_pages, self._rise_pages = fall_bytes // _PAGE_BYTES, rise_bytes // _PAGE_BYTES
        self._callback: Callable[[], object] | None = None
        self._last = self._low = self._high = 0
        self._pause = self._due = 0.0

    def begin(self, callback: Callable[[], object]) -> None:
        """From now on call back, in the loop, when there is noticeably less free memory, or more."""
        self._callback = callback
        self._begin_from(self._free())
        self._due = time.monotonic() + self._pause

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready; nothing when the time is over, or `callback` was called and may have made work."""
        if self._callback is None:
            return super().select(timeout)
        now = time.monotonic()
        end = float("inf") if timeout is None else now + timeout
        while self._due <= end:
            if now < self._due:
                ready = super().select(self._due - now)
                if ready:
                    return ready
            free, now = self._free(), time.monotonic()
            self._due = now + self._pause
            if self._last - free > self._fall_pages or not self._low <= free <= self._high:
                self._begin_from(free)
                self._callback()
                return super().select(0)
            self._last = free
        return super().select(max(0.0, end - now))

    def _begin_from(self, free: int) -> None:
        """What is told is how that changes."""
        self._last, self._low, self._high = free, free - _SLOW * self._fall_pages, free + self._rise_pages
        least, most = self._seconds
        self._pause = min(most, max(least, free * _PAGE_BYTES / 2 / _FASTEST_BYTES_PER_SECOND))
