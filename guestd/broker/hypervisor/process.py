"""Whether the process at the other end of a unix socket still runs.

The peer's pid comes from the kernel (`SO_PEERCRED`: who called `listen`), and is watched by a pidfd,
which never means another process once it is open. Between learning the pid and opening the pidfd the
number could have been reused; whoever gets an answer from the peer *after* the pidfd was opened knows
that it was not (the watcher's owner has to do that, see `qmp_link`).

Weak spot: a process that listens and lets another one serve is not seen through.
"""

import asyncio
import os
import socket
import struct
from collections.abc import Callable

_UCRED = struct.Struct("3i")  # pid, uid, gid


class ProcessWatch:
    """One watched process. `exited` turns true once, and then `on_exit` is called once."""

    def __init__(self, pid: int, pidfd: int, on_exit: Callable[[], None]) -> None:
        self.pid = pid
        self.exited = False
        self._pidfd = pidfd
        self._on_exit = on_exit
        asyncio.get_running_loop().add_reader(pidfd, self._readable)

    @classmethod
    def of_peer(cls, sock: socket.socket, on_exit: Callable[[], None]) -> "ProcessWatch | None":
        """Watch the peer of a connected unix socket; None where it cannot be known or watched
        (another pid namespace, it has ended already, or a kernel without pidfds).
        """
        pid, _, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if pid <= 0:
            return None
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return None
        return cls(pid, pidfd, on_exit)

    def close(self) -> None:
        """Stop watching; may be repeated."""
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _readable(self) -> None:
        self.exited = True
        self.close()
        self._on_exit()
