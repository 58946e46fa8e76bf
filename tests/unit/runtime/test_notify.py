"""Telling systemd: both kinds of socket, and none."""

import os
import socket
from pathlib import Path

import pytest

from guestd.runtime.notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[socket.socket, str]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    request.addfinalizer(sock.close)
    sock.settimeout(5)
    if request.param == "path":
        name = str(tmp_path / "notify")
        sock.bind(name)
        return sock, name
    name = f"guestd-test-{os.getpid()}"
    sock.bind("\0" + name)
    return sock, "@" + name


def test_what_systemd_hears(listener: tuple[socket.socket, str]) -> None:
    sock, address = listener
    notifier = Notifier({"NOTIFY_SOCKET": address})
    assert notifier.ready("serving")
    assert sock.recv(999) == b"READY=1\nSTATUS=serving"
    assert notifier.ready()
    assert sock.recv(999) == b"READY=1"
    assert notifier.status("two\nlines\0READY=1")
    assert sock.recv(999).startswith(b"STATUS=two lines")
    assert notifier.watchdog()
    assert sock.recv(999) == b"WATCHDOG=1"
    assert notifier.stopping()
    assert sock.recv(999) == b"STOPPING=1"
    assert notifier.reloading()
    first, second = sock.recv(999).decode().split("\n")
    assert first == "RELOADING=1" and second.startswith("MONOTONIC_USEC=") and int(second[15:]) > 0


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}])
def test_without_systemd_nothing_happens(environ: dict[str, str]) -> None:
    notifier = Notifier(environ)
    assert not notifier.ready()
    assert notifier.watchdog_seconds is None


def test_a_failure_is_logged_and_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).watchdog()
    assert "systemd was not told WATCHDOG=1" in caplog.text


@pytest.mark.parametrize(
    ("pid", "seconds"),
    [("", 15.0), (str(os.getpid()), 15.0), (str(os.getppid()), 15.0), ("1234567", None)],
    ids=["nobody named", "us", "the helper", "another"],
)
def test_whose_watchdog(pid: str, seconds: float | None) -> None:
    environ = {"WATCHDOG_USEC": "30000000"} | ({"WATCHDOG_PID": pid} if pid else {})
    assert Notifier(environ).watchdog_seconds == seconds


@pytest.mark.parametrize("limit", ["", "0", "soon", "-5"])
def test_odd_watchdog_limits(limit: str) -> None:
    assert Notifier({"WATCHDOG_USEC": limit}).watchdog_seconds is None
