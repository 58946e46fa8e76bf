"""A burst's life: lent above the maximum, noticed before it ends, preempted, expired, overdue."""

from guestd.broker.core.ledger import HostCapacity
from guestd.broker.core.track import Timing
from guestd.broker.hypervisor.fake import FakeVm
from guestd.model.messages import Grant, GrantStage, Reclaim
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB, MIB
from guestd.sim.guest import SimGuest
from guestd.sim.world import World, limits

TIMING = Timing(burst_least_seconds=10.0)
SECONDS = 60
"""For so long the credit lasts at the full burst."""


class Ears:
    """All that was said, with its time."""

    def __init__(self, host: HostCapacity) -> None:
        self.heard: list[tuple[float, object]] = []
        self.world = World(host, TIMING, self.hear)

    def hear(self, message: object) -> tuple[float, ...]:
        self.heard.append((self.world.now, message))
        return (0.0,)

    def grants(self, kind: Kind, stage: GrantStage) -> list[tuple[float, Grant]]:
        return [
            (at, message)
            for at, message in self.heard
            if isinstance(message, Grant) and message.kind is kind and message.stage is stage
        ]


def bursty(refill: Resources | None = None) -> Limits:
    return Limits(
        Resources(1000, 512 * MIB),
        Resources(2000, GIB),
        burst=Resources(4000, 2 * GIB),
        burst_credit=Resources(2000 * SECONDS, GIB * SECONDS),
        burst_refill=refill or Resources(500, GIB // 4),
    )


def rates() -> dict[str, float]:
    return {"plug_rate": 4 * GIB, "unplug_rate": 512 * MIB, "cpu_unplug_seconds": 0.1}


def credit(world: World, guest: SimGuest, kind: Kind) -> int:
    """What is left now: the core counts it when it looks at the guest."""
    assert world.broker is not None
    world.pause(guest.name, False)
    world.run(0.05)
    lend = world.broker.guests[guest.name].tracks[kind].lend
    assert lend is not None
    return lend.bucket.credit


def works(guest: SimGuest) -> None:
    guest.load.tasks, guest.load.memory_bytes = 4.2, 1500 * MIB


def test_a_burst_is_lent_says_so_is_noticed_and_ends() -> None:
    ears = Ears(HostCapacity(Resources(8000, 8 * GIB)))
    world = ears.world
    guest = world.add("a", bursty(), FakeVm(**rates()))  # type: ignore[arg-type]
    world.run(10)
    works(guest)
    world.run(15)
    assert len(guest.kernel.online_cpus) == 4
    assert guest.vm.guest_memory_bytes > 3 * GIB // 2
    _, lent = ears.grants(Kind.CPU, GrantStage.OFFERED)[-1]
    assert lent.burst == 2000
    assert lent.remaining_seconds is not None
    assert 0 < lent.remaining_seconds <= SECONDS
    world.run(SECONDS)
    at, notice = ears.grants(Kind.CPU, GrantStage.ENDING)[0]
    assert notice.burst == 2000
    assert notice.remaining_seconds is not None
    assert 0 < notice.remaining_seconds <= TIMING.burst_notice_seconds
    ends = at + notice.remaining_seconds
    asked = [when for when, m in ears.heard if isinstance(m, Reclaim) and m.kind is Kind.CPU and when > at]
    assert asked[0] >= ends - 0.1, "the notice comes before the end"
    assert len(guest.vm.guest_cpus) == 2
    assert world.happened["burst"] >= 2


def test_credit_comes_back_with_time_and_is_never_more_than_its_cap() -> None:
    world = World(HostCapacity(Resources(8000, 8 * GIB)), TIMING)
    guest = world.add("a", bursty(), FakeVm(**rates()))  # type: ignore[arg-type]
    world.run(10)
    assert credit(world, guest, Kind.CPU) == 2000 * SECONDS
    works(guest)
    world.run(30)
    spent = credit(world, guest, Kind.CPU)
    assert spent < 2000 * SECONDS * 3 // 4
    guest.load.tasks, guest.load.memory_bytes = 0.1, 120 * MIB
    world.run(60)
    assert spent < credit(world, guest, Kind.CPU) < 2000 * SECONDS
    world.set_clock(-50.0)
    world.run(5)
    world.set_clock(100_000.0)
    world.run(1)
    assert credit(world, guest, Kind.CPU) == 2000 * SECONDS


def test_a_burst_is_preempted_by_who_needs_its_own() -> None:
    world = World(HostCapacity(Resources(6000, 4 * GIB)), TIMING)
    guest = world.add("a", bursty(), FakeVm(**rates()))  # type: ignore[arg-type]
    other = world.add("b", limits(1, 4, 512 * MIB, 2560 * MIB), FakeVm(**rates()))  # type: ignore[arg-type]
    world.run(10)
    works(guest)
    world.run(15)
    assert len(guest.kernel.online_cpus) == 4
    other.load.tasks, guest.load.memory_bytes = 4.2, 500 * MIB
    world.run(20)
    assert len(other.kernel.online_cpus) == 4
    assert len(guest.kernel.online_cpus) == 2
    assert credit(world, guest, Kind.CPU) > 0, "preempted, not expired"


def test_memory_that_outlives_its_burst_is_overdue_and_gets_nothing_more() -> None:
    world = World(HostCapacity(Resources(8000, 8 * GIB)), TIMING)
    guest = world.add("a", bursty(Resources()), FakeVm(**rates()))  # type: ignore[arg-type]
    world.run(10)
    works(guest)
    world.run(10)
    guest.load.unmovable_bytes = GIB  # cannot be given back
    world.run(SECONDS + 60)
    assert world.broker is not None
    track = world.broker.guests["a"].tracks[Kind.MEMORY]
    held = guest.vm.guest_memory_bytes
    assert held > GIB
    assert track.overdue
    assert track.reserved == held, "charged as long as it is held"
    assert credit(world, guest, Kind.MEMORY) == 0
    guest.load.memory_bytes = 1900 * MIB  # wants even more
    world.run(60)
    assert guest.vm.guest_memory_bytes <= held
    guest.load.memory_bytes, guest.load.unmovable_bytes = 300 * MIB, 0
    world.run(120)
    assert guest.vm.guest_memory_bytes <= GIB
    assert not track.overdue


def test_cpu_that_outlives_its_burst_is_taken_by_quota_whatever_the_guest_says() -> None:
    world = World(HostCapacity(Resources(8000, 8 * GIB)), TIMING)
    guest = world.add("a", bursty(Resources()), FakeVm(cpu_enforced=True, **rates()))  # type: ignore[arg-type]
    world.run(10)
    works(guest)
    world.run(15)
    assert guest.vm.truth().cpu_quota_millicores == 4000
    guest.kernel.pinned = frozenset({1, 2, 3})  # will not let go of any CPU
    guest.silent = True
    world.run(SECONDS)
    assert guest.vm.truth().cpu_quota_millicores == 2000
    before = guest.kernel.had_cpu_seconds
    world.run(10)
    assert guest.kernel.had_cpu_seconds - before <= 2.0 * 10 + 0.1
    assert world.happened["forced"] >= 1


def test_burst_memory_is_lent_only_from_what_is_really_there() -> None:
    host = HostCapacity(Resources(8000, 6 * GIB), physical=Resources(8000, 3 * GIB))
    world = World(host, TIMING)
    guest = world.add("a", bursty(), FakeVm(**rates()))  # type: ignore[arg-type]
    other = world.add("b", limits(1, 4, 512 * MIB, 2560 * MIB), FakeVm(**rates()))  # type: ignore[arg-type]
    world.run(10)
    other.load.memory_bytes = 1200 * MIB
    world.run(20)
    held = other.vm.guest_memory_bytes
    works(guest)
    world.run(20)
    assert held >= 1280 * MIB
    assert guest.vm.guest_memory_bytes <= 3 * GIB - held
    assert guest.vm.guest_memory_bytes > GIB


def test_a_burst_survives_the_brokers_death_with_what_is_left_of_its_credit() -> None:
    world = World(HostCapacity(Resources(8000, 8 * GIB)), TIMING)
    guest = world.add("a", bursty(Resources()), FakeVm(**rates()))  # type: ignore[arg-type]
    world.run(10)
    works(guest)
    world.run(20)
    before = credit(world, guest, Kind.CPU)
    assert len(guest.kernel.online_cpus) == 4
    world.kill_broker()
    world.run(5)
    world.start_broker()
    world.run(3)
    assert len(guest.kernel.online_cpus) == 4
    # The journal has the credit of its last record: at the begin of the burst, and every 30 s of it.
    assert credit(world, guest, Kind.CPU) <= before + 2000 * TIMING.credit_record_seconds
    world.run(SECONDS + 30)
    assert len(guest.vm.guest_cpus) == 2
