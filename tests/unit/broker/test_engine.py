"""The broker around its core: what a start takes over from the journal, and when rounds are decided."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from guestd.broker import engine as module
from guestd.broker.config import BrokerConfig, GuestConfig
from guestd.broker.core.actions import Record
from guestd.broker.core.ledger import HostCapacity
from guestd.broker.core.machine import BrokerMachine
from guestd.broker.engine import Engine
from guestd.broker.history.store import Store
from guestd.broker.hypervisor.fake import FakeVm
from guestd.broker.journal import Journal
from guestd.broker.record.frames import RecordFile
from guestd.model.errors import HypervisorError, JournalError
from guestd.model.event import EventQuery
from guestd.model.guest import Identity
from guestd.model.messages import Hello, Usable
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB, MIB
from guestd.model.vm import VmState
from guestd.wire.relay import IngressRelay, Peer, Peers

LIMITS = Limits(
    Resources(1000, 512 * MIB),
    Resources(2000, GIB),
    burst=Resources(4000, 2 * GIB),
    burst_credit=Resources(60_000, 90 * GIB),
    burst_refill=Resources(10, MIB),
)

PLAIN = Limits(Resources(1000, 512 * MIB), Resources(2000, GIB))


def engine_on(tmp_path: Path, journal: Journal, vm: FakeVm) -> Engine:
    guests = {"a": GuestConfig("a", LIMITS, "/run/a.qmp", 7, origin="broker.toml")}
    config = BrokerConfig(HostCapacity(Resources(8000, 8 * GIB)), tmp_path, tmp_path, 4747, 30.0, guests)
    return Engine(config, journal, lambda guest: vm, IngressRelay(tmp_path / "server.sock", Peers()))


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.005)


async def test_what_was_recorded_is_in_the_book_before_the_hypervisor_answers(tmp_path: Path) -> None:
    before = Journal(tmp_path / "journal.db")
    await before.open()
    await before.record([Record("a", Resources(2000, GIB), 41, Resources(5000, 7 * GIB))])
    await before.close()
    vm = FakeVm()
    vm.lose_next_observations(1)
    engine = engine_on(tmp_path, Journal(tmp_path / "journal.db"), vm)
    await engine.start()
    try:
        view = engine.guest_view("a")
        assert Resources(*(view.resource(kind).reserved for kind in Kind)) == Resources(2000, GIB)
        assert view.revision >= 41
        assert engine.machine.epoch == 2
        await until(lambda: engine.guest_view("a").resource(Kind.CPU).burst_credit > 0)
        view = engine.guest_view("a")
        assert 5000 <= view.resource(Kind.CPU).burst_credit < 6000
        assert 7 * GIB <= view.resource(Kind.MEMORY).burst_credit < 8 * GIB
    finally:
        await engine.stop()


async def test_nothing_is_done_while_its_record_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_JOURNAL_RETRY_SECONDS", 0.01)
    tries = 0
    works = asyncio.Event()

    class Stuck(Journal):
        async def record(self, records: object) -> None:
            nonlocal tries
            tries += 1
            if not works.is_set():
                raise JournalError("journal: the disk is full")
            await super().record(records)  # type: ignore[arg-type]

    vm = FakeVm()
    engine = engine_on(tmp_path, Stuck(tmp_path / "journal.db"), vm)
    with caplog.at_level(logging.INFO):
        await engine.start()
        try:
            await until(lambda: tries >= 5)
            said = [record.message for record in caplog.records]
            assert sum("the disk is full; until then nothing is decided" in one for one in said) == 1
            assert vm.requests == []
            works.set()
            await until(lambda: any("can be written again" in record.message for record in caplog.records))
        finally:
            await engine.stop()
    again = Journal(tmp_path / "journal.db")
    assert (await again.open()).reserved["a"].reserved == Resources(1000, 512 * MIB)
    await again.close()


async def test_an_answer_of_no_use_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Babbling(FakeVm):
        asked = 0

        async def observe(self) -> VmState:
            self.asked += 1
            if self.asked <= 2:
                raise HypervisorError("unexpected answer")
            return await super().observe()

    vm = Babbling()
    engine = engine_on(tmp_path, Journal(tmp_path / "journal.db"), vm)
    await engine.start()
    try:
        await until(lambda: vm.asked > 2)
    finally:
        await engine.stop()
    said = [record.message for record in caplog.records if "of no use" in record.message]
    assert said == ["a: the hypervisor's answer is of no use, asking again: unexpected answer"]


async def test_an_error_that_nobody_foresaw_leaves_events_and_record_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_on(tmp_path, Journal(tmp_path / "journal.db"), FakeVm())
    await engine.start()
    await until(lambda: engine.machine.guests["a"].vm is not None)

    def broken(*_: object) -> bool:
        raise KeyError("a bug")

    monkeypatch.setattr(BrokerMachine, "next_actions", broken)
    await engine.pause_guest("a", True)
    with pytest.raises(KeyError, match="a bug"):
        async with asyncio.timeout(10):
            await engine.wait()
    await engine.stop()
    monkeypatch.undo()
    store = Store(tmp_path / "history.db", 1 << 20)
    await store.start()
    assert [one.text for one in await store.events(EventQuery())][-2:] == ["paused", "broker stops"]
    await store.stop()
    (file,) = (tmp_path / "record").glob("*.record")
    with RecordFile(file) as record:
        assert [entry.call for entry in record.entries()][-2:] == ["pause", "next_actions"]


async def test_a_guest_of_a_name_that_was_there_before_begins_with_nothing(tmp_path: Path) -> None:
    engine = engine_on(tmp_path, Journal(tmp_path / "journal.db"), FakeVm())
    await engine.start()
    try:
        added = ("b", PLAIN, "/run/b.qmp", 8, None)
        await engine.add_guest(*added)
        peer = Peer("b", "vsock 8")
        session, _ = engine.connect(peer, Hello(1, 1, Identity(bytes(16), 1), Usable(), 0))
        engine.count_protocol_error(peer)
        assert (engine.guest_view("b").protocol_errors, engine.guest_view("b").channel) == (1, "vsock 8")
        await engine.remove_guest("b")
        engine.disconnect(peer, session)
        assert [one.text for one in await engine.events(EventQuery("b"))][-1] == "removed"
        await engine.add_guest(*added)
        assert (engine.guest_view("b").protocol_errors, engine.guest_view("b").channel) == (0, "")
    finally:
        await engine.stop()
