"""The laws of the pollers that guestd is compared with, and that they sit in guestd's own machine."""

import pytest

from guestd.cli.bench.guest.inside.poller import (
    GIB,
    LAWS,
    MIB,
    CpuplugdCpu,
    CpuplugdMemory,
    Cpus,
    Memory,
    NeonCpu,
    NeonMemory,
    PollingCpu,
    PollingMachine,
    PollingMemory,
    ProxmoxMemory,
    cpus_used,
    look,
)
from guestd.guest import app
from guestd.guest import main as guestd_main
from guestd.guest.core.actions import Say, TakeSample
from guestd.model.guest import Identity, Inventory, Sample
from guestd.model.messages import Demand, Welcome
from guestd.model.resources import Resources


def sample(busy: float = 0.0, idle: float = 0.0, total: int = 512 * MIB, available: int = 400 * MIB) -> Sample:
    return Sample(
        cpu_busy_seconds={0: busy},
        cpu_idle_seconds={0: idle},
        cpu_steal_seconds=0.0,
        runnable=0,
        cpu_some_us=0,
        memory_some_us=0,
        memory_full_us=0,
        memory_total_bytes=total,
        memory_available_bytes=available,
        swap_used_bytes=0,
        refaults=0,
    )


def memory(used: int, total: int = 1000 * MIB, free: int = 0, cache: int = 0, scanned: int = 0) -> Memory:
    return Memory(total, used, free, cache, scanned)


def test_neon_divides_by_nine_tenths() -> None:
    assert NeonCpu(by_load=True).need(Cpus(used=1.0, online=4, load1=1.8)) == pytest.approx(2.0)
    assert NeonCpu(by_load=False).need(Cpus(used=0.9, online=4, load1=9.0)) == pytest.approx(1.0)


def test_cpuplugd_takes_one_at_a_time() -> None:
    law = CpuplugdCpu()
    assert law.need(Cpus(used=1.95, online=2, load1=0.0)) == 3
    assert law.need(Cpus(used=1.90, online=2, load1=0.0)) == 2
    assert law.need(Cpus(used=0.80, online=2, load1=0.0)) == 1


def test_neon_asks_above_85_percent_once_a_second_for_one_unit() -> None:
    law = NeonMemory()
    at = 0.0
    for _ in range(4):
        assert law.need(memory(400 * MIB), at) == 1000 * MIB
        at += 0.1
    for _ in range(5):
        found = law.need(memory(900 * MIB), at)
        at += 0.1
    assert found == 1000 * MIB + GIB  # the mean of five passed 85 % with the last
    again = law.need(memory(1900 * MIB, total=1000 * MIB + GIB), at)  # within the second: nothing more
    assert again == 1000 * MIB + GIB


def test_neon_shrinks_by_a_unit_and_only_where_much_is_left() -> None:
    law = NeonMemory()
    law.need(memory(100 * MIB), 0.0)
    grown = memory(100 * MIB, total=1000 * MIB + 2 * GIB)
    for step in range(1, 6):
        law.need(grown, step / 10)
    assert law.need(grown, 5.0) == 1000 * MIB + GIB
    busy = NeonMemory()
    busy.need(memory(700 * MIB), 0.0)
    held = memory(1500 * MIB, total=1000 * MIB + GIB)
    for step in range(1, 10):
        busy.need(held, step / 10)
    assert busy.need(held, 5.0) == 1000 * MIB + GIB


def test_cpuplugd_adds_a_fortieth_when_little_is_free_or_pages_are_scanned() -> None:
    assert CpuplugdMemory().need(memory(950 * MIB, free=50 * MIB, cache=20 * MIB), 0.0) == 1025 * MIB
    scanning = CpuplugdMemory()
    scanning.need(memory(500 * MIB, free=400 * MIB, scanned=10), 0.0)
    assert scanning.need(memory(500 * MIB, free=400 * MIB, scanned=5000), 1.0) == 1025 * MIB
    assert CpuplugdMemory().need(memory(500 * MIB, free=400 * MIB), 0.0) == 990 * MIB


def test_proxmox_moves_by_100_mib_and_not_below_what_it_booted_with() -> None:
    law = ProxmoxMemory()
    assert law.need(memory(500 * MIB), 0.0) == 1000 * MIB
    assert law.need(memory(800 * MIB), 10.0) == 1100 * MIB
    assert law.need(memory(500 * MIB, total=1128 * MIB), 20.0) == 1000 * MIB


def test_use_is_the_busy_share_of_what_was_accounted_for() -> None:
    assert cpus_used(sample(busy=1.0, idle=1.0), sample(busy=4.0, idle=2.0)) == pytest.approx(0.75)
    assert cpus_used(sample(), sample()) == 0.0


def test_a_cpu_law_is_asked_at_its_interval_only() -> None:
    estimator = PollingCpu(NeonCpu(by_load=False))
    assert estimator.update(sample(), 1, 0.0).needed_millicores == 1000
    assert estimator.update(sample(busy=4.0), 1, 4.0).needed_millicores == 1000
    assert estimator.update(sample(busy=5.0), 1, 5.0).needed_millicores == 1111


def test_a_memory_law_is_asked_at_its_interval_only() -> None:
    estimator = PollingMemory(ProxmoxMemory(), lambda: {"MemFree": 0})
    assert estimator.update(sample(), 10 * MIB, 0, 0.0).needed_bytes == 522 * MIB
    full = sample(available=10 * MIB)
    assert estimator.update(full, 10 * MIB, 0, 9.0).needed_bytes == 522 * MIB
    assert estimator.update(full, 10 * MIB, 0, 10.0).needed_bytes == 622 * MIB


def test_what_is_looked_at() -> None:
    found = look(sample(), {"MemFree": 5, "Cached": 30, "Shmem": 10, "pgscan_direct": 7})
    assert (found.used, found.free, found.cache, found.scanned) == (112 * MIB, 5, 20, 7)


@pytest.mark.parametrize("law", LAWS)
def test_the_machine_samples_at_the_laws_interval_and_nothing_hurries_it(
    law: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PollingMachine, "law", law)
    machine = PollingMachine(Identity(boot_id=bytes(16), generation=1), 0.0)
    machine.next_actions(0.0)
    machine.on_sample(sample(), 0.0)
    machine.on_watched(True)
    machine.on_pressure(0.01)
    interval = min(one.interval_seconds for one in LAWS[law]())
    assert not any(isinstance(action, TakeSample) for action in machine.next_actions(interval * 0.9))
    assert any(isinstance(action, TakeSample) for action in machine.next_actions(interval * 1.01))


def test_a_laws_demand_is_what_the_broker_hears() -> None:
    class Utilisation(PollingMachine):
        law = "neon-utilisation"

    machine = Utilisation(Identity(boot_id=bytes(16), generation=1), 0.0)
    limits = Resources(1000, 512 * MIB), Resources(4000, GIB)
    machine.on_welcome(Welcome(1, "vm", 1, 30.0, *limits), 0.0)
    heard: list[Demand] = []
    for step in range(60):  # one CPU, and it is busy: 0.1 s each
        now = step / 10
        machine.on_inventory(Inventory(cpus_present=frozenset({0}), cpus_online=frozenset({0})), now)
        machine.on_sample(sample(busy=now), now)
        said = [action.message for action in machine.next_actions(now) if isinstance(action, Say)]
        heard += [message for message in said if isinstance(message, Demand)]
    assert [demand.needed.cpu_millicores for demand in heard] == [1000, 1111]


def test_guestd_has_what_a_poller_puts_itself_in_place_of() -> None:
    assert vars(app)["GuestMachine"].__name__ == "GuestMachine"
    assert callable(vars(guestd_main)["_be_the_daemon"])
