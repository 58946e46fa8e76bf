"""A broker's client that tells what a test wants, and hosts that look like real ones."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from guestd.model.errors import GuestdError, NotFoundError, UnreachableError
from guestd.model.event import Event, EventCode, EventQuery, SeenEvent
from guestd.model.explanation import GuestExplanation, ResourceExplanation
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB
from guestd.model.view import GuestRemoved, GuestView, HostView, LimitsOrigin, ResizePhase, ResourceView
from guestd.model.vm import VmStatus

NOW = datetime.now(UTC)


def guest(
    name: str,
    cpu: tuple[int, int, int] = (1000, 1000, 4000),
    gib: tuple[float, float, float] = (1, 1, 4),
    why: str = "",
) -> GuestView:
    """A guest that is well. Need, grant and max; CPU in millicores."""
    memory = tuple(round(amount * GIB) for amount in gib)
    reason = Reason("test", why or "has what it asks for")
    phases = [ResizePhase.PLUGGING if need > grant else ResizePhase.IDLE for need, grant, _ in (cpu, (*memory[:2], 0))]
    return GuestView(
        name=name,
        limits=Limits(Resources(1000, GIB), Resources(cpu[2], memory[2])),
        limits_origin=LimitsOrigin.FILE,
        vm_status=VmStatus.RUNNING,
        connected=True,
        channel="vsock",
        hostname=f"{name}.example",
        kernel="6.1.0-42-amd64",
        resources=(
            ResourceView(Kind.CPU, demand=cpu[0], target=cpu[1], reserved=cpu[1], phase=phases[0], reason=reason),
            ResourceView(
                Kind.MEMORY,
                demand=memory[0],
                target=memory[1],
                reserved=memory[1],
                used=memory[0] * 3 // 4,
                phase=phases[1],
                reason=Reason("idle", "has what it asks for"),
            ),
        ),
        demand_reasons=(Reason("cpu-used", "0.91 CPU used"), Reason("memory-used", "0.8 GiB in use, headroom 0.1 GiB")),
    )


def host(guests: Sequence[GuestView]) -> HostView:
    """A host with a tenth of it free."""
    held = sum(
        (Resources(one.resource(Kind.CPU).reserved, one.resource(Kind.MEMORY).reserved) for one in guests), Resources()
    )
    free = Resources(held.cpu_millicores // 4, held.memory_bytes // 5)
    own = Resources(1000, 2 * GIB)
    return HostView(
        capacity=held + free + own,
        reserve=own,
        overhead=Resources(),
        committed=held,
        minimums=sum((one.limits.min for one in guests), Resources()),
        free=free,
        epoch=7,
        version="0.5.0",
        started_at=NOW - timedelta(days=3, hours=4, minutes=12),
        guests=len(guests),
        guests_connected=sum(one.connected for one in guests),
    )


def event(number: int, guest_name: str, text: str, code: EventCode = EventCode.GROWN) -> Event:
    """One that happened some seconds ago."""
    return Event(number, NOW - timedelta(seconds=200 - number), guest_name, Kind.CPU, code, text)


@dataclass
class FakeBroker:
    """What all its clients tell. `gone`: nobody answers; whoever is connected hears it when `change` is called."""

    guests: dict[str, GuestView] = field(default_factory=dict)
    past: list[Event] = field(default_factory=list)
    gone: str = ""
    no_events: str = ""
    clients: int = 0
    explained: int = 0
    _told: list[tuple[asyncio.Queue[GuestView | GuestRemoved | None], asyncio.Queue[Event | None]]] = field(
        default_factory=list
    )

    def change(self, *guests: GuestView) -> None:
        """Have these guests, besides those that are there."""
        for one in guests:
            self.guests[one.name] = one
            for changes, _ in self._told:
                changes.put_nowait(one)

    def remove(self, name: str) -> None:
        """Forget a guest."""
        del self.guests[name]
        for changes, _ in self._told:
            changes.put_nowait(GuestRemoved(name))

    def happen(self, *events: Event) -> None:
        """Tell events."""
        self.past.extend(events)
        for one in events:
            for _, queue in self._told:
                queue.put_nowait(one)

    def go(self, why: str) -> None:
        """End all streams and answer no more; an empty reason: answer again."""
        self.gone = why
        for changes, happened in self._told:
            changes.put_nowait(None)
            happened.put_nowait(None)

    def connect(self) -> "FakeClient":
        self.clients += 1
        return FakeClient(self)


class FakeClient:
    """Like `BrokerClient`."""

    def __init__(self, broker: FakeBroker) -> None:
        self._broker = broker
        self._queues: tuple[asyncio.Queue[GuestView | GuestRemoved | None], asyncio.Queue[Event | None]] = (
            asyncio.Queue(),
            asyncio.Queue(),
        )

    async def __aenter__(self) -> "FakeClient":
        self._broker._told.append(self._queues)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._broker._told.remove(self._queues)

    def _check(self) -> None:
        if self._broker.gone:
            raise UnreachableError(self._broker.gone)

    async def host(self) -> HostView:
        self._check()
        return host(list(self._broker.guests.values()))

    async def guests(self) -> tuple[GuestView, ...]:
        self._check()
        return tuple(self._broker.guests.values())

    async def watch_guests(self, min_interval_seconds: float | None = None) -> AsyncIterator[GuestView | GuestRemoved]:
        while (change := await self._queues[0].get()) is not None:
            yield change
        raise UnreachableError(self._broker.gone)

    async def events(self, query: EventQuery) -> tuple[Event, ...]:
        self._check()
        return tuple(one for one in self._broker.past if one.guest == query.guest)[-query.limit :]

    async def watch_events(self, guest: str = "", after_id: int = 0) -> AsyncIterator[SeenEvent]:
        if self._broker.no_events:
            raise GuestdError(self._broker.no_events)
        for past in self._broker.past:
            if 0 < after_id < past.id:
                yield SeenEvent(past)
        while (event := await self._queues[1].get()) is not None:
            yield SeenEvent(event)
        raise UnreachableError(self._broker.gone)

    async def explain(self, name: str, at: datetime | None = None) -> GuestExplanation:
        self._check()
        self._broker.explained += 1
        with contextlib.suppress(KeyError):
            one = self._broker.guests[name]
            cpu = ResourceExplanation(
                Kind.CPU,
                "has 3 CPUs: its share of a scarce pool, weight 100 of 850",
                Reason("share", ""),
                None,
                to_get_more=(
                    Reason("weight", f"raise its weight: guestctl set-limits {name} --cpu-weight 200"),
                    Reason("capacity", "let another VM have less: db-1 holds 6 CPUs above its minimum"),
                ),
            )
            memory = ResourceExplanation(Kind.MEMORY, "has 3 GiB, all that it asks for", Reason("demand", ""), None)
            return GuestExplanation(one, (cpu, memory))
        raise NotFoundError(f"no guest named {name!r}")


def busy_host(count: int = 24) -> FakeBroker:
    """A host as it may look on a working day."""
    kinds = ("web", "db", "cache", "build", "queue", "mail")
    guests = []
    for index in range(count):
        name = f"{kinds[index % 6]}-{index // 6 + 1}"
        high = (4000, 16000, 2000, 8000, 2000, 1000)[index % 6]
        need = (index * 7919 % 90 + 10) * high // 100
        grant = min(high, -(-need // 1000) * 1000)
        memory = (4.0, 32.0, 8.0, 16.0, 2.0, 1.0)[index % 6]
        wants = round((index * 104729 % 80 + 15) * memory / 100, 1)
        guests.append(guest(name, (need, grant, high), (max(1, wants), max(1, round(wants * 8 + 0.5) / 8), memory)))
    short = "4 tasks want to run on 2 CPUs; its share of a scarce pool is 2 CPU"
    guests[0] = guest("web-1", (3600, 2000, 4000), (2.4, 3, 4), short)
    guests[3] = replace(guests[3], connected=False)
    guests[4] = replace(guests[4], paused=True)
    guests[8] = replace(guests[8], vm_status=VmStatus.UNREACHABLE, degraded="its QMP socket does not answer")
    shrinking = replace(guests[7].resources[1], phase=ResizePhase.ASKING, reason=Reason("idle", "gives back 6 GiB"))
    guests[7] = replace(guests[7], resources=(guests[7].resources[0], shrinking))
    late = replace(
        guests[9].resources[1], overdue=True, reason=Reason("overdue", "holds 2 GiB more than it is to have")
    )
    guests[9] = replace(guests[9], resources=(guests[9].resources[0], late))
    broker = FakeBroker({one.name: one for one in guests})
    broker.past = [
        event(101, "web-1", "grows from 1 CPU to 2 CPU: 3 tasks want to run on 1 CPU", EventCode.GROWING),
        event(104, "web-1", "has 2 CPU", EventCode.GROWN),
        event(150, "web-1", "was asked for 512 MiB: nothing needs them", EventCode.ASKING),
        event(153, "web-1", "gave 384 MiB of 512 MiB: the rest is in use", EventCode.REFUSED),
    ]
    return broker
