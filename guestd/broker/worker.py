"""One VM's requests, one after the other, so that answers about it arrive in the order of the questions."""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from guestd.broker.core.actions import (
    HypervisorAction,
    Observe,
    RequestCpuQuota,
    RequestMemory,
    RequestVcpus,
    SettleMemory,
)
from guestd.broker.failpoint import Failpoint, reach
from guestd.broker.hypervisor.base import Vm
from guestd.model.errors import HypervisorError, OutcomeUnknown
from guestd.model.vm import VmState, VmStatus
from guestd.runtime.bell import Bell

_log = logging.getLogger(__name__)
_RETRY_SECONDS = 0.5
_WATCH_SECONDS = 15.0
"""An observation even if no event came: a lost event only delays."""


class VmWorker:
    """Carries out the machine's actions on one VM and reports what came of them.

    :param only_observed: nothing is done but to look; the machine asks for nothing else, and would be refused.
    """

    def __init__(
        self,
        vm: Vm,
        on_state: Callable[[VmState], None],
        on_failed: Callable[[HypervisorAction, HypervisorError], None],
        name: str,
        only_observed: bool = False,
    ) -> None:
        self._vm, self._on_state, self._on_failed, self._name = vm, on_state, on_failed, name
        self.only_observe(only_observed)
        self._queue: list[HypervisorAction] = []
        self._filled = Bell()
        self._observing = False
        self._waiting = 0  # requests in the queue
        self._task: asyncio.Task[None] | None = None

    def only_observe(self, only: bool) -> None:
        """Only look at the VM from now on, or do all that is asked."""
        self._only_observed = only
        self._vm.only_observe(only)

    async def start(self) -> None:
        """Watch the VM until `close`."""
        await self._vm.open(self.observe)
        self._task = asyncio.create_task(self._work())

    def submit(self, action: HypervisorAction) -> None:
        """Queue an action; an observation that is queued already is not queued twice."""
        if isinstance(action, Observe):
            self.observe()
        else:
            self._queue.append(action)
            self._waiting += 1
            self._observing = False  # what follows a request must be asked after it
            self.observe()

    def observe(self) -> None:
        """Ask the hypervisor soon."""
        if not self._observing:
            self._observing = True
            self._queue.append(Observe(self._name))
            self._filled.ring()

    async def _work(self) -> None:
        while True:
            if not self._queue:
                self._filled.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_WATCH_SECONDS):
                        await self._filled.wait()
            action = self._queue.pop(0) if self._queue else Observe(self._name)
            try:
                await self._perform(action)
                if not isinstance(action, Observe):
                    reach(Failpoint.ACTED)
            except HypervisorError as error:
                self._on_failed(action, error)
                if isinstance(action, Observe):
                    await asyncio.sleep(_RETRY_SECONDS)
            except Exception as error:  # a defect of a driver's must not leave the VM without a worker
                _log.exception("%s: %s failed in a way that nobody foresaw", self._name, type(action).__name__)
                self._on_failed(action, OutcomeUnknown(f"{type(error).__name__}: {error}"))
                await asyncio.sleep(_RETRY_SECONDS)

    async def _perform(self, action: HypervisorAction) -> None:
        self._waiting -= not isinstance(action, Observe)
        if self._only_observed and not isinstance(action, Observe):
            raise HypervisorError("it is only observed: nothing is asked of its hypervisor")
        match action:
            case Observe():
                self._observing = False
                state = await self._vm.observe()
                if self._waiting:
                    return  # a state from before a request says nothing of it; its own observation follows
                self._on_state(state)
                if state.status is VmStatus.UNREACHABLE:
                    await asyncio.sleep(0)
            case RequestVcpus():
                await self._vm.request_vcpus(action.count)
            case RequestCpuQuota():
                await self._vm.request_cpu_quota(action.millicores)
            case RequestMemory():
                await self._vm.request_memory(action.amount_bytes)
            case SettleMemory():
                await self._vm.settle_memory()

    async def close(self) -> None:
        """Stop watching; the VM stays as it is."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._vm.close()


def is_unknown(error: HypervisorError) -> bool:
    """Whether the command may have been carried out."""
    return isinstance(error, OutcomeUnknown)
