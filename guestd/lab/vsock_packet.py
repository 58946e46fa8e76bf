"""The 44-byte header of a virtio-vsock packet (virtio 1.x, section 5.10.6)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

HOST_CID = 2
HEADER_BYTES = 44
MAX_PAYLOAD_BYTES = 64 * 1024
TYPE_STREAM = 1
SHUTDOWN_RECEIVE = 1
SHUTDOWN_SEND = 2
SHUTDOWN_BOTH = 3

_HEADER = struct.Struct("<QQIIIHHIII")


class Op(IntEnum):
    """What a packet does."""

    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


@dataclass(frozen=True)
class Header:
    """One packet's header. Ports, credits and lengths as on the wire, unsigned 32 bit.

    :param operation: One of `Op`, or a number nobody knows (a guest may send anything).
    :param length: Payload bytes that follow.
    :param buffer_bytes: The sender's receive buffer.
    :param forwarded_bytes: What the sender's application has taken out of it so far, modulo 2**32.
    """

    source_cid: int
    destination_cid: int
    source_port: int
    destination_port: int
    length: int
    type: int
    operation: int
    flags: int
    buffer_bytes: int
    forwarded_bytes: int

    def encode(self) -> bytes:
        """The header as it goes into guest memory."""
        return _HEADER.pack(
            self.source_cid,
            self.destination_cid,
            self.source_port,
            self.destination_port,
            self.length,
            self.type,
            self.operation,
            self.flags,
            self.buffer_bytes,
            self.forwarded_bytes,
        )


def decode(data: bytes) -> Header:
    """Read a header from the first 44 bytes.

    :raise ValueError: When there are fewer.
    """
    if len(data) < HEADER_BYTES:
        raise ValueError(f"a packet of {len(data)} bytes has no whole header")
    return Header(*_HEADER.unpack_from(data))
