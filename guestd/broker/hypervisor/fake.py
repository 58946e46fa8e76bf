"""A hypervisor without a VM: `FakeVm` keeps the laws of `base.Vm` and fails on demand.

For tests, demos and the simulator. It has two sides, and nothing in it happens by chance or by itself:

- the hypervisor's (`base.Vm`): requests take effect on targets at once, as QEMU's do;
- the guest's (`guest_*`): what the guest kernel sees, and how it behaves when asked to give back.

The guest follows the targets at `plug_rate` and `unplug_rate` (bytes per second), but only in
`advance(seconds)`; with a rate of None it follows at once. The same calls give the same states.
Time exists only as what `advance` is told and what `sleep` is asked for, so virtual time works.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from enum import StrEnum

from guestd.model.errors import HypervisorError, HypervisorGone, HypervisorUnreachable, OutcomeUnknown
from guestd.model.resources import Kind
from guestd.model.units import GIB, MIB, MILLICORES_PER_VCPU, round_down
from guestd.model.vm import VmState, VmStatus

_BALLOON_FLOOR_BYTES = 128 * MIB


class Fault(StrEnum):
    """What becomes of a request."""

    REFUSED = "refused"  # HypervisorError, nothing done
    LOST_NOT_DONE = "lost-not-done"  # OutcomeUnknown, nothing done
    LOST_DONE = "lost-done"  # OutcomeUnknown, but it was done


class FakeVm:
    """A VM that does not exist. Implements `base.Vm`.

    :param device_bytes: Size of the virtio-mem device; 0: there is none.
    :param plug_rate: Bytes per second at which the guest takes memory; None: at once.
    :param unplug_rate: Bytes per second at which the guest gives memory; None: at once.
    :param cpu_unplug_seconds: How long the guest takes to let one vCPU go.
    :param cpu_enforced: Whether its host can bound its CPU time.
    :param command_seconds: How long each request takes, asked of `sleep`.
    """

    _size: int  # of the virtio-mem device, bytes
    _requested: int
    _ballooned: int
    _balloon_target: int
    _resets: int
    _cpu_quota: int  # millicores; 0: none
    _cpu_throttled: int  # permille

    def __init__(
        self,
        *,
        boot_bytes: int = 512 * MIB,
        device_bytes: int = 2 * GIB,
        unit_bytes: int = 2 * MIB,
        balloon: bool = False,
        vcpus: int = 1,
        vcpus_max: int = 4,
        plug_rate: int | None = None,
        unplug_rate: int | None = None,
        cpu_unplug_seconds: float = 0.0,
        cpu_enforced: bool = False,
        command_seconds: float = 0.0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.boot_bytes, self.device_bytes, self.unit_bytes = boot_bytes, device_bytes, unit_bytes
        self.has_balloon, self.boot_vcpus, self.vcpus_max = balloon, vcpus, vcpus_max
        self.plug_rate, self.unplug_rate, self.cpu_unplug_seconds = plug_rate, unplug_rate, cpu_unplug_seconds
        self.cpu_enforced, self.command_seconds, self._sleep = cpu_enforced, command_seconds, sleep
        #: Every request made, as (method, amount).
        self.requests: list[tuple[str, int]] = []
        #: The guest never gives memory below this, nor vCPUs below that.
        self.guest_keeps_bytes, self.guest_keeps_vcpus = 0, 0
        #: Called when `guest_cpus` or `guest_memory_bytes` may have changed.
        self.on_guest_change: Callable[[], None] = lambda: None
        self._on_change: Callable[[], None] | None = None
        self._faults: deque[Fault] = deque()
        self._lost_observations = 0
        self._status = VmStatus.RUNNING
        self._boot()

    # The hypervisor's side.

    def only_observe(self, only: bool) -> None:
        pass  # it does nothing unasked

    async def open(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        on_change()

    async def close(self) -> None:
        self._on_change = None

    async def observe(self) -> VmState:
        if self._lost_observations:
            self._lost_observations -= 1
            raise OutcomeUnknown("fake: the connection broke while asking")
        return self.truth()

    def truth(self) -> VmState:
        """What `observe` answers when nothing goes wrong."""
        if self._status in (VmStatus.GONE, VmStatus.UNREACHABLE):
            return VmState(self._status)
        return VmState(
            status=self._status,
            vcpus=len(self._cpus),
            vcpus_min=self.boot_vcpus,
            vcpus_max=self.vcpus_max,
            boot_memory_bytes=self.boot_bytes,
            memory_plugged_bytes=self.guest_memory_bytes,
            memory_held_bytes=self.boot_bytes - self._ballooned + max(self._size, self._requested),
            memory_ballooned_bytes=self._ballooned,
            memory_min_bytes=self._minimum,
            memory_max_bytes=self.boot_bytes + self.device_bytes,
            memory_unit_bytes=self.unit_bytes,
            resets=self._resets,
            cpu_enforced=self.cpu_enforced,
            cpu_quota_millicores=self._cpu_quota,
            cpu_throttled_permille=self._cpu_throttled if self._cpu_quota else 0,
        )

    async def request_vcpus(self, count: int) -> None:
        await self._command("request_vcpus", count, lambda: self._set_vcpus(count))

    async def request_cpu_quota(self, millicores: int) -> None:
        await self._command("request_cpu_quota", millicores, lambda: self._set_cpu_quota(millicores))

    async def request_memory(self, amount_bytes: int) -> None:
        await self._command("request_memory", amount_bytes, lambda: self._set_memory(amount_bytes))

    async def settle_memory(self) -> None:
        await self._command("settle_memory", 0, self._settle)

    # The guest's side.

    @property
    def guest_cpus(self) -> frozenset[int]:
        """CPUs that the guest kernel has."""
        return frozenset(self._cpus)

    @property
    def guest_memory_bytes(self) -> int:
        """Memory that the guest kernel has, boot memory included."""
        return self.boot_bytes - self._ballooned + self._size

    @property
    def status(self) -> VmStatus:
        """How the VM is, whoever asks."""
        return self._status

    @property
    def booting(self) -> bool:
        """Whether its kernel is not there yet after a reset."""
        return self._booting_seconds > 0

    @property
    def cpu_quota_millicores(self) -> int:
        """The bound of its CPU time, whoever asks; 0: none."""
        return self._cpu_quota

    def promised(self, kind: Kind) -> int:
        """What the VM may come to hold without another request, in millicores or bytes: what was asked for counts
        before it is there, and whether the hypervisor answers or not.
        """
        if self._status is VmStatus.GONE:
            return 0
        if kind is Kind.CPU:
            plugged = len(self._cpus) * MILLICORES_PER_VCPU
            return min(plugged, self._cpu_quota or plugged)
        ballooned = min(self._ballooned, self._balloon_target)
        return self.boot_bytes - ballooned + max(self._size, self._requested)

    @property
    def moving(self) -> bool:
        """Whether `advance` may change anything now."""
        unsettled = self._requested != self._size or self._balloon_target != self._ballooned
        return unsettled or bool(self._leaving) or self._booting_seconds > 0

    def guest_takes(self, amount_bytes: int) -> None:
        """The guest grabs memory that nobody offered, as far as the VM's devices allow."""
        from_balloon = min(amount_bytes, self._ballooned)
        self._ballooned -= from_balloon
        rest = round_down(amount_bytes - from_balloon, self.unit_bytes)
        self._size = min(self.device_bytes, self._size + rest)
        self._changed()

    # Faults.

    def fail_next(self, *faults: Fault) -> None:
        """What becomes of the next requests, one each."""
        self._faults.extend(faults)

    def lose_next_observations(self, count: int = 1) -> None:
        """The next observations raise `OutcomeUnknown`."""
        self._lost_observations += count

    def set_status(self, status: VmStatus) -> None:
        """Freeze, thaw, disconnect or reconnect. GONE forgets the VM; another status then is a new boot."""
        if self._status is VmStatus.GONE and status is not VmStatus.GONE:
            self._boot()
        self._status = status
        self._changed()

    def set_cpu_throttled(self, permille: int) -> None:
        """Say in how many periods the bound was hit; counts only while there is one."""
        self._cpu_throttled = permille
        self._changed()

    def lose_cpu_group(self) -> None:
        """The host forgets the bound, as when somebody removes the VM's cgroup."""
        self._cpu_quota = 0
        self._changed()

    def reset(self, replug_seconds: float = 0.0) -> None:
        """The guest reboots: virtio-mem is empty and the balloon too, with the targets kept; after
        `replug_seconds` of `advance` the new kernel follows them again.
        """
        self._size = self._ballooned = 0
        self._resets += 1
        self._booting_seconds = replug_seconds
        self._follow_at_once()
        self._changed()

    def advance(self, seconds: float) -> None:
        """Let the guest do what it does in this time. A VM that is frozen or gone does nothing."""
        if self._status in (VmStatus.FROZEN, VmStatus.GONE):
            return
        booting = min(seconds, self._booting_seconds)
        self._booting_seconds -= booting
        seconds -= booting
        if self._booting_seconds > 0:
            return
        before = (self.guest_cpus, self.guest_memory_bytes)
        self._release_cpus(seconds)
        self._grow(None if self.plug_rate is None else self._budget(self.plug_rate, seconds))
        self._shrink(None if self.unplug_rate is None else self._budget(self.unplug_rate, seconds))
        if before != (self.guest_cpus, self.guest_memory_bytes):
            self._changed()

    def _boot(self) -> None:
        self._cpus = list(range(self.boot_vcpus))
        self._leaving: dict[int, float] = {}  # CPU → seconds until the guest lets it go
        self._size = self._requested = self._ballooned = self._balloon_target = 0
        self._resets = 0
        self._cpu_quota = self._cpu_throttled = 0  # of the process, not of the guest: a reset changes neither
        self._booting_seconds = 0.0
        self._carry = 0.0  # bytes of a unit not yet moved

    @property
    def _minimum(self) -> int:
        return min(self.boot_bytes, _BALLOON_FLOOR_BYTES) if self.has_balloon else self.boot_bytes

    async def _command(self, name: str, amount: int, act: Callable[[], None]) -> None:
        self.requests.append((name, amount))
        if self.command_seconds:
            await self._sleep(self.command_seconds)
        if self._status is VmStatus.GONE:
            raise HypervisorGone("fake: the VM's process is gone")
        if self._status is VmStatus.UNREACHABLE:
            raise HypervisorUnreachable("fake: no connection")
        fault = self._faults.popleft() if self._faults else None
        if fault is Fault.REFUSED:
            raise HypervisorError(f"fake: {name} refused")
        if fault is not Fault.LOST_NOT_DONE:
            act()
            self._follow_at_once()
            self._changed()
        if fault is not None:
            raise OutcomeUnknown(f"fake: the answer to {name} was lost")

    def _set_vcpus(self, count: int) -> None:
        if count > self.vcpus_max:
            raise HypervisorError(f"fake: {count} vCPUs asked for, {self.vcpus_max} slots")
        while len(self._cpus) < count:
            self._cpus.append(len(self._cpus))
        for cpu in self._cpus[max(count, self.boot_vcpus) :]:
            self._leaving.setdefault(cpu, self.cpu_unplug_seconds)

    def _set_cpu_quota(self, millicores: int) -> None:
        if not self.cpu_enforced:
            raise HypervisorError("fake: this host cannot bound the VM's CPU time")
        if millicores <= 0:
            raise HypervisorError(f"fake: {millicores} millicores asked for; a quota is above 0")
        self._cpu_quota = millicores

    def _set_memory(self, amount: int) -> None:
        if amount > self.boot_bytes + self.device_bytes:
            raise HypervisorError(f"fake: {amount} bytes asked for, more than the VM can have")
        self._requested = round_down(max(0, amount - self.boot_bytes), self.unit_bytes)
        self._balloon_target = 0
        if self.has_balloon and amount < self.boot_bytes:
            self._balloon_target = self.boot_bytes - max(self._minimum, round_down(amount, self.unit_bytes))

    def _settle(self) -> None:
        self._requested = self._size
        self._balloon_target = self._ballooned

    def _follow_at_once(self) -> None:
        if self._status is VmStatus.FROZEN or self._booting_seconds > 0:
            return
        self._release_cpus(0.0)
        if self.plug_rate is None:
            self._grow(None)
        if self.unplug_rate is None:
            self._shrink(None)

    def _budget(self, rate: int, seconds: float) -> int:
        """Whole units that may move in this time; the rest is kept for the next step."""
        moved = rate * seconds + self._carry
        whole = round_down(int(moved), self.unit_bytes)
        self._carry = (moved - whole) % self.unit_bytes
        return whole

    def _grow(self, budget: int | None) -> None:
        deflate = max(0, self._ballooned - self._balloon_target)
        deflate = deflate if budget is None else min(deflate, budget)
        self._ballooned -= deflate
        plug = max(0, self._requested - self._size)
        self._size += plug if budget is None else min(plug, budget - deflate)

    def _shrink(self, budget: int | None) -> None:
        can_give = max(0, self.guest_memory_bytes - self.guest_keeps_bytes)
        budget = can_give if budget is None else min(can_give, budget)
        unplug = round_down(min(max(0, self._size - self._requested), budget), self.unit_bytes)
        self._size -= unplug
        self._ballooned += min(max(0, self._balloon_target - self._ballooned), budget - unplug)

    def _release_cpus(self, seconds: float) -> None:
        for cpu in sorted(self._leaving, reverse=True):
            self._leaving[cpu] -= seconds
            if self._leaving[cpu] > 0 or cpu != self._cpus[-1] or len(self._cpus) <= self.guest_keeps_vcpus:
                break  # from the highest down, as the guest's firmware does it
            del self._leaving[cpu]
            self._cpus.pop()

    def _changed(self) -> None:
        self.on_guest_change()
        if self._on_change is not None:
            self._on_change()
