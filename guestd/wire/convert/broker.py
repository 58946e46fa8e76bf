"""What the broker sends: written by the broker, read and checked by the guest."""

from google.protobuf.message import DecodeError

from guestd.model.errors import ProtocolError
from guestd.model.messages import BrokerMessage, Grant, Heartbeat, Reclaim, Throttle, Welcome
from guestd.v1 import common_pb2, guest_pb2
from guestd.wire.amounts import (
    KIND,
    KIND_BACK,
    MAX_CPU_MILLICORES,
    MAX_WORD,
    clean,
    duration,
    known,
    most,
    reason_from_wire,
    reason_to_wire,
    resources_from_wire,
    resources_to_wire,
    seconds,
    within,
)
from guestd.wire.convert.parts import id_from_wire, id_to_wire
from guestd.wire.convert.words import GRANT_STAGE, GRANT_STAGE_BACK, RECLAIM_STAGE, RECLAIM_STAGE_BACK


def broker_message_to_wire(message: BrokerMessage) -> guest_pb2.NegotiateResponse:
    """The broker's side of sending."""
    match message:
        case Welcome():
            welcome = guest_pb2.Welcome(
                protocol=message.protocol,
                guest=message.guest,
                epoch=message.epoch,
                heartbeat=duration(message.heartbeat_seconds),
                limits=common_pb2.Limits(
                    min=resources_to_wire(message.limits_min), max=resources_to_wire(message.limits_max)
                ),
            )
            return guest_pb2.NegotiateResponse(welcome=welcome)
        case Grant():
            remaining = None if message.remaining_seconds is None else duration(message.remaining_seconds)
            grant = guest_pb2.Grant(
                id=id_to_wire(message.id),
                kind=KIND[message.kind],
                amount=message.amount,
                stage=GRANT_STAGE[message.stage],
                remaining=remaining,
                burst=message.burst,
            )
            return guest_pb2.NegotiateResponse(grant=grant)
        case Reclaim():
            reclaim = guest_pb2.Reclaim(
                id=id_to_wire(message.id),
                kind=KIND[message.kind],
                amount=message.amount,
                stage=RECLAIM_STAGE[message.stage],
                remaining=duration(message.remaining_seconds),
                reason=reason_to_wire(message.reason),
            )
            return guest_pb2.NegotiateResponse(reclaim=reclaim)
        case Throttle():
            throttle = guest_pb2.Throttle(
                quota_millicores=message.quota_millicores, throttled_permille=message.throttled_permille
            )
            return guest_pb2.NegotiateResponse(throttle=throttle)
        case Heartbeat():
            return guest_pb2.NegotiateResponse(heartbeat=guest_pb2.Heartbeat())


def broker_message_from_bytes(raw: bytes) -> BrokerMessage | None:
    """As `broker_message_from_wire`, from the bytes as they came.

    :raise ProtocolError: When the message makes no sense.
    """
    try:
        return broker_message_from_wire(guest_pb2.NegotiateResponse.FromString(raw))
    except DecodeError as error:
        raise ProtocolError("a message that is not one of this protocol") from error


def broker_message_from_wire(response: guest_pb2.NegotiateResponse) -> BrokerMessage | None:
    """The guest's side of receiving; None for a kind of message that this version does not know.

    :raise ProtocolError: When the message makes no sense.
    """
    match response.WhichOneof("message"):
        case "welcome":
            welcome = response.welcome
            return Welcome(
                protocol=welcome.protocol,
                guest=clean(welcome.guest, MAX_WORD),
                epoch=welcome.epoch,
                heartbeat_seconds=min(3600.0, max(1.0, seconds("welcome.heartbeat", welcome.heartbeat))),
                limits_min=resources_from_wire("welcome.limits.min", welcome.limits.min),
                limits_max=resources_from_wire("welcome.limits.max", welcome.limits.max),
            )
        case "grant":
            grant = response.grant
            kind = known("grant.kind", KIND_BACK.get(grant.kind))
            remaining = seconds("grant.remaining", grant.remaining) if grant.HasField("remaining") else None
            return Grant(
                id=id_from_wire(grant.id),
                kind=kind,
                amount=within("grant.amount", grant.amount, most(kind)),
                stage=known("grant.stage", GRANT_STAGE_BACK.get(grant.stage)),
                remaining_seconds=remaining,
                burst=within("grant.burst", grant.burst, grant.amount),
            )
        case "reclaim":
            reclaim = response.reclaim
            kind = known("reclaim.kind", KIND_BACK.get(reclaim.kind))
            return Reclaim(
                id=id_from_wire(reclaim.id),
                kind=kind,
                amount=within("reclaim.amount", reclaim.amount, most(kind)),
                stage=known("reclaim.stage", RECLAIM_STAGE_BACK.get(reclaim.stage)),
                remaining_seconds=seconds("reclaim.remaining", reclaim.remaining),
                reason=reason_from_wire(reclaim.reason),
            )
        case "throttle":
            throttle = response.throttle
            return Throttle(
                quota_millicores=within("throttle.quota_millicores", throttle.quota_millicores, MAX_CPU_MILLICORES),
                throttled_permille=within("throttle.throttled_permille", throttle.throttled_permille, 1000),
            )
        case "heartbeat":
            return Heartbeat()
        case _:
            return None
