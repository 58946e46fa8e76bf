"""The operator's view from end to end: client, sockets, services, and a backend that holds what a test put there."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import grpc
import grpc.aio
import pytest
from fake_operators import EXPLANATION, GUEST, HISTORY, HOST, NOON, RECLAIMED, FakeOperators, event

from guestd.model.errors import AdmissionError, ConfigError, GuestdError, NotFoundError, UnreachableError
from guestd.model.event import EventCode, EventQuery, SeenEvent
from guestd.model.explanation import ReclaimRequest
from guestd.v1 import admin_pb2, admin_pb2_grpc, monitor_pb2, monitor_pb2_grpc
from guestd.wire.client import BrokerClient
from guestd.wire.serve_admin import serve_admin
from guestd.wire.serve_monitor import serve_monitor


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gd", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
async def backend(root: Path) -> AsyncIterator[FakeOperators]:
    one = FakeOperators()
    servers = [await serve_monitor(one, root / "monitor.sock"), await serve_admin(one, root / "admin.sock")]
    yield one
    for server in servers:
        await server.stop(0)


@pytest.fixture
async def client(root: Path, backend: FakeOperators) -> AsyncIterator[BrokerClient]:
    async with BrokerClient(root) as one:
        yield one


@pytest.fixture
async def stub(root: Path, backend: FakeOperators) -> AsyncIterator["monitor_pb2_grpc.MonitorServiceAsyncStub"]:
    async with grpc.aio.insecure_channel(f"unix:{root}/monitor.sock") as channel:
        yield monitor_pb2_grpc.MonitorServiceStub(channel)


async def refused(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    return caught.value.code(), caught.value.details() or ""


async def test_host_guest_explanation_and_history_keep_every_field(client: BrokerClient) -> None:
    assert await client.host() == HOST
    assert await client.guest("web-1") == GUEST
    assert await client.explain("web-1") == EXPLANATION
    assert await client.history("web-1") == HISTORY


async def test_explain_asks_for_the_time_in_utc(client: BrokerClient, backend: FakeOperators) -> None:
    there = NOON.astimezone(timezone(timedelta(hours=9)))
    await client.explain("web-1", there)
    (_, _, at) = backend.calls[-1]
    assert isinstance(at, datetime)
    assert (at, at.utcoffset()) == (NOON, timedelta(0))
    await client.explain("web-1")
    assert backend.calls[-1] == ("explain", "web-1", None)


async def test_history_has_a_range_and_as_many_points_as_were_asked_for(
    client: BrokerClient, backend: FakeOperators, stub: "monitor_pb2_grpc.MonitorServiceAsyncStub"
) -> None:
    await client.history("web-1", NOON, NOON + timedelta(hours=1), 50)
    assert backend.calls[-1] == ("history", "web-1", NOON, NOON + timedelta(hours=1), 50)
    await stub.GetHistory(monitor_pb2.GetHistoryRequest(name="web-1"))
    assert backend.calls[-1] == ("history", "web-1", None, None, 300)
    await stub.GetHistory(monitor_pb2.GetHistoryRequest(name="web-1", max_points=1_000_000))
    assert backend.calls[-1] == ("history", "web-1", None, None, 2000)


async def test_who_is_unknown_and_a_range_that_is_none(client: BrokerClient, backend: FakeOperators) -> None:
    for call in (client.explain("nobody"), client.history("nobody")):
        with pytest.raises(NotFoundError, match="'nobody'"):
            await call
    backend.error = ValueError("until is before since")
    with pytest.raises(ConfigError, match="until is before since"):
        await client.history("web-1")


async def test_a_time_that_no_calendar_has_is_refused(stub: "monitor_pb2_grpc.MonitorServiceAsyncStub") -> None:
    explain = monitor_pb2.ExplainGuestRequest(name="web-1")
    explain.at.seconds = 1 << 60
    events = monitor_pb2.ListEventsRequest()
    events.since.seconds = -(1 << 60)
    history = monitor_pb2.GetHistoryRequest(name="web-1")
    history.until.nanos = -5
    history.until.seconds = 1 << 62
    for call, field in (
        (stub.ExplainGuest(explain), "at"),
        (stub.ListEvents(events), "since"),
        (stub.GetHistory(history), "until"),
    ):
        code, details = await refused(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details.startswith(f"{field} is no time")


async def test_events_come_whole_over_all_pages(client: BrokerClient, backend: FakeOperators) -> None:
    backend.record = [event(number) for number in range(1, 2502)]
    assert await client.events(EventQuery(limit=10_000)) == tuple(backend.record)
    assert await client.events(EventQuery(limit=1200)) == tuple(backend.record[:1200])
    assert await client.events(EventQuery(after_id=2499)) == tuple(backend.record[2499:])


async def test_the_newest_events_are_still_oldest_first_and_have_no_further_page(
    client: BrokerClient, backend: FakeOperators, stub: "monitor_pb2_grpc.MonitorServiceAsyncStub"
) -> None:
    backend.record = [event(number) for number in range(1, 8)]
    assert await client.events(EventQuery(limit=3, newest=True)) == tuple(backend.record[-3:])
    page = await stub.ListEvents(monitor_pb2.ListEventsRequest(page_size=3, newest=True))
    assert ([one.id for one in page.events], page.next_page_token) == ([5, 6, 7], "")


async def test_events_of_one_guest_in_a_range(client: BrokerClient, backend: FakeOperators) -> None:
    backend.record = [event(number, "web-1" if number % 2 else "db") for number in range(1, 10)]
    found = await client.events(EventQuery("db", NOON + timedelta(seconds=4), NOON + timedelta(seconds=8)))
    assert [one.id for one in found] == [4, 6]
    assert {one.guest for one in found} == {"db"}


async def test_an_event_without_guest_kind_reason_and_inputs_has_none(
    client: BrokerClient, backend: FakeOperators
) -> None:
    backend.record = [replace(event(1, ""), kind=None, reason=None, inputs=None)]
    assert await client.events(EventQuery()) == tuple(backend.record)


@pytest.mark.parametrize("token", ["x", "-1", "0", "01", " 1", "1.5", "٣", "4", "9" * 30, "9" * 5000, "\0"])
async def test_a_page_token_that_no_broker_gave_is_refused(
    stub: "monitor_pb2_grpc.MonitorServiceAsyncStub", backend: FakeOperators, token: str
) -> None:
    backend.record = [event(number) for number in range(1, 4)]
    code, details = await refused(stub.ListEvents(monitor_pb2.ListEventsRequest(page_token=token)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "begin again without one" in details


async def test_watched_events_follow_what_was_seen_and_say_what_was_missed(
    client: BrokerClient, backend: FakeOperators
) -> None:
    backend.record = [event(number) for number in range(1, 4)]
    stream = client.watch_events("web-1", after_id=1)
    assert [await anext(stream), await anext(stream)] == [SeenEvent(event(2)), SeenEvent(event(3))]
    backend.record.append(event(4))
    backend.missed = 7
    backend.more.set()
    assert await anext(stream) == SeenEvent(event(4), 7)
    await stream.aclose()  # type: ignore[attr-defined]
    async with asyncio.timeout(5):
        while backend.followers:  # noqa: ASYNC110 - the broker hears of it after the client does
            await asyncio.sleep(0.01)


async def test_an_id_beyond_all_events_is_refused(client: BrokerClient) -> None:
    with pytest.raises(ConfigError, match="after_id"):
        await anext(client.watch_events(after_id=(1 << 64) - 1))


async def test_a_watch_of_events_ends_with_the_broker(root: Path) -> None:
    backend = FakeOperators()
    backend.record = [event(1)]
    server = await serve_monitor(backend, root / "monitor.sock")
    async with BrokerClient(root) as client:
        stream = client.watch_events(after_id=0)
        assert await anext(stream) == SeenEvent(event(1))
        await server.stop(0)
        with pytest.raises(UnreachableError, match=r"monitor\.sock"):
            await anext(stream)


async def test_a_reclaim_asks_for_what_was_said_and_no_more(client: BrokerClient, backend: FakeOperators) -> None:
    assert await client.reclaim_guest("web-1", ReclaimRequest()) == (RECLAIMED, GUEST)
    await client.reclaim_guest("web-1", ReclaimRequest(0, 1 << 30, dry_run=True))
    assert backend.calls == [
        ("reclaim", "web-1", ReclaimRequest(None, None, False)),
        ("reclaim", "web-1", ReclaimRequest(0, 1 << 30, True)),
    ]
    with pytest.raises(ConfigError, match="memory_bytes"):
        await client.reclaim_guest("web-1", ReclaimRequest(memory_bytes=1 << 60))
    backend.error = AdmissionError("its VM is paused")
    with pytest.raises(AdmissionError, match="its VM is paused"):
        await client.reclaim_guest("web-1", ReclaimRequest())


async def test_texts_are_bounded_on_the_wire(client: BrokerClient, backend: FakeOperators) -> None:
    backend.record = [replace(event(1), text="x" * 10_000)]
    (found,) = await client.events(EventQuery())
    assert found.text == "x" * 512


async def test_a_broker_that_does_not_know_a_call_is_older(root: Path) -> None:
    server = grpc.aio.server()
    server.add_insecure_port(f"unix:{root}/monitor.sock")
    await server.start()
    async with BrokerClient(root) as client:
        with pytest.raises(GuestdError, match="older than this program"):
            await client.explain("web-1")
    await server.stop(0)


class Newer(monitor_pb2_grpc.MonitorServiceServicer):
    """Says what this client does not know."""

    async def ListEvents(self, request: object, context: object) -> monitor_pb2.ListEventsResponse:
        one = monitor_pb2.Event(id=1)
        one.kind, one.code = 77, 99  # type: ignore[assignment]
        return monitor_pb2.ListEventsResponse(events=[one])

    async def ExplainGuest(self, request: object, context: object) -> monitor_pb2.ExplainGuestResponse:
        one = monitor_pb2.ResourceExplanation()
        one.kind = 77  # type: ignore[assignment]
        return monitor_pb2.ExplainGuestResponse(resources=[one], unknown_time=True)

    async def GetHistory(self, request: object, context: object) -> monitor_pb2.GetHistoryResponse:
        one = monitor_pb2.HistoryResource()
        one.kind = 77  # type: ignore[assignment]
        return monitor_pb2.GetHistoryResponse(points=[monitor_pb2.HistoryPoint(resources=[one])])


class NewerAdmin(admin_pb2_grpc.AdminServiceServicer):
    async def ReclaimGuest(self, request: object, context: object) -> admin_pb2.ReclaimGuestResponse:
        one = admin_pb2.ReclaimedResource()
        one.kind = 77  # type: ignore[assignment]
        return admin_pb2.ReclaimGuestResponse(resources=[one])


async def test_words_of_a_newer_broker_read_as_unknown_or_are_left_out(root: Path) -> None:
    monitor, admin = grpc.aio.server(), grpc.aio.server()
    monitor_pb2_grpc.add_MonitorServiceServicer_to_server(Newer(), monitor)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(NewerAdmin(), admin)
    for server, name in ((monitor, "monitor.sock"), (admin, "admin.sock")):
        server.add_insecure_port(f"unix:{root}/{name}")
        await server.start()
    async with BrokerClient(root) as client:
        (seen,) = await client.events(EventQuery())
        assert (seen.kind, seen.code, seen.reason, seen.inputs) == (None, EventCode.UNKNOWN, None, None)
        explained = await client.explain("x")
        assert (explained.resources, explained.unknown_time) == ((), True)
        assert (await client.history("x")).points[0].resources == ()
        assert (await client.reclaim_guest("x", ReclaimRequest()))[0] == ()
    for server in (monitor, admin):
        await server.stop(0)
