"""Events, explanations, history and reclaims, to the wire and back: `guestd.model` in the words of monitor.proto.

Times are UTC. What a newer broker says that is not known here reads as unknown, or is left out.
"""

from collections.abc import Iterable
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from guestd.model.errors import ProtocolError
from guestd.model.event import DecisionInputs, Event, EventCode, SeenEvent
from guestd.model.explanation import GuestExplanation, ReclaimedResource, ResourceExplanation
from guestd.model.history import History, HistoryPoint, HistoryResource
from guestd.model.reason import Reason
from guestd.v1 import admin_pb2, common_pb2, monitor_pb2
from guestd.wire.amounts import KIND, KIND_BACK, MAX_TEXT, duration, limits_to_wire, reason_to_wire, within
from guestd.wire.view import guest_to_wire, guest_view, limits_view, reason_view

MAX_EVENTS = 20  # of one kind in an explanation
_MAX_ID = (1 << 63) - 1
_CODE: dict[EventCode, monitor_pb2.EventCode.ValueType] = {
    code: monitor_pb2.EventCode.Value(f"EVENT_CODE_{code.name}") for code in EventCode if code is not EventCode.UNKNOWN
}
_CODE_BACK = {number: code for code, number in _CODE.items()}
_AMOUNTS = ("demand", "used", "reserved", "plugged", "target", "expected", "kept", "burst_credit", "capacity", "free")
"""Of what a decision was made from; the same words on both sides."""


def moment_to_wire(moment: datetime | None) -> Timestamp | None:
    """A time; None stays unset."""
    if moment is None:
        return None
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp


def moment_from_wire(name: str, stamp: Timestamp | None) -> datetime | None:
    """A time; what is unset is None.

    :raise ProtocolError: When no calendar has it.
    """
    try:
        return None if stamp is None else stamp.ToDatetime(UTC)
    except (ValueError, OverflowError) as error:
        raise ProtocolError(f"{name} is no time between the years 1 and 9999") from error


def event_id_from_wire(name: str, number: int) -> int:
    """The id of an event.

    :raise ProtocolError: When there will never be so many.
    """
    return within(name, number, _MAX_ID)


def id_from_token(token: str, newest: int) -> int:
    """The id after which a page begins; 0 for the first page.

    :param newest: id of the newest event.
    :raise ProtocolError: When no broker gave that token.
    """
    if not token:
        return 0
    known = token.isascii() and token.isdecimal() and token == str(int(token[:20])) and 1 <= int(token) <= newest
    if not known:
        raise ProtocolError("page_token is none that this broker gave; begin again without one")
    return int(token)


def event_to_wire(event: Event) -> monitor_pb2.Event:
    """One event."""
    return monitor_pb2.Event(
        id=event.id,
        at=moment_to_wire(event.at),
        guest=event.guest,
        kind=common_pb2.RESOURCE_KIND_UNSPECIFIED if event.kind is None else KIND[event.kind],
        code=_CODE.get(event.code, monitor_pb2.EVENT_CODE_UNSPECIFIED),
        text=event.text[:MAX_TEXT],
        before=event.before,
        after=event.after,
        reason=None if event.reason is None else reason_to_wire(event.reason),
        inputs=_inputs_to_wire(event.inputs),
    )


def event_from_wire(event: monitor_pb2.Event) -> Event:
    """One event."""
    return Event(
        id=event.id,
        at=event.at.ToDatetime(UTC),
        guest=event.guest,
        kind=KIND_BACK.get(event.kind),
        code=_CODE_BACK.get(event.code, EventCode.UNKNOWN),
        text=event.text,
        before=event.before,
        after=event.after,
        reason=reason_view(event.reason) if event.HasField("reason") else None,
        inputs=_inputs_from_wire(event.inputs) if event.HasField("inputs") else None,
    )


def seen_event_from_wire(message: monitor_pb2.WatchEventsResponse) -> SeenEvent:
    """One event, and how many the broker left out before it."""
    return SeenEvent(event_from_wire(message.event), message.missed)


def explanation_to_wire(explanation: GuestExplanation) -> monitor_pb2.ExplainGuestResponse:
    """Why a guest has what it has."""
    return monitor_pb2.ExplainGuestResponse(
        guest=guest_to_wire(explanation.guest),
        resources=[
            monitor_pb2.ResourceExplanation(
                kind=KIND[one.kind],
                summary=one.summary[:MAX_TEXT],
                reason=reason_to_wire(one.reason),
                inputs=_inputs_to_wire(one.inputs),
                demand_reasons=[reason_to_wire(reason) for reason in one.demand_reasons],
                to_get_more=[reason_to_wire(reason) for reason in one.to_get_more],
                events=[event_to_wire(event) for event in one.events[-MAX_EVENTS:]],
            )
            for one in explanation.resources
        ],
        unknown_time=explanation.unknown_time,
    )


def explanation_from_wire(response: monitor_pb2.ExplainGuestResponse) -> GuestExplanation:
    """Why a guest has what it has."""
    return GuestExplanation(
        guest=guest_view(response.guest),
        resources=tuple(
            ResourceExplanation(
                kind=KIND_BACK[one.kind],
                summary=one.summary,
                reason=reason_view(one.reason),
                inputs=_inputs_from_wire(one.inputs) if one.HasField("inputs") else None,
                demand_reasons=_reasons(one.demand_reasons),
                to_get_more=_reasons(one.to_get_more),
                events=tuple(event_from_wire(event) for event in one.events),
            )
            for one in response.resources
            if one.kind in KIND_BACK
        ),
        unknown_time=response.unknown_time,
    )


def history_to_wire(history: History) -> monitor_pb2.GetHistoryResponse:
    """A guest's past."""
    return monitor_pb2.GetHistoryResponse(
        step=duration(history.step_seconds),
        points=[
            monitor_pb2.HistoryPoint(
                at=moment_to_wire(point.at),
                resources=[
                    monitor_pb2.HistoryResource(
                        kind=KIND[one.kind],
                        demand=one.demand,
                        reserved=one.reserved,
                        plugged=one.plugged,
                        usable=one.usable,
                        used=one.used,
                    )
                    for one in point.resources
                ],
            )
            for point in history.points
        ],
    )


def history_from_wire(response: monitor_pb2.GetHistoryResponse) -> History:
    """A guest's past."""
    return History(
        step_seconds=response.step.ToNanoseconds() / 1e9,
        points=tuple(
            HistoryPoint(
                point.at.ToDatetime(UTC),
                tuple(
                    HistoryResource(KIND_BACK[one.kind], one.demand, one.reserved, one.plugged, one.usable, one.used)
                    for one in point.resources
                    if one.kind in KIND_BACK
                ),
            )
            for point in response.points
        ),
    )


def reclaimed_to_wire(one: ReclaimedResource) -> admin_pb2.ReclaimedResource:
    """What one kind comes to."""
    return admin_pb2.ReclaimedResource(
        kind=KIND[one.kind], reserved=one.reserved, goal=one.goal, reason=reason_to_wire(one.reason)
    )


def reclaimed_from_wire(response: admin_pb2.ReclaimGuestResponse) -> tuple[ReclaimedResource, ...]:
    """What each kind comes to."""
    return tuple(
        ReclaimedResource(KIND_BACK[one.kind], one.reserved, one.goal, reason_view(one.reason))
        for one in response.resources
        if one.kind in KIND_BACK
    )


def _inputs_to_wire(inputs: DecisionInputs | None) -> monitor_pb2.DecisionInputs | None:
    if inputs is None:
        return None
    return monitor_pb2.DecisionInputs(
        limits=limits_to_wire(inputs.limits),
        scarce=inputs.scarce,
        idle_tax_permille=inputs.idle_tax_permille,
        **{name: getattr(inputs, name) for name in _AMOUNTS},
    )


def _inputs_from_wire(inputs: monitor_pb2.DecisionInputs) -> DecisionInputs:
    return DecisionInputs(
        limits=limits_view(inputs.limits),
        scarce=inputs.scarce,
        idle_tax_permille=inputs.idle_tax_permille,
        **{name: getattr(inputs, name) for name in _AMOUNTS},
    )


def _reasons(reasons: Iterable[common_pb2.Reason]) -> tuple[Reason, ...]:
    return tuple(reason_view(reason) for reason in reasons)
