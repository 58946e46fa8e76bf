"""The guests' service: one stream per guest, behind the relay.

Towards guests the server's limits are set on purpose: gRPC's defaults are for friends.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NoReturn, Protocol

import grpc
import grpc.aio

from guestd.model.errors import FloodError, NotFoundError, ProtocolError, SupersededError, VersionError
from guestd.model.messages import BrokerMessage, GuestMessage, Hello
from guestd.v1 import guest_pb2
from guestd.wire import amounts, convert
from guestd.wire.relay import Peer, Peers
from guestd.wire.server import listen_unix

_HELLO_SECONDS = 10.0

_HARD_LIMIT_BYTES = 4 * amounts.MAX_MESSAGE_BYTES
"""Above this gRPC itself ends the stream, where it is not counted; between the two the servicer does."""

GUEST_SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", _HARD_LIMIT_BYTES),
    ("grpc.max_metadata_size", 8 * 1024),
    ("grpc.absolute_max_metadata_size", 8 * 1024),
    ("grpc.max_concurrent_streams", 2),
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # gRPC's default is 5 minutes
    ("grpc.http2.max_ping_strikes", 5),
    ("grpc.http2.bdp_probe", 0),  # a ping for each message, to find a window that short messages never fill
    ("grpc.so_reuseport", 0),
)


class Outbox(Protocol):
    """What is to be sent on one guest's stream."""

    async def next(self) -> BrokerMessage:
        """The next message.

        :raise ProtocolError: When the stream is to end, with the reason.
        """
        ...

    def end(self, error: ProtocolError) -> None:
        """Have `next` raise that."""
        ...


class GuestBackend(Protocol):
    """What the guest service needs of the broker."""

    def connect(self, peer: Peer, hello: Hello) -> tuple[int, Outbox]:
        """Begin a session.

        :raise NotFoundError: When no guest has that name.
        :raise ProtocolError: When the guest cannot be served.
        """
        ...

    def receive(self, peer: Peer, session: int, message: GuestMessage) -> None:
        """Take a message.

        :raise ProtocolError: When it makes no sense now, or is one too many.
        """
        ...

    def disconnect(self, peer: Peer, session: int) -> None:
        """The stream is gone."""
        ...

    def count_protocol_error(self, peer: Peer) -> None:
        """A message of that guest made no sense."""
        ...


_CODES: tuple[tuple[type[ProtocolError], grpc.StatusCode], ...] = (
    (VersionError, grpc.StatusCode.FAILED_PRECONDITION),
    (FloodError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (SupersededError, grpc.StatusCode.ABORTED),
    (ProtocolError, grpc.StatusCode.INVALID_ARGUMENT),
)
_Context = grpc.aio.ServicerContext[bytes, guest_pb2.NegotiateResponse]


class GuestServicer:
    """One stream per guest; whose it is comes from the relay, never from a message.

    Requests come as bytes: what cannot be decoded is to be answered and counted like any other nonsense.
    """

    def __init__(self, backend: GuestBackend, peers: Peers) -> None:
        self._backend = backend
        self._peers = peers

    def handler(self) -> grpc.GenericRpcHandler:
        """What a server is to be given."""
        service = guest_pb2.DESCRIPTOR.services_by_name["GuestService"].full_name
        negotiate: grpc.RpcMethodHandler[bytes, guest_pb2.NegotiateResponse] = grpc.stream_stream_rpc_method_handler(
            self.negotiate, None, guest_pb2.NegotiateResponse.SerializeToString
        )
        return grpc.method_handlers_generic_handler(service, {"Negotiate": negotiate})

    async def negotiate(self, _: AsyncIterator[bytes], context: _Context) -> None:
        """See guest.proto. No generator: gRPC drops one that is cancelled, and its clean-up waits for the
        garbage collector.
        """
        peer = self._peers.find(context.peer())
        if peer is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this connection is no guest's")
        try:
            hello = await self._hello(context)
            session, outbox = self._backend.connect(peer, hello)
        except NotFoundError as problem:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(problem))
        except ProtocolError as problem:
            await self._refuse(peer, context, problem)
        receiving = asyncio.create_task(self._receive(peer, session, context))
        receiving.add_done_callback(lambda _: outbox.end(ProtocolError("the guest's side has ended")))
        try:
            # A write is never cancelled: gRPC could not send a status before it is through.
            while True:
                await context.write(convert.broker_message_to_wire(await outbox.next()))
        except ProtocolError as problem:
            error = receiving.exception() if receiving.done() and not receiving.cancelled() else problem
            if isinstance(error, ProtocolError):
                await self._refuse(peer, context, error)
            elif error is not None:
                raise error from None
        finally:
            receiving.cancel()
            self._backend.disconnect(peer, session)
            await asyncio.gather(receiving, return_exceptions=True)

    async def _hello(self, context: _Context) -> Hello:
        try:
            async with asyncio.timeout(_HELLO_SECONDS):
                first = await _read(context)
        except TimeoutError:
            raise ProtocolError(f"no hello within {_HELLO_SECONDS:g} s") from None
        message = None if first is None else convert.guest_message_from_bytes(first)
        if not isinstance(message, Hello):
            raise ProtocolError("the first message must be hello")
        return message

    async def _refuse(self, peer: Peer, context: _Context, error: ProtocolError) -> NoReturn:
        if not isinstance(error, SupersededError):
            self._backend.count_protocol_error(peer)
        code = next(code for kind, code in _CODES if isinstance(error, kind))
        await context.abort(code, str(error)[:200])
        raise AssertionError("abort returns never")

    async def _receive(self, peer: Peer, session: int, context: _Context) -> None:
        """Until the guest's side of the stream ends."""
        while (request := await _read(context)) is not None:
            message = convert.guest_message_from_bytes(request)
            if isinstance(message, Hello):
                raise ProtocolError("hello comes once")
            self._backend.receive(peer, session, message)


async def _read(context: _Context) -> bytes | None:
    """The guest's next message; None when its side of the stream has ended."""
    raw: object = await context.read()
    return raw if isinstance(raw, bytes) else None


async def serve_guests(backend: GuestBackend, peers: Peers, path: Path) -> grpc.aio.Server:
    """The guests' server, behind the relay. `path` must lie in a directory of mode 0700.

    :raise OSError: When the socket cannot be made.
    """
    server = grpc.aio.server(options=GUEST_SERVER_OPTIONS)
    server.add_generic_rpc_handlers((GuestServicer(backend, peers).handler(),))
    listen_unix(server, path, 0o600)
    await server.start()
    return server
