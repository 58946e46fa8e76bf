"""The broker's gRPC services, as thin shells over what the broker offers in its own words.

Every `GuestdError` becomes a gRPC status here and nowhere else. Towards guests the servers' limits are
set on purpose: gRPC's defaults are for friends.
"""

import asyncio
import contextlib
import logging
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import NoReturn, Protocol

import grpc
import grpc.aio

from guestd.model.errors import (
    AdmissionError,
    FloodError,
    GuestdError,
    JournalError,
    NotFoundError,
    ProtocolError,
    SupersededError,
    VersionError,
)
from guestd.model.event import Event, EventQuery, SeenEvent
from guestd.model.explanation import GuestExplanation, ReclaimedResource, ReclaimRequest
from guestd.model.history import History
from guestd.model.messages import BrokerMessage, GuestMessage, Hello
from guestd.model.resources import Limits
from guestd.model.view import GuestView, HostView, LimitsChange
from guestd.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    guest_pb2,
    monitor_pb2,
    monitor_pb2_grpc,
)
from guestd.wire import convert
from guestd.wire.relay import Peer, Peers
from guestd.wire.view import guest_to_wire, host_to_wire

_log = logging.getLogger(__name__)
MONITOR_GROUP = "guestd-broker"
_HELLO_SECONDS = 10.0
_PAGE = 1000
_WATCH_SECONDS = 0.1
_WATCH_LONGEST_SECONDS = 86400.0

_HARD_LIMIT_BYTES = 4 * convert.MAX_MESSAGE_BYTES
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
LOCAL_SERVER_OPTIONS = (("grpc.max_receive_message_length", convert.MAX_MESSAGE_BYTES), ("grpc.so_reuseport", 0))


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


class OperatorBackend(Protocol):
    """What monitor and admin service need of the broker. Changes are durable when they return."""

    def host_view(self) -> HostView: ...
    def guest_names(self) -> list[str]: ...
    def guest_view(self, name: str) -> GuestView: ...
    def subscribe(self) -> tuple[set[str], asyncio.Event, Callable[[], None]]:
        """Names of guests that changed since last emptied, an event set with them, and how to stop."""
        ...

    async def add_guest(
        self, name: str, limits: Limits, qmp_socket: str, cid: int | None, vsock_path: str | None
    ) -> None: ...
    async def remove_guest(self, name: str) -> None: ...
    async def change_limits(self, name: str, change: LimitsChange) -> None: ...
    async def reset_limits(self, name: str) -> None: ...
    async def pause_guest(self, name: str, paused: bool) -> None: ...

    async def explain(self, name: str, at: datetime | None) -> GuestExplanation:
        """:raise NotFoundError: When there is none of that name."""
        ...

    async def events(self, query: EventQuery) -> tuple[Event, ...]: ...

    def follow_events(self, guest: str, after_id: int) -> AsyncGenerator[SeenEvent, None]:
        """Those after that one, or from now on (0); of one guest, or of all (empty)."""
        ...

    async def history(self, name: str, since: datetime | None, until: datetime | None, max_points: int) -> History:
        """:raise NotFoundError: When there is none of that name. :raise ValueError: When the range is none."""
        ...

    async def reclaim_guest(self, name: str, request: ReclaimRequest) -> tuple[ReclaimedResource, ...]:
        """:raise NotFoundError: When there is none of that name.
        :raise AdmissionError: When nothing can be decided about it now, and why.
        """
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


@asynccontextmanager
async def _status(context: grpc.aio.ServicerContext[object, object]) -> AsyncIterator[None]:
    """Turn guestd's errors into gRPC statuses."""
    try:
        yield
    except NotFoundError as error:
        await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
    except AdmissionError as error:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
    except FileExistsError as error:
        await context.abort(grpc.StatusCode.ALREADY_EXISTS, str(error))
    except (ValueError, ProtocolError) as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    except JournalError as error:
        await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
    except GuestdError as error:
        _log.exception("a call failed")
        await context.abort(grpc.StatusCode.INTERNAL, str(error))


class MonitorServicer(monitor_pb2_grpc.MonitorServiceServicer):
    """Read-only."""

    def __init__(self, backend: OperatorBackend) -> None:
        self._backend = backend

    async def GetHost(
        self, request: monitor_pb2.GetHostRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> monitor_pb2.GetHostResponse:
        """See monitor.proto."""
        return monitor_pb2.GetHostResponse(host=host_to_wire(self._backend.host_view()))

    async def ListGuests(
        self, request: monitor_pb2.ListGuestsRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> monitor_pb2.ListGuestsResponse:
        """See monitor.proto. The page token is the last name of the page before."""
        names = [name for name in self._backend.guest_names() if name > request.page_token]
        size = min(request.page_size or _PAGE, _PAGE)
        page = names[:size]
        token = page[-1] if len(names) > size else ""
        guests = [guest_to_wire(self._backend.guest_view(name)) for name in page]
        return monitor_pb2.ListGuestsResponse(guests=guests, next_page_token=token)

    async def GetGuest(
        self, request: monitor_pb2.GetGuestRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> monitor_pb2.GetGuestResponse:
        """See monitor.proto."""
        async with _status(context):
            return monitor_pb2.GetGuestResponse(guest=guest_to_wire(self._backend.guest_view(request.name)))
        raise AssertionError("abort returns never")

    async def WatchGuests(  # type: ignore[override]  # a coroutine that writes: see GuestServicer.negotiate
        self, request: monitor_pb2.WatchGuestsRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> None:
        """See monitor.proto: between two looks all changes of a guest become one message."""
        interval = request.min_interval.seconds + request.min_interval.nanos / 1e9 or _WATCH_SECONDS
        if not 0 < interval <= _WATCH_LONGEST_SECONDS:
            text = f"min_interval is {interval:g} s, must be within 0 s and {_WATCH_LONGEST_SECONDS:g} s"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
        changed, event, stop = self._backend.subscribe()
        changed.update(self._backend.guest_names())
        try:
            while True:
                event.clear()
                for name in sorted(changed):
                    changed.discard(name)
                    try:
                        guest = self._backend.guest_view(name)
                    except NotFoundError:
                        await context.write(monitor_pb2.WatchGuestsResponse(removed=name))
                    else:
                        await context.write(monitor_pb2.WatchGuestsResponse(guest=guest_to_wire(guest)))
                await asyncio.sleep(interval)
                await event.wait()
        finally:
            stop()


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Changes, for the owner of the socket."""

    def __init__(self, backend: OperatorBackend) -> None:
        self._backend = backend

    async def AddGuest(
        self, request: admin_pb2.AddGuestRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> admin_pb2.AddGuestResponse:
        """See admin.proto."""
        async with _status(context):
            limits = convert.limits_from_wire(request.limits)
            cid, path = request.cid or None, request.vsock_path or None
            await self._backend.add_guest(request.name, limits, request.qmp_socket, cid, path)
        return admin_pb2.AddGuestResponse(guest=self._guest(request.name))

    async def RemoveGuest(
        self, request: admin_pb2.RemoveGuestRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> admin_pb2.RemoveGuestResponse:
        """See admin.proto."""
        async with _status(context):
            await self._backend.remove_guest(request.name)
        return admin_pb2.RemoveGuestResponse()

    async def SetLimits(
        self, request: admin_pb2.SetLimitsRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> admin_pb2.SetLimitsResponse:
        """See admin.proto."""
        fields = {field.name: value for field, value in request.ListFields() if field.name != "name"}
        async with _status(context):
            convert.check_amounts(fields)
            await self._backend.change_limits(request.name, LimitsChange(**fields))
        return admin_pb2.SetLimitsResponse(guest=self._guest(request.name))

    async def ResetLimits(
        self, request: admin_pb2.ResetLimitsRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> admin_pb2.ResetLimitsResponse:
        """See admin.proto."""
        async with _status(context):
            await self._backend.reset_limits(request.name)
        return admin_pb2.ResetLimitsResponse(guest=self._guest(request.name))

    async def PauseGuest(
        self, request: admin_pb2.PauseGuestRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> admin_pb2.PauseGuestResponse:
        """See admin.proto."""
        async with _status(context):
            await self._backend.pause_guest(request.name, True)
        return admin_pb2.PauseGuestResponse(guest=self._guest(request.name))

    async def ResumeGuest(
        self, request: admin_pb2.ResumeGuestRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> admin_pb2.ResumeGuestResponse:
        """See admin.proto."""
        async with _status(context):
            await self._backend.pause_guest(request.name, False)
        return admin_pb2.ResumeGuestResponse(guest=self._guest(request.name))

    def _guest(self, name: str) -> monitor_pb2.Guest:
        return guest_to_wire(self._backend.guest_view(name))


def _bind(server: grpc.aio.Server, path: Path, mode: int) -> None:
    if path.is_socket():
        path.unlink()
    if not server.add_insecure_port(f"unix:{path}"):
        raise OSError(f"cannot listen on {path}")
    path.chmod(mode)


async def serve_guests(backend: GuestBackend, peers: Peers, path: Path) -> grpc.aio.Server:
    """The guests' server, behind the relay. `path` must lie in a directory of mode 0700.

    :raise OSError: When the socket cannot be made.
    """
    server = grpc.aio.server(options=GUEST_SERVER_OPTIONS)
    server.add_generic_rpc_handlers((GuestServicer(backend, peers).handler(),))
    _bind(server, path, 0o600)
    await server.start()
    return server


async def serve_monitor(backend: OperatorBackend, path: Path) -> grpc.aio.Server:
    """The monitor's server: its group may read.

    :raise OSError: When the socket cannot be made.
    """
    server = grpc.aio.server(options=LOCAL_SERVER_OPTIONS)
    monitor_pb2_grpc.add_MonitorServiceServicer_to_server(MonitorServicer(backend), server)
    _bind(server, path, 0o660)
    with contextlib.suppress(LookupError, PermissionError):  # no such group here: root alone reads
        shutil.chown(path, group=MONITOR_GROUP)
    await server.start()
    return server


async def serve_admin(backend: OperatorBackend, path: Path) -> grpc.aio.Server:
    """The admin's server: its owner only.

    :raise OSError: When the socket cannot be made.
    """
    server = grpc.aio.server(options=LOCAL_SERVER_OPTIONS)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminServicer(backend), server)
    _bind(server, path, 0o600)
    await server.start()
    return server
