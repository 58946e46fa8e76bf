"""All vsock connections of one guest: packets in, packets out, unix sockets on the other side.

A guest's connection to host port P goes to the unix socket `BASE_P`, as in Firecracker and Cloud
Hypervisor. Laws:

1. A packet counts only when it comes from the guest's own CID and goes to the host's (2).
2. At most `max_streams` connections and `MAX_RESETS` unanswered refusals are held. While the guest takes
   no refusals, `congested` is True and the caller reads no more packets from it.
3. One connection cannot starve another: whoever has sent a packet goes to the end of the line.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable
from pathlib import Path

from guestd.lab.vsock_packet import HOST_CID, MAX_PAYLOAD_BYTES, TYPE_STREAM, Header, Op
from guestd.lab.vsock_stream import Stream

MAX_RESETS = 256
FIRST_UNPRIVILEGED_PORT = 1024

_CONNECT_SECONDS = 2.0
_RETRY_SECONDS = 0.02

log = logging.getLogger(__name__)


class VsockMux:
    """The connections of one guest.

    :param guest_cid: The CID the guest was given, 3 or more.
    :param base_path: Host port P is the unix socket with this path, an underscore and P.
    :param require_privileged_port: Refuse connections from ports of 1024 and more: only root in the
        guest can open lower ones, so a connection then speaks for the VM and not for some process in it.
    :param max_streams: Connections held at once; more are refused.
    :param output: Called when `next_packet` has something again.
    """

    def __init__(
        self,
        guest_cid: int,
        base_path: Path,
        *,
        require_privileged_port: bool,
        max_streams: int,
        output: Callable[[], None],
    ) -> None:
        self._guest_cid = guest_cid
        self._base_path = base_path
        self._require_privileged_port = require_privileged_port
        self._max_streams = max_streams
        self._output = output
        self._streams: dict[tuple[int, int], Stream] = {}
        self._ready: dict[Stream, None] = {}
        self._resets: deque[Header] = deque()
        self._connecting: set[asyncio.Task[None]] = set()
        self.dropped_packets = 0
        self.refused_connections = 0

    @property
    def stream_count(self) -> int:
        """Connections held now."""
        return len(self._streams)

    @property
    def congested(self) -> bool:
        """Whether the guest must take refusals before more packets from it are read."""
        return len(self._resets) >= MAX_RESETS

    def on_packet(self, header: Header, payload: bytes) -> None:
        """Handle one packet from the guest. Nothing a packet says raises."""
        if (
            header.source_cid != self._guest_cid
            or header.destination_cid != HOST_CID
            or header.length != len(payload)
            or header.length > MAX_PAYLOAD_BYTES
        ):
            self.dropped_packets += 1
            return
        key = (header.source_port, header.destination_port)
        stream = self._streams.get(key)
        if stream is not None and header.type == TYPE_STREAM:
            stream.on_packet(header, payload)
        elif header.type == TYPE_STREAM and header.operation == Op.REQUEST:
            self._on_request(header)
        elif header.operation != Op.RST:
            self._refuse(header)

    def next_packet(self, limit: int) -> bytes | None:
        """The next packet for the guest, at most `limit` bytes with its header, or None."""
        if self._resets:
            return self._resets.popleft().encode()
        while self._ready:
            stream = next(iter(self._ready))
            del self._ready[stream]
            packet = stream.next_packet(limit)
            if packet is not None:
                if self._holds(stream):
                    self._ready[stream] = None
                return packet
        return None

    def close_all(self) -> None:
        """Drop every connection without telling the guest: it was reset, or is gone."""
        for stream in list(self._streams.values()):
            stream.end()
        for task in list(self._connecting):
            task.cancel()
        self._resets.clear()
        self._ready.clear()

    async def stop(self) -> None:
        """Drop every connection and wait until none is being made."""
        self.close_all()
        if self._connecting:
            await asyncio.gather(*self._connecting, return_exceptions=True)

    def _on_request(self, header: Header) -> None:
        privileged = header.source_port < FIRST_UNPRIVILEGED_PORT
        if len(self._streams) >= self._max_streams or (self._require_privileged_port and not privileged):
            self._refuse(header)
            return
        key = (header.source_port, header.destination_port)
        stream = Stream(self._guest_cid, *key, ready=self._on_ready, gone=self._on_gone)
        stream.open(header)
        self._streams[key] = stream
        task = asyncio.get_running_loop().create_task(self._connect(stream))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, stream: Stream) -> None:
        path = f"{self._base_path}_{stream.host_port}"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await _connect_unix(sock, path)
                await loop.create_unix_connection(lambda: stream, sock=sock)
        except OSError as error:  # TimeoutError is one too
            sock.close()
            self.refused_connections += 1
            log.debug("guest %d: nobody at %s: %r", self._guest_cid, path, error)
            stream.reset()
        except asyncio.CancelledError:
            sock.close()
            raise

    def _refuse(self, header: Header) -> None:
        self.refused_connections += header.operation == Op.REQUEST
        self._resets.append(
            Header(
                HOST_CID,
                self._guest_cid,
                header.destination_port,
                header.source_port,
                0,
                header.type,
                Op.RST,
                0,
                0,
                0,
            )
        )
        self._output()

    def _on_ready(self, stream: Stream) -> None:
        if self._holds(stream):
            self._ready[stream] = None
            self._output()

    def _on_gone(self, stream: Stream) -> None:
        self._ready.pop(stream, None)
        if self._holds(stream):
            del self._streams[(stream.guest_port, stream.host_port)]

    def _holds(self, stream: Stream) -> bool:
        return self._streams.get((stream.guest_port, stream.host_port)) is stream


async def _connect_unix(sock: socket.socket, path: str) -> None:
    """Connect a non-blocking unix socket. A full backlog is EAGAIN there, which asyncio takes for success."""
    while True:
        try:
            sock.connect(path)
        except BlockingIOError:
            await asyncio.sleep(_RETRY_SECONDS)
        else:
            return
