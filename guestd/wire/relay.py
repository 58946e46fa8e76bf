"""The host's byte relay between vsock and the gRPC server, because grpcio's wheels are built without vsock.

An `IngressRelay` takes guests' connections from AF_VSOCK or from per-VM unix sockets, finds out from the
transport which VM it is, and connects to the gRPC server from an abstract unix name that `Peers` knows: the
server sees that name as its peer, and nobody else can connect there, because the server's own socket lies in a
directory of mode 0700.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from guestd.model.errors import GuestdError
from guestd.wire.splice import Splice

_log = logging.getLogger(__name__)
_Connect = Callable[[socket.socket], Awaitable[tuple[socket.socket, Callable[[], None]] | None]]
_BACKLOG = 1024
LAST_PRIVILEGED_PORT = 1023
"""LAST_RESERVED_PORT of net/vmw_vsock/af_vsock.c: binding below needs CAP_NET_BIND_SERVICE."""
_SHUN_SECONDS, _SHUN_MAX_SECONDS = 1.0, 60.0
_LAST_WORDS_SECONDS = 0.1
MAX_CONNECTIONS_PER_GUEST = 4


@dataclass(frozen=True, slots=True)
class Peer:
    """Whose connection it is, and how that is known."""

    guest: str
    channel: str


class Peers:
    """Names of the relay's own ends of connections to the gRPC server, while they last."""

    def __init__(self) -> None:
        self._prefix = f"guestd-{os.getpid()}-{secrets.token_hex(8)}"
        self._peers: dict[str, Peer] = {}
        self._next = 0

    def add(self, peer: Peer) -> str:
        """A fresh abstract name (without its leading zero byte) for a connection of that peer."""
        self._next += 1
        name = f"{self._prefix}-{self._next}"
        self._peers[name] = peer
        return name

    def remove(self, name: str) -> None:
        self._peers.pop(name, None)

    def find(self, grpc_peer: str) -> Peer | None:
        """The peer by what gRPC's `context.peer()` says."""
        return self._peers.get(grpc_peer.removeprefix("unix-abstract:"))


class _Listener:
    """Accepts on one socket and splices each connection to what `connect` finds for it; closing ends all of them.

    `connect` returns the other socket and what to call when both are closed; None: the connection is refused.
    """

    def __init__(self, sock: socket.socket, connect: _Connect) -> None:
        self._sock = sock
        self._connect = connect
        self._joining: set[asyncio.Task[None]] = set()
        self._splices: set[Splice] = set()
        self._accepting = asyncio.create_task(self._accept())

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        self._sock.setblocking(False)
        while True:
            try:
                connection, _ = await loop.sock_accept(self._sock)
            except OSError as error:
                _log.warning("cannot accept a connection (%s), trying again in 1 s", error)
                await asyncio.sleep(1)
                continue
            task = asyncio.create_task(self._join(connection))
            self._joining.add(task)
            task.add_done_callback(self._joining.discard)

    async def _join(self, connection: socket.socket) -> None:
        try:
            found = await self._connect(connection)
        except (OSError, GuestdError) as error:
            _log.debug("a connection ended: %s", error)
            connection.close()
        except asyncio.CancelledError:
            connection.close()
            raise
        else:
            if found is None:
                connection.close()
            else:
                self._splice(connection, *found)

    def _splice(self, connection: socket.socket, other: socket.socket, release: Callable[[], None]) -> None:
        def closed() -> None:
            self._splices.discard(splice)
            release()

        splice = Splice(connection, other, closed)
        self._splices.add(splice)

    async def close(self) -> None:
        tasks = [self._accepting, *self._joining]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._sock.close()
        for splice in list(self._splices):
            splice.close()


def unix_listener(path: Path, mode: int = 0o600) -> socket.socket:
    """A listening unix socket at `path`; one that is left over there is replaced.

    :raise OSError: When the path is too long, or its directory is missing or not writable.
    """
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(str(path))
        path.chmod(mode)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"cannot listen on {path}: {error.strerror or error}") from None
    return sock


def vsock_listener(port: int) -> socket.socket:
    """A listening AF_VSOCK socket.

    :raise OSError: When the host has no vsock, or the port is taken.
    """
    sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        sock.bind((socket.VMADDR_CID_ANY, port))
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        sock.shutdown(socket.SHUT_RDWR)


class IngressRelay:
    """The host's relay: guests' connections to the gRPC server's unix socket, each under a name in `peers`."""

    def __init__(self, server_path: Path, peers: Peers) -> None:
        self._server_path = server_path
        self._peers = peers
        self._listeners: dict[str, _Listener] = {}
        self._open: Counter[str] = Counter()
        self._servers: dict[str, set[socket.socket]] = {}  # the servers' side of each guest's connections
        self._shunned: dict[str, tuple[float, float]] = {}  # until when (loop's clock), and for how long

    def shun(self, guest: str) -> float:
        """Close a guest's connections in a moment (its streams may still be told why) and take no new ones for a
        while, longer each time: streams that are opened and refused cost more than those that are kept. The seconds;
        0 when that goes on already.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        until, before = self._shunned.get(guest, (0.0, 0.0))
        if now < until:
            return 0.0
        seconds = min(_SHUN_MAX_SECONDS, 2 * before) if before and now - until < _SHUN_MAX_SECONDS else _SHUN_SECONDS
        self._shunned[guest] = now + seconds, seconds
        for server in self._servers.get(guest, ()):
            loop.call_later(_LAST_WORDS_SECONDS, _hang_up, server)
        return seconds

    def listen_unix(self, guest: str, path: Path, privileged_ports: bool) -> None:
        """Take connections at `path` for that guest: the socket is the identity.

        :param privileged_ports: the device behind the socket lets only ports below 1024 through.
        :raise OSError: When the socket cannot be made.
        """
        channel = "unix" if privileged_ports else "unix, process-unproven"

        async def connect(_: socket.socket) -> tuple[socket.socket, Callable[[], None]] | None:
            return self._connect(peer)

        peer = Peer(guest, channel)
        self._listeners[guest] = _Listener(unix_listener(path), connect)

    def listen_vsock(
        self,
        sock: socket.socket,
        guest_of: Callable[[int], str | None],
        peer_of: Callable[[socket.socket], tuple[int, int]] = socket.socket.getpeername,
    ) -> None:
        """Take connections on an AF_VSOCK socket: the peer's CID is the identity, a port below 1024
        proves that root opened it.

        :param peer_of: CID and port of a connection; simulated guests have them otherwise than from vsock.
        """

        async def connect(connection: socket.socket) -> tuple[socket.socket, Callable[[], None]] | None:
            cid, port = peer_of(connection)
            guest = guest_of(cid)
            if guest is None:
                _log.warning("a connection from vsock CID %d, which is no guest's: closed", cid)
                return None
            if port > LAST_PRIVILEGED_PORT:
                _log.warning("a connection from CID %d port %d, not opened by root in %s: closed", cid, port, guest)
                return None
            return self._connect(Peer(guest, "vsock"))

        self._listeners[""] = _Listener(sock, connect)

    async def stop_listening(self, guest: str) -> None:
        """End the guest's unix listener and its connections."""
        listener = self._listeners.pop(guest, None)
        if listener is not None:
            await listener.close()

    def _connect(self, peer: Peer) -> tuple[socket.socket, Callable[[], None]] | None:
        """A connection to the server under a name that stands for that peer.

        :raise OSError: When the server does not take one more now.
        """
        until, _ = self._shunned.get(peer.guest, (0.0, 0.0))
        if until and asyncio.get_running_loop().time() < until:
            return None
        if self._open[peer.guest] >= MAX_CONNECTIONS_PER_GUEST:
            _log.warning("%s has %d connections open already: closed", peer.guest, MAX_CONNECTIONS_PER_GUEST)
            return None
        name = self._peers.add(peer)
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            server.setblocking(False)
            server.bind(f"\0{name}")
            server.connect(str(self._server_path))  # a unix socket connects at once or not at all
        except OSError:
            server.close()
            self._peers.remove(name)
            raise
        self._open[peer.guest] += 1
        self._servers.setdefault(peer.guest, set()).add(server)

        def release() -> None:
            self._peers.remove(name)
            self._open[peer.guest] -= 1
            self._servers[peer.guest].discard(server)

        return server, release

    async def close(self) -> None:
        for guest in list(self._listeners):
            await self.stop_listening(guest)
