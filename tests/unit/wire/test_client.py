"""`guestd.wire.client` against a gRPC server on a unix socket in this process."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from guestd.model.errors import (
    AdmissionError,
    ConfigError,
    DeniedError,
    GuestdError,
    NotFoundError,
    UnreachableError,
)
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.view import GuestRemoved, GuestView, LimitsChange, LimitsOrigin, ResizePhase
from guestd.model.vm import VmStatus
from guestd.v1 import admin_pb2, admin_pb2_grpc, common_pb2, monitor_pb2, monitor_pb2_grpc
from guestd.wire.client import BrokerClient

GIB = 1 << 30


def guest_message(name: str = "demo") -> monitor_pb2.Guest:
    return monitor_pb2.Guest(
        name=name,
        limits=common_pb2.Limits(
            min=common_pb2.Resources(cpu_millicores=1000, memory_bytes=GIB // 2),
            max=common_pb2.Resources(cpu_millicores=4000, memory_bytes=3 * GIB),
            weight=common_pb2.Resources(cpu_millicores=100, memory_bytes=300),
        ),
        limits_origin=monitor_pb2.LIMITS_ORIGIN_ADMIN,
        limits_origin_detail="2026-01-01",
        vm_status=monitor_pb2.VM_STATUS_RUNNING,
        paused=True,
        connected=True,
        channel="vsock",
        hostname="lab",
        agent_version="1.0",
        kernel="6.1",
        resources=[
            monitor_pb2.GuestResource(
                kind=common_pb2.RESOURCE_KIND_CPU,
                demand=3500,
                target=4000,
                reserved=4000,
                plugged=3000,
                onlined=2000,
                usable=2000,
                used=1900,
                phase=monitor_pb2.RESIZE_PHASE_PLUGGING,
                reason=common_pb2.Reason(code="cpu-runnable", text="4 runnable"),
                grows=1,
                shrinks=2,
                partials=3,
                refusals=4,
                failures=5,
                overdue=True,
            )
        ],
        demand_reasons=[common_pb2.Reason(code="a", text="b")],
        last_seen_ago=Duration(seconds=1, nanos=500_000_000),
        protocol_errors=7,
        revision=8,
        degraded="no balloon",
    )


class FakeMonitor(monitor_pb2_grpc.MonitorServiceServicer):
    def __init__(self) -> None:
        self.watched: monitor_pb2.WatchGuestsRequest | None = None
        self.watch_cancelled = asyncio.Event()

    async def GetHost(self, request: Any, context: Any) -> monitor_pb2.GetHostResponse:
        return monitor_pb2.GetHostResponse(
            host=monitor_pb2.Host(
                capacity=common_pb2.Resources(cpu_millicores=8000, memory_bytes=8 * GIB),
                free=common_pb2.Resources(cpu_millicores=7000, memory_bytes=7 * GIB),
                epoch=3,
                version="0.1",
                started_at=Timestamp(seconds=1_700_000_000),
                guests=2,
                guests_connected=1,
            )
        )

    async def ListGuests(self, request: Any, context: Any) -> monitor_pb2.ListGuestsResponse:
        if request.page_token == "":
            return monitor_pb2.ListGuestsResponse(guests=[guest_message("a")], next_page_token="a")
        assert request.page_token == "a"
        return monitor_pb2.ListGuestsResponse(guests=[guest_message("b")])

    async def GetGuest(self, request: Any, context: Any) -> monitor_pb2.GetGuestResponse:
        if request.name == "slow":
            await asyncio.sleep(30)
        if request.name == "unheard":
            return monitor_pb2.GetGuestResponse(guest=monitor_pb2.Guest(name="unheard"))
        if request.name == "newer":
            message = monitor_pb2.Guest(name="newer", resources=[monitor_pb2.GuestResource(kind=9)])
            message.vm_status = 99
            return monitor_pb2.GetGuestResponse(guest=message)
        if request.name != "demo":
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no guest {request.name!r}")
        return monitor_pb2.GetGuestResponse(guest=guest_message())

    async def WatchGuests(self, request: Any, context: Any) -> AsyncIterator[monitor_pb2.WatchGuestsResponse]:
        self.watched = request
        try:
            yield monitor_pb2.WatchGuestsResponse(guest=guest_message())
            yield monitor_pb2.WatchGuestsResponse(removed="demo")
            if request.min_interval.seconds != 9:
                await asyncio.sleep(30)
        finally:
            self.watch_cancelled.set()


class FakeAdmin(admin_pb2_grpc.AdminServiceServicer):
    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.status: grpc.StatusCode | None = None

    async def _guest(self, request: Any, context: Any) -> monitor_pb2.Guest:
        self.requests.append(request)
        if self.status is not None:
            await context.abort(self.status, "the numbers")
        return guest_message(request.name)

    async def AddGuest(self, request: Any, context: Any) -> admin_pb2.AddGuestResponse:
        return admin_pb2.AddGuestResponse(guest=await self._guest(request, context))

    async def RemoveGuest(self, request: Any, context: Any) -> admin_pb2.RemoveGuestResponse:
        await self._guest(request, context)
        return admin_pb2.RemoveGuestResponse()

    async def SetLimits(self, request: Any, context: Any) -> admin_pb2.SetLimitsResponse:
        return admin_pb2.SetLimitsResponse(guest=await self._guest(request, context))

    async def ResetLimits(self, request: Any, context: Any) -> admin_pb2.ResetLimitsResponse:
        return admin_pb2.ResetLimitsResponse(guest=await self._guest(request, context))

    async def PauseGuest(self, request: Any, context: Any) -> admin_pb2.PauseGuestResponse:
        return admin_pb2.PauseGuestResponse(guest=await self._guest(request, context))

    async def ResumeGuest(self, request: Any, context: Any) -> admin_pb2.ResumeGuestResponse:
        return admin_pb2.ResumeGuestResponse(guest=await self._guest(request, context))


class FakeBroker:
    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.monitor = FakeMonitor()
        self.admin = FakeAdmin()
        self.servers: list[grpc.aio.Server] = []

    async def start(self) -> None:
        monitor, admin = grpc.aio.server(), grpc.aio.server()
        monitor_pb2_grpc.add_MonitorServiceServicer_to_server(self.monitor, monitor)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self.admin, admin)
        monitor.add_insecure_port(f"unix:{self.run_dir}/monitor.sock")
        admin.add_insecure_port(f"unix:{self.run_dir}/admin.sock")
        self.servers = [monitor, admin]
        for server in self.servers:
            await server.start()

    async def stop(self) -> None:
        for server in self.servers:
            await server.stop(None)


@pytest_asyncio.fixture
async def broker(tmp_path: Path) -> AsyncIterator[FakeBroker]:
    broker = FakeBroker(tmp_path)
    await broker.start()
    yield broker
    await broker.stop()


@pytest_asyncio.fixture
async def client(broker: FakeBroker) -> AsyncIterator[BrokerClient]:
    async with BrokerClient(broker.run_dir) as client:
        yield client


async def test_host(client: BrokerClient) -> None:
    host = await client.host()
    assert host.capacity == Resources(8000, 8 * GIB)
    assert host.free == Resources(7000, 7 * GIB)
    assert (host.epoch, host.version, host.guests, host.guests_connected) == (3, "0.1", 2, 1)
    assert host.started_at is not None
    assert host.started_at.isoformat() == "2023-11-14T22:13:20+00:00"


async def test_a_guest_keeps_every_field(client: BrokerClient) -> None:
    guest = await client.guest("demo")
    cpu = guest.resource(Kind.CPU)
    assert guest.limits == Limits(Resources(1000, GIB // 2), Resources(4000, 3 * GIB), weight=Resources(100, 300))
    assert guest.limits_origin is LimitsOrigin.ADMIN
    assert guest.limits_origin_detail == "2026-01-01"
    assert guest.vm_status is VmStatus.RUNNING
    assert (guest.paused, guest.connected, guest.channel) == (True, True, "vsock")
    assert (guest.hostname, guest.agent_version, guest.kernel) == ("lab", "1.0", "6.1")
    assert guest.demand_reasons == (Reason("a", "b"),)
    assert guest.last_seen_ago_seconds == 1.5
    assert (guest.protocol_errors, guest.revision, guest.degraded) == (7, 8, "no balloon")
    assert (cpu.demand, cpu.target, cpu.reserved, cpu.plugged) == (3500, 4000, 4000, 3000)
    assert (cpu.onlined, cpu.usable, cpu.used) == (2000, 2000, 1900)
    assert (cpu.grows, cpu.shrinks, cpu.partials, cpu.refusals, cpu.failures) == (1, 2, 3, 4, 5)
    assert (cpu.phase, cpu.reason, cpu.overdue) == (
        ResizePhase.PLUGGING,
        Reason("cpu-runnable", "4 runnable"),
        True,
    )


async def test_what_was_never_said_is_none_not_zero(client: BrokerClient) -> None:
    guest = await client.guest("unheard")
    assert guest.last_seen_ago_seconds is None
    assert guest.vm_status is None
    assert guest.resource(Kind.MEMORY).plugged == 0


async def test_words_of_a_newer_broker_read_as_unknown(client: BrokerClient) -> None:
    guest = await client.guest("newer")
    assert guest.vm_status is None
    assert guest.resources == ()


async def test_guests_reads_every_page(client: BrokerClient) -> None:
    assert [guest.name for guest in await client.guests()] == ["a", "b"]


async def test_watch_yields_guests_and_removals(client: BrokerClient, broker: FakeBroker) -> None:
    stream = client.watch_guests(0.25)
    first, second = await anext(stream), await anext(stream)
    await stream.aclose()
    assert isinstance(first, GuestView)
    assert first.name == "demo"
    assert second == GuestRemoved("demo")
    assert broker.monitor.watched is not None
    assert broker.monitor.watched.min_interval.nanos == 250_000_000
    await asyncio.wait_for(broker.monitor.watch_cancelled.wait(), 5)


async def test_a_watch_that_the_broker_ends_is_unreachable(client: BrokerClient) -> None:
    with pytest.raises(UnreachableError, match="ended the stream"):
        async for _ in client.watch_guests(9):
            pass


async def test_set_limits_sends_only_what_changes(client: BrokerClient, broker: FakeBroker) -> None:
    await client.set_limits("demo", LimitsChange(cpu_max_millicores=2000, memory_weight=7))
    request = broker.admin.requests[-1]
    fields = {field.name: value for field, value in request.ListFields()}
    assert fields == {"name": "demo", "cpu_max_millicores": 2000, "memory_weight": 7}


async def test_zero_is_sent_and_not_taken_for_unset(client: BrokerClient, broker: FakeBroker) -> None:
    await client.set_limits("demo", LimitsChange(cpu_min_millicores=0))
    assert broker.admin.requests[-1].HasField("cpu_min_millicores")


async def test_other_admin_calls(client: BrokerClient, broker: FakeBroker, tmp_path: Path) -> None:
    limits = Limits(Resources(1000, GIB), Resources(2000, 2 * GIB))
    await client.add_guest("x", limits, tmp_path / "q", vsock_path=tmp_path / "v")
    added = broker.admin.requests[-1]
    assert (added.qmp_socket, added.vsock_path, added.cid) == (f"{tmp_path}/q", f"{tmp_path}/v", 0)
    assert added.limits.max.memory_bytes == 2 * GIB
    assert added.limits.weight.cpu_millicores == 100
    await client.remove_guest("x")
    assert (await client.reset_limits("x")).name == "x"
    assert (await client.pause_guest("x")).paused
    await client.resume_guest("x")
    assert [type(request).__name__ for request in broker.admin.requests[1:]] == [
        "RemoveGuestRequest",
        "ResetLimitsRequest",
        "PauseGuestRequest",
        "ResumeGuestRequest",
    ]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (grpc.StatusCode.NOT_FOUND, NotFoundError),
        (grpc.StatusCode.FAILED_PRECONDITION, AdmissionError),
        (grpc.StatusCode.ALREADY_EXISTS, AdmissionError),
        (grpc.StatusCode.INVALID_ARGUMENT, ConfigError),
        (grpc.StatusCode.PERMISSION_DENIED, DeniedError),
        (grpc.StatusCode.INTERNAL, GuestdError),
    ],
)
async def test_every_status_has_its_error(
    client: BrokerClient, broker: FakeBroker, status: grpc.StatusCode, kind: type[GuestdError]
) -> None:
    broker.admin.status = status
    with pytest.raises(GuestdError, match="the numbers") as raised:
        await client.set_limits("demo", LimitsChange())
    assert type(raised.value) is kind


async def test_unknown_guest(client: BrokerClient) -> None:
    with pytest.raises(NotFoundError, match="no guest 'other'"):
        await client.guest("other")


async def test_no_answer_in_time_is_unreachable(broker: FakeBroker) -> None:
    async with BrokerClient(broker.run_dir, timeout_seconds=0.2) as client:
        with pytest.raises(UnreachableError, match=r"monitor\.sock: no answer in time"):
            await client.guest("slow")


async def test_missing_socket(tmp_path: Path) -> None:
    async with BrokerClient(tmp_path) as client:
        with pytest.raises(UnreachableError, match=r"monitor\.sock does not exist"):
            await client.host()
        with pytest.raises(UnreachableError, match=r"admin\.sock does not exist"):
            await client.reset_limits("demo")


async def test_a_file_that_is_no_socket(tmp_path: Path) -> None:
    (tmp_path / "monitor.sock").touch()
    async with BrokerClient(tmp_path) as client:
        with pytest.raises(UnreachableError, match="is not a socket"):
            await client.host()


async def test_a_socket_that_nobody_listens_on(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(tmp_path / "monitor.sock"))
    async with BrokerClient(tmp_path) as client:
        with pytest.raises(UnreachableError, match="nobody answers"):
            await client.host()
        stream = client.watch_guests()
        with pytest.raises(UnreachableError, match="nobody answers"):
            await anext(stream)


async def test_a_path_that_no_socket_can_have(tmp_path: Path) -> None:
    async with BrokerClient(tmp_path / ("x" * 100)) as client:
        with pytest.raises(UnreachableError, match="at most 107 bytes"):
            await client.host()


async def test_a_broker_that_stops_is_unreachable(broker: FakeBroker, client: BrokerClient) -> None:
    assert (await client.host()).epoch == 3
    await broker.stop()
    with pytest.raises(UnreachableError):
        await client.host()
