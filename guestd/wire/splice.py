"""Two sockets joined: what comes in at one goes out at the other, until both sides have ended.

No task, transport or buffer per connection, for there are thousands: bytes are read into one buffer that all share and
written on at once. What the other side does not take now is kept, and nothing more is read before it has gone:
at most one read is held for each direction. The end of one side is passed on as such. An error of one side is the end
of both, once what is held has gone.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable

_buffer = memoryview(bytearray(64 * 1024))
"""Filled and emptied within one callback. Only one thread of a process may run splices."""


class Splice:
    """Takes both sockets over and begins; they are closed in the end, whatever happens.

    :param on_closed: called once, when both are closed.
    """

    __slots__ = ("_ends", "_on_closed", "loop")

    def __init__(self, one: socket.socket, other: socket.socket, on_closed: Callable[[], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self._on_closed: Callable[[], None] | None = on_closed
        self._ends = (_End(self, one), _End(self, other))
        self._ends[0].other, self._ends[1].other = self._ends[1], self._ends[0]
        for end in self._ends:
            end.sock.setblocking(False)
            self.loop.add_reader(end.fd, end.read)

    def close(self) -> None:
        """Close both now; what is held is lost."""
        on_closed, self._on_closed = self._on_closed, None
        if on_closed is None:
            return
        for end in self._ends:
            self.loop.remove_reader(end.fd)
            self.loop.remove_writer(end.fd)
            end.sock.close()
        on_closed()

    def close_if_over(self) -> None:
        """Close when nothing comes any more and nothing is held."""
        if all(end.ended and not end.held for end in self._ends):
            self.close()

    def fail(self) -> None:
        """One side is broken: read no more."""
        for end in self._ends:
            end.ended = True
            self.loop.remove_reader(end.fd)
        self.close_if_over()


class _End:
    """One of the two."""

    __slots__ = ("_splice", "ended", "fd", "held", "other", "sock")

    other: "_End"

    def __init__(self, splice: Splice, sock: socket.socket) -> None:
        self._splice, self.sock, self.fd = splice, sock, sock.fileno()
        self.held = b""  # to be written here
        self.ended = False  # nothing more is read from here

    def read(self) -> None:
        """There is something to read."""
        try:
            count = self.sock.recv_into(_buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._splice.fail()
            return
        if count:
            self.other.write(_buffer[:count])
            return
        self.ended = True
        self._splice.loop.remove_reader(self.fd)
        self.other.pass_end_on()

    def write(self, data: memoryview) -> None:
        """Write, or hold it and have the other side wait."""
        try:
            sent = self.sock.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self._splice.fail()
            return
        if sent < len(data):
            self.held = bytes(data[sent:])
            self._splice.loop.add_writer(self.fd, self._write_held)
            self._splice.loop.remove_reader(self.other.fd)

    def pass_end_on(self) -> None:
        """The other side says no more."""
        if not self.held:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)
            self._splice.close_if_over()

    def _write_held(self) -> None:
        try:
            self.held = self.held[self.sock.send(self.held) :]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.held = b""
            self._splice.loop.remove_writer(self.fd)
            self._splice.fail()
            return
        if self.held:
            return
        self._splice.loop.remove_writer(self.fd)
        if self.other.ended:
            self.pass_end_on()
        else:
            self._splice.loop.add_reader(self.other.fd, self.other.read)
