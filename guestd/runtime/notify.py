"""Telling systemd how we are: `sd_notify` without a library.

The daemon that notifies may be the child of systemd's main process (the root helper is its parent), so the unit says
`NotifyAccess=all`, and a `WATCHDOG_PID` that names the parent counts as ours.
"""

import logging
import os
import socket
import time
from collections.abc import Mapping

_log = logging.getLogger(__name__)
_SEND_TIMEOUT_SECONDS = 1.0


class Notifier:
    """systemd, as the environment describes it; without one every call does nothing.

    :param environ: Where `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID` are looked up, once.
    """

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        self._address = environ.get("NOTIFY_SOCKET", "")
        self.watchdog_seconds = self._watchdog_seconds(environ)
        """How often `watchdog` is to be called at least (half of systemd's limit); None: not at all."""

    @staticmethod
    def _watchdog_seconds(environ: Mapping[str, str]) -> float | None:
        limit_us, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
        if pid and pid not in (str(os.getpid()), str(os.getppid())):
            return None
        return int(limit_us) / 2e6 if limit_us.isdecimal() and int(limit_us) else None

    def ready(self, status: str = "") -> bool:
        """Started, or done with reloading."""
        return self._send("READY=1", *([_status(status)] if status else []))

    def status(self, text: str) -> bool:
        """One line for `systemctl status`."""
        return self._send(_status(text))

    def watchdog(self) -> bool:
        """Still alive."""
        return self._send("WATCHDOG=1")

    def reloading(self) -> bool:
        """Reading the configuration again; `ready` ends that."""
        return self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> bool:
        """On the way out."""
        return self._send("STOPPING=1")

    def _send(self, *lines: str) -> bool:
        """Whether systemd has it. A failure is logged and survived: systemd will judge by its own clock."""
        if self._address[:1] not in ("/", "@"):
            return False
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(_SEND_TIMEOUT_SECONDS)
                sock.sendto("\n".join(lines).encode(), address)
        except OSError as error:
            _log.warning("systemd was not told %s: %s, ignoring", lines[0], error)
            return False
        return True


def _status(text: str) -> str:
    return "STATUS=" + " ".join(text.split())
