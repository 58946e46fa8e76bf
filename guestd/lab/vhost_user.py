"""The backend's end of the vhost-user protocol, as far as a two-queue device without migration needs it.

QEMU (the frontend) connects to a unix socket, hands over its guest's RAM and rings as file descriptors,
and from then on only changes of those pass here; packets go through shared memory. The frontend is
trusted (it is the hypervisor of this very VM), its guest is not.

https://qemu-project.gitlab.io/qemu/interop/vhost-user.html
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from enum import IntEnum
from typing import Protocol

from guestd.lab.guest_memory import Region

log = logging.getLogger(__name__)

VIRTIO_F_VERSION_1 = 1 << 32
VHOST_USER_F_PROTOCOL_FEATURES = 1 << 30
PROTOCOL_F_REPLY_ACK = 1 << 3
PROTOCOL_F_CONFIG = 1 << 9
PROTOCOL_F_CONFIGURE_MEM_SLOTS = 1 << 15
MAX_MEMORY_SLOTS = 32

_VERSION, _REPLY, _NEED_REPLY = 0x1, 0x4, 0x8
_MAX_BODY_BYTES = 4096
_MAX_DESCRIPTORS = 8
_HEADER = struct.Struct("<III")
_U64 = struct.Struct("<Q")
_STATE = struct.Struct("<II")
_ADDRESSES = struct.Struct("<IIQQQQ")
_REGION = struct.Struct("<QQQQ")
_CONFIG = struct.Struct("<III")
_NO_DESCRIPTOR = 1 << 8


class Request(IntEnum):
    """Message numbers of the protocol."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38


class Backend(Protocol):
    """What the device does for each message. `ValueError` and `OSError` refuse it, where it can be refused."""

    def device_config(self) -> bytes:
        """The device's configuration space."""

    def set_memory(self, table: list[tuple[Region, int]]) -> None:
        """Replace all regions. The descriptors are closed by the caller."""

    def add_memory(self, region: Region, descriptor: int) -> None:
        """Map one more region. The descriptor is closed by the caller."""

    def remove_memory(self, guest_address: int, size: int) -> None:
        """Unmap one region; it is not touched afterwards."""

    def set_ring_size(self, index: int, size: int) -> None:
        """The number of descriptors in a ring."""

    def set_ring_addresses(self, index: int, descriptors: int, available: int, used: int) -> None:
        """Where a ring is, in the frontend's own addresses."""

    def set_ring_base(self, index: int, base: int) -> None:
        """Where in the available ring to begin."""

    def set_ring_kick(self, index: int, descriptor: int | None) -> None:
        """The eventfd the guest rings; the backend owns it now. The ring starts."""

    def set_ring_call(self, index: int, descriptor: int | None) -> None:
        """The eventfd that interrupts the guest; the backend owns it now."""

    def enable_ring(self, index: int, enabled: bool) -> None:
        """Whether a started ring may be worked on."""

    def stop_ring(self, index: int) -> int:
        """Stop a ring and return where its available ring was read to."""


class Session:
    """One frontend's connection. `run` returns when it has closed it."""

    def __init__(self, sock: socket.socket, backend: Backend, queues: int) -> None:
        self._sock = sock
        self._backend = backend
        self._queues = queues

    async def run(self) -> None:
        """Serve until the frontend closes the connection.

        :raise ValueError: When it sends something that is not vhost-user.
        """
        while True:
            head, descriptors = await self._receive(_HEADER.size)
            if not head:
                return
            try:
                request, flags, size = _HEADER.unpack(head)
                if flags & 3 != _VERSION or size > _MAX_BODY_BYTES:
                    raise ValueError(f"not a vhost-user message: {head.hex()}")
                body, more = await self._receive(size) if size else (b"", [])
                descriptors += more
                if len(body) != size:
                    return
                reply = self._handle(request, flags, body, descriptors)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
            if reply is not None:
                await self._send(_HEADER.pack(request, _VERSION | _REPLY, len(reply)) + reply)

    def _handle(self, request: int, flags: int, body: bytes, descriptors: list[int]) -> bytes | None:
        """Do one message; descriptors it keeps are taken out of the list."""
        try:
            reply = self._dispatch(request, body, descriptors)
        except (ValueError, OSError, struct.error) as error:
            log.warning("vhost-user request %d refused: %s", request, error)
            if not flags & _NEED_REPLY:
                raise ValueError(f"vhost-user request {request}: {error}") from error
            return _U64.pack(1)
        if reply is None and flags & _NEED_REPLY:
            return _U64.pack(0)
        return reply

    def _dispatch(self, request: int, body: bytes, descriptors: list[int]) -> bytes | None:
        backend = self._backend
        match request:
            case Request.GET_FEATURES:
                return _U64.pack(VIRTIO_F_VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES)
            case Request.GET_PROTOCOL_FEATURES:
                return _U64.pack(PROTOCOL_F_REPLY_ACK | PROTOCOL_F_CONFIG | PROTOCOL_F_CONFIGURE_MEM_SLOTS)
            case Request.GET_QUEUE_NUM:
                return _U64.pack(self._queues)
            case Request.GET_MAX_MEM_SLOTS:
                return _U64.pack(MAX_MEMORY_SLOTS)
            case Request.GET_CONFIG:
                return self._config(body)
            case Request.SET_FEATURES | Request.SET_PROTOCOL_FEATURES | Request.SET_OWNER | Request.RESET_OWNER:
                pass
            case Request.SET_MEM_TABLE:
                backend.set_memory(_memory_table(body, descriptors))
            case Request.ADD_MEM_REG:
                if len(descriptors) != 1:
                    raise ValueError("a memory region without its file")
                backend.add_memory(_region(body, 8), descriptors[0])
            case Request.REM_MEM_REG:
                region = _region(body, 8)
                backend.remove_memory(region.guest_address, region.size)
            case Request.SET_VRING_NUM:
                index, size = self._state(body)
                backend.set_ring_size(index, size)
            case Request.SET_VRING_ADDR:
                index, _flags, descriptor_table, used, available, _log = _ADDRESSES.unpack_from(body)
                backend.set_ring_addresses(self._index(index), descriptor_table, available, used)
            case Request.SET_VRING_BASE:
                index, base = self._state(body)
                backend.set_ring_base(index, base)
            case Request.GET_VRING_BASE:
                index, _ = self._state(body)
                return _STATE.pack(index, backend.stop_ring(index))
            case Request.SET_VRING_KICK:
                index, descriptor = self._ring_descriptor(body, descriptors)
                backend.set_ring_kick(index, descriptor)
            case Request.SET_VRING_CALL:
                index, descriptor = self._ring_descriptor(body, descriptors)
                backend.set_ring_call(index, descriptor)
            case Request.SET_VRING_ERR:
                pass
            case Request.SET_VRING_ENABLE:
                index, enabled = self._state(body)
                backend.enable_ring(index, bool(enabled))
            case _:
                raise ValueError("not supported")
        return None

    def _config(self, body: bytes) -> bytes:
        offset, size, flags = _CONFIG.unpack_from(body)
        config = self._backend.device_config()
        if offset + size > len(config):
            raise ValueError(f"{size} bytes of configuration at {offset}")
        return _CONFIG.pack(offset, size, flags) + config[offset : offset + size]

    def _state(self, body: bytes) -> tuple[int, int]:
        index, number = _STATE.unpack_from(body)
        return self._index(index), number

    def _index(self, index: int) -> int:
        if index >= self._queues:
            raise ValueError(f"no queue {index}")
        return index

    def _ring_descriptor(self, body: bytes, descriptors: list[int]) -> tuple[int, int | None]:
        (value,) = _U64.unpack_from(body)
        index = self._index(value & 0xFF)
        if value & _NO_DESCRIPTOR:
            return index, None
        if not descriptors:
            raise ValueError("an eventfd was announced and not sent")
        return index, descriptors.pop(0)

    async def _receive(self, size: int) -> tuple[bytes, list[int]]:
        """Exactly `size` bytes with the descriptors that came along; fewer at the end of the connection."""
        data = b""
        descriptors: list[int] = []
        while len(data) < size:
            try:
                part, received, _, _ = socket.recv_fds(self._sock, size - len(data), _MAX_DESCRIPTORS)
            except BlockingIOError:
                await _readable(self._sock)
                continue
            except ConnectionResetError:
                part, received = b"", []
            descriptors += received
            if not part:
                break
            data += part
        return data, descriptors

    async def _send(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            await asyncio.get_running_loop().sock_sendall(self._sock, data)


def _memory_table(body: bytes, descriptors: list[int]) -> list[tuple[Region, int]]:
    (count, _) = _STATE.unpack_from(body)
    if count != len(descriptors):
        raise ValueError(f"{count} memory regions with {len(descriptors)} files")
    return [(_region(body, 8 + 32 * index), descriptors[index]) for index in range(count)]


def _region(body: bytes, offset: int) -> Region:
    return Region(*_REGION.unpack_from(body, offset))


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock)
