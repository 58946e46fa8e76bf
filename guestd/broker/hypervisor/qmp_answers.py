"""What QEMU's answers mean: pure functions from what came over the wire to typed values.

QEMU is trusted no further than needed: every field that is used is checked, and one that is missing or
of another type gives a `HypervisorError` that names the command.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from guestd.model.errors import HypervisorError

CPU_ID_PREFIX = "guestd-cpu-"
DIMM_ID_PREFIX = "guestd-dimm-"
BACKEND_ID_PREFIX = "guestd-mem-"
_PERIPHERAL = "/machine/peripheral/"
_OBJECTS = "/objects/"
_LARGEST = 1 << 60  # bytes; with room for sums in 63 bits
_SLOT_IDS = ("socket-id", "die-id", "cluster-id", "core-id", "thread-id")

# Everything else `query-migrate` may say means that a migration is going on.
_NOT_MIGRATING = frozenset({"none", "completed", "failed", "cancelled"})


@dataclass(frozen=True, slots=True)
class CpuSlot:
    """A place for one vCPU; `index` is its rank by socket, die, cluster, core and thread."""

    index: int
    driver: str
    props: Mapping[str, object]
    qom_path: str | None  # None: empty

    @property
    def device_id(self) -> str:
        """The id that a vCPU has which guestd adds here."""
        return f"{CPU_ID_PREFIX}{self.index}"

    @property
    def removable(self) -> bool:
        """Whether it holds a vCPU that guestd added; boot CPUs have no such id."""
        return self.qom_path == _PERIPHERAL + self.device_id


@dataclass(frozen=True, slots=True)
class VirtioMem:
    """One virtio-mem device; all sizes in bytes."""

    device_id: str
    size: int
    requested: int
    maximum: int
    block: int

    @property
    def qom_path(self) -> str:
        """Where `requested-size` is set.

        :raise HypervisorError: When the device was given no id.
        """
        if not self.device_id:
            raise HypervisorError("the virtio-mem device has no id, so it cannot be resized: give it one")
        return _PERIPHERAL + self.device_id


@dataclass(frozen=True, slots=True)
class Dimm:
    """One DIMM; `size` in bytes, `address` where it begins for the guest, `backend_id` of the memory behind it."""

    device_id: str
    backend_id: str
    address: int
    size: int

    @property
    def ours(self) -> bool:
        """Whether guestd added it; all others are never removed."""
        return self.device_id.startswith(DIMM_ID_PREFIX) and self.backend_id.startswith(BACKEND_ID_PREFIX)


@dataclass(frozen=True, slots=True)
class MemoryBackend:
    """A piece of the host's memory for the guest, plugged or not; `size` in bytes."""

    backend_id: str
    size: int
    shared: bool


@dataclass(frozen=True, slots=True)
class MemoryRoom:
    """How far a machine can grow by memory devices: `-m SIZE,slots=N,maxmem=M`; `maximum` in bytes."""

    maximum: int
    slots: int


@dataclass(frozen=True, slots=True)
class MemoryDevices:
    """What was added to the boot memory. NVDIMMs are no memory, but take slots and room; their sizes in bytes."""

    dimms: tuple[Dimm, ...]
    virtio_mem: tuple[VirtioMem, ...]
    nvdimms: tuple[int, ...] = ()

    @property
    def dimm_bytes(self) -> int:
        return sum(dimm.size for dimm in self.dimms)


def cpu_slots(answer: object) -> tuple[CpuSlot, ...]:
    """Of ``query-hotpluggable-cpus``, lowest slot first.

    :raise HypervisorError: When a slot holds several vCPUs, or the answer makes no sense.
    """
    at = "query-hotpluggable-cpus"
    found = []
    for entry in _list(answer, at):
        slot = _dict(entry, at)
        if (count := _size(slot, "vcpus-count", at)) != 1:
            raise HypervisorError(f"a CPU slot of this machine holds {count} vCPUs; only 1 is supported")
        props = _dict(slot.get("props"), at)
        rank = tuple(_size(props, name, at) if name in props else 0 for name in _SLOT_IDS)
        path = _text(slot, "qom-path", at) if "qom-path" in slot else None
        found.append((rank, _text(slot, "type", at), props, path))
    if not found:
        raise _unexpected(at, "no CPU slots")
    found.sort(key=lambda each: each[0])
    return tuple(CpuSlot(i, driver, props, path) for i, (_, driver, props, path) in enumerate(found))


def cpu_threads(answer: object) -> frozenset[int]:
    """Of ``query-cpus-fast``: the host's threads that run vCPUs, by QEMU's own numbers for them.

    :raise HypervisorError: When the answer makes no sense.
    """
    at = "query-cpus-fast"
    return frozenset(_size(_dict(entry, at), "thread-id", at) for entry in _list(answer, at))


def memory_devices(answer: object) -> MemoryDevices:
    """Of ``query-memory-devices``; virtio-mem devices in the order of their ids, DIMMs of their addresses.

    :raise HypervisorError: When the answer makes no sense.
    """
    at = "query-memory-devices"
    dimms, devices, nvdimms = [], [], []
    for entry in _list(answer, at):
        device = _dict(entry, at)
        kind = _text(device, "type", at)
        if kind == "dimm":
            dimms.append(_dimm(_dict(device.get("data"), at), at))
        elif kind == "nvdimm":
            nvdimms.append(_size(_dict(device.get("data"), at), "size", at))
        elif kind == "virtio-mem":
            devices.append(_virtio_mem(_dict(device.get("data"), at), at))
    dimms.sort(key=lambda dimm: dimm.address)
    devices.sort(key=lambda device: device.device_id)
    return MemoryDevices(tuple(dimms), tuple(devices), tuple(nvdimms))


def _dimm(data: Mapping[str, object], at: str) -> Dimm:
    return Dimm(
        device_id=_text(data, "id", at) if "id" in data else "",
        backend_id=_text(data, "memdev", at).removeprefix(_OBJECTS) if "memdev" in data else "",
        address=_size(data, "addr", at) if "addr" in data else 0,
        size=_size(data, "size", at),
    )


def memory_backends(answer: object) -> tuple[MemoryBackend, ...]:
    """Of ``query-memdev``: all that have an id.

    :raise HypervisorError: When the answer makes no sense.
    """
    at = "query-memdev"
    found = []
    for entry in _list(answer, at):
        backend = _dict(entry, at)
        if "id" in backend:
            shared = backend.get("share") is True
            found.append(MemoryBackend(_text(backend, "id", at), _size(backend, "size", at), shared))
    return tuple(found)


def memory_room(answer: object) -> MemoryRoom:
    """Of ``qom-get /machine memory`` (QEMU 7.0 and later). Without slots there is no `maxmem` to speak of.

    :raise HypervisorError: When the answer makes no sense.
    """
    at = "qom-get /machine memory"
    memory = _dict(answer, at)
    base = _size(memory, "size", at)
    maximum = _size(memory, "max-size", at) if "max-size" in memory else base
    return MemoryRoom(maximum, _size(memory, "slots", at) if "slots" in memory else 0)


def _virtio_mem(data: Mapping[str, object], at: str) -> VirtioMem:
    block = _size(data, "block-size", at)
    if block == 0:
        raise _unexpected(at, "block-size 0")
    return VirtioMem(
        device_id=_text(data, "id", at) if "id" in data else "",
        size=_size(data, "size", at),
        requested=_size(data, "requested-size", at),
        maximum=_size(data, "max-size", at),
        block=block,
    )


def base_memory(answer: object) -> int:
    """Of ``query-memory-size-summary``, in bytes.

    :raise HypervisorError: When the answer makes no sense.
    """
    at = "query-memory-size-summary"
    return _size(_dict(answer, at), "base-memory", at)


def balloon_actual(answer: object) -> int:
    """Of ``query-balloon``: boot memory and DIMMs without what is in the balloon, in bytes.

    :raise HypervisorError: When the answer makes no sense.
    """
    return _size(_dict(answer, "query-balloon"), "actual", "query-balloon")


def is_running(answer: object) -> bool:
    """Of ``query-status``: whether the vCPUs run.

    All other run states are alike for guestd: paused, suspended, inmigrate, postmigrate, prelaunch and
    the like pass by themselves or by a command; shutdown, guest-panicked, internal-error and io-error
    do not, but the process still holds its memory, and a guest that is asked will not answer.

    :raise HypervisorError: When the answer makes no sense.
    """
    return _text(_dict(answer, "query-status"), "status", "query-status") == "running"


def is_migrating(answer: object) -> bool:
    """Of ``query-migrate``: whether a migration (or a snapshot) is under way.

    :raise HypervisorError: When the answer makes no sense.
    """
    info = _dict(answer, "query-migrate")
    return "status" in info and _text(info, "status", "query-migrate") not in _NOT_MIGRATING


def event_parts(event: Mapping[str, object]) -> tuple[str, Mapping[str, object], float]:
    """Name, data and time (seconds, by QEMU's clock) of an event; what makes no sense is left empty."""
    name, data, stamp = event.get("event"), event.get("data"), event.get("timestamp")
    seconds = 0.0
    if isinstance(stamp, dict):
        whole, micro = stamp.get("seconds"), stamp.get("microseconds")
        if isinstance(whole, int) and isinstance(micro, int):
            seconds = whole + micro / 1e6
    return name if isinstance(name, str) else "", data if isinstance(data, dict) else {}, seconds


def _unexpected(command: str, what: str) -> HypervisorError:
    return HypervisorError(f"unexpected answer to {command}: {what}")


def _dict(value: object, command: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise _unexpected(command, f"{type(value).__name__} instead of an object")
    return value


def _list(value: object, command: str) -> list[object]:
    if not isinstance(value, list):
        raise _unexpected(command, f"{type(value).__name__} instead of a list")
    return value


def _text(source: Mapping[str, object], key: str, command: str) -> str:
    value = source.get(key)
    if not isinstance(value, str):
        raise _unexpected(command, f"{key} is {value!r:.80}, not a text")
    return value


def _size(source: Mapping[str, object], key: str, command: str) -> int:
    value = source.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LARGEST:
        raise _unexpected(command, f"{key} is {value!r:.80}, not a whole number from 0 to {_LARGEST}")
    return value
