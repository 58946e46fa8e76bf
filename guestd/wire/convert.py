"""Between the words of `guestd.model.messages` and the wire. The only place where a guest's message is read.

Everything that comes in is checked here, once: ranges, lengths, enums, presence. What does not make
sense raises `ProtocolError` with the field's name; texts are cut and stripped of control characters.
"""

from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError

from guestd.model.errors import FloodError, ProtocolError
from guestd.model.guest import Capability, Identity
from guestd.model.messages import (
    Ack,
    AckStatus,
    BrokerMessage,
    Demand,
    Grant,
    GrantStage,
    GuestMessage,
    Heartbeat,
    Hello,
    OrderId,
    Reason,
    Reclaim,
    ReclaimStage,
    RefusalReason,
    Throttle,
    Urgency,
    Usable,
    Welcome,
)
from guestd.model.resources import Kind, Limits, Resources
from guestd.v1 import common_pb2, guest_pb2

T = TypeVar("T")
NEGOTIATE = f"/{guest_pb2.DESCRIPTOR.services_by_name['GuestService'].full_name}/Negotiate"
"""The path of the one call between guest and broker."""
MAX_MESSAGE_BYTES = 64 * 1024
MAX_CPU_MILLICORES = 1 << 31
MAX_MEMORY_BYTES = 1 << 56
MAX_VCPUS = 8192
MAX_REASONS = 8
MAX_TEXT = 512
MAX_WORD = 64
_MAX_SECONDS = 365 * 86400

_KIND = {Kind.CPU: common_pb2.RESOURCE_KIND_CPU, Kind.MEMORY: common_pb2.RESOURCE_KIND_MEMORY}
_CAPABILITY = {
    Capability.CPU_ONLINE: guest_pb2.CAPABILITY_CPU_ONLINE,
    Capability.MEMORY_ONLINE: guest_pb2.CAPABILITY_MEMORY_ONLINE,
    Capability.VIRTIO_MEM: guest_pb2.CAPABILITY_VIRTIO_MEM,
    Capability.BALLOON: guest_pb2.CAPABILITY_BALLOON,
    Capability.PSI: guest_pb2.CAPABILITY_PSI,
    Capability.DRY_RUN: guest_pb2.CAPABILITY_DRY_RUN,
}
_URGENCY = {
    Urgency.NORMAL: guest_pb2.URGENCY_NORMAL,
    Urgency.SOON: guest_pb2.URGENCY_SOON,
    Urgency.NOW: guest_pb2.URGENCY_NOW,
}
_GRANT_STAGE = {
    GrantStage.OFFERED: guest_pb2.GRANT_STAGE_OFFERED,
    GrantStage.SETTLED: guest_pb2.GRANT_STAGE_SETTLED,
    GrantStage.ENDING: guest_pb2.GRANT_STAGE_ENDING,
}
_RECLAIM_STAGE = {
    ReclaimStage.ASK: guest_pb2.RECLAIM_STAGE_ASK,
    ReclaimStage.URGE: guest_pb2.RECLAIM_STAGE_URGE,
    ReclaimStage.OVERDUE: guest_pb2.RECLAIM_STAGE_OVERDUE,
}
_ACK_STATUS = {
    AckStatus.DONE: guest_pb2.ACK_STATUS_DONE,
    AckStatus.PARTIAL: guest_pb2.ACK_STATUS_PARTIAL,
    AckStatus.REFUSED: guest_pb2.ACK_STATUS_REFUSED,
}
_REFUSAL = {
    RefusalReason.IN_USE: guest_pb2.REFUSAL_REASON_IN_USE,
    RefusalReason.PINNED: guest_pb2.REFUSAL_REASON_PINNED,
    RefusalReason.PRESSURE: guest_pb2.REFUSAL_REASON_PRESSURE,
    RefusalReason.BUSY: guest_pb2.REFUSAL_REASON_BUSY,
    RefusalReason.TIMEOUT: guest_pb2.REFUSAL_REASON_TIMEOUT,
    RefusalReason.UNSUPPORTED: guest_pb2.REFUSAL_REASON_UNSUPPORTED,
    RefusalReason.STALE: guest_pb2.REFUSAL_REASON_STALE,
    RefusalReason.FAILED: guest_pb2.REFUSAL_REASON_FAILED,
    RefusalReason.DRY_RUN: guest_pb2.REFUSAL_REASON_DRY_RUN,
    RefusalReason.VETO: guest_pb2.REFUSAL_REASON_VETO,
    RefusalReason.OTHERS: guest_pb2.REFUSAL_REASON_OTHERS,
}
_KIND_BACK = {number: kind for kind, number in _KIND.items()}
_CAPABILITY_BACK = {number: capability for capability, number in _CAPABILITY.items()}
_URGENCY_BACK = {number: urgency for urgency, number in _URGENCY.items()}
_GRANT_STAGE_BACK = {number: stage for stage, number in _GRANT_STAGE.items()}
_RECLAIM_STAGE_BACK = {number: stage for stage, number in _RECLAIM_STAGE.items()}
_ACK_STATUS_BACK = {number: status for status, number in _ACK_STATUS.items()}
_REFUSAL_BACK = {number: reason for reason, number in _REFUSAL.items()}


# ---- what the guest sends ------------------------------------------------------------------------


def guest_message_to_wire(message: GuestMessage) -> guest_pb2.NegotiateRequest:
    """The guest's side of sending."""
    match message:
        case Hello():
            return guest_pb2.NegotiateRequest(hello=_hello_to_wire(message))
        case Demand():
            return guest_pb2.NegotiateRequest(demand=_demand_to_wire(message))
        case Ack():
            return guest_pb2.NegotiateRequest(ack=_ack_to_wire(message))
        case Heartbeat():
            usable = None if message.usable is None else usable_to_wire(message.usable)
            return guest_pb2.NegotiateRequest(heartbeat=guest_pb2.Heartbeat(usable=usable))


def guest_message_from_bytes(raw: bytes) -> GuestMessage:
    """The broker's side of receiving, from the bytes as they came.

    :raise FloodError: When the message is too long.
    :raise ProtocolError: When the message makes no sense.
    """
    if len(raw) > MAX_MESSAGE_BYTES:
        raise FloodError(f"a message of {len(raw)} bytes, at most {MAX_MESSAGE_BYTES} are allowed")
    try:
        request = guest_pb2.NegotiateRequest.FromString(raw)
    except DecodeError as error:
        raise ProtocolError("a message that is not one of this protocol") from error
    return guest_message_from_wire(request)


def guest_message_from_wire(request: guest_pb2.NegotiateRequest) -> GuestMessage:
    """The broker's side of receiving.

    :raise ProtocolError: When the message makes no sense.
    """
    match request.WhichOneof("message"):
        case "hello":
            return _hello_from_wire(request.hello)
        case "demand":
            return _demand_from_wire(request.demand)
        case "ack":
            return _ack_from_wire(request.ack)
        case "heartbeat":
            usable = usable_from_wire(request.heartbeat.usable) if request.heartbeat.HasField("usable") else None
            return Heartbeat(usable)
        case _:
            raise ProtocolError("an empty message, or one of a kind that is not known here")


def _hello_to_wire(hello: Hello) -> guest_pb2.Hello:
    return guest_pb2.Hello(
        protocol_min=hello.protocol_min,
        protocol_max=hello.protocol_max,
        agent_version=hello.identity.agent_version,
        hostname=hello.identity.hostname,
        kernel=hello.identity.kernel,
        capabilities=sorted(_CAPABILITY[capability] for capability in hello.identity.capabilities),
        boot_id=hello.identity.boot_id,
        generation=hello.identity.generation,
        usable=usable_to_wire(hello.usable),
        last_revision=hello.last_revision,
    )


def _hello_from_wire(hello: guest_pb2.Hello) -> Hello:
    if len(hello.boot_id) != 16:
        raise ProtocolError(f"hello.boot_id has {len(hello.boot_id)} bytes, must have 16")
    known = (_CAPABILITY_BACK.get(number) for number in hello.capabilities[:64])
    identity = Identity(
        boot_id=hello.boot_id,
        generation=hello.generation,
        agent_version=clean(hello.agent_version, MAX_WORD),
        hostname=clean(hello.hostname, MAX_WORD),
        kernel=clean(hello.kernel, 2 * MAX_WORD),
        capabilities=frozenset(capability for capability in known if capability is not None),
    )
    usable = usable_from_wire(hello.usable)
    return Hello(hello.protocol_min, hello.protocol_max, identity, usable, hello.last_revision)


def _demand_to_wire(demand: Demand) -> guest_pb2.Demand:
    return guest_pb2.Demand(
        sequence=demand.sequence,
        needed=resources_to_wire(demand.needed),
        floor=resources_to_wire(demand.floor),
        acceptable_memory_bytes=demand.acceptable_memory_bytes,
        urgency=_URGENCY[demand.urgency],
        reasons=[reason_to_wire(reason) for reason in demand.reasons],
        usable=usable_to_wire(demand.usable),
        memory_used_bytes=demand.memory_used_bytes,
        cpu_used_millicores=demand.cpu_used_millicores,
        under_memory_pressure=demand.under_memory_pressure,
    )


def _demand_from_wire(demand: guest_pb2.Demand) -> Demand:
    return Demand(
        sequence=demand.sequence,
        needed=resources_from_wire("demand.needed", demand.needed),
        floor=resources_from_wire("demand.floor", demand.floor),
        acceptable_memory_bytes=_within(
            "demand.acceptable_memory_bytes", demand.acceptable_memory_bytes, MAX_MEMORY_BYTES
        ),
        urgency=_known("demand.urgency", _URGENCY_BACK.get(demand.urgency)),
        reasons=tuple(reason_from_wire(reason) for reason in demand.reasons[:MAX_REASONS]),
        usable=usable_from_wire(demand.usable),
        memory_used_bytes=_within("demand.memory_used_bytes", demand.memory_used_bytes, MAX_MEMORY_BYTES),
        cpu_used_millicores=_within("demand.cpu_used_millicores", demand.cpu_used_millicores, MAX_CPU_MILLICORES),
        under_memory_pressure=demand.under_memory_pressure,
    )


def _ack_to_wire(ack: Ack) -> guest_pb2.Ack:
    return guest_pb2.Ack(
        id=_id_to_wire(ack.id),
        kind=_KIND[ack.kind],
        status=_ACK_STATUS[ack.status],
        achieved=ack.achieved,
        refusal=guest_pb2.REFUSAL_REASON_UNSPECIFIED if ack.refusal is None else _REFUSAL[ack.refusal],
        text=ack.text[:MAX_TEXT],
        retry_after=_duration(ack.retry_after_seconds),
        usable=usable_to_wire(ack.usable),
        later_amount=ack.later_amount,
    )


def _ack_from_wire(ack: guest_pb2.Ack) -> Ack:
    kind = _known("ack.kind", _KIND_BACK.get(ack.kind))
    return Ack(
        id=_id_from_wire(ack.id),
        kind=kind,
        status=_known("ack.status", _ACK_STATUS_BACK.get(ack.status)),
        achieved=_within("ack.achieved", ack.achieved, _most(kind)),
        usable=usable_from_wire(ack.usable),
        refusal=_REFUSAL_BACK.get(ack.refusal),
        text=clean(ack.text, MAX_TEXT),
        retry_after_seconds=_seconds("ack.retry_after", ack.retry_after),
        later_amount=_within("ack.later_amount", ack.later_amount, _most(kind)),
    )


# ---- what the broker sends -----------------------------------------------------------------------


def broker_message_to_wire(message: BrokerMessage) -> guest_pb2.NegotiateResponse:
    """The broker's side of sending."""
    match message:
        case Welcome():
            welcome = guest_pb2.Welcome(
                protocol=message.protocol,
                guest=message.guest,
                epoch=message.epoch,
                heartbeat=_duration(message.heartbeat_seconds),
                limits=common_pb2.Limits(
                    min=resources_to_wire(message.limits_min), max=resources_to_wire(message.limits_max)
                ),
            )
            return guest_pb2.NegotiateResponse(welcome=welcome)
        case Grant():
            remaining = None if message.remaining_seconds is None else _duration(message.remaining_seconds)
            grant = guest_pb2.Grant(
                id=_id_to_wire(message.id),
                kind=_KIND[message.kind],
                amount=message.amount,
                stage=_GRANT_STAGE[message.stage],
                remaining=remaining,
                burst=message.burst,
            )
            return guest_pb2.NegotiateResponse(grant=grant)
        case Reclaim():
            reclaim = guest_pb2.Reclaim(
                id=_id_to_wire(message.id),
                kind=_KIND[message.kind],
                amount=message.amount,
                stage=_RECLAIM_STAGE[message.stage],
                remaining=_duration(message.remaining_seconds),
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
                heartbeat_seconds=min(3600.0, max(1.0, _seconds("welcome.heartbeat", welcome.heartbeat))),
                limits_min=resources_from_wire("welcome.limits.min", welcome.limits.min),
                limits_max=resources_from_wire("welcome.limits.max", welcome.limits.max),
            )
        case "grant":
            grant = response.grant
            kind = _known("grant.kind", _KIND_BACK.get(grant.kind))
            remaining = _seconds("grant.remaining", grant.remaining) if grant.HasField("remaining") else None
            return Grant(
                id=_id_from_wire(grant.id),
                kind=kind,
                amount=_within("grant.amount", grant.amount, _most(kind)),
                stage=_known("grant.stage", _GRANT_STAGE_BACK.get(grant.stage)),
                remaining_seconds=remaining,
                burst=_within("grant.burst", grant.burst, grant.amount),
            )
        case "reclaim":
            reclaim = response.reclaim
            kind = _known("reclaim.kind", _KIND_BACK.get(reclaim.kind))
            return Reclaim(
                id=_id_from_wire(reclaim.id),
                kind=kind,
                amount=_within("reclaim.amount", reclaim.amount, _most(kind)),
                stage=_known("reclaim.stage", _RECLAIM_STAGE_BACK.get(reclaim.stage)),
                remaining_seconds=_seconds("reclaim.remaining", reclaim.remaining),
                reason=reason_from_wire(reclaim.reason),
            )
        case "throttle":
            throttle = response.throttle
            return Throttle(
                quota_millicores=_within("throttle.quota_millicores", throttle.quota_millicores, MAX_CPU_MILLICORES),
                throttled_permille=_within("throttle.throttled_permille", throttle.throttled_permille, 1000),
            )
        case "heartbeat":
            return Heartbeat()
        case _:
            return None


# ---- parts ---------------------------------------------------------------------------------------


def clean(text: str, most: int) -> str:
    """A peer's text made fit for logs and terminals: no control characters, at most `most` characters."""
    text = text[:most]
    return text if text.isprintable() else "".join(char if char.isprintable() else "�" for char in text)


def resources_to_wire(resources: Resources) -> common_pb2.Resources:
    return common_pb2.Resources(cpu_millicores=resources.cpu_millicores, memory_bytes=resources.memory_bytes)


def resources_from_wire(name: str, resources: common_pb2.Resources) -> Resources:
    """:raise ProtocolError: When an amount is beyond any machine."""
    cpu, memory = resources.cpu_millicores, resources.memory_bytes
    if cpu > MAX_CPU_MILLICORES or memory > MAX_MEMORY_BYTES:
        _within(f"{name}.cpu_millicores", cpu, MAX_CPU_MILLICORES)
        _within(f"{name}.memory_bytes", memory, MAX_MEMORY_BYTES)
    return Resources(cpu, memory)


def limits_to_wire(limits: Limits) -> common_pb2.Limits:
    return common_pb2.Limits(
        min=resources_to_wire(limits.min),
        max=resources_to_wire(limits.max),
        weight=resources_to_wire(limits.weight),
        burst=resources_to_wire(limits.burst),
        burst_credit=resources_to_wire(limits.burst_credit),
        burst_refill=resources_to_wire(limits.burst_refill),
    )


def limits_from_wire(limits: common_pb2.Limits) -> Limits:
    """An unset weight is 100.

    :raise ProtocolError: When an amount is beyond any machine.
    """
    weight = resources_from_wire("limits.weight", limits.weight) if limits.HasField("weight") else Resources(100, 100)
    return Limits(
        resources_from_wire("limits.min", limits.min),
        resources_from_wire("limits.max", limits.max),
        weight,
        resources_from_wire("limits.burst", limits.burst),
        resources_from_wire("limits.burst_credit", limits.burst_credit),
        resources_from_wire("limits.burst_refill", limits.burst_refill),
    )


def usable_to_wire(usable: Usable) -> common_pb2.Usable:
    return common_pb2.Usable(
        vcpus_online=usable.vcpus_online,
        vcpus_present=usable.vcpus_present,
        memory_online_bytes=usable.memory_online_bytes,
        memory_total_bytes=usable.memory_total_bytes,
        memory_block_bytes=usable.memory_block_bytes,
    )


def usable_from_wire(usable: common_pb2.Usable) -> Usable:
    """:raise ProtocolError: When an amount is beyond any machine."""
    return Usable(
        vcpus_online=_within("usable.vcpus_online", usable.vcpus_online, MAX_VCPUS),
        vcpus_present=_within("usable.vcpus_present", usable.vcpus_present, MAX_VCPUS),
        memory_online_bytes=_within("usable.memory_online_bytes", usable.memory_online_bytes, MAX_MEMORY_BYTES),
        memory_total_bytes=_within("usable.memory_total_bytes", usable.memory_total_bytes, MAX_MEMORY_BYTES),
        memory_block_bytes=_within("usable.memory_block_bytes", usable.memory_block_bytes, MAX_MEMORY_BYTES),
    )


def reason_to_wire(reason: Reason) -> common_pb2.Reason:
    return common_pb2.Reason(code=reason.code[:MAX_WORD], text=reason.text[:MAX_TEXT])


def reason_from_wire(reason: common_pb2.Reason) -> Reason:
    return Reason(clean(reason.code, MAX_WORD), clean(reason.text, MAX_TEXT))


def _id_to_wire(order: OrderId) -> guest_pb2.OrderId:
    return guest_pb2.OrderId(epoch=order.epoch, request_id=order.request_id, revision=order.revision)


def _id_from_wire(order: guest_pb2.OrderId) -> OrderId:
    return OrderId(order.epoch, order.request_id, order.revision)


def _most(kind: Kind) -> int:
    return MAX_CPU_MILLICORES if kind is Kind.CPU else MAX_MEMORY_BYTES


def _within(name: str, value: int, most: int) -> int:
    if value > most:
        raise ProtocolError(f"{name} is {value}, more than {most}")
    return value


def _known(name: str, value: T | None) -> T:
    if value is None:
        raise ProtocolError(f"{name} is missing or not known")
    return value


def _duration(seconds: float) -> Duration:
    whole = int(seconds)
    return Duration(seconds=whole, nanos=int((seconds - whole) * 1e9))


def _seconds(name: str, duration: Duration) -> float:
    seconds = duration.seconds + duration.nanos / 1e9
    if not 0 <= seconds <= _MAX_SECONDS:
        raise ProtocolError(f"{name} is {seconds:g} s, must be within 0 s and a year")
    return seconds


def check_amounts(fields: dict[str, int]) -> None:
    """Check the amounts of a change of limits, by the names of their fields.

    :raise ProtocolError: When one is beyond any machine.
    """
    for name, value in fields.items():
        _within(name, value, MAX_CPU_MILLICORES if name.startswith("cpu_") else MAX_MEMORY_BYTES)
