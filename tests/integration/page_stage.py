"""A host that is only acted: as many VMs as asked for, whose loads go up and down by a script.

For what a browser does with what it is told, where real VMs would say nothing more and cost more.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from guestd.model.errors import NotFoundError
from guestd.model.event import Event, EventCode, EventQuery, SeenEvent
from guestd.model.explanation import GuestExplanation, ReclaimedResource, ReclaimRequest, ResourceExplanation
from guestd.model.history import History, HistoryPoint, HistoryResource
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB, MIB
from guestd.model.view import GuestView, HostView, LimitsChange, LimitsOrigin, ResizePhase, ResourceView
from guestd.model.vm import VmStatus

_ROLES = ("api", "batch", "build", "cache", "db", "edge", "mail", "queue", "search", "web")


class Stage:
    """Implements what the page asks of a broker."""

    def __init__(self, guests: int) -> None:
        self.epoch = 7
        self.started_at = datetime.now(UTC) - timedelta(days=3, hours=4)
        self.guests: dict[str, GuestView] = {}
        self.past: list[Event] = []
        self.time = 0.0
        self._subscribers: list[tuple[set[str], asyncio.Event]] = []
        self._followers: list[asyncio.Queue[Event]] = []
        for index in range(guests):
            name = f"{_ROLES[index % len(_ROLES)]}-{index // len(_ROLES) + 1}"
            self.guests[name] = _guest(name, index, 0.0)
        self._dress()

    def _dress(self) -> None:
        """A few that are special."""
        special: dict[str, Callable[[GuestView], GuestView]] = {
            "mail-1": lambda one: replace(one, vm_status=VmStatus.GONE, connected=False, resources=()),
            "edge-2": lambda one: replace(one, connected=False),
            "queue-2": lambda one: replace(one, paused=True),
            "search-3": lambda one: replace(one, observed=True),
            "build-2": lambda one: replace(
                one,
                vm_status=VmStatus.UNREACHABLE,
                degraded="its QMP socket does not answer; it keeps what it has, and is tried again",
            ),
        }
        self._special = special
        for name, change in special.items():
            if name in self.guests:
                self.guests[name] = change(self.guests[name])

    def move(self, *names: str, seconds: float = 1.0) -> None:
        """Let time pass for these VMs, or all."""
        self.time += seconds
        for index, name in enumerate(self.guests):
            if not names or name in names:
                self.put(self._special.get(name, lambda one: one)(_guest(name, index, self.time)))

    def put(self, guest: GuestView) -> None:
        """It is like that now."""
        self.guests[guest.name] = guest
        self._changed(guest.name)

    def drop(self, name: str) -> None:
        """It is no more."""
        del self.guests[name]
        self._changed(name)

    def happen(self, guest: str, code: EventCode, text: str, kind: Kind | None = None, ago: float = 0.0) -> None:
        """One more event, so many seconds ago."""
        event = Event(len(self.past) + 1, datetime.now(UTC) - timedelta(seconds=ago), guest, kind, code, text)
        self.past.append(event)
        for follower in self._followers:
            follower.put_nowait(event)

    def _changed(self, name: str) -> None:
        for changed, event in self._subscribers:
            changed.add(name)
            event.set()

    # ---- what a broker answers -------------------------------------------------------------------

    def host_view(self) -> HostView:
        count = len(self.guests)
        floor = [guest.limits.min for guest in self.guests.values()]
        held = [
            Resources(guest.resource(Kind.CPU).reserved, guest.resource(Kind.MEMORY).reserved)
            for guest in self.guests.values()
        ]
        scale = max(1, math.ceil(count / 30))
        capacity, reserve = Resources(112_000 * scale, 192 * GIB * scale), Resources(2000, 4 * GIB)
        overhead = Resources(10 * count, 48 * MIB * count)
        charged = sum((_larger(*pair) for pair in zip(held, floor, strict=True)), Resources())
        return HostView(
            capacity=capacity,
            reserve=reserve,
            overhead=overhead,
            committed=sum(held, Resources()),
            minimums=sum(floor, Resources()),
            free=capacity - reserve - overhead - charged,
            epoch=self.epoch,
            version="0.1.0",
            started_at=self.started_at,
            guests=count,
            guests_connected=sum(guest.connected for guest in self.guests.values()),
        )

    def guest_names(self) -> list[str]:
        return sorted(self.guests)

    def guest_view(self, name: str) -> GuestView:
        if name not in self.guests:
            raise NotFoundError(f"no guest named {name!r}")
        return self.guests[name]

    def subscribe(self) -> tuple[set[str], asyncio.Event, Callable[[], None]]:
        entry = (set[str](), asyncio.Event())
        self._subscribers.append(entry)
        return (*entry, lambda: self._subscribers.remove(entry))

    @property
    def watched(self) -> bool:
        return bool(self._subscribers or self._followers)

    async def explain(self, name: str, at: datetime | None) -> GuestExplanation:
        guest = self.guest_view(name)
        return GuestExplanation(guest, tuple(_explained(guest, kind) for kind in Kind))

    async def events(self, query: EventQuery) -> tuple[Event, ...]:
        assert query.newest
        return tuple(self.past[-query.limit :])

    async def follow_events(self, guest: str, after_id: int) -> AsyncGenerator[SeenEvent, None]:
        queue: asyncio.Queue[Event] = asyncio.Queue()
        for event in self.past[after_id:] if after_id else ():
            queue.put_nowait(event)
        self._followers.append(queue)
        try:
            while True:
                yield SeenEvent(await queue.get())
        finally:
            self._followers.remove(queue)

    async def history(self, name: str, since: datetime | None, until: datetime | None, max_points: int) -> History:
        assert since is not None and until is not None
        index = list(self.guests).index(self.guest_view(name).name)
        step = (until - since).total_seconds() / max_points
        points = []
        for number in range(max_points):
            at = since + timedelta(seconds=number * step)
            past = _guest(name, index, self.time - (until - at).total_seconds())
            points.append(HistoryPoint(at, tuple(_past(past.resource(kind)) for kind in Kind)))
        return History(step, tuple(points))

    async def add_guest(
        self, name: str, limits: Limits, qmp_socket: str, cid: int | None, vsock_path: str | None
    ) -> None:
        raise NotImplementedError

    async def remove_guest(self, name: str) -> None:
        raise NotImplementedError

    async def change_limits(self, name: str, change: LimitsChange) -> None:
        raise NotImplementedError

    async def reset_limits(self, name: str) -> None:
        raise NotImplementedError

    async def pause_guest(self, name: str, paused: bool) -> None:
        raise NotImplementedError

    async def reclaim_guest(self, name: str, request: ReclaimRequest) -> tuple[ReclaimedResource, ...]:
        raise NotImplementedError


def _larger(one: Resources, other: Resources) -> Resources:
    return Resources(max(one.cpu_millicores, other.cpu_millicores), max(one.memory_bytes, other.memory_bytes))


def _wave(index: int, seconds: float, period: float) -> float:
    """A load within 0..1: a slow swing, a faster one on it, and a step now and then."""
    turn = (seconds / period + index * 0.37) * 2 * math.pi
    step = 0.3 if (seconds / 97 + index * 0.61) % 1 < 0.25 else 0.0
    return min(1.0, max(0.02, 0.32 + 0.3 * math.sin(turn) + 0.1 * math.sin(turn * 5.3) + step))


def _guest(name: str, index: int, seconds: float) -> GuestView:
    """A VM as it is after so many seconds."""
    size = (2, 4, 8, 4, 8, 2, 4, 6, 4, 4)[index % 10]
    burst = size + 2 if index % 4 == 1 else 0
    limits = Limits(
        Resources(1000 if index % 3 else 500, GIB * (1 + index % 2)),
        Resources(size * 1000, size * 2 * GIB),
        Resources(100 + 100 * (index % 3), 100),
        Resources(burst * 1000, 0),
        Resources(600_000 if burst else 0, 0),
        Resources(200 if burst else 0, 0),
    )
    cpu = _resource(Kind.CPU, limits, 1000, index, seconds, 140.0)
    memory = _resource(Kind.MEMORY, limits, 256 * MIB, index + 5, seconds, 900.0)
    return GuestView(
        name,
        limits,
        LimitsOrigin.FILE,
        "/etc/guestd/broker.toml",
        VmStatus.RUNNING,
        connected=True,
        channel=f"vsock:{100 + index}",
        hostname=f"{name}.example.net",
        agent_version="0.1.0",
        kernel="6.1.0-37-amd64",
        resources=(cpu, memory),
        demand_reasons=(Reason("runnable", f"{cpu.demand / 1000:.1f} CPUs' worth of tasks"),),
        last_seen_ago_seconds=seconds % 30,
    )


def _resource(kind: Kind, limits: Limits, unit: int, index: int, seconds: float, period: float) -> ResourceView:
    top, low = limits.ceiling(kind), limits.min.get(kind)

    def needed(at: float) -> int:
        exact = top * _wave(index, at, period) * 1.1
        return round(exact / 10) * 10 if kind is Kind.CPU else round(exact / MIB) * MIB

    demand, before = needed(seconds), needed(seconds - 3)
    lately = max(needed(seconds - ago) for ago in (3, 6, 9, 12))
    reserved = max(low, min(top, -(-max(before, lately) // unit) * unit))
    phase = ResizePhase.IDLE
    usable = reserved
    if demand > reserved and reserved < top:
        phase, usable = ResizePhase.PLUGGING, reserved
        reserved = min(top, -(-demand // unit) * unit)
    burst = max(0, reserved - limits.max.get(kind))
    return ResourceView(
        kind,
        demand,
        reserved,
        reserved,
        usable,
        usable,
        usable,
        int(demand * 0.9),
        phase,
        Reason("demand", "as asked"),
        burst=burst,
    )


def _past(one: ResourceView) -> HistoryResource:
    return HistoryResource(one.kind, one.demand, one.reserved, one.plugged, one.usable, one.used)


def _explained(guest: GuestView, kind: Kind) -> ResourceExplanation:
    one, high = guest.resource(kind), guest.limits.max.get(kind)
    summary = f"has {kind.show(one.reserved)} because it needs {kind.show(one.demand)}"
    more: tuple[Reason, ...] = ()
    if one.demand > one.reserved:
        more = (Reason("max", f"raise its max of {kind.show(high)}: guestctl set-limits {guest.name}"),)
    reasons = guest.demand_reasons if kind is Kind.CPU else ()
    return ResourceExplanation(kind, summary, Reason("demand", summary), None, reasons, more)
