"""A broker's side of monitor and admin service that holds what a test put there."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from datetime import UTC, datetime, timedelta

from guestd.model.errors import NotFoundError
from guestd.model.event import DecisionInputs, Event, EventCode, EventQuery, SeenEvent
from guestd.model.explanation import GuestExplanation, ReclaimedResource, ReclaimRequest, ResourceExplanation
from guestd.model.history import History, HistoryPoint, HistoryResource
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.view import GuestView, HostView, LimitsChange, LimitsOrigin, ResizePhase, ResourceView
from guestd.model.vm import VmStatus
from guestd.wire.health import Health

NOON = datetime(2026, 1, 2, 12, 0, 0, 123456, tzinfo=UTC)
LIMITS = Limits(Resources(1000, 1 << 30), Resources(4000, 4 << 30), burst=Resources(6000), burst_credit=Resources(9))
HOST = HostView(
    *(Resources(1000 * number, number << 30) for number in (16, 1, 2, 8, 3, 5)),
    7,
    "1.0",
    NOON,
    guests=2,
    guests_connected=1,
)
CPU = ResourceView(
    *(Kind.CPU, 3500, 4000, 4001, 3000, 2000, 2001, 1900, ResizePhase.PLUGGING, Reason("cpu-runnable", "4 run")),
    *(1, 2, 3, 4, 5, True, 6, 7, 8, 9),
)
GUEST = GuestView(
    name="web-1",
    limits=LIMITS,
    limits_origin=LimitsOrigin.FILE,
    limits_origin_detail="/etc/guestd/broker.toml",
    vm_status=VmStatus.RUNNING,
    connected=True,
    channel="vsock",
    hostname="web",
    agent_version="1.0",
    kernel="6.1",
    resources=(CPU, ResourceView(Kind.MEMORY, phase=ResizePhase.IDLE)),
    demand_reasons=(Reason("cpu-runnable", "4 run"),),
    last_seen_ago_seconds=1.5,
    protocol_errors=3,
    revision=4,
    degraded="no balloon",
    observed=True,
)
INPUTS = DecisionInputs(3500, 1900, LIMITS, 4001, 3000, 4000, 3600, 100, 7, 16_000, 5000, True, 750)
WHY = Reason("scarce", "others need it")


def event(number: int, guest: str = "web-1") -> Event:
    """The event of that id, a second after the one before."""
    at = NOON + timedelta(seconds=number)
    return Event(number, at, guest, Kind.CPU, EventCode.GROWING, f"grows for the {number}.", 1000, 2000, WHY, INPUTS)


EXPLANATION = GuestExplanation(
    GUEST,
    (
        ResourceExplanation(Kind.CPU, "4 CPU, its maximum", WHY, INPUTS, (WHY,), (WHY, WHY), (event(1), event(2))),
        ResourceExplanation(Kind.MEMORY, "1 GiB, its minimum", WHY, None),
    ),
)
HISTORY = History(
    2.5,
    tuple(
        HistoryPoint(
            NOON + timedelta(seconds=2.5 * step), tuple(HistoryResource(kind, 1 + step, 2, 3, 4, 5) for kind in Kind)
        )
        for step in range(3)
    ),
)
RECLAIMED = (ReclaimedResource(Kind.CPU, 4000, 1000, Reason("floor", "it needs that")),)


class FakeOperators:
    """Knows the guests of `guests`; notes what it was asked, and fails when told to."""

    def __init__(self) -> None:
        self.health = Health()
        self.guests = {"web-1": GUEST}
        self.record: list[Event] = []
        self.missed = 0
        self.calls: list[tuple[object, ...]] = []
        self.error: Exception | None = None
        self.followers = 0
        self.more = asyncio.Event()

    def host_view(self) -> HostView:
        return HOST

    def guest_names(self) -> list[str]:
        return sorted(self.guests)

    def guest_view(self, name: str) -> GuestView:
        if name not in self.guests:
            raise NotFoundError(f"no guest named {name!r}")
        return self.guests[name]

    def subscribe(self) -> tuple[set[str], asyncio.Event, Callable[[], None]]:
        return set(), asyncio.Event(), lambda: None

    async def add_guest(
        self, name: str, limits: Limits, qmp_socket: str, cid: int | None, vsock_path: str | None
    ) -> None:
        self._note("add", name, limits, qmp_socket, cid, vsock_path)

    async def remove_guest(self, name: str) -> None:
        self._note("remove", name)

    async def change_limits(self, name: str, change: LimitsChange) -> None:
        self._note("change", name, change)

    async def reset_limits(self, name: str) -> None:
        self._note("reset", name)

    async def pause_guest(self, name: str, paused: bool) -> None:
        self._note("pause", name, paused)

    async def explain(self, name: str, at: datetime | None) -> GuestExplanation:
        self._note("explain", name, at)
        self.guest_view(name)
        return EXPLANATION

    async def events(self, query: EventQuery) -> tuple[Event, ...]:
        self._note("events", query)
        found = [one for one in self.record if one.id > query.after_id and query.guest in ("", one.guest)]
        found = [one for one in found if query.since is None or one.at >= query.since]
        found = [one for one in found if query.until is None or one.at < query.until]
        return tuple(found[-query.limit :] if query.newest else found[: query.limit])

    async def follow_events(self, guest: str, after_id: int) -> AsyncGenerator[SeenEvent, None]:
        self._note("follow", guest, after_id)
        self.followers += 1
        try:
            while True:
                self.more.clear()
                for one in await self.events(EventQuery(guest, after_id=after_id)):
                    after_id = one.id
                    yield SeenEvent(one, self.missed)
                await self.more.wait()
        finally:
            self.followers -= 1

    async def history(self, name: str, since: datetime | None, until: datetime | None, max_points: int) -> History:
        self._note("history", name, since, until, max_points)
        self.guest_view(name)
        return HISTORY

    async def reclaim_guest(self, name: str, request: ReclaimRequest) -> tuple[ReclaimedResource, ...]:
        self._note("reclaim", name, request)
        return RECLAIMED

    def _note(self, *call: object) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(call)
