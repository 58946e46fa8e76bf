"""A virtio-vsock device in user space, for one VM: vhost-user on one side, unix sockets on the other.

Works on machines without /dev/vhost-vsock and without any AF_VSOCK of their own. Laws:

1. Packets are moved only while both rings run. A pause of the VM stops and restarts them, and the
   connections live on; a reset restarts them from 0, and every connection is dropped.
2. A ring that makes no sense stops the device for good (until the VM is reset or started again), with
   one warning that says why. No other VM is touched.
3. A turn of the event loop moves at most `BURST` packets each way, so one busy guest cannot hold up the rest.

Weak spot: a guest that resets itself is noticed when its driver comes up again; `drop_connections` is for
those who know earlier.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from guestd.lab.guest_memory import BadGuestAddress, GuestMemory, Region
from guestd.lab.vhost_user import Session
from guestd.lab.virtqueue import BadRing, VirtQueue
from guestd.lab.vsock_mux import VsockMux
from guestd.lab.vsock_packet import HEADER_BYTES, MAX_PAYLOAD_BYTES, decode

RX, TX = 0, 1
"""Queue numbers, named from the guest: it receives on 0 and sends on 1."""

BURST = 64

log = logging.getLogger(__name__)


@dataclass
class _Ring:
    """What the frontend has said about one ring, and the ring itself while it runs."""

    size: int = 0
    descriptors: int = 0
    available: int = 0
    used: int = 0
    base: int = 0
    kick: int | None = None
    call: int | None = None
    enabled: bool = True
    queue: VirtQueue | None = None


class VsockDevice:
    """The vsock device of one VM.

    :param socket_path: The unix socket QEMU connects to; made by `start`, removed by `stop`.
    :param guest_cid: The guest's CID, 3 or more.
    :param base_path: A guest's connection to host port P goes to the unix socket `{base_path}_P`.
    :param require_privileged_port: Refuse guest ports of 1024 and more.
    :param max_streams: Connections at once; each may hold about 0.5 MiB.
    """

    def __init__(
        self,
        socket_path: Path,
        guest_cid: int,
        base_path: Path,
        *,
        require_privileged_port: bool = False,
        max_streams: int = 256,
    ) -> None:
        if guest_cid < 3:
            raise ValueError(f"guest CID {guest_cid}: 0 to 2 are reserved")
        self._socket_path = socket_path
        self._guest_cid = guest_cid
        self._memory = GuestMemory()
        self._rings = (_Ring(), _Ring())
        self._mux = VsockMux(
            guest_cid,
            base_path,
            require_privileged_port=require_privileged_port,
            max_streams=max_streams,
            output=self._wake,
        )
        self._serving: asyncio.Task[None] | None = None
        self._listener: socket.socket | None = None
        self._wakeup: asyncio.Handle | None = None
        self.fault: str | None = None

    @property
    def mux(self) -> VsockMux:
        """The connections, for counters."""
        return self._mux

    async def start(self) -> None:
        """Listen for QEMU.

        :raise OSError: When the socket cannot be made.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listener.bind(str(self._socket_path))
            listener.listen(1)
        except OSError:
            listener.close()
            raise
        self._listener = listener
        self._serving = asyncio.get_running_loop().create_task(self._serve(listener))

    async def stop(self) -> None:
        """Drop everything. May be called again, and without `start`."""
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
            self._serving = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            self._socket_path.unlink(missing_ok=True)
        await self._mux.stop()
        self._forget_frontend()

    def drop_connections(self) -> None:
        """End every connection, as when the VM was reset."""
        self._mux.close_all()

    async def _serve(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listener)
            connection.setblocking(False)
            try:
                await Session(connection, self, queues=len(self._rings)).run()
            except ValueError as error:
                self._fail(f"QEMU: {error}")
            finally:
                connection.close()
                self._mux.close_all()
                self._forget_frontend()

    def _forget_frontend(self) -> None:
        for index in (RX, TX):
            self.stop_ring(index)
            self.set_ring_call(index, None)
        self._rings = (_Ring(), _Ring())
        self._memory.close()
        self.fault = None
        if self._wakeup is not None:
            self._wakeup.cancel()
            self._wakeup = None

    # What the frontend says (vhost_user.Backend).

    def device_config(self) -> bytes:
        """The guest's CID, 8 bytes."""
        return struct.pack("<Q", self._guest_cid)

    def set_memory(self, table: list[tuple[Region, int]]) -> None:
        """Replace all regions."""
        self._memory.replace(table)

    def add_memory(self, region: Region, descriptor: int) -> None:
        """Map one more region."""
        self._memory.add(region, descriptor)

    def remove_memory(self, guest_address: int, size: int) -> None:
        """Unmap one region."""
        self._memory.remove(guest_address, size)

    def set_ring_size(self, index: int, size: int) -> None:
        """Number of descriptors."""
        self._rings[index].size = size

    def set_ring_addresses(self, index: int, descriptors: int, available: int, used: int) -> None:
        """Where the ring is, in QEMU's own addresses."""
        ring = self._rings[index]
        ring.descriptors, ring.available, ring.used = descriptors, available, used

    def set_ring_base(self, index: int, base: int) -> None:
        """Where to begin. 0 after something else means that the VM was reset."""
        ring = self._rings[index]
        if base == 0 and ring.base != 0:
            self.fault = None
            self._mux.close_all()
        ring.base = base

    def set_ring_kick(self, index: int, descriptor: int | None) -> None:
        """Start the ring."""
        ring = self._rings[index]
        self._close_kick(ring)
        ring.kick = descriptor
        try:
            guest_address_of = self._memory.guest_address_of
            ring.queue = VirtQueue(
                self._memory,
                ring.size,
                guest_address_of(ring.descriptors),
                guest_address_of(ring.available),
                guest_address_of(ring.used),
                ring.base,
            )
        except (BadRing, BadGuestAddress) as error:
            self._fail(str(error))
            return
        if descriptor is not None:
            os.set_blocking(descriptor, False)
            asyncio.get_running_loop().add_reader(descriptor, self._on_kick, descriptor)
        self._wake()

    def set_ring_call(self, index: int, descriptor: int | None) -> None:
        """The guest's interrupt."""
        ring = self._rings[index]
        if ring.call is not None:
            os.close(ring.call)
        ring.call = descriptor
        if descriptor is not None:
            os.set_blocking(descriptor, False)

    def enable_ring(self, index: int, enabled: bool) -> None:
        """Whether the ring may be worked on."""
        self._rings[index].enabled = enabled
        self._wake()

    def stop_ring(self, index: int) -> int:
        """Stop the ring and say how far it was read."""
        ring = self._rings[index]
        self._close_kick(ring)
        if ring.queue is not None:
            ring.base = ring.queue.last_available
            ring.queue = None
        return ring.base

    def _close_kick(self, ring: _Ring) -> None:
        if ring.kick is not None:
            asyncio.get_running_loop().remove_reader(ring.kick)
            os.close(ring.kick)
            ring.kick = None

    # Moving packets.

    def _on_kick(self, descriptor: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(descriptor, 8)
        self._work()

    def _wake(self) -> None:
        if self._wakeup is None:
            self._wakeup = asyncio.get_running_loop().call_soon(self._on_wakeup)

    def _on_wakeup(self) -> None:
        self._wakeup = None
        self._work()

    def _work(self) -> None:
        rx, tx = self._rings
        if rx.queue is None or tx.queue is None or not rx.enabled or not tx.enabled or self.fault is not None:
            return
        try:
            taken = self._take_packets(tx, tx.queue)
            held_back = self._mux.congested
            given = self._give_packets(rx, rx.queue)
        except BadRing as error:
            self._fail(str(error))
            return
        if BURST in (taken, given) or (held_back and given):
            self._wake()

    def _take_packets(self, ring: _Ring, queue: VirtQueue) -> int:
        """Read packets from the guest and return how many, at most BURST."""
        taken = 0
        while taken < BURST and not self._mux.congested:
            chain = queue.pop()
            if chain is None:
                break
            taken += 1
            data = queue.read(chain, HEADER_BYTES + MAX_PAYLOAD_BYTES)
            queue.push(chain)
            if len(data) < HEADER_BYTES:
                self._mux.dropped_packets += 1
                continue
            header = decode(data)
            self._mux.on_packet(header, data[HEADER_BYTES : HEADER_BYTES + header.length])
        if taken:
            _notify(ring.call)
        return taken

    def _give_packets(self, ring: _Ring, queue: VirtQueue) -> int:
        """Write packets into the guest's buffers and return how many, at most BURST."""
        given = 0
        while given < BURST:
            chain = queue.pop()
            if chain is None:
                break
            room = min(chain.writable_bytes, HEADER_BYTES + MAX_PAYLOAD_BYTES)
            if room <= HEADER_BYTES:
                raise BadRing(f"a receive buffer of {room} bytes")
            packet = self._mux.next_packet(room)
            if packet is None:
                queue.unpop()
                break
            queue.write(chain, packet)
            queue.push(chain, len(packet))
            given += 1
        if given:
            _notify(ring.call)
        return given

    def _fail(self, reason: str) -> None:
        if self.fault is None:
            self.fault = reason
            log.warning("vsock device of CID %d stopped: %s", self._guest_cid, reason)
            self._mux.close_all()


def _notify(call: int | None) -> None:
    if call is not None:
        with contextlib.suppress(BlockingIOError):  # the counter is full: an interrupt is pending anyway
            os.write(call, b"\1\0\0\0\0\0\0\0")
