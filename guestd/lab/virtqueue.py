"""The device's side of one split virtqueue (virtio 1.x, section 2.7), over a guest's memory.

Laws:

1. Everything in the ring is the guest's word. Indices, chains and addresses are checked before use, and
   anything impossible raises `BadRing`: the device is then stopped, never guessed about.
2. A chain is walked once and returned as plain (address, length) pairs. What the guest writes to its
   descriptors afterwards changes nothing.
3. Each chain taken is given back once (`push`) by the caller.

Features are kept to the minimum (no indirect descriptors, no event index): interrupts are always sent
and kicks never suppressed, so no memory barrier between processes is needed for a wake-up.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from guestd.lab.guest_memory import BadGuestAddress, GuestMemory

MAX_CHAIN_BYTES = 1 << 20
"""More than this in one chain is refused, in bytes; virtio-vsock needs 64 KiB and a header."""

_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_DESCRIPTOR = struct.Struct("<QIHH")
_U16 = struct.Struct("<H")
_USED = struct.Struct("<II")


class BadRing(Exception):
    """The guest's ring is impossible."""


@dataclass(frozen=True)
class Chain:
    """One descriptor chain: `readable` was written by the guest, `writable` is for the device."""

    head: int
    readable: tuple[tuple[int, int], ...]
    writable: tuple[tuple[int, int], ...]

    @property
    def readable_bytes(self) -> int:
        """Bytes that the guest offers to read."""
        return sum(length for _, length in self.readable)

    @property
    def writable_bytes(self) -> int:
        """Bytes that the device may write."""
        return sum(length for _, length in self.writable)


class VirtQueue:
    """One split ring.

    :param size: Number of descriptors, a power of two up to 32,768.
    :param descriptors: Guest-physical address of the descriptor table; likewise `available` and `used`.
    :param base: Where in the available ring to begin (an index modulo 65,536).
    :raise BadRing: When the size is not allowed or a part is outside guest memory.
    """

    def __init__(
        self, memory: GuestMemory, size: int, descriptors: int, available: int, used: int, base: int = 0
    ) -> None:
        if not 0 < size <= 32768 or size & (size - 1):
            raise BadRing(f"ring size {size} is not a power of two up to 32768")
        self._memory = memory
        self._size = size
        self._descriptors = descriptors
        self._available = available
        self._used = used
        self.last_available = base & 0xFFFF
        try:
            memory.read(descriptors, 16 * size)
            memory.read(available, 4 + 2 * size)
            self._used_index = _U16.unpack(memory.read(used, 4 + 8 * size)[2:4])[0]
        except BadGuestAddress as error:
            raise BadRing(f"ring outside guest memory: {error}") from error

    def pop(self) -> Chain | None:
        """Take the next chain, or None when the guest has offered no more.

        :raise BadRing: When the ring or the chain is impossible.
        """
        try:
            index: int = _U16.unpack(self._memory.read(self._available + 2, 2))[0]
            offered = (index - self.last_available) & 0xFFFF
            if not offered:
                return None
            if offered > self._size:
                raise BadRing(f"{offered} chains offered in a ring of {self._size}")
            slot = self._available + 4 + 2 * (self.last_available % self._size)
            chain = self._walk(_U16.unpack(self._memory.read(slot, 2))[0])
        except BadGuestAddress as error:
            raise BadRing(str(error)) from error
        self.last_available = (self.last_available + 1) & 0xFFFF
        return chain

    def unpop(self) -> None:
        """Undo the last `pop`: its chain stays offered. Only before it was pushed."""
        self.last_available = (self.last_available - 1) & 0xFFFF

    def push(self, chain: Chain, written: int = 0) -> None:
        """Give a chain back, with the number of bytes written into it.

        :raise BadRing: When the used ring has left guest memory.
        """
        try:
            slot = self._used + 4 + 8 * (self._used_index % self._size)
            self._memory.write(slot, _USED.pack(chain.head, written))
            self._used_index = (self._used_index + 1) & 0xFFFF
            self._memory.write(self._used + 2, _U16.pack(self._used_index))
        except BadGuestAddress as error:
            raise BadRing(str(error)) from error

    def read(self, chain: Chain, limit: int) -> bytes:
        """Up to `limit` bytes of what the guest put into a chain.

        :raise BadRing: When a buffer is outside guest memory.
        """
        parts = []
        try:
            for address, length in chain.readable:
                if limit <= 0:
                    break
                parts.append(self._memory.read(address, min(length, limit)))
                limit -= length
        except BadGuestAddress as error:
            raise BadRing(str(error)) from error
        return b"".join(parts)

    def write(self, chain: Chain, data: bytes) -> None:
        """Fill the writable part of a chain; `data` must fit.

        :raise BadRing: When a buffer is outside guest memory.
        """
        try:
            for address, length in chain.writable:
                if not data:
                    return
                self._memory.write(address, data[:length])
                data = data[length:]
        except BadGuestAddress as error:
            raise BadRing(str(error)) from error
        if data:
            raise ValueError("the chain is too short for this packet")

    def _walk(self, head: int) -> Chain:
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        index, total = head, 0
        for _ in range(self._size):
            if index >= self._size:
                raise BadRing(f"descriptor {index} in a ring of {self._size}")
            raw = self._memory.read(self._descriptors + 16 * index, 16)
            address, length, flags, following = _DESCRIPTOR.unpack(raw)
            if flags & _INDIRECT:
                raise BadRing("an indirect descriptor, which was not negotiated")
            if not flags & _WRITE and writable:
                raise BadRing("a readable descriptor after a writable one")
            total += length
            if total > MAX_CHAIN_BYTES:
                raise BadRing(f"a chain of more than {MAX_CHAIN_BYTES} bytes")
            (writable if flags & _WRITE else readable).append((address, length))
            if not flags & _NEXT:
                return Chain(head, tuple(readable), tuple(writable))
            index = following
        raise BadRing("a chain that never ends")
