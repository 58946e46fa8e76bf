"""Takes in what the views say and makes records of it. No I/O: the caller asks, this understands.

The two clocks: a line written by the guest at `guest_t` is seen by the host some time later, so
``host - guest_t`` is the clocks' difference plus a delay. The smallest one ever seen has the smallest
delay; with it, and only for drawing, the guest's times become times of the host.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from guestd.cli.demo.timeline import (
    Broker,
    Guest,
    Hypervisor,
    Load,
    Record,
    Service,
    Socket,
    Timeline,
)
from guestd.model.resources import Kind
from guestd.model.view import GuestView


def broker_record(t: float, guest: GuestView) -> Broker:
    """What the broker says of a guest."""
    cpu, memory = guest.resource(Kind.CPU), guest.resource(Kind.MEMORY)
    return Broker(
        t=t,
        connected=guest.connected,
        cpu_demand_millicores=cpu.demand,
        cpu_target_millicores=cpu.target,
        cpu_plugged_millicores=cpu.plugged,
        memory_demand_bytes=memory.demand,
        memory_target_bytes=memory.target,
        memory_plugged_bytes=memory.plugged,
        channel=guest.channel,
        cpu_reason=cpu.reason.text,
        memory_reason=memory.reason.text,
    )


def hypervisor_record(
    t: float,
    boot_memory_bytes: int,
    cpus: Sequence[object],
    devices: Sequence[Mapping[str, Any]],
    balloon: Mapping[str, Any] | None,
) -> Hypervisor:
    """What QEMU says: answers to query-cpus-fast, query-memory-devices and query-balloon.

    :param balloon: None where there is no balloon. Its `actual` leaves virtio-mem out (QEMU counts only
        boot memory and DIMMs there).
    """
    virtio_mem = [device["data"] for device in devices if device.get("type") == "virtio-mem"]
    base = boot_memory_bytes if balloon is None else min(int(balloon["actual"]), boot_memory_bytes)
    return Hypervisor(
        t=t,
        vcpus=len(cpus),
        memory_bytes=base + sum(int(one["size"]) for one in virtio_mem),
        memory_requested_bytes=base + sum(int(one["requested-size"]) for one in virtio_mem),
    )


def probe_records(t: float, output: str) -> list[Service | Socket]:
    """What `guest_probe` printed; lines that are not its own (the console's) are passed over."""
    found: list[Service | Socket] = []
    for line in output.splitlines():
        values = _values(line)
        match values.pop("source", None):
            case "service":
                found.append(Service(t=t, **values))
            case "socket":
                found.append(Socket(t=t, **values))
    return found


@dataclass(slots=True)
class GuestLines:
    """The growing output of the programs in the guest, read piece by piece.

    `offset` is how many bytes were taken in: what to ask for next begins there.
    """

    offset: int = 0
    _rest: bytes = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The whole lines that are complete now, each as its values."""
        self.offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [values for line in lines if (values := _values(line.decode(errors="replace")))]


@dataclass(slots=True)
class Recorder:
    """All records so far; each new one is also shown to `watch`.

    `clock` is the host's monotonic clock; times of records count from `began`.
    """

    clock: Callable[[], float]
    watch: Callable[[Record], None] = lambda record: None
    began: float = field(init=False)
    records: list[Record] = field(default_factory=list)
    _guest_offset: float | None = None

    def __post_init__(self) -> None:
        self.began = self.clock()

    def now(self) -> float:
        """Seconds since the beginning."""
        return self.clock() - self.began

    def add(self, record: Record) -> None:
        """Keeps a record."""
        self.records.append(record)
        self.watch(record)

    def add_guest(self, values: dict[str, Any]) -> None:
        """Keeps what a line of the guest's programs says, seen now."""
        kind = {"guest": Guest, "load": Load}[values.pop("source")]
        now, guest_t = self.now(), float(values["guest_t"])
        offset = now - guest_t
        if self._guest_offset is None or offset < self._guest_offset:
            self._guest_offset = offset
        self.add(kind(t=guest_t + self._guest_offset, **values))

    def timeline(self) -> Timeline:
        """Everything, in order of time, the guest's times by the best that is known of its clock."""
        offset = self._guest_offset
        placed = [
            replace(record, t=record.guest_t + offset)
            if isinstance(record, Guest | Load) and offset is not None
            else record
            for record in self.records
        ]
        return Timeline(tuple(sorted(placed, key=lambda record: record.t)))


def _values(line: str) -> dict[str, Any]:
    """The values of a line of JSON; empty for any other line."""
    try:
        values = json.loads(line)
    except ValueError:
        return {}
    return values if isinstance(values, dict) and "source" in values else {}
