"""When to take the next sample: often while something moves, hardly ever at rest.

Quick for `quick_for_seconds` after a trigger, an order or a movement; calm for `calm_for_seconds` after a movement or
an order; then at rest, as long as the shell says at once when tasks begin to wait, or more or less memory is free
(`watched`). With one CPU online the rest is deep: there is nothing that could be given back but memory.
"""

import math

from guestd.guest.core.actions import Settings, TakeSample

_FRESH_SECONDS = 1.0


class Pace:
    """The rhythm of one guest's samples."""

    def __init__(self, settings: Settings, now: float) -> None:
        self._settings = settings
        self._quick_until = 0.0
        self._calm_until = now + settings.calm_for_seconds
        self.watched = False
        self.next_at = now
        self._taken_at = -math.inf

    def moved(self, now: float) -> None:
        """Something moves: look closely, and keep looking for a while."""
        self._quick_until = now + self._settings.quick_for_seconds
        self._calm_until = now + self._settings.calm_for_seconds

    def alarm(self, now: float) -> None:
        """Something may be moving: look closely for a moment."""
        self._quick_until = max(self._quick_until, now + self._settings.quick_for_seconds)
        self.soon(now)

    def soon(self, at: float) -> None:
        """Look then at the latest."""
        self.next_at = min(self.next_at, at)

    def refresh(self, now: float) -> None:
        """What is said now is to be no older than a second, which has the next sample come with the next heartbeat."""
        if now - self._taken_at > _FRESH_SECONDS:
            self.soon(now)

    def due(self, now: float, settled: bool, one_cpu: bool) -> TakeSample | None:
        """The sample that is due, if one is.

        :param settled: no order is open and nothing is being done.
        :param one_cpu: no CPU is online that could be given back.
        """
        if now < self.next_at:
            return None
        pause = self._pause(now, settled, one_cpu)
        self.next_at, self._taken_at = now + pause, now
        return TakeSample(quick=pause < self._settings.rest_seconds)

    def _pause(self, now: float, settled: bool, one_cpu: bool) -> float:
        if now < self._quick_until:
            return self._settings.quick_seconds
        if not (self.watched and settled and now >= self._calm_until):
            return self._settings.calm_seconds
        return self._settings.deep_rest_seconds if one_cpu else self._settings.rest_seconds
