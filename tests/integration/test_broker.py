"""The whole broker on real sockets: engine, journal, relay and gRPC servers, with fake VMs and real guest daemons."""

import asyncio
import contextlib
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from broker_rig import (
    BrokerRig,
    RawGuest,
    demand,
    eventually,
    guest_table,
    hello,
    host_table,
    short_directory,
)

from guestd.broker.core.track import Timing
from guestd.model.errors import AdmissionError, ConfigError, GuestdError, NotFoundError
from guestd.model.messages import Ack, AckStatus, Grant, Heartbeat, Hello, OrderId, Reclaim, Usable
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB, MIB
from guestd.model.view import GuestRemoved, GuestView, LimitsChange, LimitsOrigin
from guestd.model.vm import VmStatus
from guestd.v1 import common_pb2, guest_pb2, guest_pb2_grpc, monitor_pb2, monitor_pb2_grpc
from guestd.wire.client import BrokerClient

MIN_MEMORY = 512 * MIB


@pytest.fixture
async def rig() -> AsyncIterator[BrokerRig]:
    """A broker with the guests `a` and `b`."""
    with short_directory() as root:
        config = host_table(root) + guest_table(root, "a") + guest_table(root, "b")
        async with BrokerRig(root, config) as broker:
            yield broker


@pytest.fixture
async def client(rig: BrokerRig) -> AsyncIterator[BrokerClient]:
    async with BrokerClient(rig.run_dir) as one:
        yield one


# ---- grows and shrinks ---------------------------------------------------------------------------


async def test_a_vm_follows_its_load_over_the_wire(rig: BrokerRig) -> None:
    guest = rig.guest("a")
    await eventually(lambda: rig.connected("a"), "connected")
    guest.load.tasks, guest.load.memory_bytes = 5, 900 * MIB
    await eventually(lambda: len(guest.kernel.online_cpus) == 4, "four CPUs online")
    await eventually(lambda: guest.vm.guest_memory_bytes >= 1152 * MIB, "memory for 900 MiB in use")
    guest.load.tasks, guest.load.memory_bytes = 0.1, 120 * MIB
    await eventually(lambda: guest.has(1, MIN_MEMORY), "back at the minimum")
    await eventually(lambda: rig.reserved("a") == Resources(1000, MIN_MEMORY), "the book agrees")
    assert guest.kernel.online_cpus == {0}


async def test_a_broker_that_restarts_on_its_journal_changes_nothing(rig: BrokerRig) -> None:
    guest = rig.guest("a")
    guest.load.tasks = 4.2
    await eventually(lambda: guest.has(4, MIN_MEMORY), "four CPUs")
    await eventually(lambda: rig.reserved("a").cpu_millicores == 4000, "in the book")
    requests, epoch = len(guest.vm.requests), rig.engine.machine.epoch
    await rig.stop()
    await asyncio.sleep(0.3)
    assert guest.has(4, MIN_MEMORY)
    await rig.start()
    assert rig.engine.machine.epoch == epoch + 1
    await eventually(lambda: rig.connected("a"), "the daemon is back by itself")
    await asyncio.sleep(0.5)
    assert guest.has(4, MIN_MEMORY)
    assert len(guest.vm.requests) == requests
    guest.load.tasks = 0.1
    await eventually(lambda: guest.has(1, MIN_MEMORY), "orders of the new epoch are obeyed")


async def test_a_daemon_that_restarts_changes_nothing(rig: BrokerRig) -> None:
    guest = rig.guest("a")
    guest.load.tasks = 4.2
    await eventually(lambda: guest.has(4, MIN_MEMORY), "four CPUs")
    await guest.stop()
    await eventually(lambda: not rig.connected("a"), "the broker sees it go")
    await asyncio.sleep(0.3)
    assert guest.has(4, MIN_MEMORY)
    guest.start()
    await eventually(lambda: rig.connected("a"), "back")
    await asyncio.sleep(0.3)
    assert guest.has(4, MIN_MEMORY)


async def test_an_unreachable_hypervisor_degrades_its_guest_only(rig: BrokerRig, client: BrokerClient) -> None:
    a, b = rig.guest("a"), rig.guest("b")
    a.vm.set_status(VmStatus.UNREACHABLE)
    b.load.tasks = 4.2
    await eventually(lambda: b.has(4, MIN_MEMORY), "the other one grows")
    shown = await client.guest("a")
    assert shown.vm_status is VmStatus.UNREACHABLE
    assert "QMP socket" in shown.degraded
    assert (await client.guest("b")).degraded == ""
    a.vm.set_status(VmStatus.RUNNING)
    a.load.tasks = 4.2
    await eventually(lambda: a.has(4, MIN_MEMORY), "and the first one, once it answers")


# ---- operators -----------------------------------------------------------------------------------


async def test_limits_take_effect_and_survive_a_restart(rig: BrokerRig, client: BrokerClient) -> None:
    guest = rig.guest("a")
    guest.load.tasks = 4.2
    await eventually(lambda: guest.has(4, MIN_MEMORY), "four CPUs")
    shown = await client.guest("a")
    assert (shown.limits_origin, shown.limits_origin_detail) == (LimitsOrigin.FILE, str(rig.config_path))
    shown = await client.set_limits("a", LimitsChange(cpu_max_millicores=2000))
    assert shown.limits_origin is LimitsOrigin.ADMIN
    await eventually(lambda: guest.has(2, MIN_MEMORY), "shrunk to the new maximum")
    await rig.stop()
    await client.close()
    await rig.start()
    shown = await client.guest("a")
    assert (shown.limits.max.cpu_millicores, shown.limits_origin) == (2000, LimitsOrigin.ADMIN)
    await rig.engine.reload(rig.load())
    assert (await client.guest("a")).limits.max.cpu_millicores == 2000
    shown = await client.reset_limits("a")
    assert (shown.limits.max.cpu_millicores, shown.limits_origin) == (4000, LimitsOrigin.FILE)
    await eventually(lambda: guest.has(4, MIN_MEMORY), "grown to the file's maximum")
    await rig.stop()
    await client.close()
    await rig.start()
    assert (await client.guest("a")).limits_origin is LimitsOrigin.FILE


async def test_limits_that_make_no_sense_are_refused_with_the_numbers(rig: BrokerRig, client: BrokerClient) -> None:
    before = (await client.guest("a")).limits
    with pytest.raises(ConfigError, match="min 3 CPU is above max 2 CPU"):
        await client.set_limits("a", LimitsChange(cpu_min_millicores=3000, cpu_max_millicores=2000))
    with pytest.raises(ConfigError, match="weight is 0"):
        await client.set_limits("a", LimitsChange(cpu_weight=0))
    with pytest.raises(ConfigError, match="memory_max_bytes"):
        await client.set_limits("a", LimitsChange(memory_max_bytes=1 << 60))
    with pytest.raises(AdmissionError, match="minimums of 2 guests add up to 9 CPU, but the host has 8 CPU"):
        await client.set_limits("a", LimitsChange(cpu_min_millicores=8000, cpu_max_millicores=8000))
    with pytest.raises(NotFoundError, match="'nobody'"):
        await client.set_limits("nobody", LimitsChange(cpu_weight=5))
    assert (await client.guest("a")).limits == before
    assert (await client.guest("a")).limits_origin is LimitsOrigin.FILE


async def test_a_paused_guest_stays_as_it_is_also_over_a_restart(rig: BrokerRig, client: BrokerClient) -> None:
    guest = rig.guest("a")
    await eventually(lambda: rig.connected("a"), "connected")
    assert (await client.pause_guest("a")).paused
    guest.load.tasks = 4.2
    await asyncio.sleep(1.0)
    assert guest.has(1, MIN_MEMORY)
    await rig.stop()
    await client.close()
    await rig.start()
    assert (await client.guest("a")).paused
    await eventually(lambda: rig.connected("a"), "connected again")
    await asyncio.sleep(0.5)
    assert guest.has(1, MIN_MEMORY)
    assert not (await client.resume_guest("a")).paused
    await eventually(lambda: guest.has(4, MIN_MEMORY), "grows once resumed")


ADDED = Limits(Resources(1000, MIN_MEMORY), Resources(2000, GIB))


async def test_a_guest_is_added_served_kept_and_removed_by_calls(rig: BrokerRig, client: BrokerClient) -> None:
    shown = await client.add_guest("c", ADDED, rig.root / "c.qmp", vsock_path=rig.root / "c")
    assert shown.limits_origin is LimitsOrigin.ADMIN
    guest = rig.guest("c")
    guest.load.tasks = 4.2
    await eventually(lambda: guest.has(2, MIN_MEMORY), "served up to its maximum")
    with pytest.raises(AdmissionError, match="already"):
        await client.add_guest("c", ADDED, rig.root / "d.qmp", vsock_path=rig.root / "d")
    await rig.stop()
    await client.close()
    await rig.start()
    await eventually(lambda: rig.connected("c"), "known after a restart")
    await rig.reload(rig.config_path.read_text())
    assert rig.connected("c")
    with pytest.raises(AdmissionError, match="no file"):
        await client.reset_limits("c")
    await client.remove_guest("c")
    assert [one.name for one in await client.guests()] == ["a", "b"]
    assert guest.has(2, MIN_MEMORY)  # the VM is left as it is
    with pytest.raises(NotFoundError):
        await client.remove_guest("c")
    await rig.stop()
    await client.close()
    await rig.start()
    assert [one.name for one in await client.guests()] == ["a", "b"]


async def test_a_guest_that_makes_no_sense_is_not_added(rig: BrokerRig, client: BrokerClient) -> None:
    with pytest.raises(ConfigError, match=r"is a's already"):
        await client.add_guest("c", ADDED, rig.root / "c.qmp", vsock_path=rig.root / "a")
    with pytest.raises(ConfigError, match=r"needs either cid .* or vsock_path"):
        await client.add_guest("c", ADDED, rig.root / "c.qmp")
    with pytest.raises(ConfigError, match=r"name 'x/y'"):
        await client.add_guest("x/y", ADDED, rig.root / "c.qmp", vsock_path=rig.root / "c")
    with pytest.raises(AdmissionError, match="minimums of 3 guests"):
        await client.add_guest(
            "c", Limits(Resources(7000, GIB), Resources(8000, GIB)), rig.root / "c.qmp", vsock_path=rig.root / "c"
        )
    with pytest.raises(AdmissionError, match=r"comes from .*broker.toml"):
        await client.remove_guest("a")
    assert [one.name for one in await client.guests()] == ["a", "b"]


# ---- reload --------------------------------------------------------------------------------------


async def test_reload_adds_and_removes_without_dropping_a_stream(rig: BrokerRig, client: BrokerClient) -> None:
    rig.guest("a")
    b = rig.guest("b")
    await eventually(lambda: rig.connected("a") and rig.connected("b"), "both connected")
    session = rig.engine.machine.guests["a"].session
    root = rig.root
    await rig.reload(host_table(root, cpus=16) + guest_table(root, "a", cpus=(1, 3)) + guest_table(root, "c"))
    c = rig.guest("c")
    c.load.tasks = 4.2
    await eventually(lambda: c.has(4, MIN_MEMORY), "the new one is served")
    assert [one.name for one in await client.guests()] == ["a", "c"]
    assert rig.engine.machine.guests["a"].session == session
    assert (await client.guest("a")).limits.max.cpu_millicores == 3000
    assert (await client.host()).capacity.cpu_millicores == 16_000
    await rig.reload(host_table(root) + guest_table(root, "a") + guest_table(root, "b"))
    b.load.tasks = 4.2
    await eventually(lambda: b.has(4, MIN_MEMORY), "and the old one again, when it is back in the file")
    assert rig.engine.machine.guests["a"].session == session


async def test_a_reload_that_does_not_fit_changes_nothing(rig: BrokerRig, client: BrokerClient) -> None:
    root = rig.root
    await client.add_guest("d", ADDED, root / "d.qmp", vsock_path=root / "d")
    before, host = [(one.name, one.limits) for one in await client.guests()], (await client.host()).capacity
    for text, error in (
        # What the file says fits, but not together with the guest that was added by a call.
        (host_table(root) + guest_table(root, "a", cpus=(8, 8)), (AdmissionError, "minimums of 2 guests")),
        (
            host_table(root, cpus=16, memory="1000MiB") + guest_table(root, "a"),
            (AdmissionError, "minimums of 2 guests"),
        ),
        (host_table(root, cpus=16) + guest_table(root, "e").replace("e.qmp", "d.qmp"), (ConfigError, "already")),
        (host_table(root, cpus=1) + guest_table(root, "a", cpus=(2, 4)), (ConfigError, "minimums of 1 guests")),
        ("nonsense", (ConfigError, "is not TOML")),
    ):
        with pytest.raises(error[0], match=error[1]):
            await rig.reload(text)
        assert [(one.name, one.limits) for one in await client.guests()] == before
        assert (await client.host()).capacity == host


async def test_minimums_may_move_from_one_guest_to_another_in_one_reload(rig: BrokerRig, client: BrokerClient) -> None:
    root = rig.root

    def file(a: int, b: int) -> str:
        return host_table(root) + guest_table(root, "a", cpus=(a, 7)) + guest_table(root, "b", cpus=(b, 7))

    for a, b in ((1, 7), (7, 1), (1, 7)):
        await rig.reload(file(a, b))
        assert [one.limits.min.cpu_millicores for one in await client.guests()] == [a * 1000, b * 1000]


async def test_limits_set_by_a_call_end_with_the_guest(rig: BrokerRig, client: BrokerClient) -> None:
    await client.set_limits("b", LimitsChange(cpu_max_millicores=2000))
    root, with_b = rig.root, rig.config_path.read_text()
    await rig.reload(host_table(root) + guest_table(root, "a"))
    await rig.reload(with_b)
    for _ in range(2):
        shown = await client.guest("b")
        assert (shown.limits.max.cpu_millicores, shown.limits_origin) == (4000, LimitsOrigin.FILE)
        await rig.stop()
        await client.close()
        await rig.start()


async def test_limits_set_by_calls_that_fit_no_more_do_not_stop_a_broker(rig: BrokerRig, client: BrokerClient) -> None:
    await client.set_limits("a", LimitsChange(cpu_min_millicores=3000))
    await client.set_limits("b", LimitsChange(cpu_min_millicores=2000))
    await rig.stop()
    await client.close()
    root = rig.root
    rig.config_path.write_text(
        host_table(root, cpus=4) + guest_table(root, "a") + guest_table(root, "b") + guest_table(root, "c")
    )
    await rig.start()
    assert [(one.limits.min.cpu_millicores, one.limits_origin) for one in await client.guests()] == [
        (1000, LimitsOrigin.FILE),
        (1000, LimitsOrigin.FILE),
        (1000, LimitsOrigin.FILE),
    ]


async def test_a_channel_that_was_given_away_by_a_call_is_not_given_twice(rig: BrokerRig, client: BrokerClient) -> None:
    await client.add_guest("d", ADDED, rig.root / "d.qmp", vsock_path=rig.root / "d")
    await rig.stop()
    rig.config_path.write_text(host_table(rig.root) + guest_table(rig.root, "e").replace('/e"', '/d"'))
    with pytest.raises(ConfigError, match=r"d's already|e's already"):
        await rig.start()
    rig.config_path.write_text(host_table(rig.root) + guest_table(rig.root, "e"))
    await rig.engine.stop()
    await rig.start()


async def test_a_guest_that_is_gone_from_the_file_loses_its_stream(rig: BrokerRig) -> None:
    async with RawGuest(rig.root, "b") as raw:
        await raw.hello()
        await rig.reload(host_table(rig.root) + guest_table(rig.root, "a"))
        assert await raw.status() is not grpc.StatusCode.OK
    assert rig.engine.guest_names() == ["a"]


# ---- bad input from a guest ----------------------------------------------------------------------

NONSENSE: list[tuple[str, object, grpc.StatusCode]] = [
    ("malformed", b"\xff\xff\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
    ("empty", guest_pb2.NegotiateRequest(), grpc.StatusCode.INVALID_ARGUMENT),
    ("unknown kind of message", b"\xfa\x06\x01a", grpc.StatusCode.INVALID_ARGUMENT),
    ("a second hello", hello(2), grpc.StatusCode.INVALID_ARGUMENT),
    (
        "beyond any machine",
        guest_pb2.NegotiateRequest(
            demand=guest_pb2.Demand(
                sequence=1,
                urgency=guest_pb2.URGENCY_NOW,
                needed=common_pb2.Resources(cpu_millicores=(1 << 64) - 1, memory_bytes=(1 << 64) - 1),
            )
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    (
        "an enum of no meaning",
        guest_pb2.NegotiateRequest(demand=guest_pb2.Demand(sequence=1)),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    ("oversized", b"\x00" * (64 * 1024 + 1), grpc.StatusCode.RESOURCE_EXHAUSTED),
]


@pytest.mark.parametrize(("message", "status"), [one[1:] for one in NONSENSE], ids=[one[0] for one in NONSENSE])
async def test_nonsense_is_answered_counted_and_hurts_nobody_else(
    rig: BrokerRig, client: BrokerClient, message: object, status: grpc.StatusCode
) -> None:
    other = rig.guest("b")
    await eventually(lambda: rig.connected("b"), "the other one is connected")
    session = rig.engine.machine.guests["b"].session
    async with RawGuest(rig.root, "a") as raw:
        await raw.hello()
        await raw.send(message)  # type: ignore[arg-type]
        assert await raw.status() is status
    assert (await client.guest("a")).protocol_errors == 1
    await eventually(lambda: not rig.connected("a"), "its session is over")
    other.load.tasks = 4.2
    await eventually(lambda: other.has(4, MIN_MEMORY), "the other one grows")
    assert rig.engine.machine.guests["b"].session == session
    assert (await client.guest("b")).protocol_errors == 0
    async with RawGuest(rig.root, "a") as raw:
        await raw.hello()  # and it may come again


@pytest.mark.parametrize(
    "first", [b"\xff\xff\xff\xff", Heartbeat(), b"\x00" * (64 * 1024 + 1)], ids=["malformed", "no hello", "oversized"]
)
async def test_nonsense_before_hello_is_answered_and_counted(
    rig: BrokerRig, client: BrokerClient, first: object
) -> None:
    async with RawGuest(rig.root, "a") as raw:
        await raw.send(first)  # type: ignore[arg-type]
        assert await raw.status() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert (await client.guest("a")).protocol_errors == 1


async def test_other_protocols_are_refused(rig: BrokerRig, client: BrokerClient) -> None:
    async with RawGuest(rig.root, "a") as raw:
        await raw.send(Hello(2, 9, hello().identity, Usable()))
        assert await raw.status() is grpc.StatusCode.FAILED_PRECONDITION
        assert "speaks protocol 1" in await raw.call.details()


async def test_a_flood_ends_its_own_stream_only(rig: BrokerRig, client: BrokerClient) -> None:
    other = rig.guest("b")
    await eventually(lambda: rig.connected("b"), "the other one is connected")
    async with RawGuest(rig.root, "a") as raw:
        await raw.hello()
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            for _ in range(2000):
                await raw.send(Heartbeat())
        # A write that fails makes grpc.aio forget the status that the server gave.
        assert await raw.status() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL)
    assert (await client.guest("a")).protocol_errors == 1
    other.load.tasks = 4.2
    await eventually(lambda: other.has(4, MIN_MEMORY), "the other one grows")


async def test_a_slow_reader_is_bounded_and_hears_the_newest(rig: BrokerRig) -> None:
    async with RawGuest(rig.root, "a") as raw:
        await raw.hello()
        _, session = rig.engine._sessions["a"]
        for revision in range(20_000):
            session.put(Grant(OrderId(1, revision, revision), Kind.CPU, 1000))
            session.put(Grant(OrderId(1, revision, revision), Kind.MEMORY, MIN_MEMORY))
            session.put(Heartbeat())
        assert len(session._waiting) <= 4
        newest = 0
        while newest < 19_999:
            message = await raw.read()
            newest = max(newest, message.id.revision) if isinstance(message, Grant) else newest
        await raw.send(demand(1, 2000, MIN_MEMORY))
        await eventually(lambda: rig.reserved("a").cpu_millicores == 2000, "still served")


async def test_acks_to_orders_that_never_were_change_nothing(rig: BrokerRig, client: BrokerClient) -> None:
    async with RawGuest(rig.root, "a") as raw:
        await raw.hello()
        await raw.send(demand(1, 1000, MIN_MEMORY))
        for kind in Kind:
            for status in AckStatus:
                await raw.send(Ack(OrderId(7, 7, 7), kind, status, 1 << 30, Usable(4, 4, 1 << 40, 1 << 40, 1)))
        await asyncio.sleep(0.3)
        assert rig.vms["a"].requests == []
        assert rig.reserved("a") == Resources(1000, MIN_MEMORY)
        assert rig.connected("a")


# ---- identity ------------------------------------------------------------------------------------


async def test_a_connection_of_no_guest_is_unauthenticated(rig: BrokerRig) -> None:
    async with grpc.aio.insecure_channel(f"unix:{rig.run_dir}/guests/server.sock") as channel:
        call = guest_pb2_grpc.GuestServiceStub(channel).Negotiate()
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_the_channel_is_the_identity(rig: BrokerRig) -> None:
    """Whatever a guest says of itself, it gets what is its channel's."""
    async with RawGuest(rig.root, "b") as raw:
        welcome = await raw.hello()
        assert welcome.guest == "b"
        await raw.send(demand(1, 4000, 2 * GIB))
        await eventually(lambda: rig.reserved("b").cpu_millicores == 4000, "its own grows")
        assert rig.vms["a"].requests == []


async def test_a_newer_daemon_takes_over_and_an_older_is_refused(rig: BrokerRig) -> None:
    async with RawGuest(rig.root, "a") as old, RawGuest(rig.root, "a") as new, RawGuest(rig.root, "a") as older:
        await old.hello(generation=5)
        await new.hello(generation=6)
        assert await old.status() is grpc.StatusCode.ABORTED
        await older.send(hello(generation=4))
        assert await older.status() is grpc.StatusCode.ABORTED
        assert rig.connected("a")
        await new.send(demand(1, 2000, MIN_MEMORY))
        await eventually(lambda: rig.reserved("a").cpu_millicores == 2000, "the newer one is served")


async def test_a_guest_may_not_open_connections_without_end(rig: BrokerRig) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for number in range(4):
            await (await stack.enter_async_context(RawGuest(rig.root, "a"))).hello(generation=number + 1)
        for _ in range(4):
            stream = await stack.enter_async_context(RawGuest(rig.root, "a"))
            assert await stream.status() is grpc.StatusCode.UNAVAILABLE
        assert rig.connected("a")


# ---- the monitor ---------------------------------------------------------------------------------


async def test_guests_come_in_pages(rig: BrokerRig) -> None:
    async with grpc.aio.insecure_channel(f"unix:{rig.run_dir}/monitor.sock") as channel:
        stub = monitor_pb2_grpc.MonitorServiceStub(channel)
        names, token = [], ""
        for _ in range(2):
            page = await stub.ListGuests(monitor_pb2.ListGuestsRequest(page_size=1, page_token=token))
            names += [guest.name for guest in page.guests]
            token = page.next_page_token
        assert (names, token) == (["a", "b"], "")
        everything = await stub.ListGuests(monitor_pb2.ListGuestsRequest(page_size=1_000_000))
        assert [guest.name for guest in everything.guests] == ["a", "b"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetGuest(monitor_pb2.GetGuestRequest(name="nobody"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_watching_shows_all_then_changes_then_removals(rig: BrokerRig, client: BrokerClient) -> None:
    changes = client.watch_guests(0.02)
    async with asyncio.timeout(10):
        first = [await anext(changes), await anext(changes)]
        assert [one.name for one in first] == ["a", "b"]
        await client.pause_guest("b")
        while True:
            one = await anext(changes)
            if isinstance(one, GuestView) and one.name == "b" and one.paused:
                break
        await rig.reload(host_table(rig.root) + guest_table(rig.root, "a"))
        while await anext(changes) != GuestRemoved("b"):
            pass
    await changes.aclose()
    await eventually(lambda: not rig.engine._subscribers, "nobody watches any more")


async def test_an_interval_that_makes_no_sense_is_refused(rig: BrokerRig) -> None:
    async with grpc.aio.insecure_channel(f"unix:{rig.run_dir}/monitor.sock") as channel:
        request = monitor_pb2.WatchGuestsRequest()
        request.min_interval.seconds = -5
        call = monitor_pb2_grpc.MonitorServiceStub(channel).WatchGuests(request)
        async with asyncio.timeout(5):
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_sockets_are_open_only_to_those_they_are_for(rig: BrokerRig) -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    assert mode(rig.run_dir / "admin.sock") == 0o600
    assert mode(rig.run_dir / "monitor.sock") == 0o660
    assert mode(rig.run_dir / "guests") == 0o700
    assert mode(rig.run_dir / "guests" / "server.sock") == 0o600
    assert mode(rig.root / "a_4747") == 0o600


async def test_the_monitor_cannot_change_anything(rig: BrokerRig) -> None:
    async with grpc.aio.insecure_channel(f"unix:{rig.run_dir}/monitor.sock") as channel:
        pause = channel.unary_unary("/guestd.v1.AdminService/PauseGuest")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pause(b"\x0a\x01a")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


# ---- partial shrinks -----------------------------------------------------------------------------


async def test_memory_that_stays_makes_a_partial_shrink(rig: BrokerRig, client: BrokerClient) -> None:
    guest = rig.guest("a")
    guest.load.memory_bytes = 900 * MIB
    await eventually(lambda: guest.vm.guest_memory_bytes >= 1152 * MIB, "grown")
    await asyncio.sleep(1)
    guest.kernel.step = lambda seconds: None  # type: ignore[method-assign] - pinned from here on
    guest.vm.guest_keeps_bytes = GIB
    rig.engine.machine.timing = Timing(unplug_progress_seconds=0.5, cool_down_seconds=0.1, retry_seconds=30)
    guest.load.memory_bytes = 120 * MIB
    await eventually(lambda: rig.engine.machine.guests["a"].tracks[Kind.MEMORY].counters.partials == 1, "ends partial")
    await eventually(lambda: rig.reserved("a").memory_bytes == GIB, "what was achieved is committed")
    assert guest.vm.truth().memory_held_bytes == GIB
    assert (await client.guest("a")).resource(Kind.MEMORY).partials == 1


async def test_grants_and_reclaims_reach_a_raw_guest_in_stages(rig: BrokerRig) -> None:
    """A guest that never answers is asked, urged, and then overdue; nothing is taken by force."""
    async with RawGuest(rig.root, "a") as raw:
        await raw.hello()
        await raw.send(demand(1, 2000, MIN_MEMORY))
        await eventually(lambda: rig.reserved("a").cpu_millicores == 2000, "granted")
        await raw.send(demand(2, 1000, MIN_MEMORY))
        stages = []
        number = 3
        while len(stages) < 3:
            message = await raw.read()
            if isinstance(message, Reclaim):
                stages.append(str(message.stage))
                await raw.send(demand(number, 1000, MIN_MEMORY))
                number += 1
        assert stages == ["ask", "urge", "overdue"]
        await eventually(lambda: rig.engine.machine.guests["a"].tracks[Kind.CPU].overdue, "overdue")
        assert rig.reserved("a").cpu_millicores == 2000
        assert ("request_vcpus", 1) not in rig.vms["a"].requests


async def test_an_error_of_guestd_reads_as_one(rig: BrokerRig, client: BrokerClient) -> None:
    with pytest.raises(GuestdError):
        await client.pause_guest("nobody")
