"""One VM's requests: in order, each followed by a look, failures reported."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from guestd.broker import worker as module
from guestd.broker.core.actions import (
    HypervisorAction,
    Observe,
    RequestCpuQuota,
    RequestMemory,
    RequestVcpus,
    SettleMemory,
)
from guestd.broker.hypervisor.fake import FakeVm, Fault
from guestd.broker.worker import VmWorker, is_unknown
from guestd.model.errors import HypervisorError, HypervisorUnreachable, OutcomeUnknown
from guestd.model.units import GIB
from guestd.model.vm import VmState, VmStatus


class Rig:
    """A worker on a fake VM, and all that it reported."""

    def __init__(self) -> None:
        self.vm = FakeVm()
        self.states: list[VmState] = []
        self.failures: list[tuple[HypervisorAction, HypervisorError]] = []
        self.worker = VmWorker(self.vm, self.states.append, lambda *one: self.failures.append(one), "a")

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not holds():  # noqa: ASYNC110 - whatever a test waits for
                await asyncio.sleep(0.005)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    one = Rig()
    await one.worker.start()
    await one.until(lambda: bool(one.states))
    one.states.clear()
    yield one
    await one.worker.close()


async def test_what_is_asked_for_is_done_in_order_and_looked_at(rig: Rig) -> None:
    rig.worker.submit(RequestVcpus("a", 3))
    rig.worker.submit(RequestMemory("a", GIB))
    rig.worker.submit(SettleMemory("a"))
    await rig.until(lambda: len(rig.states) >= 3)
    assert rig.vm.requests == [("request_vcpus", 3), ("request_memory", GIB), ("settle_memory", 0)]
    assert (rig.states[-1].vcpus, rig.states[-1].memory_held_bytes) == (3, GIB)
    assert rig.failures == []


async def test_a_quota_is_set_and_one_that_cannot_be_is_reported(rig: Rig) -> None:
    rig.worker.submit(RequestCpuQuota("a", 250))
    await rig.until(lambda: bool(rig.failures))
    [(action, error)] = rig.failures
    assert action == RequestCpuQuota("a", 250)
    assert "cannot bound" in str(error)
    rig.vm.cpu_enforced = True
    rig.worker.submit(RequestCpuQuota("a", 500))
    await rig.until(lambda: bool(rig.states) and rig.states[-1].cpu_quota_millicores == 500)
    assert len(rig.failures) == 1


async def test_looks_that_wait_become_one(rig: Rig) -> None:
    for _ in range(100):
        rig.worker.observe()
        rig.worker.submit(Observe("a"))
    await asyncio.sleep(0.05)
    assert len(rig.states) == 1


async def test_a_look_after_a_request_is_not_the_one_from_before(rig: Rig) -> None:
    rig.worker.observe()
    rig.worker.submit(RequestVcpus("a", 2))
    await rig.until(lambda: len(rig.states) >= 2)
    assert rig.states[-1].vcpus == 2


@pytest.mark.parametrize(("fault", "unknown"), [(Fault.REFUSED, False), (Fault.LOST_DONE, True)])
async def test_a_failure_is_reported_with_what_it_was_about_and_the_next_goes_on(
    rig: Rig, fault: Fault, unknown: bool
) -> None:
    rig.vm.fail_next(fault)
    rig.worker.submit(RequestVcpus("a", 2))
    rig.worker.submit(RequestVcpus("a", 3))
    await rig.until(lambda: bool(rig.states) and rig.states[-1].vcpus == 3)
    [(action, error)] = rig.failures
    assert action == RequestVcpus("a", 2)
    assert is_unknown(error) is unknown


async def test_a_lost_look_is_reported_and_tried_again_soon(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.01)
    rig.vm.lose_next_observations()
    rig.worker.observe()
    await rig.until(lambda: bool(rig.failures))
    assert isinstance(rig.failures[0][0], Observe)
    rig.worker.observe()
    await rig.until(lambda: bool(rig.states))


async def test_a_vm_that_says_nothing_is_looked_at_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WATCH_SECONDS", 0.02)
    rig = Rig()
    await rig.worker.start()
    await rig.until(lambda: len(rig.states) >= 3)
    await rig.worker.close()
    assert rig.vm.requests == [], "it was looked at, and nothing else"
    assert not rig.failures


async def test_an_event_makes_it_look(rig: Rig) -> None:
    rig.vm.set_status(VmStatus.FROZEN)
    await rig.until(lambda: bool(rig.states))
    assert rig.states[-1].status is VmStatus.FROZEN


async def test_closing_leaves_the_vm_alone(rig: Rig) -> None:
    rig.worker.submit(RequestVcpus("a", 3))
    await rig.worker.close()
    assert rig.vm.requests in ([], [("request_vcpus", 3)])
    assert rig.vm.truth().status is VmStatus.RUNNING


def test_only_a_lost_answer_is_unknown() -> None:
    assert is_unknown(OutcomeUnknown(""))
    assert not is_unknown(HypervisorUnreachable(""))


async def test_a_defect_of_a_driver_ends_no_worker(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeVm):
        async def request_vcpus(self, count: int) -> None:
            raise KeyError("no such thing")

    told: asyncio.Queue[VmState] = asyncio.Queue()
    failed: asyncio.Queue[HypervisorError] = asyncio.Queue()
    worker = VmWorker(Broken(), told.put_nowait, lambda action, error: failed.put_nowait(error), "vm")
    await worker.start()
    try:
        worker.submit(RequestVcpus("vm", 2))
        error = await failed.get()
        assert is_unknown(error)
        assert "KeyError" in str(error)
        assert (await told.get()).status is VmStatus.RUNNING
        assert "RequestVcpus failed in a way that nobody foresaw" in caplog.text
    finally:
        await worker.close()


async def test_a_state_from_before_a_request_is_not_told() -> None:
    told: asyncio.Queue[VmState] = asyncio.Queue()
    gate = asyncio.Event()

    class Slow(FakeVm):
        async def observe(self) -> VmState:
            state = await super().observe()
            await gate.wait()
            return state

    vm = Slow()
    worker = VmWorker(vm, told.put_nowait, lambda action, error: None, "vm")
    await worker.start()
    try:
        await asyncio.sleep(0.01)
        worker.submit(RequestVcpus("vm", 2))
        gate.set()
        assert (await told.get()).vcpus == 2
    finally:
        await worker.close()


async def test_of_an_observed_vm_only_the_state_is_asked() -> None:
    rig = Rig()
    rig.worker = VmWorker(rig.vm, rig.states.append, lambda *one: rig.failures.append(one), "a", only_observed=True)
    await rig.worker.start()
    try:
        requests = [RequestVcpus("a", 2), RequestCpuQuota("a", 250), RequestMemory("a", GIB), SettleMemory("a")]
        for request in requests:
            rig.worker.submit(request)
        await rig.until(lambda: len(rig.failures) == len(requests) and bool(rig.states))
        assert rig.vm.requests == []
        assert [action for action, _ in rig.failures] == requests
        assert all("only observed" in str(error) and not is_unknown(error) for _, error in rig.failures)
        rig.worker.only_observe(False)
        rig.worker.submit(RequestVcpus("a", 2))
        await rig.until(lambda: rig.states[-1].vcpus == 2)
        rig.worker.only_observe(True)
        rig.worker.submit(RequestVcpus("a", 3))
        await rig.until(lambda: len(rig.failures) == len(requests) + 1)
        assert rig.vm.requests == [("request_vcpus", 2)]
    finally:
        await rig.worker.close()
