"""Stands for the broker, with something of everything to show."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar, Self

from test_status import GUEST, HOST

from guestd.model.errors import GuestdError
from guestd.model.event import DecisionInputs, Event, EventCode, EventQuery, SeenEvent
from guestd.model.explanation import GuestExplanation, ReclaimedResource, ReclaimRequest, ResourceExplanation
from guestd.model.history import History, HistoryPoint, HistoryResource
from guestd.model.reason import Reason
from guestd.model.resources import Kind
from guestd.model.units import GIB, MIB
from guestd.model.view import GuestRemoved, GuestView, HostView, LimitsChange

AT = datetime(2026, 3, 10, 14, 2, tzinfo=UTC)
INPUTS = DecisionInputs(
    demand=3500,
    used=3100,
    limits=GUEST.limits,
    reserved=4000,
    plugged=3000,
    target=4000,
    expected=3600,
    kept=1000,
    capacity=8000,
    free=4000,
    scarce=True,
)
EVENTS = (
    Event(7, AT, "demo", Kind.CPU, EventCode.GROWING, "grows to 4 CPU", 3000, 4000, Reason("demand", "busy"), INPUTS),
    Event(8, AT + timedelta(seconds=1), "demo", Kind.CPU, EventCode.FAILED, "QEMU said no", 3000, 3000),
    Event(9, AT + timedelta(seconds=2), "", None, EventCode.BROKER, "started"),
)
EXPLANATION = GuestExplanation(
    GUEST,
    (
        ResourceExplanation(
            Kind.CPU,
            "has 4 CPUs because it asked for 3.5",
            Reason("demand", "as much as it needs"),
            INPUTS,
            (Reason("cpu-runnable", "4 runnable"),),
            (Reason("limit", "raise its max: guestctl set-limits demo --cpu-max 6"),),
            EVENTS[:2],
        ),
        ResourceExplanation(Kind.MEMORY, "has 1.6 GiB, all that it asks for", Reason("", ""), None),
    ),
)
HISTORY = History(
    10.0,
    tuple(
        HistoryPoint(
            AT + timedelta(seconds=10 * step),
            (
                HistoryResource(Kind.CPU, 100 * step, 1000 + 40 * step, 2000, 1000, 50 * step),
                HistoryResource(Kind.MEMORY, 600 * MIB, GIB, GIB, 900 * MIB, 500 * MIB),
            ),
        )
        for step in (*range(40), *range(60, 100))
    ),
)
RECLAIMED = (
    ReclaimedResource(Kind.CPU, 4000, 2000, Reason("kept", "it needs 2 CPU")),
    ReclaimedResource(Kind.MEMORY, GIB, GIB, Reason("min", "it is at its minimum")),
)


class FakeClient:
    """Calls are kept, errors are raised when set, `views` are what the guest looks like, one after the other."""

    calls: ClassVar[list[tuple[Any, ...]]] = []
    error: ClassVar[GuestdError | None] = None
    changes: ClassVar[list[GuestView | GuestRemoved | BaseException]] = []
    stream: ClassVar[list[SeenEvent | BaseException]] = []
    views: ClassVar[list[GuestView]] = []
    unknown_time: ClassVar[bool] = False
    past: ClassVar[tuple[Event, ...]] = EVENTS

    def __init__(self, run_dir: Path) -> None:
        self.calls.append(("open", run_dir))

    @classmethod
    def remote(cls, address: str, certificate: Path, key: Path, ca: Path) -> Self:
        cls.calls.append(("remote", address, certificate, key, ca))
        return cls(Path("/nowhere"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.calls.append(("close",))

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def _view(self) -> GuestView:
        self._check()
        return self.views.pop(0) if len(self.views) > 1 else self.views[0] if self.views else GUEST

    async def host(self) -> HostView:
        self._check()
        return HOST

    async def guests(self) -> tuple[GuestView, ...]:
        self._check()
        return (GUEST,)

    async def guest(self, name: str) -> GuestView:
        self.calls.append(("guest", name))
        return self._view()

    async def watch_guests(self, interval: float) -> AsyncIterator[GuestView | GuestRemoved]:
        for change in self.changes:
            await asyncio.sleep(0.01)
            if isinstance(change, BaseException):
                raise change
            yield change
        await asyncio.sleep(60)

    async def events(self, query: EventQuery) -> tuple[Event, ...]:
        self.calls.append(("events", query))
        self._check()
        return self.past

    async def watch_events(self, guest: str, after_id: int) -> AsyncIterator[SeenEvent]:
        self.calls.append(("watch", guest, after_id))
        for seen in self.stream:
            if isinstance(seen, BaseException):
                raise seen
            yield seen

    async def history(self, name: str, since: datetime, until: datetime | None, max_points: int) -> History:
        self.calls.append(("history", name, since, until, max_points))
        self._check()
        return HISTORY

    async def explain(self, name: str, at: datetime | None) -> GuestExplanation:
        self.calls.append(("explain", name, at))
        self._check()
        return replace(EXPLANATION, unknown_time=self.unknown_time)

    async def set_limits(self, name: str, change: LimitsChange) -> GuestView:
        self.calls.append(("set", name, change))
        return self._view()

    async def reset_limits(self, name: str) -> GuestView:
        self.calls.append(("reset", name))
        return self._view()

    async def pause_guest(self, name: str) -> GuestView:
        self.calls.append(("pause", name))
        return self._view()

    async def resume_guest(self, name: str) -> GuestView:
        self.calls.append(("resume", name))
        return self._view()

    async def reclaim_guest(
        self, name: str, request: ReclaimRequest
    ) -> tuple[tuple[ReclaimedResource, ...], GuestView]:
        self.calls.append(("reclaim", name, request))
        return RECLAIMED, self._view()
