"""Free memory, glanced at between samples: one system call, no file, and Python hardly wakes for it.

A sample says much and costs much; seldom is often enough for it while nothing happens. That tasks wait for a
CPU or stall on memory the kernel tells by itself (`psi`), but not that a program begins to take memory while there
is some, or lets go of it: that is what is looked for here. Free memory falls for other reasons too (page cache): a fall
says only that a sample is worth its while. A slow fall counts once it has come to four times as much as a quick one.

The event loop waits in its selector, so that is where the glances are: a timer of the loop's own costs twice as much
each time, and in a guest that does nothing it is most of what this daemon costs at all.
"""

import os
import selectors
import time
from collections.abc import Callable

from guestd.model.units import MIB

_SLOW = 4
_FREE_PAGES = os.sysconf_names.get("SC_AVPHYS_PAGES", -1)


def free_pages() -> int:
    """Pages of memory that are used for nothing at all."""
    return os.sysconf(_FREE_PAGES)


class Glance(selectors.DefaultSelector):
    """A selector for an event loop; once told to `begin` it looks at free memory while it waits.

    :param fall_bytes: a fall from one glance to the next that counts.
    :param rise_bytes: a rise since it was last told that counts.
    :param free: how many pages are free; tests have their own.
    """

    offered = _FREE_PAGES >= 0
    """Whether this system tells (Linux and some others do)."""

    def __init__(
        self,
        seconds: float = 0.25,
        fall_bytes: int = 4 * MIB,
        rise_bytes: int = 64 * MIB,
        free: Callable[[], int] = free_pages,
    ) -> None:
        super().__init__()
        self._seconds, self._free = seconds, free
        self._fall_pages = fall_bytes // os.sysconf("SC_PAGE_SIZE")
        self._rise_pages = rise_bytes // os.sysconf("SC_PAGE_SIZE")
        self._callback: Callable[[], object] | None = None
        self._last = self._told = 0
        self._due = 0.0

    def begin(self, callback: Callable[[], object]) -> None:
        """From now on call back, in the loop, when there is noticeably less free memory, or more."""
        self._callback = callback
        self._last = self._told = self._free()
        self._due = time.monotonic() + self._seconds

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready; nothing when the time is over, or `callback` was called and may have made work."""
        if self._callback is None:
            return super().select(timeout)
        now = time.monotonic()
        end = float("inf") if timeout is None else now + timeout
        while True:
            if now >= self._due:
                self._due = now + self._seconds
                if self._is_telling(self._free()):
                    self._callback()
                    end = now
            ready = super().select(max(0.0, min(end, self._due) - now))
            if ready or end <= self._due:
                return ready
            now = time.monotonic()

    def _is_telling(self, free: int) -> bool:
        fallen, self._last = self._last - free, free
        telling = fallen > self._fall_pages or not -self._rise_pages <= self._told - free <= _SLOW * self._fall_pages
        if telling:
            self._told = free
        return telling
