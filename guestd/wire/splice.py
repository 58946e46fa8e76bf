"""Two sockets joined: what comes in at one goes out at the other, until both sides have ended.

No task and no buffer per connection, for there are thousands: bytes are read into one buffer that all share and
written on at once. What the other side does not take is kept by its transport, and then reading stops until
it has gone (at most the transport's high-water mark and one read are held). The end of one side is passed on as
such; an error of one, or the end of both, closes both.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable

_buffer = memoryview(bytearray(64 * 1024))
"""Filled and emptied within one callback. Only one thread of a process may run splices."""


class Splice:
    """Two sockets, once `join` was awaited.

    :param on_closed: called once, when both sockets are closed.
    """

    __slots__ = ("_ends", "_on_closed", "_open")

    def __init__(self, on_closed: Callable[[], None]) -> None:
        one, other = _End(self), _End(self)
        one.other, other.other = other, one
        self._ends = (one, other)
        self._open, self._on_closed = 0, on_closed

    async def join(self, one: socket.socket, other: socket.socket) -> None:
        """Take both over; whatever happens, they are closed in the end.

        :raise OSError: When one cannot be used.
        """
        loop = asyncio.get_running_loop()
        self._open = 2
        for end, sock in zip(self._ends, (one, other), strict=True):
            try:
                await loop.connect_accepted_socket(end.itself, sock)
            except BaseException:
                self._open = 0
                self.abort()
                one.close()
                other.close()
                self._on_closed()
                raise

    def abort(self) -> None:
        """Close both at once; what was not passed on is lost."""
        for end in self._ends:
            if end.transport is not None:
                end.transport.abort()

    def closed_one(self) -> None:
        """One of the ends is closed."""
        self._open -= 1
        if self._open == 0:
            self._on_closed()


class _End(asyncio.BufferedProtocol):
    """One of the two."""

    __slots__ = ("_splice", "ended", "other", "transport")

    other: "_End"

    def __init__(self, splice: Splice) -> None:
        self._splice = splice
        self.transport: asyncio.Transport | None = None
        self.ended = False  # nothing more comes from here

    def itself(self) -> "_End":
        """What asyncio wants for a protocol factory."""
        return self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if self.other.transport is None:
            transport.pause_reading()  # there is nowhere to write to yet
        elif self.other.transport.is_closing():
            transport.abort()
        else:
            self.other.transport.resume_reading()

    def get_buffer(self, _: int) -> memoryview:
        return _buffer

    def buffer_updated(self, count: int) -> None:
        if self.other.transport is not None:
            self.other.transport.write(bytes(_buffer[:count]))

    def eof_received(self) -> bool:
        self.ended = True
        if self.other.transport is not None:
            with contextlib.suppress(OSError):
                self.other.transport.write_eof()
        return not self.other.ended  # True: stays open for what the other side still says

    def pause_writing(self) -> None:
        if self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other.transport is not None:
            self.other.transport.resume_reading()

    def connection_lost(self, _: Exception | None) -> None:
        if self.other.transport is not None:
            self.other.transport.close()  # it still writes what it was given
        self._splice.closed_one()
