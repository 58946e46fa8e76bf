"""Kernel events, from monitors that the tests make."""

import asyncio
import errno
import socket
from collections.abc import Callable

import pytest

from guestd.guest.uevents import RESCAN, Uevents, open_monitor

NAMES = {b"c": "cpu", b"m": "memory", b"v": "virtio", b"b": "block"}


class Device:
    def __init__(self, subsystem: str) -> None:
        self.subsystem = subsystem


class FakeMonitor:
    """Gives a device per byte that is in its socket; "!" is the error of a socket that overflowed."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)

    def fileno(self) -> int:
        return self.ours.fileno()

    def poll(self, timeout: float | None = None) -> Device | None:
        assert timeout == 0
        try:
            letter = self.ours.recv(1)
        except BlockingIOError:
            return None
        if letter == b"!":
            raise OSError(errno.ENOBUFS, "No buffer space available")
        return Device(NAMES[letter])

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_burst_is_one_call_per_subsystem() -> None:
    monitor, seen = FakeMonitor(), list[str]()
    uevents = Uevents(seen.append, lambda: monitor)
    assert uevents.start() and uevents.reason == ""
    monitor.theirs.send(b"mmmmmcmmbb")
    await settle()
    assert seen == ["memory", "cpu"]
    monitor.theirs.send(b"v")
    await settle()
    assert seen == ["memory", "cpu", "virtio"]
    uevents.close()
    uevents.close()
    monitor.theirs.send(b"m")
    await settle()
    assert len(seen) == 3
    monitor.close()


async def test_lost_events_are_a_rescan_and_a_new_monitor() -> None:
    monitors, seen = [FakeMonitor(), FakeMonitor()], list[str]()
    fresh = iter(monitors)
    uevents = Uevents(seen.append, lambda: next(fresh))
    assert uevents.start()
    monitors[0].theirs.send(b"c!")
    await settle()
    assert seen == [RESCAN]
    monitors[1].theirs.send(b"m")
    await settle()
    assert seen == [RESCAN, "memory"]
    uevents.close()
    for monitor in monitors:
        monitor.close()


async def test_a_monitor_that_cannot_be_replaced_leaves_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    monitor, seen = FakeMonitor(), list[str]()
    openers: list[Callable[[], FakeMonitor]] = [lambda: monitor]

    def opener() -> FakeMonitor:
        if not openers:
            raise OSError("Could not create udev monitor")
        return openers.pop()()

    uevents = Uevents(seen.append, opener)
    assert uevents.start()
    monitor.theirs.send(b"!")
    await settle()
    assert seen == [RESCAN]
    assert "Could not create udev monitor" in uevents.reason
    assert uevents.reason in caplog.text
    uevents.close()
    monitor.close()


@pytest.mark.parametrize("error", [OSError("no netlink"), ImportError("No udev library")])
async def test_where_there_is_no_udev(error: Exception) -> None:
    def opener() -> FakeMonitor:
        raise error

    uevents = Uevents(lambda kind: None, opener)
    assert not uevents.start()
    assert str(error) in uevents.reason
    uevents.close()


async def test_the_real_monitor_opens_or_says_why() -> None:
    uevents = Uevents(lambda kind: None, open_monitor)
    assert uevents.start() is (uevents.reason == "")
    uevents.close()
