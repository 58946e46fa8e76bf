"""CPU bounded by a quota: fractions of a CPU, forced shrinks, parking, and what the guest is told of it."""

from dataclasses import replace

from one_guest import BOOT, LIMITS, TIMING, USABLE, One, of, reclaim, vm

from guestd.broker.core.actions import Log, Record, RequestCpuQuota, RequestVcpus, Send
from guestd.broker.core.track import Phase
from guestd.model.messages import AckStatus, Grant, Reclaim, Throttle
from guestd.model.resources import Kind, Resources
from guestd.model.units import GIB
from guestd.model.vm import VmState


def bounded(cpus: int, quota: int, **more: object) -> VmState:
    return vm(cpus, BOOT, cpu_enforced=True, cpu_quota_millicores=quota, **more)


class Bounded(One):
    """The host bounds the guest's CPU time."""

    def __init__(self, low: int = 250, high: int = 4000, park: bool = False) -> None:
        super().__init__(state=bounded(1, 1000))
        self.machine.guests["a"].park = park
        self.machine.set_limits(
            "a", replace(LIMITS, min=Resources(low, BOOT), max=Resources(high, LIMITS.max.memory_bytes))
        )
        self.first = self.step()


def test_a_vm_without_a_quota_gets_one() -> None:
    one = One(state=vm())
    assert of(RequestCpuQuota, one.is_now(bounded(2, 0))) == [RequestCpuQuota("a", 2000)]
    assert not of(RequestCpuQuota, one.is_now(bounded(2, 2000)))


def test_a_fraction_of_a_cpu_is_charged_and_set_without_asking_the_guest() -> None:
    one = Bounded(high=250)
    assert of(RequestCpuQuota, one.first) == [RequestCpuQuota("a", 250)]
    assert not of(RequestVcpus, one.first)
    one.is_now(bounded(1, 250))
    assert one.reserved.cpu_millicores == 250
    assert one.track().phase is Phase.IDLE


def test_without_scarcity_a_need_is_rounded_up_to_whole_vcpus() -> None:
    one = Bounded()
    one.demand(cpu=300)
    assert one.track().target == 1000
    actions = one.demand(cpu=1300)
    assert [type(a) for a in actions if not isinstance(a, Log)] == [Record, RequestVcpus, RequestCpuQuota, Send]
    assert of(RequestVcpus, actions) == [RequestVcpus("a", 2)]
    assert of(RequestCpuQuota, actions) == [RequestCpuQuota("a", 2000)]


def test_a_grow_is_settled_when_both_vcpus_and_quota_are_there() -> None:
    one = Bounded()
    one.demand(cpu=2000)
    one.is_now(bounded(2, 1000))
    assert one.track().phase is Phase.PLUGGING
    one.is_now(bounded(2, 2000))
    assert one.track().phase is Phase.IDLE
    assert one.track().counters.grows == 1


class Three(Bounded):
    """It has 3 vCPUs online and needs one from now on."""

    def __init__(self, park: bool = False) -> None:
        super().__init__(park=park)
        self.demand(cpu=3000)
        self.is_now(bounded(3, 3000))
        self.machine.guests["a"].usable = replace(USABLE, vcpus_online=3, vcpus_present=3)
        self.step(TIMING.cool_down_seconds + 1)
        self.sequence += 1
        demand = self.machine.guests["a"].demand
        assert demand is not None
        less = replace(
            demand,
            sequence=self.sequence,
            needed=Resources(1000, BOOT),
            usable=replace(USABLE, vcpus_online=3, vcpus_present=3),
        )
        self.machine.on_demand("a", self.session, less, self.now)
        self.order = reclaim(self.step())


def test_parked_vcpus_stay_plugged_and_their_time_is_free_at_once() -> None:
    one = Three(park=True)
    actions = one.answer(one.order, AckStatus.DONE, 1000)
    assert of(RequestCpuQuota, actions) == [RequestCpuQuota("a", 1000)]
    assert not of(RequestVcpus, actions)
    one.is_now(bounded(3, 1000))
    assert one.track().phase is Phase.IDLE
    assert one.reserved.cpu_millicores == 1000
    grow = one.demand(cpu=3000)
    assert of(RequestCpuQuota, grow) == [RequestCpuQuota("a", 3000)]
    assert not of(RequestVcpus, grow), "they are there already"


def test_unplugging_frees_the_time_before_the_vcpus_are_gone() -> None:
    one = Three()
    actions = one.answer(one.order, AckStatus.DONE, 1000)
    assert of(RequestCpuQuota, actions) == [RequestCpuQuota("a", 1000)]
    assert of(RequestVcpus, actions) == [RequestVcpus("a", 1)]
    one.is_now(bounded(3, 1000))
    assert one.reserved.cpu_millicores == 1000
    assert one.track().phase is Phase.UNPLUGGING
    one.is_now(bounded(2, 1000))
    one.is_now(bounded(1, 1000))
    assert one.track().phase is Phase.IDLE
    assert one.track().counters.shrinks == 1


def test_a_guest_that_refuses_or_is_silent_loses_the_time_all_the_same() -> None:
    refusing = Three(park=True)
    actions = refusing.answer(refusing.order, AckStatus.REFUSED, 3000)
    assert of(RequestCpuQuota, actions) == [RequestCpuQuota("a", 1000)]
    assert refusing.track().counters.refusals == 1
    silent = Three(park=True)
    assert not of(RequestCpuQuota, silent.step(TIMING.ask_seconds + 0.1)), "urged first"
    assert of(RequestCpuQuota, silent.step(TIMING.urge_seconds + 0.1)) == [RequestCpuQuota("a", 1000)]


def test_a_guest_is_asked_for_whole_vcpus() -> None:
    one = Three(park=True)
    one.machine.set_limits("a", replace(LIMITS, min=Resources(250, BOOT), max=Resources(1500, GIB)))
    one.machine.guests["a"].tracks[Kind.CPU].end()
    one.step()  # its time is taken at once, above its maximum
    one.is_now(bounded(3, 1500))
    order = reclaim(one.step(TIMING.cool_down_seconds + 0.1))
    assert order.amount == 1000
    one.answer(order, AckStatus.DONE, 1000)
    one.is_now(bounded(3, 1000))
    assert one.track().counters.refusals == 0


def test_a_quota_that_somebody_changed_is_put_right() -> None:
    one = Bounded()
    actions = one.is_now(bounded(4, 4000))
    assert any("more than the 1 CPU that were granted" in log.text for log in of(Log, actions))
    assert one.reserved.cpu_millicores == 4000, "what it has is charged"


def test_the_guest_is_told_when_it_is_held_back_and_when_not_any_more() -> None:
    one = Bounded(high=250)
    one.demand(cpu=1000)
    one.is_now(bounded(1, 250))

    def told(permille: int) -> list[object]:
        actions = one.is_now(bounded(1, 250, cpu_throttled_permille=permille))
        return [send.message for send in of(Send, actions) if not isinstance(send.message, Grant)]

    assert told(700) == [Throttle(250, 700)]
    assert told(750) == [], "hardly another number"
    assert told(900) == [Throttle(250, 900)]
    again = [send.message for send in of(Send, one.step(5))]  # with each heartbeat: what was lost only delays
    assert Throttle(250, 900) in again
    assert told(0) == [Throttle(250, 0)]
    assert [message for permille in (20, 0, 40, 90, 10) for message in told(permille)] == [], "now and then"
    assert told(100) == [Throttle(250, 100)]
    assert told(60) == []
    assert told(40) == [Throttle(250, 0)]


def test_vcpus_that_a_reboot_brought_online_are_parked_again() -> None:
    one = Three(park=True)
    one.answer(one.order, AckStatus.DONE, 1000)
    one.is_now(bounded(3, 1000))
    one.sequence += 1
    demand = one.machine.guests["a"].demand
    assert demand is not None
    booted = replace(USABLE, vcpus_online=3, vcpus_present=3)
    one.machine.on_demand("a", one.session, replace(demand, sequence=one.sequence, usable=booted), one.now)
    order = reclaim(one.step())
    assert order.amount == 1000
    refused = one.answer(order, AckStatus.REFUSED, 3000)
    one.is_now(bounded(3, 1000))
    assert not [send for send in of(Send, refused) if isinstance(send.message, Reclaim)], "not again at once"
    assert one.reserved.cpu_millicores == 1000
