"""Kernel events about CPUs, memory and virtio devices, by pyudev: hints that something is to be looked at.

1. An event is only a hint: nothing in it is believed but the subsystem, sysfs is read again. Events come in
   bursts, so the callback is called once per subsystem for all that is there to be read.
2. The kernel's own events, not udev's: they come tens of milliseconds earlier and without a udev daemon. That races a
   distribution's rule which onlines by itself; both write the same, and "already online" is success.
   libudev drops messages that the kernel did not send.
3. Any error on the socket (a burst that overflowed it ends a monitor for good) means events were lost: the callback
   gets `RESCAN` and a new monitor is opened. Where that fails, the reconciling timer is all there is.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

_log = logging.getLogger(__name__)
SUBSYSTEMS = ("cpu", "memory", "virtio")
RESCAN = "rescan"
_BUFFER_BYTES = 4 << 20
_MOST_AT_ONCE = 256


class Monitor(Protocol):
    """What is used of a `pyudev.Monitor`; `poll` gives devices with a `subsystem`, or None."""

    def fileno(self) -> int: ...

    def poll(self, timeout: float | None = None) -> object | None: ...


def open_monitor() -> Monitor:
    """A started monitor for the kernel's events of our subsystems.

    :raise ImportError: When there is no libudev.
    :raise OSError: When there is no netlink here.
    """
    import pyudev

    monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source="kernel")
    for subsystem in SUBSYSTEMS:
        monitor.filter_by(subsystem)
    try:
        monitor.set_receive_buffer_size(_BUFFER_BYTES)
    except OSError as error:  # more than net.core.rmem_max takes CAP_NET_ADMIN
        _log.debug("uevents: receive buffer stays as it is: %s, ignoring", error)
    monitor.start()
    opened: Monitor = monitor
    return opened


class Uevents:
    """Calls `callback` with a subsystem, or `RESCAN`, from the running loop.

    :param opener: How a monitor is opened; tests have their own.
    """

    def __init__(self, callback: Callable[[str], object], opener: Callable[[], Monitor] = open_monitor) -> None:
        self._callback, self._open = callback, opener
        self._monitor: Monitor | None = None
        self._loop = asyncio.get_running_loop()
        self.reason = ""
        """Why there are no events; empty while there are."""

    def start(self) -> bool:
        """Begin to listen; False, with the reason in `reason`, where that is not possible."""
        try:
            self._monitor = self._open()
        except (OSError, ImportError) as error:
            self.reason = f"no kernel events ({error}), only the timer finds changes"
            return False
        self.reason = ""
        self._loop.add_reader(self._monitor.fileno(), self._readable)
        return True

    def close(self) -> None:
        """Stop listening; a second call does nothing."""
        if self._monitor is not None:
            self._loop.remove_reader(self._monitor.fileno())
            self._monitor = None  # the last reference: pyudev closes the socket

    def _readable(self) -> None:
        assert self._monitor is not None
        seen: dict[str, None] = {}
        try:
            for _ in range(_MOST_AT_ONCE):
                device = self._monitor.poll(timeout=0)
                if device is None:
                    break
                seen[str(getattr(device, "subsystem", ""))] = None
        except OSError as error:
            _log.warning("uevents: %s: events were lost, looking at everything again", error)
            self.close()
            if not self.start():
                _log.warning("uevents: %s", self.reason)
            self._callback(RESCAN)
            return
        for subsystem in seen:
            if subsystem in SUBSYSTEMS:
                self._callback(subsystem)
