"""Observe mode of the whole broker and of one guest: what is touched, and what a reload changes."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from guestd.broker.config import BrokerConfig, GuestConfig
from guestd.broker.core.ledger import HostCapacity
from guestd.broker.engine import Engine
from guestd.broker.hypervisor.fake import FakeVm
from guestd.broker.journal import Journal
from guestd.broker.session import Session
from guestd.model.errors import AdmissionError, NotFoundError
from guestd.model.explanation import ReclaimRequest
from guestd.model.guest import Capability, Identity
from guestd.model.messages import BrokerMessage, Demand, Grant, Hello, Reclaim, Urgency, Usable, Welcome
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB, MIB
from guestd.wire.relay import IngressRelay, Peer, Peers

LIMITS = Limits(Resources(1000, 512 * MIB), Resources(4000, 2 * GIB))
USABLE = Usable(1, 1, 512 * MIB, 460 * MIB, 128 * MIB)
BOTH = frozenset({Capability.CPU_ONLINE, Capability.MEMORY_ONLINE})
PEER = Peer("a", "vsock")


class Rig:
    """An engine with one VM, whose guest is connected, and what it was sent."""

    def __init__(self, path: Path, config: BrokerConfig) -> None:
        self.config, self.vm = config, FakeVm()
        self.journal = Journal(path / "journal.db")
        self.relay = IngressRelay(path / "server.sock", Peers())
        self.engine = Engine(config, self.journal, lambda guest: self.vm, self.relay)
        self.sequence = 0

    async def start(self) -> None:
        await self.engine.start()
        await self.until(lambda: self.engine.guest_view("a").vm_status is not None)
        hello = Hello(1, 1, Identity(bytes(16), 1, capabilities=BOTH), USABLE)
        self.number, self.session = self.engine.connect(PEER, hello)
        assert isinstance(await self.session.next(), Welcome)

    def need(self, cpu: int, memory: int = 512 * MIB) -> None:
        self.sequence += 1
        needed, floor, reasons = Resources(cpu, memory), Resources(1000, 256 * MIB), (Reason("cpu-used", "busy"),)
        demand = Demand(self.sequence, needed, floor, 1 << 40, Urgency.NORMAL, reasons, USABLE)
        self.engine.receive(PEER, self.number, demand)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not holds():  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.005)

    async def stop(self) -> None:
        await self.engine.stop()
        await self.relay.close()


def configured(path: Path, observe: bool = False, guest: bool = False) -> BrokerConfig:
    guests = {"a": GuestConfig("a", LIMITS, "/run/a.qmp", 7, origin="broker.toml", observe=guest)}
    host = HostCapacity(Resources(8000, 8 * GIB))
    return BrokerConfig(host, path, path, 4747, 30.0, guests, observe=observe)


def waiting(session: Session) -> list[BrokerMessage]:
    return list(session._waiting.values())


@pytest.mark.parametrize("how", ["observe", "guest"])
async def test_an_observed_vm_is_asked_and_shown_and_nothing_else(tmp_path: Path, how: str) -> None:
    rig = Rig(tmp_path, configured(tmp_path, **{how: True}))
    await rig.start()
    try:
        rig.need(3000, GIB)
        await rig.until(lambda: rig.engine.guest_view("a").resource(Kind.CPU).target == 3000)
        view = rig.engine.guest_view("a")
        assert view.observed
        assert view.resource(Kind.CPU).reason.text == "needs 3 CPU"
        assert view.resource(Kind.MEMORY).target == GIB
        assert Resources(*(view.resource(kind).reserved for kind in Kind)) == Resources(1000, 512 * MIB)
        rig.need(1000)
        await rig.until(lambda: rig.engine.guest_view("a").resource(Kind.CPU).target == 1000)
        assert rig.vm.requests == []
        assert waiting(rig.session) == []
    finally:
        await rig.stop()
    again = Journal(tmp_path / "journal.db")
    assert (await again.open()).reserved == {}, "nothing of it was recorded"
    await again.close()


async def test_a_reload_changes_the_mode_both_ways_on_the_same_stream(tmp_path: Path) -> None:
    rig = Rig(tmp_path, configured(tmp_path, observe=True))
    await rig.start()
    try:
        rig.need(3000)
        await rig.until(lambda: rig.engine.guest_view("a").resource(Kind.CPU).target == 3000)
        await rig.engine.reload(configured(tmp_path))
        assert not rig.engine.guest_view("a").observed
        await rig.until(lambda: len(rig.vm.guest_cpus) == 3)
        message = await rig.session.next()
        assert isinstance(message, Grant)
        await rig.until(lambda: rig.engine.guest_view("a").resource(Kind.CPU).grows == 1)
        await rig.engine.reload(configured(tmp_path, guest=True))
        assert rig.engine.guest_view("a").observed
        requests = list(rig.vm.requests)
        rig.session._waiting.clear()
        rig.need(4000)
        await rig.until(lambda: rig.engine.guest_view("a").resource(Kind.CPU).target == 4000)
        await rig.until(lambda: rig.engine.machine.guests["a"].vm_fresh)
        assert rig.vm.requests == requests
        assert waiting(rig.session) == []
        assert rig.engine.guest_view("a").connected
        assert rig.engine.guest_view("a").resource(Kind.CPU).reserved == 3000
    finally:
        await rig.stop()


async def test_a_guest_that_is_added_by_a_call_keeps_to_the_brokers_mode(tmp_path: Path) -> None:
    config = configured(tmp_path, observe=True)
    rig = Rig(tmp_path, msgspec.structs.replace(config, guests={}))
    await rig.engine.start()
    try:
        await rig.engine.add_guest("a", LIMITS, "/run/a.qmp", 7, None)
        assert rig.engine.guest_view("a").observed
    finally:
        await rig.stop()


async def test_reclaim_takes_what_is_spare_at_once_and_a_dry_run_nothing(tmp_path: Path) -> None:
    rig = Rig(tmp_path, configured(tmp_path))
    await rig.start()
    try:
        rig.need(3000)
        await rig.until(lambda: rig.engine.guest_view("a").resource(Kind.CPU).grows == 1)
        rig.need(1000)
        await rig.until(lambda: rig.engine.guest_view("a").resource(Kind.CPU).target == 1000)
        rig.session._waiting.clear()
        dry = await rig.engine.reclaim_guest("a", ReclaimRequest(dry_run=True))
        assert [(one.kind, one.reserved, one.goal) for one in dry] == [
            (Kind.CPU, 3000, 1000),
            (Kind.MEMORY, 512 * MIB, 512 * MIB),
        ]
        assert waiting(rig.session) == []
        assert await rig.engine.reclaim_guest("a", ReclaimRequest()) == dry
        await rig.until(lambda: bool(waiting(rig.session)))
        [order] = waiting(rig.session)
        assert isinstance(order, Reclaim)
        assert (order.amount, order.reason.code) == (1000, "reclaim")
        with pytest.raises(NotFoundError, match="no guest named 'b'"):
            await rig.engine.reclaim_guest("b", ReclaimRequest())
        await rig.engine.pause_guest("a", True)
        with pytest.raises(AdmissionError, match="paused by the operator"):
            await rig.engine.reclaim_guest("a", replace(ReclaimRequest(), dry_run=True))
    finally:
        await rig.stop()
