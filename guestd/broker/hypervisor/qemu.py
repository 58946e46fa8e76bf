"""QEMU as a hypervisor: vCPUs by hotplug, memory by virtio-mem or DIMMs above the boot size and a balloon below.

1. Boot memory is what the VM has whatever guestd does: ``-m`` plus any DIMMs that guestd did not add. QEMU's
   balloon counts them and guestd's own DIMMs: `actual` is all these less what is ballooned, without virtio-mem.
2. ``held = boot - ballooned + max(size, requested-size)``, ``plugged = boot - ballooned + size``. A VM without
   virtio-mem and with free slots (``-m SIZE,slots=N,maxmem=M``) grows by DIMMs, see `dimms`: then both sizes
   are those of guestd's DIMMs, in `held` with what QEMU has not given back yet.
3. A vCPU that guestd added is called ``guestd-cpu-<slot>``; all others are never removed.
4. After a guest reset the balloon's `actual` is the dead kernel's word: the new kernel has all its boot
   memory until its balloon driver reports again. Until then nothing counts as ballooned.
5. A removal that waits for the guest is asked for again only after a while, and not at each request.
6. A VM that does not run for any reason is FROZEN (see `qmp_answers.is_running`).
7. CPU time is bounded by the host, on the vCPU threads only (see `cpu_bound`); QEMU is not asked for it.

Weak spots: a balloon is a promise of the guest's, not a limit (`deflate-on-oom` must be off), and one
that deflates is charged as it grows, not by its target, which QEMU doesn't tell. A guest reset that
happens while there is no connection is not seen.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qemu.qmp import Message

from guestd.broker.cgroup.cpu_group import Bandwidth, CpuGroup
from guestd.broker.hypervisor import qmp_answers
from guestd.broker.hypervisor.cpu_bound import CpuBound
from guestd.broker.hypervisor.dimm_keeper import DimmKeeper
from guestd.broker.hypervisor.dimms import Bank
from guestd.broker.hypervisor.qmp_answers import CpuSlot, MemoryDevices, VirtioMem
from guestd.broker.hypervisor.qmp_link import LinkState, LinkTiming, QmpLink, QmpRefused
from guestd.model.errors import HypervisorError, HypervisorGone, HypervisorUnreachable
from guestd.model.units import MIB, format_size, round_down
from guestd.model.vm import VmState, VmStatus

# A Linux with systemd needs about 100 MiB for itself; a balloon that goes below it kills the guest
# instead of shrinking it. The real floor is the operator's limit and what the guest says.
BALLOON_FLOOR_BYTES = 128 * MIB
_BALLOON_UNIT_BYTES = MIB  # the balloon counts pages; finer steps than this are noise
_GLANCE_SECONDS = 1.0  # at a bound VM's throttling, of which nobody sends an event

_WORTH_ASKING = frozenset(
    {
        "MEMORY_DEVICE_SIZE_CHANGE",
        "BALLOON_CHANGE",
        "MEM_UNPLUG_ERROR",
        "DEVICE_DELETED",
        "DEVICE_UNPLUG_GUEST_ERROR",
        "ACPI_DEVICE_OST",
        "STOP",
        "RESUME",
        "RESET",
        "SHUTDOWN",
        "POWERDOWN",
        "SUSPEND",
        "SUSPEND_DISK",
        "WAKEUP",
        "MIGRATION",
        "GUEST_PANICKED",
        "BLOCK_IO_ERROR",
        "WATCHDOG",
    }
)
_CLEAN_UP_SECONDS = 0.2  # until what is left of a process that ended is looked at again
_NO_BALLOON = frozenset({"DeviceNotActive", "KVMMissingCap"})


@dataclass(frozen=True, slots=True)
class _Memory:
    """QEMU's view of a VM's memory, all in bytes."""

    boot: int
    ballooned: int
    has_balloon: bool
    devices: tuple[VirtioMem, ...]
    bank: Bank | None  # where it grows by DIMMs

    @property
    def minimum(self) -> int:
        return min(self.boot, BALLOON_FLOOR_BYTES) if self.has_balloon else self.boot

    @property
    def maximum(self) -> int:
        most = self.bank.most if self.bank is not None else 0
        return self.boot + most + sum(device.maximum for device in self.devices)

    @property
    def unit(self) -> int:
        if self.devices:
            return max(device.block for device in self.devices)  # powers of two
        if self.bank is not None:
            return self.bank.unit
        return _BALLOON_UNIT_BYTES if self.has_balloon else 1

    @property
    def plugged(self) -> int:
        dimms = self.bank.plugged if self.bank is not None else 0
        return self.boot - self.ballooned + dimms + sum(device.size for device in self.devices)

    @property
    def held(self) -> int:
        dimms = self.bank.held if self.bank is not None else 0
        sizes = sum(max(device.size, device.requested) for device in self.devices)
        return self.boot - self.ballooned + dimms + sizes

    @property
    def balloon_base(self) -> int:
        """What QEMU's balloon counts from."""
        return self.boot + (self.bank.plugged if self.bank is not None else 0)


class QemuVm:
    """A VM of QEMU's, by a QMP socket that is the broker's own. Implements `base.Vm`.

    :param unplug_repeat_seconds: How long a removal of a vCPU may wait for the guest before a request
        asks for it again.
    :param notify_seconds: Events within this time of each other cause one `on_change`.
    :param cpu_group: Makes the keeper of a QEMU process's CPU group, by its pid; None: CPU time is not bounded.
    """

    def __init__(
        self,
        qmp_socket: Path,
        timing: LinkTiming | None = None,
        unplug_repeat_seconds: float = 1.5,
        notify_seconds: float = 0.01,
        cpu_group: Callable[[int], CpuGroup] | None = None,
    ) -> None:
        self._link = QmpLink(qmp_socket, self._on_event, self._on_link_change, timing)
        self._unplug_repeat_seconds = unplug_repeat_seconds
        self._notify_seconds = notify_seconds
        self._on_change: Callable[[], None] | None = None
        self._notify: asyncio.TimerHandle | None = None
        self._cpu = CpuBound(cpu_group, str(qmp_socket))
        self._glance: asyncio.TimerHandle | None = None
        self._requests = asyncio.Lock()  # a request reads, then acts: one at a time
        self._dimms = DimmKeeper(self._link.execute, self._bank, self._requests, self._notify_soon, str(qmp_socket))
        self._unplug_asked: dict[str, float] = {}  # device id → loop time
        self._only_observed = False
        self._resets = 0
        self._reset_at: float | None = None  # QEMU's time of a reset that the balloon has not reported after

    def only_observe(self, only: bool) -> None:
        self._only_observed = self._cpu.only_observed = only
        if only:
            self._dimms.forget()

    async def open(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        await self._link.open()

    async def close(self) -> None:
        self._on_change = None
        await self._dimms.close()
        await self._link.close()
        for timer in (self._notify, self._glance):
            if timer is not None:
                timer.cancel()
        self._notify = self._glance = None

    async def observe(self) -> VmState:
        try:
            return await self._ask()
        except HypervisorUnreachable:
            if self._link.state is not LinkState.GONE:
                return VmState(VmStatus.UNREACHABLE)
        except HypervisorGone:
            pass
        if not self._cpu.process_ended():
            asyncio.get_running_loop().call_later(_CLEAN_UP_SECONDS, self._notify_soon)
        return VmState(VmStatus.GONE)

    async def request_vcpus(self, count: int) -> None:
        async with self._requests:
            slots = await self._cpu_slots()
            plugged = [slot for slot in slots if slot.qom_path is not None]
            if count > len(slots):
                raise HypervisorError(f"{count} vCPUs asked for, but the machine has {len(slots)} slots")
            free = [slot for slot in slots if slot.qom_path is None]
            for slot in free[: max(0, count - len(plugged))]:
                await self._link.execute("device_add", {**slot.props, "driver": slot.driver, "id": slot.device_id})
                await self._bound()  # before the guest brings it online
            removable = [slot for slot in reversed(plugged) if slot.removable]
            if removable and count < len(plugged):
                # One at a time: of two removals that the guest's firmware finds together, the second took
                # 4 s or was lost (seen with QEMU 7.2 on q35 and Linux 6.1); alone each takes 0.1 s.
                await self._unplug(removable[0])

    async def request_cpu_quota(self, millicores: int) -> None:
        async with self._requests:
            await self._cpu.request(await self._cpu_threads(), millicores)

    async def request_memory(self, amount_bytes: int) -> None:
        async with self._requests:
            memory = await self._memory()
            if amount_bytes > memory.maximum:
                asked, most = format_size(amount_bytes), format_size(memory.maximum)
                raise HypervisorError(f"{asked} asked for, but the VM can have {most} at most")
            above_boot = max(0, amount_bytes - memory.boot)
            for device in memory.devices:
                share = round_down(min(above_boot, device.maximum), device.block)
                above_boot -= share
                await self._resize(device, share)
            base = memory.balloon_base
            if memory.bank is not None:
                base += await self._dimms.request(memory.bank, max(0, amount_bytes - memory.boot))
            if memory.has_balloon:
                step = _BALLOON_UNIT_BYTES if memory.bank is not None else memory.unit  # a DIMM is much to take
                left = max(round_down(amount_bytes, step), memory.minimum)
                await self._link.execute("balloon", {"value": base - max(0, memory.boot - left)})

    async def settle_memory(self) -> None:
        async with self._requests:
            memory = await self._memory()
            for device in memory.devices:
                await self._resize(device, device.size)
            self._dimms.settle()
            if memory.has_balloon:
                await self._link.execute("balloon", {"value": memory.balloon_base - memory.ballooned})

    async def _ask(self) -> VmState:
        running = qmp_answers.is_running(await self._link.execute("query-status"))
        migrating = qmp_answers.is_migrating(await self._link.execute("query-migrate"))
        slots = await self._cpu_slots()
        memory = await self._memory()
        if memory.bank is not None and memory.bank.leftovers and not self._only_observed:
            self._dimms.tend_soon()
        cpu = await self._bound()
        plugged = sum(slot.qom_path is not None for slot in slots)
        return VmState(
            status=VmStatus.RUNNING if running and not migrating else VmStatus.FROZEN,
            vcpus=plugged,
            vcpus_min=plugged - sum(slot.removable for slot in slots),
            vcpus_max=len(slots),
            boot_memory_bytes=memory.boot,
            memory_plugged_bytes=memory.plugged,
            memory_held_bytes=memory.held,
            memory_ballooned_bytes=memory.ballooned,
            memory_min_bytes=memory.minimum,
            memory_max_bytes=memory.maximum,
            memory_unit_bytes=memory.unit,
            resets=self._resets,
            cpu_enforced=cpu is not None,
            cpu_quota_millicores=cpu.quota_millicores if cpu is not None else 0,
            cpu_throttled_permille=cpu.throttled_permille if cpu is not None else 0,
        )

    async def _bound(self) -> Bandwidth | None:
        """The VM's CPU bandwidth, with all vCPU threads of this moment in it; None where it is not enforced."""
        if not self._cpu.wanted:
            return None
        seen = await self._cpu.look(await self._cpu_threads())
        if seen is not None and seen.quota_millicores:
            self._glance_later(seen.throttled_permille)
        return seen

    async def _cpu_threads(self) -> frozenset[int]:
        return qmp_answers.cpu_threads(await self._link.execute("query-cpus-fast"))

    async def _cpu_slots(self) -> tuple[CpuSlot, ...]:
        return qmp_answers.cpu_slots(await self._link.execute("query-hotpluggable-cpus"))

    async def _memory(self) -> _Memory:
        base = qmp_answers.base_memory(await self._link.execute("query-memory-size-summary"))
        added = qmp_answers.memory_devices(await self._link.execute("query-memory-devices"))
        bank = await self._bank_of(base, added)
        boot = base + added.dimm_bytes if bank is None else bank.boot
        actual = await self._balloon_actual()
        trusted = actual is not None and self._reset_at is None
        return _Memory(
            boot=boot,
            ballooned=max(0, base + added.dimm_bytes - actual) if actual is not None and trusted else 0,
            has_balloon=actual is not None,
            devices=added.virtio_mem,
            bank=bank,
        )

    async def _bank(self) -> Bank | None:
        base = qmp_answers.base_memory(await self._link.execute("query-memory-size-summary"))
        return await self._bank_of(base, qmp_answers.memory_devices(await self._link.execute("query-memory-devices")))

    async def _bank_of(self, base: int, devices: MemoryDevices) -> Bank | None:
        """The VM's DIMMs; None where it has virtio-mem, or no room for a DIMM."""
        if devices.virtio_mem:
            return None
        try:
            where = {"path": "/machine", "property": "memory"}
            room = qmp_answers.memory_room(await self._link.execute("qom-get", where))
        except QmpRefused:  # QEMU before 7.0 does not tell
            return None
        backends = qmp_answers.memory_backends(await self._link.execute("query-memdev"))
        bank = Bank(base, devices, backends, room)
        return bank if bank.unit else None

    async def _balloon_actual(self) -> int | None:
        """None where there is no balloon."""
        try:
            return qmp_answers.balloon_actual(await self._link.execute("query-balloon"))
        except QmpRefused as error:
            if error.error_class in _NO_BALLOON:
                return None
            raise

    async def _resize(self, device: VirtioMem, size: int) -> None:
        if device.requested != size:
            what = {"path": device.qom_path, "property": "requested-size", "value": size}
            await self._link.execute("qom-set", what)

    async def _unplug(self, slot: CpuSlot) -> None:
        now = asyncio.get_running_loop().time()
        asked = self._unplug_asked.get(slot.device_id)
        if asked is not None and now - asked < self._unplug_repeat_seconds:
            return
        try:
            await self._link.execute("device_del", {"id": slot.device_id})
        except QmpRefused as error:
            under_way = "already in the process of unplug" in str(error)
            if not under_way and error.error_class != "DeviceNotFound":
                raise
        self._unplug_asked[slot.device_id] = now

    def _on_event(self, event: Message) -> None:
        name, data, seconds = qmp_answers.event_parts(event)
        if name not in _WORTH_ASKING:
            return
        if name == "RESET":
            self._resets += 1
            self._reset_at = seconds
            self._unplug_asked.clear()
            self._dimms.reset()
        elif name == "BALLOON_CHANGE" and self._reset_at is not None and seconds > self._reset_at:
            self._reset_at = None  # QEMU may deliver an older change late: hence the comparison
        elif name == "DEVICE_DELETED":
            self._unplug_asked.pop(_device_of(data), None)
        if not self._only_observed:
            self._dimms.on_event(name, data, _device_of(data))
        self._notify_soon()

    def _on_link_change(self) -> None:
        if self._link.state is LinkState.CONNECTED:
            self._cpu.connected(self._link.pid)
        else:  # what was seen ends with its connection
            self._resets = 0
            self._reset_at = None
            self._unplug_asked.clear()
            self._dimms.forget()
        if self._link.state is LinkState.GONE:
            self._cpu.process_ended()
        self._notify_soon()

    def _glance_later(self, seen_permille: int) -> None:
        if self._glance is not None:
            self._glance.cancel()
        self._glance = asyncio.get_running_loop().call_later(_GLANCE_SECONDS, self._glance_now, seen_permille)

    def _glance_now(self, seen_permille: int) -> None:
        """Have the VM observed when it is throttled more or less than was seen."""
        self._glance = None
        if self._cpu.glance() == seen_permille:
            self._glance_later(seen_permille)
        else:
            self._notify_soon()

    def _notify_soon(self) -> None:
        if self._notify is None and self._on_change is not None:
            self._notify = asyncio.get_running_loop().call_later(self._notify_seconds, self._notify_now)

    def _notify_now(self) -> None:
        self._notify = None
        if self._on_change is not None:
            self._on_change()


def _device_of(data: Mapping[str, object]) -> str:
    """The id of the device that an event is about. Of a vCPU that is gone QEMU 7.2 (q35) tells only that its local APIC
    is, by path.
    """
    parts = str(data.get("path", "")).split("/")
    by_path = parts[3] if parts[:3] == ["", "machine", "peripheral"] and len(parts) > 3 else ""
    return str(data.get("device", by_path))
