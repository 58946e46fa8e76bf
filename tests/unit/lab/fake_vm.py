"""A guest made of one memfd and two rings, and the QEMU in front of it: what the vsock device sees of a VM."""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
import struct
from pathlib import Path

import pytest

from guestd.lab.guest_memory import Region
from guestd.lab.vhost_user import Request
from guestd.lab.vsock_device import RX, TX
from guestd.lab.vsock_packet import HEADER_BYTES, HOST_CID, TYPE_STREAM, Header, Op, decode

GUEST_CID = 7
MEMORY_BYTES = 1 << 20
BASE = 0x10000000
USER_BASE = 0x7F0000000000
RING_SIZE = 16
BUFFER_BYTES = 4096

_RING_BYTES = 0x1000
_BUFFERS = 0x10000


class FakeRing:
    """The driver's side of one split ring in the fake guest's memory."""

    def __init__(self, memory: mmap.mmap, number: int) -> None:
        self.memory = memory
        self.offset = number * 4 * _RING_BYTES
        self.buffers = _BUFFERS + number * RING_SIZE * 2 * BUFFER_BYTES
        self.available_index = 0
        self.used_seen = 0

    @property
    def addresses(self) -> tuple[int, int, int]:
        return tuple(USER_BASE + self.offset + part * _RING_BYTES for part in range(3))  # type: ignore[return-value]

    def describe(self, index: int, address: int, length: int, flags: int = 0, following: int = 0) -> None:
        struct.pack_into("<QIHH", self.memory, self.offset + 16 * index, address, length, flags, following)

    def offer(self, head: int) -> None:
        at = self.offset + _RING_BYTES
        struct.pack_into("<H", self.memory, at + 4 + 2 * (self.available_index % RING_SIZE), head)
        self.available_index = (self.available_index + 1) & 0xFFFF
        struct.pack_into("<H", self.memory, at + 2, self.available_index)

    def used(self) -> list[tuple[int, int]]:
        """(head, written) that the device has given back since the last call."""
        at = self.offset + 2 * _RING_BYTES
        (index,) = struct.unpack_from("<H", self.memory, at + 2)
        entries = []
        while self.used_seen != index:
            entries.append(struct.unpack_from("<II", self.memory, at + 4 + 8 * (self.used_seen % RING_SIZE)))
            self.used_seen = (self.used_seen + 1) & 0xFFFF
        return entries


class FakeGuest:
    """Speaks vhost-user as QEMU does, and virtio as a guest's driver does."""

    def __init__(self) -> None:
        self.memfd = os.memfd_create("guest")
        os.ftruncate(self.memfd, MEMORY_BYTES)
        self.memory = mmap.mmap(self.memfd, MEMORY_BYTES)
        self.rings = (FakeRing(self.memory, RX), FakeRing(self.memory, TX))
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)]
        self.calls = [os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)]
        self.frontend = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.frontend.setblocking(False)
        self.forwarded = 0
        self._sent = 0
        self._arrived: list[bytes] = []

    @property
    def region(self) -> Region:
        return Region(BASE, MEMORY_BYTES, USER_BASE, 0)

    def close(self) -> None:
        for descriptor in (self.memfd, *self.kicks, *self.calls):
            os.close(descriptor)
        self.frontend.close()
        self.memory.close()

    async def ask(
        self, request: Request, body: bytes = b"", descriptors: tuple[int, ...] = (), ack: bool = True
    ) -> bytes:
        """One vhost-user message and its answer."""
        flags = 0x1 | (0x8 if ack else 0)
        socket.send_fds(self.frontend, [struct.pack("<III", request, flags, len(body)) + body], list(descriptors))
        loop = asyncio.get_running_loop()
        head = await asyncio.wait_for(loop.sock_recv(self.frontend, 12), 5)
        if not head:
            raise ConnectionError("the backend hung up")
        return await loop.sock_recv(self.frontend, struct.unpack("<III", head)[2])

    async def connect(self, path: Path) -> None:
        await asyncio.get_running_loop().sock_connect(self.frontend, str(path))
        await self.ask(Request.SET_OWNER)
        region = struct.pack("<QQQQQ", 0, *(BASE, MEMORY_BYTES, USER_BASE, 0))
        assert await self.ask(Request.ADD_MEM_REG, region, (self.memfd,)) == bytes(8)

    async def start(self, base: int = 0) -> None:
        """Start both rings, with every receive buffer offered at base 0."""
        for number, ring in enumerate(self.rings):
            descriptors, available, used = ring.addresses
            await self.ask(Request.SET_VRING_NUM, struct.pack("<II", number, RING_SIZE))
            await self.ask(Request.SET_VRING_BASE, struct.pack("<II", number, base))
            await self.ask(Request.SET_VRING_ADDR, struct.pack("<IIQQQQ", number, 0, descriptors, used, available, 0))
            await self.ask(Request.SET_VRING_CALL, struct.pack("<Q", number), (self.calls[number],))
            await self.ask(Request.SET_VRING_KICK, struct.pack("<Q", number), (self.kicks[number],))
            await self.ask(Request.SET_VRING_ENABLE, struct.pack("<II", number, 1))
        for head in range(RING_SIZE if base == 0 else 0):
            self.offer_buffer(head)
        self.kick(RX)

    async def stop(self) -> list[int]:
        """Stop both rings; where the device had read to."""
        answers = [await self.ask(Request.GET_VRING_BASE, struct.pack("<II", n, 0), ack=False) for n in (RX, TX)]
        return [struct.unpack("<II", answer)[1] for answer in answers]

    def kick(self, number: int) -> None:
        os.eventfd_write(self.kicks[number], 1)

    def offer_buffer(self, head: int) -> None:
        ring = self.rings[RX]
        ring.describe(head, BASE + ring.buffers + head * BUFFER_BYTES, BUFFER_BYTES, flags=2)
        ring.offer(head)

    def put(self, data: bytes) -> None:
        """Offer raw bytes in the transmit ring and kick."""
        ring = self.rings[TX]
        ring.used()
        slot = self._sent % RING_SIZE
        self._sent += 1
        at = ring.buffers + slot * 2 * BUFFER_BYTES
        assert len(data) <= 2 * BUFFER_BYTES
        self.memory[at : at + len(data)] = data
        ring.describe(slot, BASE + at, len(data))
        ring.offer(slot)
        self.kick(TX)

    def send(
        self,
        operation: int,
        source: int,
        destination: int,
        payload: bytes = b"",
        *,
        flags: int = 0,
        credit: int = 65536,
        cid: int = GUEST_CID,
    ) -> None:
        """Send one packet of a stream."""
        header = Header(
            cid, HOST_CID, source, destination, len(payload), TYPE_STREAM, operation, flags, credit, self.forwarded
        )
        self.put(header.encode() + payload)

    async def receive(self, timeout_seconds: float = 5.0) -> tuple[Header, bytes]:
        """The next packet from the device; its buffer is offered again."""
        async with asyncio.timeout(timeout_seconds):
            while not self._arrived:
                ring = self.rings[RX]
                for head, written in ring.used():
                    at = ring.buffers + head * BUFFER_BYTES
                    self._arrived.append(self.memory[at : at + written])
                    self.offer_buffer(head)
                    self.kick(RX)
                if not self._arrived:
                    await asyncio.sleep(0.001)
        data = self._arrived.pop(0)
        return decode(data), data[HEADER_BYTES:]

    async def expect(self, operation: Op) -> tuple[Header, bytes]:
        """The next packet that is not about credit, which must be this one."""
        while True:
            header, payload = await self.receive()
            if header.operation not in {Op.CREDIT_UPDATE, Op.CREDIT_REQUEST} or operation == header.operation:
                assert header.operation == operation, header
                return header, payload

    async def nothing(self) -> None:
        """Assert that the device says nothing for a while."""
        with pytest.raises(TimeoutError):
            await self.receive(0.05)
