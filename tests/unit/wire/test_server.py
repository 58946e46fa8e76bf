"""The services as shells: what a backend says, as gRPC statuses. (On real sockets with a real broker:
tests/integration/test_broker.py.)
"""

import asyncio
import contextlib
import stat
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from guestd.model.errors import (
    AdmissionError,
    FloodError,
    GuestdError,
    HistoryError,
    JournalError,
    NotFoundError,
    ProtocolError,
    SupersededError,
    VersionError,
)
from guestd.model.explanation import ReclaimedResource, ReclaimRequest
from guestd.model.guest import Identity
from guestd.model.messages import BrokerMessage, GuestMessage, Heartbeat, Hello, Usable, Welcome
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.view import GuestView, HostView, LimitsChange
from guestd.v1 import admin_pb2, admin_pb2_grpc, common_pb2, guest_pb2, guest_pb2_grpc, monitor_pb2, monitor_pb2_grpc
from guestd.wire import amounts, convert
from guestd.wire import serve_guests as guests_service
from guestd.wire.health import Health
from guestd.wire.relay import IngressRelay, Peer, Peers
from guestd.wire.serve_admin import serve_admin
from guestd.wire.serve_guests import serve_guests
from guestd.wire.serve_monitor import serve_monitor

HELLO = Hello(1, 1, Identity(bytes(16), 1), Usable())
WELCOME = Welcome(1, "a", 1, 10.0, Resources(), Resources())
LIMITS = Limits(Resources(1, 1), Resources(2, 2))
HOST = HostView(Resources(), Resources(), Resources(), Resources(), Resources(), Resources(), 1, "", None, 0, 0)


class Outbox:
    """Says welcome, and then ends with an error when there is one."""

    def __init__(self, error: ProtocolError | None) -> None:
        self._messages: asyncio.Queue[BrokerMessage | None] = asyncio.Queue()
        self._messages.put_nowait(WELCOME)
        self._error = error
        if error is not None:
            self._messages.put_nowait(None)

    async def next(self) -> BrokerMessage:
        message = await self._messages.get()
        if message is None:
            assert self._error is not None
            raise self._error
        return message

    def end(self, error: ProtocolError) -> None:
        self._error = error
        self._messages.put_nowait(None)


class Backend:
    """Fails as it is told to, and notes what it was asked."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.health = Health()
        self.outbox_error: ProtocolError | None = None
        self.receive_error: ProtocolError | None = None
        self.calls: list[tuple[object, ...]] = []
        self.counted = 0
        self.disconnected = 0
        self.names = [f"vm-{number:02}" for number in range(5)]

    def connect(self, peer: Peer, hello: Hello) -> tuple[int, Outbox]:
        if self.error is not None:
            raise self.error
        self.calls.append(("connect", peer.guest))
        return 7, Outbox(self.outbox_error)

    def receive(self, peer: Peer, session: int, message: GuestMessage) -> None:
        if self.receive_error is not None:
            raise self.receive_error
        self.calls.append((session, message))

    def disconnect(self, peer: Peer, session: int) -> None:
        self.disconnected += 1

    def count_protocol_error(self, peer: Peer) -> None:
        self.counted += 1

    def host_view(self) -> HostView:
        return HOST

    def guest_names(self) -> list[str]:
        return self.names

    def guest_view(self, name: str) -> GuestView:
        if name not in self.names:
            raise NotFoundError(f"no guest named {name!r}")
        return GuestView(name, LIMITS)

    def subscribe(self) -> tuple[set[str], asyncio.Event, Callable[[], None]]:
        return set(), asyncio.Event(), lambda: None

    async def add_guest(
        self, name: str, limits: Limits, qmp_socket: str, cid: int | None, vsock_path: str | None
    ) -> None:
        await self._do("add", name, limits, qmp_socket, cid, vsock_path)
        self.names.append(name)

    async def remove_guest(self, name: str) -> None:
        await self._do("remove", name)

    async def change_limits(self, name: str, change: LimitsChange) -> None:
        await self._do("change", name, change)

    async def reset_limits(self, name: str) -> None:
        await self._do("reset", name)

    async def pause_guest(self, name: str, paused: bool) -> None:
        await self._do("pause", name, paused)

    async def reclaim_guest(self, name: str, request: ReclaimRequest) -> tuple[ReclaimedResource, ...]:
        await self._do("reclaim", name, request)
        return (ReclaimedResource(Kind.CPU, 4000, 1000, Reason("floor", "it needs that")),)

    async def _do(self, *call: object) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(call)


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gd", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
async def backend(root: Path) -> AsyncIterator[Backend]:
    one, peers = Backend(), Peers()
    servers = [
        await serve_guests(one, peers, root / "server"),
        await serve_monitor(one, root / "monitor"),
        await serve_admin(one, root / "admin"),
    ]
    relay = IngressRelay(root / "server", peers)
    relay.listen_unix("a", root / "a", privileged_ports=True)
    yield one
    await relay.close()
    for each in servers:
        await each.stop(0)


@contextlib.asynccontextmanager
async def talking(root: Path) -> AsyncIterator["grpc.aio.StreamStreamCall[object, object]"]:
    async with grpc.aio.insecure_channel(f"unix:{root}/a", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = guest_pb2_grpc.GuestServiceStub(channel).Negotiate()
        await call.write(convert.guest_message_to_wire(HELLO))
        yield call
        call.cancel()


async def ended(call: "grpc.aio.StreamStreamCall[object, object]") -> grpc.StatusCode:
    async with asyncio.timeout(5):
        with contextlib.suppress(grpc.aio.AioRpcError):
            while await call.read() is not grpc.aio.EOF:
                pass
        return await call.code()


async def gone(backend: Backend) -> None:
    """The backend hears of the end after the guest does."""
    async with asyncio.timeout(5):
        while not backend.disconnected:  # noqa: ASYNC110 - whatever a test waits for
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("error", "status", "counted"),
    [
        (NotFoundError("x"), grpc.StatusCode.UNAUTHENTICATED, 0),
        (VersionError("x"), grpc.StatusCode.FAILED_PRECONDITION, 1),
        (SupersededError("x"), grpc.StatusCode.ABORTED, 0),
        (ProtocolError("x"), grpc.StatusCode.INVALID_ARGUMENT, 1),
    ],
)
async def test_why_a_guest_is_not_served(
    backend: Backend, root: Path, error: GuestdError, status: grpc.StatusCode, counted: int
) -> None:
    backend.error = error
    async with talking(root) as call:
        assert await ended(call) is status
        assert await call.details() == "x"
    assert (backend.counted, backend.disconnected) == (counted, 0)


@pytest.mark.parametrize(
    ("error", "status", "counted"),
    [
        (SupersededError("x"), grpc.StatusCode.ABORTED, 0),
        (FloodError("x"), grpc.StatusCode.RESOURCE_EXHAUSTED, 1),
        (ProtocolError("x" * 1000), grpc.StatusCode.INVALID_ARGUMENT, 1),
    ],
)
async def test_why_a_stream_ends(
    backend: Backend, root: Path, error: ProtocolError, status: grpc.StatusCode, counted: int
) -> None:
    backend.outbox_error = error
    async with talking(root) as call:
        assert await ended(call) is status
        assert len(await call.details() or "") <= 200
    await gone(backend)
    assert (backend.counted, backend.disconnected) == (counted, 1)


async def test_what_is_one_too_many_ends_the_stream(backend: Backend, root: Path) -> None:
    backend.receive_error = FloodError("too many")
    async with talking(root) as call:
        await call.write(convert.guest_message_to_wire(Heartbeat()))
        assert await ended(call) is grpc.StatusCode.RESOURCE_EXHAUSTED
    await gone(backend)
    assert (backend.counted, backend.disconnected) == (1, 1)


async def test_messages_are_handed_on_with_their_session(backend: Backend, root: Path) -> None:
    async with talking(root) as call:
        assert convert.broker_message_from_wire(await call.read()) == WELCOME  # type: ignore[arg-type]
        await call.write(convert.guest_message_to_wire(Heartbeat(Usable(3))))
        await call.done_writing()
        assert await ended(call) is grpc.StatusCode.OK
    await gone(backend)
    assert backend.calls == [("connect", "a"), (7, Heartbeat(Usable(3)))]
    assert (backend.counted, backend.disconnected) == (0, 1)


async def test_a_guest_that_hangs_up_is_disconnected_once(backend: Backend, root: Path) -> None:
    async with talking(root) as call:
        await call.read()
    await gone(backend)
    assert (backend.counted, backend.disconnected) == (0, 1)


async def test_hello_is_not_waited_for_without_end(
    backend: Backend, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guests_service, "_HELLO_SECONDS", 0.1)
    async with grpc.aio.insecure_channel(f"unix:{root}/a") as channel:
        call = guest_pb2_grpc.GuestServiceStub(channel).Negotiate()
        assert await ended(call) is grpc.StatusCode.INVALID_ARGUMENT
        assert await call.details() == "no hello within 0.1 s"
    assert backend.counted == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NotFoundError("why"), grpc.StatusCode.NOT_FOUND),
        (AdmissionError("why"), grpc.StatusCode.FAILED_PRECONDITION),
        (FileExistsError("why"), grpc.StatusCode.ALREADY_EXISTS),
        (ValueError("why"), grpc.StatusCode.INVALID_ARGUMENT),
        (ProtocolError("why"), grpc.StatusCode.INVALID_ARGUMENT),
        (JournalError("why"), grpc.StatusCode.UNAVAILABLE),
        (HistoryError("why"), grpc.StatusCode.UNAVAILABLE),
        (GuestdError("why"), grpc.StatusCode.INTERNAL),
    ],
)
async def test_each_error_has_its_status_in_every_call(
    backend: Backend, root: Path, error: Exception, status: grpc.StatusCode
) -> None:
    backend.error = error
    async with grpc.aio.insecure_channel(f"unix:{root}/admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        for call in (
            stub.AddGuest(admin_pb2.AddGuestRequest(name="vm-09")),
            stub.RemoveGuest(admin_pb2.RemoveGuestRequest(name="vm-00")),
            stub.SetLimits(admin_pb2.SetLimitsRequest(name="vm-00")),
            stub.ResetLimits(admin_pb2.ResetLimitsRequest(name="vm-00")),
            stub.PauseGuest(admin_pb2.PauseGuestRequest(name="vm-00")),
            stub.ResumeGuest(admin_pb2.ResumeGuestRequest(name="vm-00")),
            stub.ReclaimGuest(admin_pb2.ReclaimGuestRequest(name="vm-00")),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert (caught.value.code(), caught.value.details()) == (status, "why")


async def test_what_is_unset_stays_unset(backend: Backend, root: Path) -> None:
    limits = common_pb2.Limits(min=common_pb2.Resources(cpu_millicores=1, memory_bytes=2))
    async with grpc.aio.insecure_channel(f"unix:{root}/admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        await stub.SetLimits(admin_pb2.SetLimitsRequest(name="vm-00", cpu_min_millicores=0, memory_weight=5))
        await stub.AddGuest(admin_pb2.AddGuestRequest(name="vm-77", limits=limits, qmp_socket="/q", vsock_path="/v"))
        await stub.AddGuest(admin_pb2.AddGuestRequest(name="vm-78", limits=limits, qmp_socket="/q", cid=9))
    expected = Limits(Resources(1, 2), Resources(0, 0), Resources(100, 100))
    assert backend.calls == [
        ("change", "vm-00", LimitsChange(cpu_min_millicores=0, memory_weight=5)),
        ("add", "vm-77", expected, "/q", None, "/v"),
        ("add", "vm-78", expected, "/q", 9, None),
    ]


async def test_amounts_beyond_any_machine_are_refused_here(backend: Backend, root: Path) -> None:
    async with grpc.aio.insecure_channel(f"unix:{root}/admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        huge = common_pb2.Limits(max=common_pb2.Resources(memory_bytes=(1 << 64) - 1))
        for call in (
            stub.SetLimits(admin_pb2.SetLimitsRequest(name="vm-00", memory_max_bytes=(1 << 64) - 1)),
            stub.AddGuest(admin_pb2.AddGuestRequest(name="vm-77", limits=huge)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert backend.calls == []


async def test_pages_hold_every_guest_once_even_if_one_goes_between(backend: Backend, root: Path) -> None:
    async with grpc.aio.insecure_channel(f"unix:{root}/monitor") as channel:
        stub = monitor_pb2_grpc.MonitorServiceStub(channel)
        first = await stub.ListGuests(monitor_pb2.ListGuestsRequest(page_size=2))
        backend.names.remove("vm-01")  # the last one of that page
        second = await stub.ListGuests(monitor_pb2.ListGuestsRequest(page_size=2, page_token=first.next_page_token))
        third = await stub.ListGuests(monitor_pb2.ListGuestsRequest(page_size=2, page_token=second.next_page_token))
    pages = [[guest.name for guest in page.guests] for page in (first, second, third)]
    assert pages == [["vm-00", "vm-01"], ["vm-02", "vm-03"], ["vm-04"]]
    assert third.next_page_token == ""


async def test_modes_of_the_sockets_and_leftovers(backend: Backend, root: Path) -> None:
    def mode(name: str) -> int:
        return stat.S_IMODE((root / name).stat().st_mode)

    assert (mode("server"), mode("monitor"), mode("admin")) == (0o600, 0o660, 0o600)
    again = await serve_admin(backend, root / "admin")  # a socket of a broker that was killed is replaced
    await again.stop(0)


async def test_a_place_that_cannot_be_listened_on_is_named(root: Path) -> None:
    with pytest.raises((OSError, RuntimeError), match="admin"):
        await serve_admin(Backend(), root / "missing" / "admin")


def test_guests_messages_have_a_hard_limit() -> None:
    options = dict(guests_service.GUEST_SERVER_OPTIONS)
    assert amounts.MAX_MESSAGE_BYTES < options["grpc.max_receive_message_length"] <= 4 * amounts.MAX_MESSAGE_BYTES
    assert guest_pb2.DESCRIPTOR.services_by_name["GuestService"].full_name == "guestd.v1.GuestService"
