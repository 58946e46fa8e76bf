"""A client of the broker's monitor and admin services.

One channel per service, opened at the first call. Every call has a deadline and ends in a value or in one
of guestd's own errors:

1. nobody answers, or not in time → `UnreachableError`, naming the address and what may be wrong with it;
2. NOT_FOUND → `NotFoundError`;
3. PERMISSION_DENIED, a socket or certificate that lets this user not in → `DeniedError`;
4. FAILED_PRECONDITION, ALREADY_EXISTS → `AdmissionError`, with the broker's numbers;
5. INVALID_ARGUMENT → `ConfigError`: the caller asked for something that makes no sense;
6. anything else → `GuestdError`, with the status in words.

A stream that ends is an `UnreachableError` too: the broker never ends one by itself.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc
import grpc.aio

from guestd.model.errors import (
    AdmissionError,
    ConfigError,
    DeniedError,
    GuestdError,
    HistoryError,
    JournalError,
    NotFoundError,
    UnreachableError,
)
from guestd.model.resources import Limits
from guestd.model.view import GuestRemoved, GuestView, HostView, LimitsChange
from guestd.v1 import admin_pb2, admin_pb2_grpc, monitor_pb2, monitor_pb2_grpc
from guestd.wire.amounts import limits_to_wire
from guestd.wire.endpoint import Endpoint, LocalOnly, TlsEndpoint, UnixEndpoint
from guestd.wire.tls import TlsFiles
from guestd.wire.view import guest_view, host_view

if TYPE_CHECKING:  # what looks back is imported when it is asked for: most calls ask for what there is now
    from guestd.model.event import Event, EventQuery, SeenEvent
    from guestd.model.explanation import GuestExplanation, ReclaimedResource, ReclaimRequest
    from guestd.model.history import History

MONITOR_SOCKET = "monitor.sock"
ADMIN_SOCKET = "admin.sock"
_PAGE = 1000

_Answer = TypeVar("_Answer")


class BrokerClient:
    """Talks to the broker whose sockets are in `run_dir`, or, made by `remote`, to a monitor on TCP. Use as an
    async context manager.
    """

    def __init__(self, run_dir: Path, timeout_seconds: float = 5.0) -> None:
        self._monitor_end: Endpoint = UnixEndpoint(run_dir / MONITOR_SOCKET)
        self._admin_end: Endpoint = UnixEndpoint(run_dir / ADMIN_SOCKET)
        self._timeout_seconds = timeout_seconds
        self._channels: dict[Endpoint, grpc.aio.Channel] = {}

    @classmethod
    def remote(cls, address: str, certificate: Path, key: Path, ca: Path, timeout_seconds: float = 5.0) -> Self:
        """A client of the monitor at ``HOST:PORT``, which changes nothing: that is done on the host itself.

        :param ca: what the broker's certificate must be signed by.
        :raise ConfigError: When that is no address.
        """
        client = cls(Path(), timeout_seconds)
        client._monitor_end = TlsEndpoint.parse(address, TlsFiles(certificate, key, ca))
        client._admin_end = LocalOnly(address)
        return client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channels; a later call opens new ones."""
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()

    async def host(self) -> HostView:
        """The host as one pool.

        :raise UnreachableError: When nobody answers on the monitor socket.
        """
        call = self._monitor().GetHost(monitor_pb2.GetHostRequest(), timeout=self._timeout_seconds)
        return host_view((await self._answer(call, self._monitor_end)).host)

    async def guests(self) -> tuple[GuestView, ...]:
        """All guests, by name.

        :raise UnreachableError: When nobody answers on the monitor socket.
        """
        found: list[GuestView] = []
        token = ""
        while True:
            request = monitor_pb2.ListGuestsRequest(page_token=token)
            call = self._monitor().ListGuests(request, timeout=self._timeout_seconds)
            page = await self._answer(call, self._monitor_end)
            found.extend(guest_view(guest) for guest in page.guests)
            token = page.next_page_token
            if not token:
                return tuple(found)

    async def guest(self, name: str) -> GuestView:
        """One guest.

        :raise NotFoundError: When there is none of that name.
        :raise UnreachableError: When nobody answers on the monitor socket.
        """
        request = monitor_pb2.GetGuestRequest(name=name)
        call = self._monitor().GetGuest(request, timeout=self._timeout_seconds)
        return guest_view((await self._answer(call, self._monitor_end)).guest)

    async def watch_guests(self, min_interval_seconds: float | None = None) -> AsyncIterator[GuestView | GuestRemoved]:
        """All guests now, then each one as it changes, until the caller has enough.

        :param min_interval_seconds: Shortest time between two values of one guest; None: the broker's.
        :raise UnreachableError: When nobody answers on the monitor socket, or the broker went away.
        """
        request = monitor_pb2.WatchGuestsRequest()
        if min_interval_seconds is not None:
            request.min_interval.FromNanoseconds(round(min_interval_seconds * 1e9))
        async with aclosing(self._stream(self._monitor().WatchGuests(request))) as messages:
            async for message in messages:
                if message.WhichOneof("change") == "removed":
                    yield GuestRemoved(message.removed)
                else:
                    yield guest_view(message.guest)

    async def explain(self, name: str, at: datetime | None = None) -> "GuestExplanation":
        """Why a guest has what it has; at that time, or now.

        :raise NotFoundError: When there is none of that name.
        :raise UnreachableError: When nobody answers.
        """
        from guestd.wire import past

        request = monitor_pb2.ExplainGuestRequest(name=name, at=past.moment_to_wire(at))
        call = self._monitor().ExplainGuest(request, timeout=self._timeout_seconds)
        return past.explanation_from_wire(await self._answer(call, self._monitor_end))

    async def events(self, query: "EventQuery") -> "tuple[Event, ...]":
        """What happened, oldest first, up to the query's limit.

        :raise ConfigError: When the query makes no sense.
        :raise UnreachableError: When nobody answers.
        """
        from guestd.wire import past

        request = monitor_pb2.ListEventsRequest(
            guest=query.guest,
            since=past.moment_to_wire(query.since),
            until=past.moment_to_wire(query.until),
            page_token=str(query.after_id) if query.after_id else "",
            newest=query.newest,
        )
        found: list[Event] = []
        while True:
            request.page_size = min(query.limit - len(found), _PAGE)
            call = self._monitor().ListEvents(request, timeout=self._timeout_seconds)
            page = await self._answer(call, self._monitor_end)
            found.extend(past.event_from_wire(event) for event in page.events)
            request.page_token = page.next_page_token
            if not page.next_page_token or len(found) >= query.limit:
                return tuple(found)

    async def watch_events(self, guest: str = "", after_id: int = 0) -> "AsyncIterator[SeenEvent]":
        """What happens, to one guest or to all, after that event or from now on, until the caller has enough.

        :raise UnreachableError: When nobody answers, or the broker went away.
        """
        from guestd.wire import past

        request = monitor_pb2.WatchEventsRequest(guest=guest, after_id=after_id)
        async with aclosing(self._stream(self._monitor().WatchEvents(request))) as messages:
            async for message in messages:
                yield past.seen_event_from_wire(message)

    async def history(
        self, name: str, since: datetime | None = None, until: datetime | None = None, max_points: int = 300
    ) -> "History":
        """How much a guest wanted and had over time: an hour ago until now, unless told otherwise.

        :raise NotFoundError: When there is none of that name.
        :raise ConfigError: When the range is none.
        :raise UnreachableError: When nobody answers.
        """
        from guestd.wire import past

        request = monitor_pb2.GetHistoryRequest(
            name=name, since=past.moment_to_wire(since), until=past.moment_to_wire(until), max_points=max_points
        )
        call = self._monitor().GetHistory(request, timeout=self._timeout_seconds)
        return past.history_from_wire(await self._answer(call, self._monitor_end))

    async def add_guest(
        self, name: str, limits: Limits, qmp_socket: Path, *, cid: int = 0, vsock_path: Path | None = None
    ) -> GuestView:
        """Adds a guest, reached by its context id or by unix sockets at `vsock_path`.

        :raise AdmissionError: When it is there already, or its minimum does not fit.
        :raise ConfigError: When something about it makes no sense.
        """
        request = admin_pb2.AddGuestRequest(
            name=name,
            limits=limits_to_wire(limits),
            qmp_socket=str(qmp_socket),
            cid=cid,
            vsock_path="" if vsock_path is None else str(vsock_path),
        )
        call = self._admin().AddGuest(request, timeout=self._timeout_seconds)
        return guest_view((await self._answer(call, self._admin_end)).guest)

    async def remove_guest(self, name: str) -> None:
        """Forgets a guest that was added by `add_guest`.

        :raise NotFoundError: When there is none of that name.
        :raise AdmissionError: When it comes from a file.
        """
        request = admin_pb2.RemoveGuestRequest(name=name)
        await self._answer(self._admin().RemoveGuest(request, timeout=self._timeout_seconds), self._admin_end)

    async def set_limits(self, name: str, change: LimitsChange) -> GuestView:
        """Sets limits; they win over the file's until `reset_limits`.

        :raise NotFoundError: When there is none of that name.
        :raise AdmissionError: When a minimum does not fit.
        :raise ConfigError: When the limits contradict each other.
        """
        request = admin_pb2.SetLimitsRequest(
            name=name,
            cpu_min_millicores=change.cpu_min_millicores,
            cpu_max_millicores=change.cpu_max_millicores,
            cpu_weight=change.cpu_weight,
            memory_min_bytes=change.memory_min_bytes,
            memory_max_bytes=change.memory_max_bytes,
            memory_weight=change.memory_weight,
            cpu_burst_millicores=change.cpu_burst_millicores,
            cpu_burst_credit=change.cpu_burst_credit,
            cpu_burst_refill=change.cpu_burst_refill,
            memory_burst_bytes=change.memory_burst_bytes,
            memory_burst_credit=change.memory_burst_credit,
            memory_burst_refill=change.memory_burst_refill,
        )
        call = self._admin().SetLimits(request, timeout=self._timeout_seconds)
        return guest_view((await self._answer(call, self._admin_end)).guest)

    async def reset_limits(self, name: str) -> GuestView:
        """Goes back to the limits of the file.

        :raise NotFoundError: When there is none of that name.
        :raise AdmissionError: When there is no file, or its minimum does not fit any more.
        """
        request = admin_pb2.ResetLimitsRequest(name=name)
        call = self._admin().ResetLimits(request, timeout=self._timeout_seconds)
        return guest_view((await self._answer(call, self._admin_end)).guest)

    async def pause_guest(self, name: str) -> GuestView:
        """Leaves the VM as it is until `resume_guest`.

        :raise NotFoundError: When there is none of that name.
        """
        request = admin_pb2.PauseGuestRequest(name=name)
        call = self._admin().PauseGuest(request, timeout=self._timeout_seconds)
        return guest_view((await self._answer(call, self._admin_end)).guest)

    async def resume_guest(self, name: str) -> GuestView:
        """Decides about the VM again.

        :raise NotFoundError: When there is none of that name.
        """
        request = admin_pb2.ResumeGuestRequest(name=name)
        call = self._admin().ResumeGuest(request, timeout=self._timeout_seconds)
        return guest_view((await self._answer(call, self._admin_end)).guest)

    async def reclaim_guest(
        self, name: str, request: "ReclaimRequest"
    ) -> "tuple[tuple[ReclaimedResource, ...], GuestView]":
        """Asks the guest now for what it holds and does not need: what each kind comes to, and the guest.

        :raise NotFoundError: When there is none of that name.
        :raise AdmissionError: When nothing can be decided about it now, and why.
        """
        from guestd.wire import past

        message = admin_pb2.ReclaimGuestRequest(
            name=name,
            cpu_millicores=request.cpu_millicores,
            memory_bytes=request.memory_bytes,
            dry_run=request.dry_run,
        )
        call = self._admin().ReclaimGuest(message, timeout=self._timeout_seconds)
        response = await self._answer(call, self._admin_end)
        return past.reclaimed_from_wire(response), guest_view(response.guest)

    def _monitor(self) -> "monitor_pb2_grpc.MonitorServiceAsyncStub":
        return monitor_pb2_grpc.MonitorServiceStub(self._channel(self._monitor_end))

    def _admin(self) -> "admin_pb2_grpc.AdminServiceAsyncStub":
        return admin_pb2_grpc.AdminServiceStub(self._channel(self._admin_end))

    def _channel(self, end: Endpoint) -> grpc.aio.Channel:
        channel = self._channels.get(end)
        if channel is None:
            channel = self._channels[end] = end.open()
        return channel

    async def _answer(self, call: Awaitable[_Answer], end: Endpoint) -> _Answer:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise await _own_error(error, end) from error

    async def _stream(self, call: "grpc.aio.UnaryStreamCall[Any, _Answer]") -> AsyncGenerator[_Answer, None]:
        """The messages of a stream of the monitor, which is hung up at the end."""
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as error:
            raise await _own_error(error, self._monitor_end) from error
        finally:
            call.cancel()
        raise UnreachableError(f"{self._monitor_end}: the broker ended the stream")


async def _own_error(error: grpc.aio.AioRpcError, end: Endpoint) -> GuestdError:
    code, details = error.code(), error.details() or ""
    match code:
        case grpc.StatusCode.UNAVAILABLE if details.startswith("journal "):
            return JournalError(details)
        case grpc.StatusCode.UNAVAILABLE if details.startswith("history "):
            return HistoryError(details)
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:  # the second: a broker that stops ends its calls
            return await end.problem()
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return UnreachableError(f"{end}: no answer in time")
        case grpc.StatusCode.NOT_FOUND:
            return NotFoundError(details)
        case grpc.StatusCode.PERMISSION_DENIED:
            return DeniedError(f"{end}: {details}")
        case grpc.StatusCode.FAILED_PRECONDITION | grpc.StatusCode.ALREADY_EXISTS:
            return AdmissionError(details)
        case grpc.StatusCode.INVALID_ARGUMENT:
            return ConfigError("refused by the broker", "", None, details)
        case grpc.StatusCode.UNIMPLEMENTED:
            return GuestdError(f"{end}: this broker does not know that call; it is older than this program")
        case _:
            return GuestdError(f"{end}: {code.name}: {details}")
