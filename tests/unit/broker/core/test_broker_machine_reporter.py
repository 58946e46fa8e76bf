"""A guest that can only report: the host sizes its VM by quota and balloon, and asks it for nothing it cannot do."""

from dataclasses import replace

from one_guest import BLOCK, BOOT, LIMITS, TIMING, USABLE, One, hello, of, sent, vm

from guestd.broker.core import judge
from guestd.broker.core.actions import RequestCpuQuota, RequestMemory, RequestVcpus
from guestd.broker.core.track import Phase
from guestd.model.guest import Capability
from guestd.model.messages import AckStatus, Reclaim
from guestd.model.resources import Kind, Resources
from guestd.model.units import MIB
from guestd.model.vm import VmState

WIDE = TIMING.cool_down_seconds + 1


def booted(quota: int = 4000, memory: int = BOOT, ballooned: int = 0, enforced: bool = True, vcpus: int = 4) -> VmState:
    """A VM with four vCPUs plugged, one of them from the start, and a balloon down to 128 MiB."""
    return vm(
        vcpus,
        memory,
        cpu_enforced=enforced,
        cpu_quota_millicores=quota if enforced else 0,
        memory_min_bytes=BLOCK,
        memory_ballooned_bytes=ballooned,
    )


class Reporter(One):
    """A guest that says how it is, and can switch nothing."""

    def __init__(self, enforced: bool = True) -> None:
        super().__init__(state=booted(enforced=enforced), connect=False)
        self.machine.on_vm_state("a", booted(enforced=enforced), self.now)
        self.machine.set_limits("a", replace(LIMITS, min=Resources(250, BLOCK)))
        self.connect(hello(capabilities=()))
        self.step()
        self.step(WIDE)


def test_its_cpu_time_is_taken_and_given_by_quota_alone() -> None:
    one = Reporter()
    actions = one.demand(cpu=900)
    assert of(RequestCpuQuota, actions) == [RequestCpuQuota("a", 1000)]
    assert not of(RequestVcpus, actions)  # it could not take one offline
    assert not [message for message in sent(actions) if isinstance(message, Reclaim)]  # it could only say no
    one.is_now(booted(1000))
    assert one.track().phase is Phase.IDLE
    assert one.reserved.cpu_millicores == 1000
    one.step(WIDE)
    actions = one.demand(cpu=2500)
    assert of(RequestCpuQuota, actions) == [RequestCpuQuota("a", 3000)]
    assert not of(RequestVcpus, actions)
    one.is_now(booted(3000))
    assert one.reserved.cpu_millicores == 3000
    assert one.track().counters.refusals == one.track().counters.failures == 0


def test_it_is_given_no_more_cpu_time_than_the_vcpus_it_has() -> None:
    one = Reporter()
    one.is_now(booted(2000, vcpus=2))
    one.step(WIDE)
    actions = one.demand(cpu=9000)
    assert one.track().target == one.reserved.cpu_millicores == 2000
    assert not of(RequestVcpus, actions)


def test_without_a_quota_its_vcpus_stay() -> None:
    one = Reporter(enforced=False)
    actions = one.demand(cpu=900)
    [order] = [message for message in sent(actions) if isinstance(message, Reclaim)]
    assert order.kind is Kind.CPU
    one.answer(order, AckStatus.REFUSED, 4000)
    assert one.reserved.cpu_millicores == 4000
    assert one.track().phase is Phase.IDLE


def test_its_memory_goes_and_comes_back_by_balloon() -> None:
    one = Reporter()
    actions = one.demand(cpu=4000, memory=2 * BLOCK, floor=BLOCK)
    [order] = [message for message in sent(actions) if isinstance(message, Reclaim)]
    assert order.kind is Kind.MEMORY
    assert of(RequestMemory, one.answer(order, AckStatus.DONE, 2 * BLOCK)) == [RequestMemory("a", 2 * BLOCK)]
    one.is_now(booted(memory=2 * BLOCK, ballooned=2 * BLOCK))
    one.step(1.0)
    one.is_now(booted(memory=2 * BLOCK, ballooned=2 * BLOCK))
    assert one.reserved.memory_bytes == 2 * BLOCK
    one.step(WIDE)
    # More than it booted with nobody can bring online there.
    actions = one.demand(cpu=4000, memory=2048 * MIB, floor=BLOCK)
    assert of(RequestMemory, actions) == [RequestMemory("a", BOOT)]


def test_who_can_switch_is_asked_as_ever() -> None:
    one = Reporter()
    one.connect(hello(generation=2, capabilities={Capability.CPU_ONLINE, Capability.MEMORY_ONLINE}))
    one.step()
    guest = one.machine.guests["a"]
    guest.usable = replace(USABLE, vcpus_online=4)
    assert not guest.parks
    assert judge.needs_asking(guest, one.track(), 1000)
