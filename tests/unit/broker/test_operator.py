"""What operators change: durable or undone, and what is left of limits when a part of them changes."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from guestd.broker.config import BrokerConfig, GuestConfig
from guestd.broker.core.ledger import HostCapacity
from guestd.broker.engine import Engine
from guestd.broker.hypervisor.fake import FakeVm
from guestd.broker.journal import Journal
from guestd.broker.operator import changed_limits
from guestd.model.errors import JournalError
from guestd.model.resources import Limits, Resources
from guestd.model.units import GIB, MIB
from guestd.model.view import LimitsChange
from guestd.wire.relay import IngressRelay, Peers

LIMITS = Limits(
    Resources(1000, 512 * MIB),
    Resources(4000, 2 * GIB),
    Resources(100, 100),
    Resources(6000, 3 * GIB),
    Resources(60_000, 90 * GIB),
    Resources(100, 64 * MIB),
)


class FullJournal(Journal):
    """A journal that takes nothing more, once told so."""

    full = False

    async def _write(self, *arguments: object) -> None:
        if self.full:
            raise JournalError("journal: the disk is full")
        await super()._write(*arguments)  # type: ignore[arg-type]


@pytest.fixture
async def journal(tmp_path: Path) -> FullJournal:
    return FullJournal(tmp_path / "state" / "journal.db")


@pytest.fixture
async def engine(tmp_path: Path, journal: FullJournal) -> AsyncIterator[Engine]:
    host = HostCapacity(Resources(8000, 8 * GIB))
    guests = {"a": GuestConfig("a", LIMITS, "/run/a.qmp", 7, origin="broker.toml")}
    config = BrokerConfig(host, tmp_path, tmp_path, 4747, 30.0, guests)
    relay = IngressRelay(tmp_path / "server.sock", Peers())
    one = Engine(config, journal, lambda guest: FakeVm(), relay)
    await one.start()
    yield one
    await one.stop()
    await relay.close()


def test_what_is_not_named_stays() -> None:
    assert changed_limits(LIMITS, LimitsChange()) == LIMITS
    changed = changed_limits(LIMITS, LimitsChange(cpu_min_millicores=500, memory_max_bytes=GIB, cpu_weight=7))
    assert (changed.min, changed.max, changed.weight) == (
        Resources(500, 512 * MIB),
        Resources(4000, GIB),
        Resources(7, 100),
    )
    assert (changed.burst, changed.burst_credit, changed.burst_refill) == (
        LIMITS.burst,
        LIMITS.burst_credit,
        LIMITS.burst_refill,
    )


def test_every_part_of_a_burst_can_be_changed() -> None:
    change = LimitsChange(
        cpu_burst_millicores=5000,
        cpu_burst_credit=1,
        cpu_burst_refill=2,
        memory_burst_bytes=3,
        memory_burst_credit=4,
        memory_burst_refill=5,
    )
    changed = changed_limits(LIMITS, change)
    assert changed.burst == Resources(5000, 3)
    assert changed.burst_credit == Resources(1, 4)
    assert changed.burst_refill == Resources(2, 5)


def test_a_new_burst_gets_the_usual_bucket_unless_it_is_said() -> None:
    plain = Limits(LIMITS.min, LIMITS.max)
    changed = changed_limits(plain, LimitsChange(cpu_burst_millicores=LIMITS.max.cpu_millicores + 2000))
    assert changed.burst_credit == Resources(2000 * 300, 0)
    assert changed.burst_refill == Resources(200, 0)
    assert changed.problems() == []
    said = changed_limits(plain, LimitsChange(cpu_burst_millicores=9000, cpu_burst_credit=7))
    assert said.burst_credit.cpu_millicores == 7


def test_a_burst_that_is_taken_away_takes_its_bucket_along() -> None:
    changed = changed_limits(LIMITS, LimitsChange(memory_burst_bytes=0))
    assert changed.burst == Resources(6000, 0)
    assert changed.burst_credit == Resources(60_000, 0)
    assert changed.burst_refill == Resources(100, 0)
    assert changed.problems() == []
    asked_for = changed_limits(LIMITS, LimitsChange(cpu_burst_millicores=0, cpu_burst_credit=5))
    assert "burst credit or refill without a burst" in asked_for.problems()[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (LimitsChange(cpu_max_millicores=7000), "guest a: cpu: burst 6 CPU is not above max 7 CPU"),
        (LimitsChange(cpu_burst_credit=1), "guest a: cpu: a burst credit of"),
        (LimitsChange(memory_burst_refill=2 * GIB), "guest a: memory: a burst refill of"),
        (LimitsChange(cpu_min_millicores=5000), "guest a: cpu: min 5 CPU is above max 4 CPU"),
    ],
)
async def test_limits_that_contradict_each_other_are_refused_with_the_numbers(
    engine: Engine, change: LimitsChange, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        await engine.change_limits("a", change)
    assert engine.guest_view("a").limits == LIMITS


async def test_what_cannot_be_made_durable_is_undone(engine: Engine, journal: FullJournal) -> None:
    journal.full = True
    for _ in range(2):
        with pytest.raises(JournalError, match="the disk is full"):
            await engine.add_guest("b", LIMITS, "/run/b.qmp", 8, None)
        with pytest.raises(JournalError, match="the disk is full"):
            await engine.change_limits("a", LimitsChange(cpu_weight=7))
        with pytest.raises(JournalError, match="the disk is full"):
            await engine.pause_guest("a", True)
    assert engine.guest_names() == ["a"]
    assert engine.guest_view("a").limits == LIMITS
    assert not engine.guest_view("a").paused
    assert engine.guest_of_cid(8) is None
    journal.full = False
    await engine.add_guest("b", LIMITS, "/run/b.qmp", 8, None)
    await engine.change_limits("a", LimitsChange(cpu_weight=7))
    assert engine.guest_names() == ["a", "b"]
    assert engine.guest_of_cid(8) == "b"
    assert engine.guest_view("a").limits.weight == Resources(7, 100)


async def test_a_guest_is_found_by_its_cid_as_long_as_it_is_there(engine: Engine) -> None:
    assert (engine.guest_of_cid(7), engine.guest_of_cid(8)) == ("a", None)
    await engine.add_guest("b", LIMITS, "/run/b.qmp", 8, None)
    assert engine.guest_of_cid(8) == "b"
    await engine.remove_guest("b")
    assert (engine.guest_of_cid(7), engine.guest_of_cid(8)) == ("a", None)
