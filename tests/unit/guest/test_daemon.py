"""The daemon's shell: it samples, dials, and carries out what its core decides, and nothing else."""

import asyncio
import errno
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import grpc.aio
import pytest

from guestd.broker.hypervisor.fake import FakeVm
from guestd.guest import app
from guestd.guest import daemon as module
from guestd.guest.core.machine import GuestMachine
from guestd.guest.core.ops import CpuOp, HandResult, Op
from guestd.guest.core.setbacks import Key
from guestd.guest.daemon import Daemon, dial_unix
from guestd.guest.hands import DryHands
from guestd.guest.identity import identify
from guestd.guest.procfs import SensorError
from guestd.guest.uevents import RESCAN
from guestd.model.errors import UnreachableError
from guestd.model.guest import Capability, Identity, Inventory, Sample
from guestd.model.messages import (
    Ack,
    AckStatus,
    BrokerMessage,
    Demand,
    Grant,
    GuestMessage,
    Hello,
    OrderId,
    Reclaim,
    ReclaimStage,
    RefusalReason,
    Welcome,
)
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Resources
from guestd.model.units import GIB
from guestd.sim.kernel import GuestKernel, Load
from guestd.v1 import guest_pb2, guest_pb2_grpc
from guestd.wire import convert

WELCOME = Welcome(1, "a", 1, 5.0, Resources(), Resources())


class Hands(DryHands):
    """Hands on a fake kernel that can be slow."""

    def __init__(self, kernel: GuestKernel) -> None:
        self.kernel, self.done, self.seconds = kernel, [], 0.0
        self.done: list[Op] = []

    async def batch(self, ops: Sequence[Op], deadline_seconds: float = 10.0) -> list[HandResult]:
        await asyncio.sleep(self.seconds)
        self.done += ops
        return [self.kernel.perform(op) for op in ops]


class Broker(guest_pb2_grpc.GuestServiceServicer):
    """Welcomes everybody, and says what a test puts into `out`."""

    def __init__(self) -> None:
        self.heard: list[GuestMessage] = []
        self.out: asyncio.Queue[BrokerMessage | None] = asyncio.Queue()
        self.streams = 0

    async def Negotiate(
        self, requests: AsyncIterator[guest_pb2.NegotiateRequest], context: object
    ) -> AsyncIterator[guest_pb2.NegotiateResponse]:
        self.streams += 1
        listening = asyncio.create_task(self._listen(requests))
        try:
            yield convert.broker_message_to_wire(WELCOME)
            while (message := await self.out.get()) is not None:
                yield convert.broker_message_to_wire(message)
        finally:
            listening.cancel()

    async def _listen(self, requests: AsyncIterator[guest_pb2.NegotiateRequest]) -> None:
        async for request in requests:
            self.heard.append(convert.guest_message_from_wire(request))

    def of(self, kind: type) -> list[GuestMessage]:
        return [message for message in self.heard if isinstance(message, kind)]


class Rig:
    """A daemon on a fake kernel."""

    def __init__(self, root: Path) -> None:
        self.root, self.vm = root, FakeVm()
        self.kernel = GuestKernel(self.vm, Load())
        self.hands, self.dials = Hands(self.kernel), 0
        self.samples = self.scans = 0
        self.sensor_failure: Exception | None = None
        self.scan_failure: Exception | None = None
        identity = Identity(bytes(16), 1, capabilities=frozenset({Capability.CPU_ONLINE, Capability.MEMORY_ONLINE}))
        self.daemon = Daemon(GuestMachine(identity, time.monotonic()), self._sense, self._scan, self.hands, self._dial)
        self.statuses: list[str] = []
        self.daemon.on_status = self.statuses.append
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.task = asyncio.create_task(self.daemon.run())

    async def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)

    def _sense(self, quick: bool) -> Sample:
        self.samples += 1
        if self.sensor_failure is not None:
            raise self.sensor_failure
        return self.kernel.sample()

    def _scan(self) -> Inventory:
        self.scans += 1
        if self.scan_failure is not None:
            raise self.scan_failure
        return self.kernel.inventory()

    async def _dial(self) -> socket.socket:
        self.dials += 1
        return await dial_unix(str(self.root / "broker"))


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gd", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
async def rig(root: Path) -> AsyncIterator[Rig]:
    one = Rig(root)
    yield one
    await one.stop()


async def serve(root: Path) -> tuple[Broker, grpc.aio.Server]:
    broker, server = Broker(), grpc.aio.server()
    guest_pb2_grpc.add_GuestServiceServicer_to_server(broker, server)
    server.add_insecure_port(f"unix:{root}/broker")
    await server.start()
    return broker, server


@pytest.fixture
async def broker(root: Path) -> AsyncIterator[Broker]:
    one, server = await serve(root)
    yield one
    one.out.put_nowait(None)
    await server.stop(0)


async def until(holds: Callable[[], object], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - whatever a test waits for
            await asyncio.sleep(0.005)


async def test_without_a_broker_it_measures_and_changes_nothing(rig: Rig) -> None:
    rig.start()
    await until(lambda: rig.samples >= 3)
    await until(lambda: rig.dials >= 2)
    assert rig.hands.done == []
    assert rig.statuses[-1].startswith("waiting for the broker")


async def test_pauses_between_dials_grow_and_are_jittered(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses, real = [], asyncio.sleep

    async def sleep(seconds: float) -> None:
        if seconds > 0.05:
            pauses.append(seconds)
        await real(min(seconds, 0.001))

    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    rig.start()
    async with asyncio.timeout(10):
        while len(pauses) < 20:
            await real(0.01)
    assert pauses[0] <= 0.3
    assert all(2.5 <= pause <= 7.5 for pause in pauses[-5:])
    assert len(set(pauses[-5:])) == 5


@pytest.mark.parametrize(("served_seconds", "anew"), [(9.0, True), (0.1, False)])
async def test_who_was_served_for_longer_than_it_waited_is_back_at_once(
    root: Path, monkeypatch: pytest.MonkeyPatch, served_seconds: float, anew: bool
) -> None:
    rig, now, pauses, real = Rig(root), [100.0], [], asyncio.sleep

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds
        await real(0)

    async def converse(dial: object, hello: object, on_open: Callable[..., None], on_message: object) -> None:
        if len(pauses) == 10:
            on_open(object(), WELCOME)
            now[0] += served_seconds
        elif len(pauses) == 11:
            await asyncio.Event().wait()
        raise UnreachableError("gone")

    monkeypatch.setattr(module, "converse", converse)
    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    monkeypatch.setattr(rig.daemon, "_clock", lambda: now[0])
    talking = asyncio.create_task(rig.daemon._talk())
    async with asyncio.timeout(10):
        while len(pauses) < 11:
            await real(0.001)
    talking.cancel()
    assert pauses[9] >= 2.5
    assert (pauses[10] <= 0.3) == anew


async def test_it_says_hello_and_what_it_needs(rig: Rig, broker: Broker) -> None:
    rig.start()
    await until(lambda: len(broker.heard) >= 2)
    assert isinstance(broker.heard[0], Hello)
    assert isinstance(broker.heard[1], Demand)
    assert rig.statuses == ["served as a"]


async def test_an_order_is_carried_out_and_answered(rig: Rig, broker: Broker) -> None:
    await rig.vm.request_vcpus(3)
    rig.start()
    broker.out.put_nowait(Grant(OrderId(1, 1, 1), Kind.CPU, 3000))
    await until(lambda: broker.of(Ack))
    assert rig.kernel.online_cpus == {0, 1, 2}
    assert len([op for op in rig.hands.done if isinstance(op, CpuOp)]) == 2  # each once


async def test_the_service_managers_status_says_what_went_wrong_so_far(rig: Rig, broker: Broker) -> None:
    rig.kernel.failing = {CpuOp(1, True): errno.EIO}
    await rig.vm.request_vcpus(2)
    rig.start()
    await until(lambda: "served as a" in rig.statuses)
    broker.out.put_nowait(Grant(OrderId(1, 1, 1), Kind.CPU, 2000))
    await until(lambda: rig.statuses[-1] != "served as a")
    assert rig.statuses[-1] == "served as a; failed-operations: 1"


async def test_slow_hands_do_not_stop_the_rest(rig: Rig, broker: Broker) -> None:
    await rig.vm.request_vcpus(2)
    rig.hands.seconds = 1.0
    rig.start()
    broker.out.put_nowait(Grant(OrderId(1, 1, 1), Kind.CPU, 2000))
    await until(lambda: broker.heard)
    before = rig.samples
    await until(lambda: rig.samples >= before + 3, 0.95)
    assert not broker.of(Ack), "the hands are still at it"
    await until(lambda: broker.of(Ack))
    assert rig.kernel.online_cpus == {0, 1}


async def test_hotplug_makes_it_look_at_once(rig: Rig, broker: Broker) -> None:
    rig.start()
    broker.out.put_nowait(Grant(OrderId(1, 1, 1), Kind.MEMORY, GIB))
    await until(lambda: broker.heard)
    await rig.vm.request_memory(GIB)
    scans = rig.scans
    rig.daemon.on_hotplug()
    await until(lambda: rig.kernel.online_blocks == set(range(8)), 0.4)
    assert rig.scans > scans


async def test_a_driver_that_is_bound_later_is_said_by_another_hello(rig: Rig, broker: Broker, tmp_path: Path) -> None:
    rig.start()
    await until(lambda: broker.of(Demand))
    (tmp_path / "sys/devices/system/memory").mkdir(parents=True)
    (tmp_path / "sys/devices/system/memory/block_size_bytes").write_text("8000000")
    (tmp_path / "sys/devices/system/cpu/hotplug").mkdir(parents=True)
    who = partial(identify, False, True, tmp_path)
    app._on_uevent(rig.daemon, who, "virtio")
    assert broker.streams == 1, "as it was"
    (tmp_path / "sys/bus/virtio/drivers/virtio_balloon/virtio3").mkdir(parents=True)
    app._on_uevent(rig.daemon, who, "memory")
    assert broker.streams == 1, "that tells of no driver"
    app._on_uevent(rig.daemon, who, RESCAN)
    await until(lambda: len(broker.of(Hello)) == 2)
    first, second = broker.of(Hello)
    assert isinstance(first, Hello) and isinstance(second, Hello)
    assert second.identity.capabilities - first.identity.capabilities == {Capability.BALLOON}
    assert second.identity.generation > first.identity.generation


async def test_a_driver_that_is_bound_while_it_dials_is_said_by_another_hello(rig: Rig, broker: Broker) -> None:
    dial = rig.daemon._dial

    async def slow() -> socket.socket:
        if rig.dials == 0:
            rig.daemon.on_identity(Identity(bytes(16), 2, capabilities=frozenset({Capability.BALLOON})))
        return await dial()

    rig.daemon._dial = slow
    rig.start()
    await until(lambda: len(broker.of(Hello)) == 2)
    assert [one.identity.generation for one in broker.of(Hello) if isinstance(one, Hello)] == [1, 2]


async def test_what_is_offered_and_cannot_be_read_stays_as_it_was(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    def who() -> Identity:
        raise OSError(errno.EIO, "broken")

    app._on_uevent(rig.daemon, who, "virtio")
    assert "broken" in caplog.text


async def test_what_others_took_offline_is_told_whenever_it_changed(rig: Rig, broker: Broker) -> None:
    told: list[frozenset[Key]] = []
    rig.daemon.on_held = told.append
    await rig.vm.request_vcpus(2)
    rig.start()
    broker.out.put_nowait(Grant(OrderId(1, 1, 1), Kind.CPU, 2000))
    await until(lambda: broker.of(Ack))
    assert told == []
    rig.kernel.perform(CpuOp(1, False))
    rig.daemon.on_hotplug()
    await until(lambda: told)
    assert told == [{(CpuOp, 1)}]


async def test_pressure_makes_it_sample_at_once(rig: Rig) -> None:
    rig.start()
    await until(lambda: rig.samples >= 2)
    before = rig.samples
    rig.daemon.on_pressure()
    await until(lambda: rig.samples > before, 0.15)
    assert rig.scans == 1, "a look at the load is no look at CPUs and blocks"


async def test_a_load_that_cannot_be_read_is_counted_said_seldom_and_kept_to_itself(
    rig: Rig, broker: Broker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.start()
    await until(lambda: broker.of(Demand))
    heard = len(broker.of(Demand))
    rig.sensor_failure = SensorError("meminfo", "no line MemTotal with a number")
    rig.daemon.on_pressure()  # look closely
    await until(lambda: rig.daemon.counters["failed-samples"] >= 9)
    assert len([one for one in caplog.records if "meminfo: no line MemTotal" in one.message]) <= 4  # 1, 2, 4, 8
    # For a moment what was known holds; then nothing is given away for it.
    broker.out.put_nowait(reclaim(1, GIB))
    await until(lambda: broker.of(Ack))
    monkeypatch.setattr(module, "_BLIND_SECONDS", 0.0)
    before = rig.samples
    await until(lambda: rig.samples > before + 1)
    broker.out.put_nowait(reclaim(2, GIB, seconds=1.5))
    await until(lambda: len(broker.of(Ack)) == 2)
    answer = broker.of(Ack)[-1]
    assert isinstance(answer, Ack)
    assert (answer.status, answer.refusal) == (AckStatus.REFUSED, RefusalReason.FAILED)
    assert len(broker.of(Demand)) == heard
    # It works again, and so does all the rest.
    rig.sensor_failure = None
    broker.out.put_nowait(reclaim(3, GIB))
    await until(lambda: len(broker.of(Ack)) == 3)
    answer = broker.of(Ack)[-1]
    assert isinstance(answer, Ack) and answer.status is AckStatus.DONE


def test_one_sample_that_failed_after_a_long_rest_is_no_blindness(root: Path) -> None:
    rig, now = Rig(root), [time.monotonic()]
    said: list[bool] = []
    rig.daemon._clock = lambda: now[0]
    rig.daemon._machine.on_failed_sample = lambda now, blind: said.append(blind)  # type: ignore[method-assign]
    rig.daemon._sample(quick=False)
    now[0] += 30.0
    rig.sensor_failure = SensorError("meminfo", "no line MemTotal with a number")
    for _ in range(17):
        rig.daemon._sample(quick=False)
        now[0] += 1.0
    assert said == [False] * 16 + [True]
    rig.sensor_failure = None
    rig.daemon._sample(quick=False)
    rig.sensor_failure = SensorError("meminfo", "no line MemTotal with a number")
    rig.daemon._sample(quick=False)
    assert said[-1] is False


async def test_cpus_and_blocks_that_cannot_be_read_stop_nothing_else(
    rig: Rig, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    await rig.vm.request_vcpus(2)
    rig.scan_failure = ValueError("memory3/state: 'molten' is not a state that is known")
    rig.start()
    await until(lambda: broker.of(Demand))
    broker.out.put_nowait(Grant(OrderId(1, 1, 1), Kind.CPU, 2000))
    before = rig.samples
    await until(lambda: rig.daemon.counters["failed-looks"] >= 2 and rig.samples > before)
    assert rig.hands.done == []  # nobody knows what is there
    assert "'molten' is not a state that is known" in caplog.text
    rig.scan_failure = None
    rig.daemon.on_hotplug()
    await until(lambda: broker.of(Ack))
    assert rig.kernel.online_cpus == {0, 1}


def reclaim(revision: int, amount: int, seconds: float = 30.0) -> Reclaim:
    reason = Reason("test", "the test wants it")
    return Reclaim(OrderId(1, revision, revision), Kind.MEMORY, amount, ReclaimStage.ASK, seconds, reason)


async def test_it_comes_back_when_the_broker_does(rig: Rig, root: Path) -> None:
    rig.start()
    for _ in range(2):
        broker, server = await serve(root)
        await until(lambda broker=broker: broker.of(Demand))
        assert broker.streams == 1
        assert broker.of(Demand)[0].sequence == 1, "each stream counts anew"
        broker.out.put_nowait(None)
        await server.stop(0)


async def test_a_second_welcome_ends_the_stream(rig: Rig, broker: Broker) -> None:
    rig.start()
    await until(lambda: broker.streams == 1)
    broker.out.put_nowait(WELCOME)
    await until(lambda: broker.streams == 2)
    assert rig.daemon.counters["protocol-errors"] == 1


async def test_ending_changes_nothing(rig: Rig, broker: Broker) -> None:
    await rig.vm.request_vcpus(2)
    rig.start()
    broker.out.put_nowait(Grant(OrderId(1, 1, 1), Kind.CPU, 2000))
    await until(lambda: broker.of(Ack))
    done = list(rig.hands.done)
    await rig.stop()
    assert rig.hands.done == done
    assert rig.kernel.online_cpus == {0, 1}


async def test_dialling_nobody_fails_and_leaks_nothing(root: Path) -> None:
    dial: Callable[[str], Awaitable[socket.socket]] = dial_unix
    with pytest.raises(FileNotFoundError):
        await dial(str(root / "nobody"))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(root / "deaf"))
    listener.close()
    with pytest.raises(ConnectionRefusedError) as caught:
        await dial(str(root / "deaf"))
    assert caught.value.errno == errno.ECONNREFUSED
