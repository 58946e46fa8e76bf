"""Two sockets joined: what comes in at one goes out at the other, until both sides have ended.

No task and no buffer per connection, for there are thousands: bytes are read into one buffer that all share and
written on at once. What the other side does not take is kept by its transport, and then reading stops until
it has gone (at most the transport's high-water mark and one read are held). An end of one side is
passed on as such; an error or both ends close both.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable

_CHUNK_BYTES = 64 * 1024
_buffer = memoryview(bytearray(_CHUNK_BYTES))
"""Filled and emptied within one callback: loops of other threads must not use it, and there are none."""


class Splice:
    """A pair of sockets; `join` makes one.

    :param on_closed: called once, when both sockets are closed.
    """

    __slots__ = ("_ends", "_on_closed", "_open")

    def __init__(self, on_closed: Callable[[], None]) -> None:
        self._on_closed, self._open = on_closed, 0
        self._ends = (_End(self), _End(self))
        self._ends[0].other, self._ends[1].other = self._ends[1], self._ends[0]

    def abort(self) -> None:
        """Close both at once; what was not passed on is lost."""
        for end in self._ends:
            if end.transport is not None:
                end.transport.abort()

    async def _join(self, one: socket.socket, other: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            for end, sock in zip(self._ends, (one, other), strict=True):
                end.ready = end is self._ends[1]  # reading begins when both are there
                await loop.connect_accepted_socket(lambda end=end: end, sock)  # type: ignore[misc]  # binds it
        except BaseException:
            self.abort()
            raise
        self._ends[0].begin()

    def _came(self) -> None:
        self._open += 1

    def _went(self) -> None:
        self._open -= 1
        if self._open == 0:
            self._on_closed()
