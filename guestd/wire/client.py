"""A client of the broker's monitor and admin services.

One channel per socket, opened at the first call. Every call has a deadline and ends in a value or in one
of guestd's own errors:

1. nobody answers, or not in time → `UnreachableError`, naming the socket and what may be wrong with it;
2. NOT_FOUND → `NotFoundError`;
3. FAILED_PRECONDITION, ALREADY_EXISTS → `AdmissionError`, with the broker's numbers;
4. INVALID_ARGUMENT → `ConfigError`: the caller asked for something that makes no sense;
5. anything else → `GuestdError`, with the status in words.

A stream of `watch_guests` that ends is an `UnreachableError` too: the broker never ends one by itself.
"""

import os
import stat
from collections.abc import AsyncIterator, Awaitable
from datetime import UTC
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import grpc
import grpc.aio

from guestd.model.errors import (
    AdmissionError,
    ConfigError,
    GuestdError,
    JournalError,
    NotFoundError,
    UnreachableError,
)
from guestd.model.messages import Reason
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.view import (
    GuestRemoved,
    GuestView,
    HostView,
    LimitsChange,
    LimitsOrigin,
    ResizePhase,
    ResourceView,
)
from guestd.model.vm import VmStatus
from guestd.v1 import admin_pb2, admin_pb2_grpc, common_pb2, monitor_pb2, monitor_pb2_grpc

MONITOR_SOCKET = "monitor.sock"
ADMIN_SOCKET = "admin.sock"

_LONGEST_SOCKET_PATH = 107  # bytes: sun_path without its final 0
_MAX_MESSAGE_BYTES = 16 << 20  # a page of 1000 guests with all their reasons

_KIND = {common_pb2.RESOURCE_KIND_CPU: Kind.CPU, common_pb2.RESOURCE_KIND_MEMORY: Kind.MEMORY}
_ORIGIN = {
    monitor_pb2.LIMITS_ORIGIN_FILE: LimitsOrigin.FILE,
    monitor_pb2.LIMITS_ORIGIN_ADMIN: LimitsOrigin.ADMIN,
}
_VM_STATUS = {
    monitor_pb2.VM_STATUS_RUNNING: VmStatus.RUNNING,
    monitor_pb2.VM_STATUS_FROZEN: VmStatus.FROZEN,
    monitor_pb2.VM_STATUS_GONE: VmStatus.GONE,
    monitor_pb2.VM_STATUS_UNREACHABLE: VmStatus.UNREACHABLE,
}
_PHASE = {
    monitor_pb2.RESIZE_PHASE_IDLE: ResizePhase.IDLE,
    monitor_pb2.RESIZE_PHASE_PLUGGING: ResizePhase.PLUGGING,
    monitor_pb2.RESIZE_PHASE_ASKING: ResizePhase.ASKING,
    monitor_pb2.RESIZE_PHASE_UNPLUGGING: ResizePhase.UNPLUGGING,
}

_Answer = TypeVar("_Answer")


class BrokerClient:
    """Talks to the broker whose sockets are in `run_dir`. Use as an async context manager."""

    def __init__(self, run_dir: Path, timeout_seconds: float = 5.0) -> None:
        self._monitor_path = run_dir / MONITOR_SOCKET
        self._admin_path = run_dir / ADMIN_SOCKET
        self._timeout_seconds = timeout_seconds
        self._channels: dict[Path, grpc.aio.Channel] = {}

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
        return host_view((await self._answer(call, self._monitor_path)).host)

    async def guests(self) -> tuple[GuestView, ...]:
        """All guests, by name.

        :raise UnreachableError: When nobody answers on the monitor socket.
        """
        found: list[GuestView] = []
        token = ""
        while True:
            request = monitor_pb2.ListGuestsRequest(page_token=token)
            call = self._monitor().ListGuests(request, timeout=self._timeout_seconds)
            page = await self._answer(call, self._monitor_path)
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
        return guest_view((await self._answer(call, self._monitor_path)).guest)

    async def watch_guests(self, min_interval_seconds: float | None = None) -> AsyncIterator[GuestView | GuestRemoved]:
        """All guests now, then each one as it changes, until the caller has enough.

        :param min_interval_seconds: Shortest time between two values of one guest; None: the broker's.
        :raise UnreachableError: When nobody answers on the monitor socket, or the broker went away.
        """
        request = monitor_pb2.WatchGuestsRequest()
        if min_interval_seconds is not None:
            request.min_interval.FromNanoseconds(round(min_interval_seconds * 1e9))
        call = self._monitor().WatchGuests(request)
        try:
            async for message in call:
                if message.WhichOneof("change") == "removed":
                    yield GuestRemoved(message.removed)
                else:
                    yield guest_view(message.guest)
        except grpc.aio.AioRpcError as error:
            raise _own_error(error, self._monitor_path) from error
        finally:
            call.cancel()
        raise UnreachableError(f"{self._monitor_path}: the broker ended the stream")

    async def add_guest(
        self, name: str, limits: Limits, qmp_socket: Path, *, cid: int = 0, vsock_path: Path | None = None
    ) -> GuestView:
        """Adds a guest, reached by its context id or by unix sockets at `vsock_path`.

        :raise AdmissionError: When it is there already, or its minimum does not fit.
        :raise ConfigError: When something about it makes no sense.
        """
        request = admin_pb2.AddGuestRequest(
            name=name,
            limits=_limits_message(limits),
            qmp_socket=str(qmp_socket),
            cid=cid,
            vsock_path="" if vsock_path is None else str(vsock_path),
        )
        call = self._admin().AddGuest(request, timeout=self._timeout_seconds)
        return guest_view((await self._answer(call, self._admin_path)).guest)

    async def remove_guest(self, name: str) -> None:
        """Forgets a guest that was added by `add_guest`.

        :raise NotFoundError: When there is none of that name.
        :raise AdmissionError: When it comes from a file.
        """
        request = admin_pb2.RemoveGuestRequest(name=name)
        await self._answer(self._admin().RemoveGuest(request, timeout=self._timeout_seconds), self._admin_path)

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
        return guest_view((await self._answer(call, self._admin_path)).guest)

    async def reset_limits(self, name: str) -> GuestView:
        """Goes back to the limits of the file.

        :raise NotFoundError: When there is none of that name.
        :raise AdmissionError: When there is no file, or its minimum does not fit any more.
        """
        request = admin_pb2.ResetLimitsRequest(name=name)
        call = self._admin().ResetLimits(request, timeout=self._timeout_seconds)
        return guest_view((await self._answer(call, self._admin_path)).guest)

    async def pause_guest(self, name: str) -> GuestView:
        """Leaves the VM as it is until `resume_guest`.

        :raise NotFoundError: When there is none of that name.
        """
        request = admin_pb2.PauseGuestRequest(name=name)
        call = self._admin().PauseGuest(request, timeout=self._timeout_seconds)
        return guest_view((await self._answer(call, self._admin_path)).guest)

    async def resume_guest(self, name: str) -> GuestView:
        """Decides about the VM again.

        :raise NotFoundError: When there is none of that name.
        """
        request = admin_pb2.ResumeGuestRequest(name=name)
        call = self._admin().ResumeGuest(request, timeout=self._timeout_seconds)
        return guest_view((await self._answer(call, self._admin_path)).guest)

    def _monitor(self) -> "monitor_pb2_grpc.MonitorServiceAsyncStub":
        return monitor_pb2_grpc.MonitorServiceStub(self._channel(self._monitor_path))

    def _admin(self) -> "admin_pb2_grpc.AdminServiceAsyncStub":
        return admin_pb2_grpc.AdminServiceStub(self._channel(self._admin_path))

    def _channel(self, path: Path) -> grpc.aio.Channel:
        channel = self._channels.get(path)
        if channel is None:
            problem = socket_problem(path)
            if problem is not None:
                raise UnreachableError(problem)
            options = [("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES)]
            channel = grpc.aio.insecure_channel(f"unix:{path.absolute()}", options=options)
            self._channels[path] = channel
        return channel

    async def _answer(self, call: Awaitable[_Answer], path: Path) -> _Answer:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise _own_error(error, path) from error


def socket_problem(path: Path) -> str | None:
    """Why nobody can answer at a socket, as far as its path tells; None when it may well work."""
    if len(os.fsencode(path.absolute())) > _LONGEST_SOCKET_PATH:
        return f"{path}: a path of a unix socket has at most {_LONGEST_SOCKET_PATH} bytes"
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return f"{path} does not exist"
    except PermissionError:
        return f"{path} is in a directory that this user may not open; try with sudo"
    except OSError as error:
        return f"{path}: {error.strerror}"
    if not stat.S_ISSOCK(mode):
        return f"{path} is not a socket"
    if not os.access(path, os.R_OK | os.W_OK):
        return f"{path} may not be opened by this user; try with sudo"
    return None


def _own_error(error: grpc.aio.AioRpcError, path: Path) -> GuestdError:
    code, details = error.code(), error.details() or ""
    match code:
        case grpc.StatusCode.UNAVAILABLE if details.startswith("journal "):
            return JournalError(details)
        case grpc.StatusCode.UNAVAILABLE:
            return UnreachableError(socket_problem(path) or f"{path}: nobody answers")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return UnreachableError(f"{path}: no answer in time")
        case grpc.StatusCode.NOT_FOUND:
            return NotFoundError(details)
        case grpc.StatusCode.FAILED_PRECONDITION | grpc.StatusCode.ALREADY_EXISTS:
            return AdmissionError(details)
        case grpc.StatusCode.INVALID_ARGUMENT:
            return ConfigError("refused by the broker", "", None, details)
        case _:
            return GuestdError(f"{path}: {code.name}: {details}")


def host_view(host: monitor_pb2.Host) -> HostView:
    """The host, from its message."""
    return HostView(
        capacity=_resources(host.capacity),
        reserve=_resources(host.reserve),
        overhead=_resources(host.overhead),
        committed=_resources(host.committed),
        minimums=_resources(host.minimums),
        free=_resources(host.free),
        epoch=host.epoch,
        version=host.version,
        started_at=host.started_at.ToDatetime(UTC) if host.HasField("started_at") else None,
        guests=host.guests,
        guests_connected=host.guests_connected,
    )


def guest_view(guest: monitor_pb2.Guest) -> GuestView:
    """A guest, from its message. What a newer broker says that is not known here reads as unknown."""
    return GuestView(
        name=guest.name,
        limits=Limits(
            min=_resources(guest.limits.min),
            max=_resources(guest.limits.max),
            weight=_resources(guest.limits.weight),
            burst=_resources(guest.limits.burst),
            burst_credit=_resources(guest.limits.burst_credit),
            burst_refill=_resources(guest.limits.burst_refill),
        ),
        limits_origin=_ORIGIN.get(guest.limits_origin, LimitsOrigin.UNKNOWN),
        limits_origin_detail=guest.limits_origin_detail,
        vm_status=_VM_STATUS.get(guest.vm_status),
        paused=guest.paused,
        connected=guest.connected,
        channel=guest.channel,
        hostname=guest.hostname,
        agent_version=guest.agent_version,
        kernel=guest.kernel,
        resources=tuple(_resource_view(one) for one in guest.resources if one.kind in _KIND),
        demand_reasons=tuple(Reason(reason.code, reason.text) for reason in guest.demand_reasons),
        last_seen_ago_seconds=(guest.last_seen_ago.ToNanoseconds() / 1e9 if guest.HasField("last_seen_ago") else None),
        protocol_errors=guest.protocol_errors,
        revision=guest.revision,
        degraded=guest.degraded,
    )


def _resource_view(resource: monitor_pb2.GuestResource) -> ResourceView:
    return ResourceView(
        kind=_KIND[resource.kind],
        demand=resource.demand,
        target=resource.target,
        reserved=resource.reserved,
        plugged=resource.plugged,
        onlined=resource.onlined,
        usable=resource.usable,
        used=resource.used,
        phase=_PHASE.get(resource.phase, ResizePhase.UNKNOWN),
        reason=Reason(resource.reason.code, resource.reason.text),
        grows=resource.grows,
        shrinks=resource.shrinks,
        partials=resource.partials,
        refusals=resource.refusals,
        failures=resource.failures,
        overdue=resource.overdue,
        burst=resource.burst,
        burst_credit=resource.burst_credit,
        quota=resource.quota,
        throttled_permille=resource.throttled_permille,
    )


def _resources(message: common_pb2.Resources) -> Resources:
    return Resources(message.cpu_millicores, message.memory_bytes)


def _limits_message(limits: Limits) -> common_pb2.Limits:
    return common_pb2.Limits(
        min=_resources_message(limits.min),
        max=_resources_message(limits.max),
        weight=_resources_message(limits.weight),
        burst=_resources_message(limits.burst),
        burst_credit=_resources_message(limits.burst_credit),
        burst_refill=_resources_message(limits.burst_refill),
    )


def _resources_message(resources: Resources) -> common_pb2.Resources:
    return common_pb2.Resources(cpu_millicores=resources.cpu_millicores, memory_bytes=resources.memory_bytes)
