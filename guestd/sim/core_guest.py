"""A guest of the simulated hypervisor with the production daemon: real time, real sockets, a fake kernel.

The kernel sees what `guestd.sim.remote` says that the VM has, a moment later, and has its memory in use:
the hypervisor is told below what the guest lets nothing go.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from guestd.broker.hypervisor.fake import FakeVm
from guestd.guest.core.machine import GuestMachine
from guestd.guest.core.need import EstimateSettings
from guestd.guest.core.need_cpu import CpuEstimator
from guestd.guest.core.need_memory import MemoryEstimator
from guestd.guest.core.ops import HandResult, Op
from guestd.guest.daemon import Daemon, dial_unix
from guestd.guest.hands import DryHands
from guestd.model.errors import HypervisorError
from guestd.model.guest import Capability, Identity
from guestd.model.vm import VmState
from guestd.sim.kernel import GuestKernel, Load
from guestd.sim.remote import HypervisorLink, RemoteVm

_STEP_SECONDS = 0.02
_CAPABLE = frozenset({Capability.CPU_ONLINE, Capability.MEMORY_ONLINE, Capability.VIRTIO_MEM, Capability.PSI})


class Mirror:
    """What of a `FakeVm` the guest's kernel sees, as the hypervisor last told it."""

    def __init__(self, state: VmState) -> None:
        self.guest_keeps_bytes = 0
        self.take(state)

    def take(self, state: VmState) -> None:
        """Another answer of the hypervisor."""
        self._state, self.guest_cpus = state, frozenset(range(state.vcpus))
        self.guest_memory_bytes, self.cpu_enforced = state.memory_plugged_bytes, state.cpu_enforced
        self.boot_bytes, self.vcpus_max = state.boot_memory_bytes, state.vcpus_max

    def truth(self) -> VmState:
        """The answer itself."""
        return self._state


class _Hands(DryHands):
    """Hands on the fake kernel."""

    def __init__(self, kernel: GuestKernel) -> None:
        self._kernel = kernel

    async def batch(self, ops: Sequence[Op], deadline_seconds: float = 10.0) -> list[HandResult]:
        return [self._kernel.perform(op) for op in ops]


class CoreGuest:
    """One guest; `load` may be changed at any time.

    :param broker: the broker's unix socket for this guest.
    :param hold_seconds: for how long a lower need must last to be believed; None: as in production.
    """

    def __init__(self, link: HypervisorLink, name: str, broker: Path, hold_seconds: float | None = None) -> None:
        self.name, self.load = name, Load()
        self._link, self._vm, self._broker = link, RemoteVm(link, name), broker
        self._hold_seconds = hold_seconds
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.mirror: Mirror
        self.kernel: GuestKernel
        self.daemon: Daemon

    async def start(self) -> None:
        """Boot on what the VM has, and run until `stop`.

        :raise HypervisorError: When the hypervisor does not answer.
        """
        self.mirror = Mirror(await self._vm.observe())
        self.kernel = GuestKernel(cast(FakeVm, self.mirror), self.load)
        identity = Identity(b"b" * 16, time.monotonic_ns(), "sim", self.name, "sim", _CAPABLE)
        machine = GuestMachine(identity, time.monotonic())
        if self._hold_seconds is not None:
            settings = EstimateSettings(hold_seconds=self._hold_seconds)
            machine.cpu_estimator, machine.memory_estimator = CpuEstimator(settings), MemoryEstimator(settings)
        self.daemon = Daemon(
            machine,
            lambda quick: self.kernel.sample(),
            self.kernel.inventory,
            _Hands(self.kernel),
            lambda: dial_unix(str(self._broker)),
        )
        await self._vm.open(self._changed.set)
        self._tasks = [asyncio.create_task(work()) for work in (self.daemon.run, self._follow, self._pass_time)]

    async def stop(self) -> None:
        """Stop the daemon; nothing changes in the VM."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._vm.close()

    async def _follow(self) -> None:
        """Let the kernel see what the hypervisor did."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            with contextlib.suppress(HypervisorError):
                self.mirror.take(await self._vm.observe())
                if self.kernel.take_hotplug():
                    self.daemon.on_hotplug()

    async def _pass_time(self) -> None:
        before, kept = time.monotonic(), 0
        while True:
            await asyncio.sleep(_STEP_SECONDS)
            now = time.monotonic()
            self.kernel.step(now - before)
            before = now
            if self.kernel.take_trigger():
                self.daemon.on_pressure()
            if self.mirror.guest_keeps_bytes != kept:
                kept = self.mirror.guest_keeps_bytes
                with contextlib.suppress(HypervisorError):
                    await self._link.call(self.name, "guest_keeps", kept, type(None))
