"""Thousands of guests in one process, for load: each a real gRPC channel with a stream of its own.

A `LightGuest` is the least that the protocol allows: it says hello, wants another amount when it is told to, and
answers every order at once and in full. It notes how long a demand waited for the grant that covers it, from before
the demand is written until after the grant was read: what this process itself is late is in it. Its channel's
socket is bound to `guest_address` (see `bound`); gRPC connects again by itself, after pauses of 1 to 5 s.

For guests with the production daemon see `core_guest`.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from guestd.model.errors import ProtocolError
from guestd.model.guest import Capability, Identity
from guestd.model.messages import (
    Ack,
    AckStatus,
    Demand,
    Grant,
    GuestMessage,
    Heartbeat,
    Hello,
    Reclaim,
    Urgency,
    Usable,
    Welcome,
)
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Resources
from guestd.model.units import GIB, MIB, MILLICORES_PER_VCPU
from guestd.sim.bound import BoundTo
from guestd.sim.broker import SOCKET_NAME, guest_address
from guestd.wire import convert

BOOT = Resources(1000, 512 * MIB)
MIN = Resources(2000, GIB)
MAX = Resources(4000, 2 * GIB)
"""What every guest of a swarm boots with, and its limits: it is to be brought to its minimum first."""
STEP = Resources(1000, 512 * MIB)
"""By so much a demand goes up and down again."""
FIRST_CID = 1000
_CAPABLE = frozenset({Capability.CPU_ONLINE, Capability.MEMORY_ONLINE, Capability.VIRTIO_MEM})
_REASONS = (Reason("swarm", "the load generator wants it"),)
_FLOOR = Resources(1000, 256 * MIB)
_BLOCK_BYTES = 128 * MIB
_AGAIN_SECONDS = 0.2
_LOOK_SECONDS = 0.05
_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.min_reconnect_backoff_ms", 5000),  # the time that one attempt has
    ("grpc.max_reconnect_backoff_ms", 5000),
)


def guest_name(index: int) -> str:
    """The name of the guest with that number."""
    return f"g{index:05d}"


@dataclass(slots=True)
class Waits:
    """How long demands waited, in seconds; `missed` were not covered when the next one came, or at the end."""

    up: list[float] = field(default_factory=list)
    down: list[float] = field(default_factory=list)
    missed: int = 0
    late: list[float] = field(default_factory=list)  # by so much a change came after its time: this process's fault


class LightGuest:
    """One guest: a channel, and the amounts that it knows of. Wants more or less of one kind only.

    :param on_covered: called with the seconds that a demand waited, and whether it was for more.
    """

    __slots__ = (
        "_bound", "_call", "_channel", "_on_covered", "_sequence", "_since", "_writing", "epoch", "granted", "index",
        "kind", "last_said", "needed", "told", "up",
    )  # fmt: skip

    def __init__(self, index: int, run_dir: Path, on_covered: Callable[["LightGuest", float, bool], None]) -> None:
        self.index, self.kind = index, Kind.MEMORY if index % 2 else Kind.CPU
        self._on_covered = on_covered
        self.needed, self.granted, self.up = MIN, BOOT, False
        self.epoch, self.told, self.last_said = 0, set[Kind](), 0.0
        self._since: float | None = None
        self._sequence = 0
        self._writing = asyncio.Lock()
        self._call: Any = None  # gRPC's call of raw bytes both ways, while the broker serves this guest on it
        self._bound = BoundTo(guest_address(run_dir, FIRST_CID + index))
        self._channel = grpc.aio.insecure_channel(
            f"unix:{run_dir / SOCKET_NAME}", options=(*_OPTIONS, ("grpc.socket_mutator", self._bound))
        )

    @property
    def waiting(self) -> bool:
        """Whether a demand is not covered yet."""
        return self._since is not None

    def open(self) -> Any:
        """A call of raw bytes both ways, as soon as there is a connection."""
        return self._channel.stream_stream(convert.NEGOTIATE)(wait_for_ready=True)

    async def run(self) -> None:
        """Keep a stream open until cancelled."""
        while True:
            call = self.open()
            try:
                await self._converse(call)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError, ProtocolError):
                pass
            finally:
                self._call = None
                call.cancel()
            await asyncio.sleep(_AGAIN_SECONDS)

    async def close(self) -> None:
        await self._channel.close()

    def toggle(self) -> bool:
        """Want the other amount, to be said by `say_demand`; whether the demand before was covered."""
        covered, self._since = self._since is None, time.monotonic()
        self.up = not self.up
        amount = MIN.get(self.kind) + (STEP.get(self.kind) if self.up else 0)
        self.needed = MIN.with_(self.kind, amount)
        return covered

    async def say_demand(self) -> None:
        """Say what is needed; without a stream it is said when there is one."""
        self._sequence += 1
        await self.say(
            Demand(self._sequence, self.needed, _FLOOR, 1 << 40, Urgency.NORMAL, _REASONS, self.usable)
        )  # fmt: skip

    async def say(self, message: GuestMessage) -> None:
        """Send, if there is a stream."""
        call = self._call
        if call is None:
            return
        raw = convert.guest_message_to_wire(message).SerializeToString()
        async with self._writing:
            try:
                await call.write(raw)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # `run` sees it too
        self.last_said = time.monotonic()

    async def _converse(self, call: Any) -> None:
        identity = Identity(b"b" * 16, time.monotonic_ns(), "swarm", guest_name(self.index), "sim", _CAPABLE)
        hello = Hello(1, 1, identity, self.usable)
        await call.write(convert.guest_message_to_wire(hello).SerializeToString())
        while (raw := await call.read()) is not grpc.aio.EOF:
            message = convert.broker_message_from_bytes(raw)
            match message:
                case Welcome():
                    self.epoch, self._call = message.epoch, call
                    self.told.clear()
                    await self.say_demand()
                case Grant():
                    await self._take(message)
                case Reclaim():
                    self._hold(message.kind, min(message.amount, self.granted.get(message.kind)))
                    await self.say(Ack(message.id, message.kind, AckStatus.DONE, message.amount, self.usable))

    async def _take(self, grant: Grant) -> None:
        self._hold(grant.kind, grant.amount)
        self.told.add(grant.kind)
        wanted = self.needed.get(self.kind)
        covers = grant.amount >= wanted if self.up else grant.amount <= wanted
        if self._since is not None and grant.kind is self.kind and covers:
            waited, self._since = time.monotonic() - self._since, None
            self._on_covered(self, waited, self.up)
        await self.say(Ack(grant.id, grant.kind, AckStatus.DONE, grant.amount, self.usable))

    def _hold(self, kind: Kind, amount: int) -> None:
        self.granted = self.granted.with_(kind, amount)

    @property
    def usable(self) -> Usable:
        """What it says that it can use."""
        vcpus, memory = self.granted.cpu_millicores // MILLICORES_PER_VCPU, self.granted.memory_bytes
        return Usable(vcpus, vcpus, memory, memory, _BLOCK_BYTES)


class Swarm:
    """Many light guests. All times are of the monotonic clock, which all processes of a machine share."""

    def __init__(self, run_dir: Path, count: int, heartbeat_seconds: float = 30.0) -> None:
        self.guests = [LightGuest(index, run_dir, self._covered) for index in range(count)]
        self._heartbeat_seconds = heartbeat_seconds
        self._waits = Waits()
        self._again = False
        self._tasks: set[asyncio.Task[object]] = set()

    def start(self) -> None:
        """Dial, all of them."""
        for guest in self.guests:
            self._spawn(guest.run())
        self._spawn(self._beat())

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(guest.close() for guest in self.guests))

    async def settled(self, epoch: int, seconds: float) -> tuple[float, int]:
        """Wait until every guest was told by that epoch of the broker (or a later one) what it has, and has its
        minimum. Returns when that was, and how many are missing after `seconds`.
        """
        end = time.monotonic() + seconds
        missing = self.guests
        while missing and time.monotonic() < end:
            await asyncio.sleep(_LOOK_SECONDS)
            missing = [guest for guest in missing if not _is_settled(guest, epoch)]
        return time.monotonic(), len(missing)

    async def steady(self, seconds: float, period_seconds: float, seed: int) -> Waits:
        """Change every guest's demand once a period, at a phase of its own; up and down in turns."""
        waits = self._waits = Waits()
        random_ = random.Random(seed)  # noqa: S311 - the same load each time
        plan = sorted((random_.random() * period_seconds, guest.index) for guest in self.guests)
        began = time.monotonic()
        lap = 0.0
        while lap < seconds:
            for phase, index in plan:
                due = began + lap + phase
                if due > began + seconds:
                    break
                pause = due - time.monotonic()
                if pause > 0:
                    await asyncio.sleep(pause)
                waits.late.append(max(0.0, time.monotonic() - due))
                self._toggle(self.guests[index])
            lap += period_seconds
        await self._calm()
        waits.missed += sum(guest.waiting for guest in self.guests)
        return waits

    async def rush(self, seconds: float, outstanding: int) -> int:
        """So many guests at a time want something else as soon as they have it. Returns how often one got it."""
        waits = self._waits = Waits()
        self._again = True
        for guest in self.guests[:outstanding]:
            self._toggle(guest)
        await asyncio.sleep(seconds)
        self._again = False
        done = len(waits.up) + len(waits.down)
        await self._calm()
        return done

    async def _calm(self, seconds: float = 3.0) -> None:
        """Give the last ones time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not any(guest.waiting for guest in self.guests):
                return
            await asyncio.sleep(0.05)

    def _toggle(self, guest: LightGuest) -> None:
        if not guest.toggle():
            self._waits.missed += 1
        self._spawn(guest.say_demand())

    async def _beat(self) -> None:
        """Heartbeats of those who have long said nothing."""
        while True:
            await asyncio.sleep(self._heartbeat_seconds / 10)
            limit = time.monotonic() - self._heartbeat_seconds * 0.8
            for guest in self.guests:
                if guest.last_said < limit:
                    await guest.say(Heartbeat())

    def _covered(self, guest: LightGuest, waited: float, up: bool) -> None:
        (self._waits.up if up else self._waits.down).append(waited)
        if self._again:
            self._toggle(guest)

    def _spawn(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _is_settled(guest: LightGuest, epoch: int) -> bool:
    has = guest.granted
    low = MIN
    return (
        guest.epoch >= epoch
        and len(guest.told) == len(Kind)
        and has.cpu_millicores >= low.cpu_millicores
        and has.memory_bytes >= low.memory_bytes
    )


async def flood(run_dir: Path, index: int, seconds: float) -> tuple[int, int]:
    """One guest says what it needs as fast as it can, on a new stream whenever the broker ends one. Returns the
    number of messages and of streams.
    """
    guest = LightGuest(index, run_dir, lambda *_: None)
    messages = streams = 0
    identity = Identity(b"b" * 16, time.monotonic_ns(), "flood", guest_name(index), "sim", _CAPABLE)
    hello = convert.guest_message_to_wire(Hello(1, 1, identity, guest.usable)).SerializeToString()

    async def say(call: Any) -> None:
        nonlocal messages, streams
        streams += 1
        await call.write(hello)
        while True:
            messages += 1
            demand = Demand(messages, MIN, _FLOOR, 1 << 40, Urgency.NOW, _REASONS, guest.usable)
            await call.write(convert.guest_message_to_wire(demand).SerializeToString())

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                call: Any = guest.open()
                saying = asyncio.create_task(say(call))
                try:
                    while await call.read() is not grpc.aio.EOF:  # the end is told only when all was read
                        pass
                except grpc.aio.AioRpcError:
                    pass
                finally:
                    saying.cancel()
                    await asyncio.gather(saying, return_exceptions=True)
                    call.cancel()
    await guest.close()
    return messages, streams
