"""One vsock connection, joined to one unix-socket connection.

Laws:

1. What is in flight towards the guest never exceeds the credit it gave; what a guest sends beyond the
   credit it was given ends its connection.
2. Memory is bounded both ways: `BUFFER_BYTES` towards the host, one read (256 KiB) plus 32 KiB towards
   the guest.
3. A packet is written at the moment it is sent, never queued encoded: credit in it is always the newest.
   (Linux takes any later packet's credit as the truth, so an old one would stall a connection.)
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable
from typing import cast

from guestd.lab.vsock_packet import (
    HEADER_BYTES,
    HOST_CID,
    SHUTDOWN_BOTH,
    SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
    TYPE_STREAM,
    Header,
    Op,
)

BUFFER_BYTES = 256 * 1024
"""Credit given to the guest for each connection, in bytes."""

_RESUME_READING_BELOW = 32 * 1024
_U32 = 0xFFFFFFFF


class Stream(asyncio.Protocol):
    """One connection, from the guest's REQUEST to the RST that ends it.

    :param guest_cid: The guest's CID.
    :param guest_port: Its port; `host_port` is the one it called.
    :param ready: Called when the stream has something to send to the guest.
    :param gone: Called once, when nothing more will be sent or accepted.
    """

    def __init__(
        self,
        guest_cid: int,
        guest_port: int,
        host_port: int,
        ready: Callable[[Stream], None],
        gone: Callable[[Stream], None],
    ) -> None:
        self.guest_port = guest_port
        self.host_port = host_port
        self._guest_cid = guest_cid
        self._ready = ready
        self._gone = gone
        self._transport: asyncio.Transport | None = None
        self._established = False
        self._ended = False
        self._outgoing = bytearray()
        self._sent = 0  # bytes to the guest, modulo 2**32
        self._received = 0  # bytes from the guest, modulo 2**32
        self._credit_told = 0  # the newest `forwarded_bytes` the guest knows
        self._peer_buffer = 0
        self._peer_forwarded = 0
        self._guest_shutdown = 0
        self._owes_response = False
        self._owes_credit = False
        self._owes_shutdown = 0
        self._owes_reset = False
        self._asked_for_credit = False

    # What asyncio tells about the unix socket.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The host's side answered: tell the guest."""
        self._transport = cast(asyncio.Transport, transport)
        if self._ended or self._owes_reset:
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(high=0)
        self._established = True
        self._owes_response = True
        self._ready(self)

    def data_received(self, data: bytes) -> None:
        """Bytes for the guest. One read at a time is kept."""
        if self._ended or self._guest_shutdown & SHUTDOWN_RECEIVE:
            return
        self._outgoing += data
        if self._transport is not None:
            self._transport.pause_reading()
        self._ready(self)

    def eof_received(self) -> bool:
        """The host's side sends no more, or is gone altogether."""
        transport = self._transport
        self._owes_shutdown = SHUTDOWN_BOTH if transport is not None and _hung_up(transport) else SHUTDOWN_SEND
        self._ready(self)
        return True

    def resume_writing(self) -> None:
        """Everything the guest sent has been taken: it may have new credit."""
        self._maybe_owe_credit()

    def connection_lost(self, exc: Exception | None) -> None:
        """The unix socket is gone: RST, after what is still owed to the guest."""
        self._transport = None
        if not self._ended:
            self._owes_reset = True
            self._ready(self)

    # What the guest says.

    def open(self, header: Header) -> None:
        """Take the credit that came with the guest's REQUEST."""
        self._peer_buffer = header.buffer_bytes
        self._peer_forwarded = header.forwarded_bytes

    def on_packet(self, header: Header, payload: bytes) -> None:
        """Handle one packet of this connection. Anything out of order resets it."""
        self._peer_buffer = header.buffer_bytes
        self._peer_forwarded = header.forwarded_bytes
        self._asked_for_credit = False
        match header.operation:
            case Op.RST:
                self.end()
                return
            case Op.RW if self._established:
                self._on_data(payload)
            case Op.SHUTDOWN if self._established:
                self._on_shutdown(header.flags)
            case Op.CREDIT_UPDATE:
                pass
            case Op.CREDIT_REQUEST:
                self._owes_credit = True
            case _:
                self.reset()
        if not self._ended:
            self._ready(self)

    def reset(self) -> None:
        """Refuse or break the connection: RST at once, nothing else."""
        self._outgoing.clear()
        self._owes_reset = True
        self._owes_response = False
        if self._transport is not None:
            self._transport.abort()
        if not self._ended:
            self._ready(self)

    def end(self) -> None:
        """Forget the connection on both sides without telling the guest. May be called again."""
        if self._ended:
            return
        self._ended = True
        self._outgoing.clear()
        if self._transport is not None:
            self._transport.abort()
        self._gone(self)

    def _on_data(self, payload: bytes) -> None:
        transport = self._transport
        if self._guest_shutdown & SHUTDOWN_SEND:
            self.reset()
            return
        if transport is None or not payload:
            return
        if transport.get_write_buffer_size() + len(payload) > BUFFER_BYTES:
            self.reset()  # more than the credit it was given
            return
        self._received = (self._received + len(payload)) & _U32
        transport.write(payload)
        self._maybe_owe_credit()

    def _on_shutdown(self, flags: int) -> None:
        self._guest_shutdown |= flags & SHUTDOWN_BOTH
        transport = self._transport
        if self._guest_shutdown & SHUTDOWN_RECEIVE:
            self._outgoing.clear()
        if transport is None or transport.is_closing():
            return
        if self._guest_shutdown == SHUTDOWN_BOTH:
            transport.close()  # after flushing; connection_lost then owes the RST
        elif self._guest_shutdown & SHUTDOWN_SEND and transport.can_write_eof():
            transport.write_eof()

    def _forwarded(self) -> int:
        buffered = self._transport.get_write_buffer_size() if self._transport is not None else 0
        return (self._received - buffered) & _U32

    def _maybe_owe_credit(self) -> None:
        if (self._forwarded() - self._credit_told) & _U32 >= BUFFER_BYTES // 2:
            self._owes_credit = True
            self._ready(self)

    # What goes to the guest.

    def next_packet(self, limit: int) -> bytes | None:
        """The next packet of at most `limit` bytes with its header, or None when there is nothing to say."""
        if self._ended:
            return None
        if self._owes_response:
            self._owes_response = False
            return self._packet(Op.RESPONSE)
        if self._outgoing:
            in_flight = (self._sent - self._peer_forwarded) & _U32
            size = min(len(self._outgoing), limit - HEADER_BYTES, max(0, self._peer_buffer - in_flight))
            if size > 0:
                return self._data_packet(size)
            if not self._asked_for_credit:
                self._asked_for_credit = True
                return self._packet(Op.CREDIT_REQUEST)
        elif self._owes_reset:
            packet = self._packet(Op.RST)
            self.end()
            return packet
        elif self._owes_shutdown:
            flags, self._owes_shutdown = self._owes_shutdown, 0
            return self._packet(Op.SHUTDOWN, flags=flags)
        if self._owes_credit:
            return self._packet(Op.CREDIT_UPDATE)
        return None

    def _data_packet(self, size: int) -> bytes:
        payload = bytes(self._outgoing[:size])
        del self._outgoing[:size]
        self._sent = (self._sent + size) & _U32
        transport = self._transport
        if transport is not None and not transport.is_closing() and len(self._outgoing) < _RESUME_READING_BELOW:
            transport.resume_reading()
        return self._packet(Op.RW, payload)

    def _packet(self, operation: Op, payload: bytes = b"", flags: int = 0) -> bytes:
        self._credit_told = self._forwarded()
        self._owes_credit = False
        header = Header(
            HOST_CID,
            self._guest_cid,
            self.host_port,
            self.guest_port,
            len(payload),
            TYPE_STREAM,
            operation,
            flags,
            BUFFER_BYTES,
            self._credit_told,
        )
        return header.encode() + payload


def _hung_up(transport: asyncio.Transport) -> bool:
    """Whether the peer of a unix socket has closed it, not only its sending side."""
    sock: socket.socket | None = transport.get_extra_info("socket")
    if sock is None:
        return False
    poll = select.poll()
    poll.register(sock.fileno(), 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))
