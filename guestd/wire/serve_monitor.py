"""The monitor service, on its socket and, with mutual TLS, on TCP. Read-only: no call changes anything."""

import asyncio
import contextlib
import logging
import shutil
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path

import grpc
import grpc.aio

from guestd.model.errors import ConfigError, GuestdError, NotFoundError
from guestd.model.event import EventQuery
from guestd.v1 import monitor_pb2, monitor_pb2_grpc
from guestd.wire.health import add_health
from guestd.wire.past import (
    event_id_from_wire,
    event_to_wire,
    explanation_to_wire,
    history_to_wire,
    id_from_token,
    moment_from_wire,
)
from guestd.wire.server import LOCAL_SERVER_OPTIONS, STRANGER_SERVER_OPTIONS, OperatorBackend, listen_unix, status
from guestd.wire.tls import ServerCertificates, TlsFiles
from guestd.wire.view import guest_to_wire, host_to_wire

_log = logging.getLogger(__name__)
MONITOR_GROUP = "guestd-broker"
_SERVICE = monitor_pb2.DESCRIPTOR.services_by_name["MonitorService"].full_name
_PAGE = 1000
_POINTS, _MOST_POINTS = 300, 2000
_WATCH_SECONDS = 0.1
_WATCH_LONGEST_SECONDS = 86400.0
_MOST_CALLS = 256  # at once, of all who come by TCP


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
        async with status(context):
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

    async def ExplainGuest(
        self, request: monitor_pb2.ExplainGuestRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> monitor_pb2.ExplainGuestResponse:
        """See monitor.proto."""
        async with status(context):
            at = moment_from_wire("at", request.at if request.HasField("at") else None)
            return explanation_to_wire(await self._backend.explain(request.name, at))
        raise AssertionError("abort returns never")

    async def ListEvents(
        self, request: monitor_pb2.ListEventsRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> monitor_pb2.ListEventsResponse:
        """See monitor.proto. The page token is the last id of the page before."""
        size = min(request.page_size or _PAGE, _PAGE)
        async with status(context):
            newest = await self._backend.events(EventQuery(limit=1, newest=True))
            after = id_from_token(request.page_token, newest[-1].id if newest else 0)
            since, until = _range(request)
            query = EventQuery(request.guest, since, until, after, size, request.newest)
            events = await self._backend.events(query)
        token = str(events[-1].id) if len(events) == size and not request.newest else ""
        return monitor_pb2.ListEventsResponse(events=[event_to_wire(one) for one in events], next_page_token=token)

    async def WatchEvents(  # type: ignore[override]  # a coroutine that writes: see GuestServicer.negotiate
        self, request: monitor_pb2.WatchEventsRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> None:
        """See monitor.proto."""
        async with status(context):
            after = event_id_from_wire("after_id", request.after_id)
            async with contextlib.aclosing(self._backend.follow_events(request.guest, after)) as events:
                async for seen in events:
                    event = event_to_wire(seen.event)
                    await context.write(monitor_pb2.WatchEventsResponse(event=event, missed=seen.missed))

    async def GetHistory(
        self, request: monitor_pb2.GetHistoryRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> monitor_pb2.GetHistoryResponse:
        """See monitor.proto."""
        points = min(request.max_points or _POINTS, _MOST_POINTS)
        async with status(context):
            since, until = _range(request)
            return history_to_wire(await self._backend.history(request.name, since, until, points))
        raise AssertionError("abort returns never")


def _range(
    request: monitor_pb2.ListEventsRequest | monitor_pb2.GetHistoryRequest,
) -> tuple[datetime | None, datetime | None]:
    """From when, and until when.

    :raise ProtocolError: When no calendar has it.
    """
    return (
        moment_from_wire("since", request.since if request.HasField("since") else None),
        moment_from_wire("until", request.until if request.HasField("until") else None),
    )


def _add_services(server: grpc.aio.Server, backend: OperatorBackend) -> None:
    monitor_pb2_grpc.add_MonitorServiceServicer_to_server(MonitorServicer(backend), server)
    add_health(server, backend.health, _SERVICE)


async def serve_monitor(backend: OperatorBackend, path: Path) -> grpc.aio.Server:
    """The monitor's server: its group may read.

    :raise OSError: When the socket cannot be made.
    """
    server = grpc.aio.server(options=LOCAL_SERVER_OPTIONS)
    _add_services(server, backend)
    listen_unix(server, path, 0o660)
    with contextlib.suppress(LookupError, PermissionError):  # no such group here: root alone reads
        shutil.chown(path, group=MONITOR_GROUP)
    await server.start()
    return server


async def serve_remote_monitor(backend: OperatorBackend, address: str, files: TlsFiles) -> grpc.aio.Server:
    """The monitor on TCP, for those whose certificate is signed by the CA in `files`.

    :raise GuestdError: When that cannot be, with the reason.
    """
    server = grpc.aio.server(options=STRANGER_SERVER_OPTIONS, maximum_concurrent_rpcs=_MOST_CALLS)
    _add_services(server, backend)
    try:
        server.add_secure_port(address, ServerCertificates(files).credentials())
    except ConfigError as error:
        problem = f"the monitor does not listen on {address}: {error}"
    except RuntimeError:
        problem = f"the monitor cannot listen on {address}: is the address this host's, and free?"
    else:
        await server.start()
        _log.info("the monitor listens on %s, for clients with a certificate of %s", address, files.ca)
        return server
    await server.stop(None)
    raise GuestdError(problem)


@contextlib.asynccontextmanager
async def remote_monitor(
    backend: OperatorBackend, address: str, files: TlsFiles, last_words_seconds: float, retry_seconds: float = 30.0
) -> AsyncIterator[None]:
    """The monitor on TCP while the block lasts. As long as it cannot be, that is said once and tried again: guests
    are served all the same.
    """
    server: grpc.aio.Server | None = None
    said = ""

    async def listen() -> None:
        nonlocal server, said
        try:
            server = await serve_remote_monitor(backend, address, files)
        except GuestdError as error:
            if str(error) != said:
                said = str(error)
                _log.error("%s; trying again every %g s", said, retry_seconds)

    async def keep_trying() -> None:
        while server is None:
            await asyncio.sleep(retry_seconds)
            await listen()

    await listen()
    trying = asyncio.create_task(keep_trying())
    try:
        yield
    finally:
        trying.cancel()
        await asyncio.gather(trying, return_exceptions=True)
        if server is not None:
            await server.stop(last_words_seconds)
