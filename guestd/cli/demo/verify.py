"""Did the VM really breathe? A pure function of the timeline.

What must hold, each in numbers, or the demo has failed:

1. The load ran to its end, and nothing killed it.
2. Before it, CPUs and memory were at their minimum: what grew had not been there.
3. After its onset the hypervisor plugged all CPUs, and the guest had all of them online.
4. After its onset the memory grew by what the load could not have found in the minimum, in both views.
5. At the end CPUs are back at the minimum in both views, and memory is within one memory block of it.
6. The hypervisor never had more than the maximum.
7. The guest's kernel killed nothing for want of memory.
8. `guestd.service` was active from before the load until after it, without a restart.
9. Before and after the load, one of its processes held an AF_VSOCK connection to the broker's port on the
   host, as the guest's kernel tells.
10. All views were watched all the time: an absent view proves nothing.

The broker's own view is in none of these but the last: it must not be its own witness.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from guestd.cli.demo.timeline import (
    Broker,
    Guest,
    Hypervisor,
    Load,
    Machine,
    Record,
    Service,
    Socket,
    Timeline,
)
from guestd.model.units import GIB, MIB, format_size

HOST_CID = 2
LOAD_EVENTS = ("cpu-onset", "cpu-end", "memory-onset", "memory-full", "memory-end", "end")

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Expected:
    """What the run was set up for. CPUs are whole vCPUs."""

    cpu_min: int = 1
    cpu_max: int = 4
    memory_min_bytes: int = 512 * MIB
    memory_max_bytes: int = 3 * GIB
    memory_block_bytes: int = 128 * MIB
    load_bytes: int = 1536 * MIB
    broker_port: int = 4747
    freshest_seconds: float = 3.0  # a view's last record is at most so much older than the end
    longest_gap_seconds: float = 5.0  # between two records of a view, from the load's onset on

    @property
    def growth_bytes(self) -> int:
        """What the load needs beyond the minimum."""
        return self.load_bytes - self.memory_min_bytes


@dataclass(frozen=True, slots=True)
class _Views:
    """The records of each view, and the first event of each name of the load."""

    machine: Machine | None
    broker: list[Broker]
    hypervisor: list[Hypervisor]
    guest: list[Guest]
    service: list[Service]
    socket: list[Socket]
    load: dict[str, Load]
    end: float

    @classmethod
    def of(cls, timeline: Timeline) -> "_Views":
        return cls(
            machine=next(iter(timeline.of(Machine)), None),
            broker=timeline.of(Broker),
            hypervisor=timeline.of(Hypervisor),
            guest=timeline.of(Guest),
            service=timeline.of(Service),
            socket=timeline.of(Socket),
            load={record.event: record for record in reversed(timeline.of(Load))},
            end=timeline.end,
        )

    @property
    def cpu_onset(self) -> Load | None:
        return self.load.get("cpu-onset")

    @property
    def memory_onset(self) -> Load | None:
        return self.load.get("memory-onset")

    def hypervisor_since(self, onset: Load | None) -> list[Hypervisor]:
        return [one for one in self.hypervisor if onset is None or one.t >= onset.t]

    def guest_since(self, onset: Load | None) -> list[Guest]:
        return [one for one in self.guest if onset is None or one.guest_t >= onset.guest_t]

    def hypervisor_before(self, onset: Load | None) -> Hypervisor | None:
        before = [one for one in self.hypervisor if onset is not None and one.t < onset.t]
        return before[-1] if before else next(iter(self.hypervisor), None)

    def guest_before(self, onset: Load | None) -> Guest | None:
        before = [one for one in self.guest if onset is not None and one.guest_t < onset.guest_t]
        return before[-1] if before else next(iter(self.guest), None)


def verify(timeline: Timeline, expected: Expected) -> tuple[dict[str, Any], list[str]]:
    """The summary of a run, and what is wrong with it: one line each, with the numbers; none = passed."""
    views = _Views.of(timeline)
    checks = (
        _check_watched,
        _check_load,
        _check_start,
        _check_cpu,
        _check_memory,
        _check_maximum,
        _check_oom,
        _check_service,
        _check_transport,
    )
    failures = [failure for check in checks for failure in check(views, expected)]
    return _summary(views, expected, failures), failures


def _check_watched(views: _Views, expected: Expected) -> Iterator[str]:
    named: list[tuple[str, Sequence[Record]]] = [
        ("the broker", views.broker),
        ("the hypervisor", views.hypervisor),
        ("the guest", views.guest),
    ]
    for name, records in named:
        if not records:
            yield f"{name} was never seen"
            continue
        times = [record.t for record in records]
        silent = views.end - times[-1]
        if silent > expected.freshest_seconds:
            yield (
                f"{name} was last seen {silent:.1f} s before the end, expected within {expected.freshest_seconds:g} s"
            )
        onset = views.cpu_onset.t if views.cpu_onset else times[0]
        gap, at = max(((b - a, a) for a, b in pairwise(times) if b > onset), default=(0.0, 0.0))
        if gap > expected.longest_gap_seconds:
            yield (
                f"{name} was not seen for {gap:.1f} s from {at:.1f} s on, "
                f"expected at most {expected.longest_gap_seconds:g} s"
            )
    if views.machine is None:
        yield "no machine was booted"


def _check_load(views: _Views, expected: Expected) -> Iterator[str]:
    if views.cpu_onset is None:
        yield "no load ran in the guest, so nothing was there to follow"
        return
    for event in LOAD_EVENTS:
        if event not in views.load:
            yield f"the load never came to {event!r}"
    memory_end = views.load.get("memory-end")
    if memory_end is not None and memory_end.detail != "ok":
        yield f"the memory load did not end by itself: {memory_end.detail}"


def _check_start(views: _Views, expected: Expected) -> Iterator[str]:
    hypervisor, guest = views.hypervisor_before(views.cpu_onset), views.guest_before(views.cpu_onset)
    if hypervisor is not None:
        if hypervisor.vcpus != expected.cpu_min:
            yield f"before the load the hypervisor had {hypervisor.vcpus} CPUs, expected {expected.cpu_min}"
        yield from _near_minimum("before the load", hypervisor, expected)
    if guest is not None and guest.cpus_online != expected.cpu_min:
        yield f"before the load the guest had {guest.cpus_online} CPUs online, expected {expected.cpu_min}"


def _check_cpu(views: _Views, expected: Expected) -> Iterator[str]:
    plugged = [one.vcpus for one in views.hypervisor_since(views.cpu_onset)]
    online = [one.cpus_online for one in views.guest_since(views.cpu_onset)]
    if plugged and max(plugged) < expected.cpu_max:
        yield f"CPUs plugged in the hypervisor peaked at {max(plugged)}, expected {expected.cpu_max}"
    if online and max(online) < expected.cpu_max:
        yield f"CPUs online in the guest peaked at {max(online)}, expected {expected.cpu_max}"
    if plugged and plugged[-1] != expected.cpu_min:
        yield f"at the end the hypervisor has {plugged[-1]} CPUs plugged, expected {expected.cpu_min}"
    if online and online[-1] != expected.cpu_min:
        yield f"at the end the guest has {online[-1]} CPUs online, expected {expected.cpu_min}"


def _check_memory(views: _Views, expected: Expected) -> Iterator[str]:
    guest = views.guest_before(views.cpu_onset)
    sizes = [one.memory_bytes for one in views.hypervisor_since(views.memory_onset)]
    totals = [one.memory_total_bytes for one in views.guest_since(views.memory_onset)]
    if sizes:
        yield from _grown("the hypervisor", expected.memory_min_bytes, max(sizes), expected)
        yield from _near_minimum("at the end", views.hypervisor[-1], expected)
    if guest is not None and totals:
        first = guest.memory_total_bytes
        yield from _grown("the guest", first, max(totals), expected)
        if totals[-1] > first + expected.memory_block_bytes:
            yield (
                f"at the end the guest has {format_size(totals[-1])} of memory, expected at most "
                f"{format_size(expected.memory_block_bytes)} above the {format_size(first)} before the load"
            )


def _grown(name: str, first: int, peak: int, expected: Expected) -> Iterator[str]:
    if peak - first < expected.growth_bytes:
        yield (
            f"memory in {name} grew by {format_size(max(peak - first, 0))} (to {format_size(peak)}), "
            f"expected at least {format_size(expected.growth_bytes)}"
        )


def _near_minimum(when: str, seen: Hypervisor, expected: Expected) -> Iterator[str]:
    highest = expected.memory_min_bytes + expected.memory_block_bytes
    if seen.memory_bytes > highest:
        yield (
            f"{when} the hypervisor gives {format_size(seen.memory_bytes)} of memory, expected at most "
            f"{format_size(highest)}"
        )
    if seen.memory_requested_bytes > highest:
        yield (
            f"{when} {format_size(seen.memory_requested_bytes)} of memory are requested in the hypervisor, "
            f"expected at most {format_size(highest)}"
        )


def _check_maximum(views: _Views, expected: Expected) -> Iterator[str]:
    cpus = _peak(views.hypervisor, lambda one: one.vcpus)
    if cpus is not None and cpus > expected.cpu_max:
        yield f"the hypervisor had {cpus} CPUs plugged, the maximum is {expected.cpu_max}"
    memory = _peak(views.hypervisor, lambda one: max(one.memory_bytes, one.memory_requested_bytes))
    if memory is not None and memory > expected.memory_max_bytes:
        yield (
            f"the hypervisor gave or requested {format_size(memory)} of memory, "
            f"the maximum is {format_size(expected.memory_max_bytes)}"
        )


def _check_oom(views: _Views, expected: Expected) -> Iterator[str]:
    kills = _peak(views.guest, lambda one: one.oom_kills)
    if kills:
        yield f"the guest's kernel killed {kills} processes for want of memory, expected none"


def _check_service(views: _Views, expected: Expected) -> Iterator[str]:
    yield from _seen_before_and_after("guestd.service", [one.t for one in views.service], views)
    for one in views.service:
        if one.state != "active":
            yield f"guestd.service was {one.state!r} at {one.t:.1f} s, expected 'active'"
    if views.service:
        first, last = views.service[0], views.service[-1]
        if (first.active_since_us, first.restarts) != (last.active_since_us, last.restarts):
            yield (
                f"guestd.service was restarted: {last.restarts} restarts and active since "
                f"{last.active_since_us / 1e6:.1f} s of the guest, at first {first.restarts} and "
                f"{first.active_since_us / 1e6:.1f} s"
            )


def _check_transport(views: _Views, expected: Expected) -> Iterator[str]:
    proofs = [one.t for one in views.socket if _is_proof(one, expected)]
    seen = ", ".join(sorted({f"{one.family} {one.state} to {one.peer_cid}:{one.peer_port}" for one in views.socket}))
    yield from _seen_before_and_after(
        f"an established AF_VSOCK connection of guestd.service to {HOST_CID}:{expected.broker_port} "
        f"(its sockets: {seen or 'none'})",
        proofs,
        views,
    )


def _is_proof(one: Socket, expected: Expected) -> bool:
    return (one.family, one.state, one.peer_cid, one.peer_port) == (
        "AF_VSOCK",
        "established",
        HOST_CID,
        expected.broker_port,
    )


def _seen_before_and_after(what: str, times: list[float], views: _Views) -> Iterator[str]:
    if not times:
        yield f"{what} was never seen"
        return
    if views.cpu_onset is not None and min(times) > views.cpu_onset.t:
        yield f"{what} was not seen before the load"
    load_end = views.load.get("end")
    if load_end is not None and max(times) < load_end.t:
        yield f"{what} was not seen after the load"


def _summary(views: _Views, expected: Expected, failures: list[str]) -> dict[str, Any]:
    machine, hypervisor, guest = views.machine, views.hypervisor, views.guest
    online = [one for one in views.guest_since(views.cpu_onset) if views.cpu_onset is not None]
    usable = [one for one in views.guest_since(views.memory_onset) if views.memory_onset is not None]
    before_cpu, before_memory = views.guest_before(views.cpu_onset), views.guest_before(views.memory_onset)
    peak_online = _peak(online, lambda one: one.cpus_online)
    return {
        "schema": 1,
        "passed": not failures,
        "failures": failures,
        "transport": "vsock" if any(_is_proof(one, expected) for one in views.socket) else "unproven",
        "accel": machine.accel if machine else None,
        "guest_kernel": machine.guest_kernel if machine else None,
        "guest_service_state": views.service[-1].state if views.service else None,
        "boot_seconds": machine.boot_seconds if machine else None,
        "duration_seconds": round(views.end, 1),
        "cpu": {
            "min": expected.cpu_min,
            "max": expected.cpu_max,
            "peak_online_in_guest": _peak(guest, lambda one: one.cpus_online),
            "peak_plugged_in_hypervisor": _peak(hypervisor, lambda one: one.vcpus),
            "end_online_in_guest": guest[-1].cpus_online if guest else None,
            "end_plugged_in_hypervisor": hypervisor[-1].vcpus if hypervisor else None,
            "onset_to_first_online_seconds": _first(
                views.cpu_onset,
                online,
                lambda one: before_cpu is not None and one.cpus_online > before_cpu.cpus_online,
            ),
            "onset_to_peak_seconds": _first(
                views.cpu_onset,
                online,
                lambda one: (
                    before_cpu is not None
                    and one.cpus_online > before_cpu.cpus_online
                    and one.cpus_online == peak_online
                ),
            ),
        },
        "memory": {
            "min_bytes": expected.memory_min_bytes,
            "max_bytes": expected.memory_max_bytes,
            "peak_total_in_guest_bytes": _peak(guest, lambda one: one.memory_total_bytes),
            "peak_size_in_hypervisor_bytes": _peak(hypervisor, lambda one: one.memory_bytes),
            "end_size_in_hypervisor_bytes": hypervisor[-1].memory_bytes if hypervisor else None,
            "onset_to_first_usable_seconds": _first(
                views.memory_onset,
                usable,
                lambda one: before_memory is not None and one.memory_total_bytes > before_memory.memory_total_bytes,
            ),
            "oom_kills": _peak(guest, lambda one: one.oom_kills),
        },
    }


def _peak(records: Sequence[_Item], value: Callable[[_Item], int]) -> int | None:
    return max((value(record) for record in records), default=None)


def _first(onset: Load | None, records: Sequence[Guest], wanted: Callable[[Guest], bool]) -> float | None:
    """Seconds from the onset to the first record that is wanted, by the guest's clock."""
    found = next((record for record in records if wanted(record)), None)
    return None if onset is None or found is None else round(found.guest_t - onset.guest_t, 3)
