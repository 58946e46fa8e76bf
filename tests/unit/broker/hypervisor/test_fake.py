"""The fake hypervisor keeps the laws of the real one."""

from collections.abc import Awaitable, Callable

import pytest

from guestd.broker.hypervisor.base import Vm
from guestd.broker.hypervisor.fake import FakeVm, Fault
from guestd.model.errors import HypervisorError, HypervisorGone, HypervisorUnreachable, OutcomeUnknown
from guestd.model.units import GIB, MIB
from guestd.model.vm import VmState, VmStatus

BOOT = 512 * MIB


async def test_without_rates_the_guest_follows_at_once() -> None:
    fake = FakeVm()
    vm: Vm = fake
    await vm.request_vcpus(3)
    await vm.request_memory(BOOT + GIB)
    state = await vm.observe()
    assert (state.vcpus, state.memory_plugged_bytes, state.memory_held_bytes) == (3, BOOT + GIB, BOOT + GIB)
    await vm.request_vcpus(0)
    await vm.request_memory(0)
    state = await vm.observe()
    assert (state.vcpus, state.memory_plugged_bytes) == (1, BOOT)
    assert fake.guest_cpus == {0}


async def test_with_rates_the_guest_follows_in_time() -> None:
    fake = FakeVm(plug_rate=100 * MIB, unplug_rate=50 * MIB, cpu_unplug_seconds=2.0, vcpus_max=2)
    await fake.request_memory(BOOT + 200 * MIB)
    state = await fake.observe()
    assert (state.memory_held_bytes, state.memory_plugged_bytes) == (BOOT + 200 * MIB, BOOT)
    for _ in range(10):
        fake.advance(0.1)
    assert fake.guest_memory_bytes == BOOT + 100 * MIB
    fake.advance(5)
    await fake.request_memory(BOOT)
    fake.advance(1)
    state = await fake.observe()
    assert state.memory_held_bytes == state.memory_plugged_bytes == BOOT + 150 * MIB
    await fake.request_vcpus(2)
    await fake.request_vcpus(1)
    fake.advance(1.5)
    assert (await fake.observe()).vcpus == 2
    fake.advance(0.5)
    assert (await fake.observe()).vcpus == 1


async def test_an_unplug_that_stops_short_can_be_settled() -> None:
    fake = FakeVm()
    await fake.request_memory(BOOT + GIB)
    fake.guest_keeps_bytes = BOOT + 300 * MIB
    await fake.request_memory(BOOT)
    assert (await fake.observe()).memory_held_bytes == BOOT + 300 * MIB
    await fake.settle_memory()
    fake.guest_keeps_bytes = 0
    fake.advance(10)
    assert (await fake.observe()).memory_held_bytes == BOOT + 300 * MIB


async def test_a_guest_that_keeps_its_cpus() -> None:
    fake = FakeVm()
    await fake.request_vcpus(4)
    fake.guest_keeps_vcpus = 3
    await fake.request_vcpus(1)
    fake.advance(10)
    assert fake.guest_cpus == {0, 1, 2}


async def test_the_balloon_works_below_boot_memory() -> None:
    fake = FakeVm(balloon=True)
    await fake.request_memory(0)
    state = await fake.observe()
    assert state.memory_held_bytes == state.memory_min_bytes == 128 * MIB
    fake.guest_takes(100 * MIB)
    assert (await fake.observe()).memory_held_bytes == 228 * MIB


async def test_a_reset_keeps_what_was_requested() -> None:
    fake = FakeVm()
    await fake.request_memory(BOOT + GIB)
    fake.reset(replug_seconds=14)
    fake.advance(13)
    state = await fake.observe()
    assert (state.memory_plugged_bytes, state.memory_held_bytes, state.resets) == (BOOT, BOOT + GIB, 1)
    fake.advance(1)
    assert fake.guest_memory_bytes == BOOT + GIB


async def test_a_guest_that_grabs_more_is_charged() -> None:
    fake = FakeVm()
    fake.unplug_rate = 0
    fake.guest_takes(64 * MIB)
    assert (await fake.observe()).memory_held_bytes == BOOT + 64 * MIB


@pytest.mark.parametrize(
    ("fault", "error", "vcpus"),
    [
        (Fault.REFUSED, HypervisorError, 1),
        (Fault.LOST_NOT_DONE, OutcomeUnknown, 1),
        (Fault.LOST_DONE, OutcomeUnknown, 2),
    ],
)
async def test_a_fault_hits_one_request(fault: Fault, error: type[Exception], vcpus: int) -> None:
    fake = FakeVm()
    fake.fail_next(fault)
    with pytest.raises(error) as caught:
        await fake.request_vcpus(2)
    assert type(caught.value) is error
    assert (await fake.observe()).vcpus == vcpus
    await fake.request_vcpus(2)


async def test_a_lost_observation() -> None:
    fake = FakeVm()
    fake.lose_next_observations()
    with pytest.raises(OutcomeUnknown):
        await fake.observe()
    assert (await fake.observe()).status is VmStatus.RUNNING


@pytest.mark.parametrize(
    ("status", "error"),
    [(VmStatus.GONE, HypervisorGone), (VmStatus.UNREACHABLE, HypervisorUnreachable)],
)
async def test_gone_and_unreachable(status: VmStatus, error: type[Exception]) -> None:
    fake = FakeVm()
    await fake.request_vcpus(2)
    fake.set_status(status)
    assert (await fake.observe()).status is status
    for request in (lambda: fake.request_vcpus(3), fake.settle_memory):
        call: Callable[[], Awaitable[None]] = request
        with pytest.raises(error):
            await call()
    fake.set_status(VmStatus.RUNNING)
    assert (await fake.observe()).vcpus == (1 if status is VmStatus.GONE else 2)


async def test_a_frozen_guest_does_nothing() -> None:
    fake = FakeVm()
    fake.set_status(VmStatus.FROZEN)
    await fake.request_memory(BOOT + GIB)
    fake.advance(100)
    assert fake.guest_memory_bytes == BOOT
    fake.set_status(VmStatus.RUNNING)
    fake.advance(0)
    assert fake.guest_memory_bytes == BOOT + GIB


async def test_both_sides_are_told_of_changes() -> None:
    told: list[str] = []
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    fake = FakeVm(command_seconds=0.2, sleep=sleep)
    fake.on_guest_change = lambda: told.append("guest")
    await fake.open(lambda: told.append("broker"))
    await fake.request_memory(BOOT + GIB)
    await fake.close()
    fake.reset()
    assert told == ["broker", "guest", "broker", "guest"]
    assert slept == [0.2]
    assert fake.requests == [("request_memory", BOOT + GIB)]


async def test_cpu_time_is_bounded_where_the_host_can() -> None:
    with pytest.raises(HypervisorError, match="cannot bound"):
        await FakeVm().request_cpu_quota(250)
    vm = FakeVm(cpu_enforced=True)
    assert (await vm.observe()).cpu_quota_millicores == 0
    with pytest.raises(HypervisorError, match="above 0"):
        await vm.request_cpu_quota(0)
    await vm.request_cpu_quota(250)
    vm.set_cpu_throttled(900)
    vm.reset()
    state = await vm.observe()
    assert (state.cpu_enforced, state.cpu_quota_millicores, state.cpu_throttled_permille) == (True, 250, 900)
    vm.set_status(VmStatus.GONE)
    assert await vm.observe() == VmState(VmStatus.GONE)
    vm.set_status(VmStatus.RUNNING)
    state = await vm.observe()
    assert (state.cpu_enforced, state.cpu_quota_millicores, state.cpu_throttled_permille) == (True, 0, 0)


async def test_a_quota_fails_and_is_lost_on_demand() -> None:
    vm = FakeVm(cpu_enforced=True)
    vm.fail_next(Fault.LOST_DONE, Fault.REFUSED, Fault.LOST_NOT_DONE)
    with pytest.raises(OutcomeUnknown):
        await vm.request_cpu_quota(250)
    with pytest.raises(HypervisorError, match="refused"):
        await vm.request_cpu_quota(500)
    with pytest.raises(OutcomeUnknown):
        await vm.request_cpu_quota(750)
    assert (await vm.observe()).cpu_quota_millicores == 250
    vm.lose_cpu_group()
    assert (await vm.observe()).cpu_quota_millicores == 0
