"""What the demo saw: records of independent views, each with the time at which it was seen.

Rules:

1. `t` is seconds of the host's monotonic clock since the demo began. Records of the guest also carry
   `guest_t`, the guest's own monotonic clock, by which everything between two events in the guest is
   measured. The two clocks are only compared to draw them in one picture.
2. A record is what one view said, as it said it; nothing is filled in from another view.
3. A timeline is a JSON object per line, with the kind of the record in `source`.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeVar


@dataclass(frozen=True, slots=True)
class Machine:
    """What was booted. Once, when it is up."""

    source: ClassVar[str] = "machine"
    t: float
    accel: str
    guest_kernel: str
    boot_seconds: float


@dataclass(frozen=True, slots=True)
class Broker:
    """What the broker says of the guest (WatchGuests)."""

    source: ClassVar[str] = "broker"
    t: float
    connected: bool
    cpu_demand_millicores: int
    cpu_target_millicores: int
    cpu_plugged_millicores: int
    memory_demand_bytes: int
    memory_target_bytes: int
    memory_plugged_bytes: int
    channel: str = ""
    cpu_reason: str = ""
    memory_reason: str = ""


@dataclass(frozen=True, slots=True)
class Hypervisor:
    """What QEMU says on the observer's QMP socket.

    `memory_bytes` is what the VM can use: boot memory without what a balloon took, plus the size of the
    virtio-mem devices; `memory_requested_bytes` the same with their requested size.
    """

    source: ClassVar[str] = "hypervisor"
    t: float
    vcpus: int
    memory_bytes: int
    memory_requested_bytes: int


@dataclass(frozen=True, slots=True)
class Guest:
    """What the guest's own /proc and /sys say; one at every change, and some between.

    `busy_seconds` counts from the first look, `oom_kills` from boot; `runnable` leaves out the sampler itself.
    """

    source: ClassVar[str] = "guest"
    t: float
    guest_t: float
    cpus_online: int
    memory_total_bytes: int
    memory_available_bytes: int
    busy_seconds: float
    runnable: int
    oom_kills: int


@dataclass(frozen=True, slots=True)
class Load:
    """An event of the load in the guest, at the guest's own time.

    In order: ``cpu-onset``, ``cpu-end``, ``memory-onset``, ``memory-full``, ``memory-end``, ``end``.
    `detail` of ``memory-end`` is "ok", or how the process died.
    """

    source: ClassVar[str] = "load"
    t: float
    guest_t: float
    event: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Service:
    """`guestd.service` as systemd in the guest describes it.

    When `active_since_us` and `restarts` are the same in two records, it was active all the time between.
    """

    source: ClassVar[str] = "service"
    t: float
    state: str  # ActiveState
    active_since_us: int  # ActiveEnterTimestampMonotonic
    restarts: int  # NRestarts
    main_pid: int


@dataclass(frozen=True, slots=True)
class Socket:
    """A socket that a process of `guestd.service` holds, as the guest's kernel describes it."""

    source: ClassVar[str] = "socket"
    t: float
    pid: int
    family: str  # as the kernel names it: "AF_VSOCK"
    state: str
    local_cid: int
    local_port: int
    peer_cid: int
    peer_port: int


Record = Machine | Broker | Hypervisor | Guest | Load | Service | Socket

_KINDS: dict[str, type[Record]] = {
    kind.source: kind for kind in (Machine, Broker, Hypervisor, Guest, Load, Service, Socket)
}
_Kind = TypeVar("_Kind", Machine, Broker, Hypervisor, Guest, Load, Service, Socket)


@dataclass(frozen=True, slots=True)
class Timeline:
    """All records of a run."""

    records: tuple[Record, ...]

    def of(self, kind: type[_Kind]) -> list[_Kind]:
        """The records of one view, oldest first (the guest's by the guest's clock)."""
        found = [record for record in self.records if isinstance(record, kind)]
        return sorted(found, key=lambda record: getattr(record, "guest_t", record.t))

    def load(self, event: str) -> Load | None:
        """The event of the load of that name."""
        return next((record for record in self.of(Load) if record.event == event), None)

    @property
    def end(self) -> float:
        """When the last record was made."""
        return max((record.t for record in self.records), default=0.0)


def to_json(record: Record) -> str:
    """One line of a timeline, without its line end."""
    values = {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(record).items()}
    return json.dumps({"source": record.source, **values})


def from_json(line: str) -> Record:
    """The record of one line.

    :raise ValueError: When the line is not a record.
    """
    try:
        values: dict[str, Any] = json.loads(line)
        return _KINDS[values.pop("source")](**values)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a record of a timeline: {line[:200]!r}") from error


def read_lines(lines: Iterable[str]) -> Timeline:
    """A timeline from its lines.

    :raise ValueError: When a line is not a record.
    """
    return Timeline(tuple(from_json(line) for line in lines if line.strip()))


def lines(records: Iterable[Record]) -> Iterator[str]:
    """The lines of a timeline, each with its line end."""
    return (f"{to_json(record)}\n" for record in records)
