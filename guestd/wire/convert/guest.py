"""What the guest sends: written by the guest, read and checked by the broker.

The only place where a guest's message is read.
"""

from google.protobuf.message import DecodeError

from guestd.model.errors import FloodError, ProtocolError
from guestd.model.guest import Identity
from guestd.model.messages import Ack, Demand, GuestMessage, Heartbeat, Hello
from guestd.v1 import guest_pb2
from guestd.wire.amounts import (
    KIND,
    KIND_BACK,
    MAX_CPU_MILLICORES,
    MAX_MEMORY_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_REASONS,
    MAX_TEXT,
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
from guestd.wire.convert.parts import id_from_wire, id_to_wire, usable_from_wire, usable_to_wire
from guestd.wire.convert.words import (
    ACK_STATUS,
    ACK_STATUS_BACK,
    CAPABILITY,
    CAPABILITY_BACK,
    REFUSAL,
    REFUSAL_BACK,
    URGENCY,
    URGENCY_BACK,
)


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
        capabilities=sorted(CAPABILITY[capability] for capability in hello.identity.capabilities),
        boot_id=hello.identity.boot_id,
        generation=hello.identity.generation,
        usable=usable_to_wire(hello.usable),
        last_revision=hello.last_revision,
    )


def _hello_from_wire(hello: guest_pb2.Hello) -> Hello:
    if len(hello.boot_id) != 16:
        raise ProtocolError(f"hello.boot_id has {len(hello.boot_id)} bytes, must have 16")
    known = (CAPABILITY_BACK.get(number) for number in hello.capabilities[:64])
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
        urgency=URGENCY[demand.urgency],
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
        acceptable_memory_bytes=within(
            "demand.acceptable_memory_bytes", demand.acceptable_memory_bytes, MAX_MEMORY_BYTES
        ),
        urgency=known("demand.urgency", URGENCY_BACK.get(demand.urgency)),
        reasons=tuple(reason_from_wire(reason) for reason in demand.reasons[:MAX_REASONS]),
        usable=usable_from_wire(demand.usable),
        memory_used_bytes=within("demand.memory_used_bytes", demand.memory_used_bytes, MAX_MEMORY_BYTES),
        cpu_used_millicores=within("demand.cpu_used_millicores", demand.cpu_used_millicores, MAX_CPU_MILLICORES),
        under_memory_pressure=demand.under_memory_pressure,
    )


def _ack_to_wire(ack: Ack) -> guest_pb2.Ack:
    return guest_pb2.Ack(
        id=id_to_wire(ack.id),
        kind=KIND[ack.kind],
        status=ACK_STATUS[ack.status],
        achieved=ack.achieved,
        refusal=guest_pb2.REFUSAL_REASON_UNSPECIFIED if ack.refusal is None else REFUSAL[ack.refusal],
        text=ack.text[:MAX_TEXT],
        retry_after=duration(ack.retry_after_seconds),
        usable=usable_to_wire(ack.usable),
        later_amount=ack.later_amount,
    )


def _ack_from_wire(ack: guest_pb2.Ack) -> Ack:
    kind = known("ack.kind", KIND_BACK.get(ack.kind))
    return Ack(
        id=id_from_wire(ack.id),
        kind=kind,
        status=known("ack.status", ACK_STATUS_BACK.get(ack.status)),
        achieved=within("ack.achieved", ack.achieved, most(kind)),
        usable=usable_from_wire(ack.usable),
        refusal=REFUSAL_BACK.get(ack.refusal),
        text=clean(ack.text, MAX_TEXT),
        retry_after_seconds=seconds("ack.retry_after", ack.retry_after),
        later_amount=within("ack.later_amount", ack.later_amount, most(kind)),
    )
