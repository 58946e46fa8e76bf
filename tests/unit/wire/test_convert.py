"""Round trips, and what a guest may not say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.model.errors import ProtocolError
from guestd.model.guest import Capability, Identity
from guestd.model.messages import (
    Ack,
    AckStatus,
    Demand,
    Grant,
    GrantStage,
    Heartbeat,
    Hello,
    OrderId,
    Reclaim,
    ReclaimStage,
    RefusalReason,
    Urgency,
    Usable,
    Welcome,
)
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Resources
from guestd.v1 import common_pb2, guest_pb2
from guestd.wire import amounts, convert
from guestd.wire.convert import words

USABLE = Usable(2, 3, 1 << 30, 1 << 29, 128 << 20)
IDENTITY = Identity(bytes(16), 7, "0.1.0", "web", "6.1", frozenset(Capability))
DEMAND = Demand(
    3,
    Resources(2500, 1 << 30),
    Resources(1000, 1 << 29),
    1 << 31,
    Urgency.SOON,
    (Reason("a", "b"),),
    USABLE,
    5,
    6,
    True,
)


@pytest.mark.parametrize(
    "message",
    [
        Hello(1, 2, IDENTITY, USABLE, 9),
        DEMAND,
        Ack(OrderId(1, 2, 3), Kind.MEMORY, AckStatus.PARTIAL, 1 << 30, USABLE, RefusalReason.IN_USE, "no", 2.5),
        Heartbeat(USABLE),
        Heartbeat(),
    ],
)
def test_what_a_guest_says_arrives(message: object) -> None:
    wire = convert.guest_message_to_wire(message).SerializeToString()  # type: ignore[arg-type]
    assert convert.guest_message_from_wire(guest_pb2.NegotiateRequest.FromString(wire)) == message


@pytest.mark.parametrize(
    "message",
    [
        Welcome(1, "web-1", 4, 10.0, Resources(1000, 1), Resources(4000, 2)),
        Grant(OrderId(1, 2, 3), Kind.CPU, 4000, GrantStage.SETTLED),
        Grant(OrderId(1, 2, 3), Kind.CPU, 4000, GrantStage.OFFERED, 1.5),
        Reclaim(OrderId(1, 2, 3), Kind.MEMORY, 1 << 29, ReclaimStage.URGE, 5.0, Reason("share", "text")),
        Heartbeat(),
    ],
)
def test_what_the_broker_says_arrives(message: object) -> None:
    wire = convert.broker_message_to_wire(message).SerializeToString()  # type: ignore[arg-type]
    assert convert.broker_message_from_wire(guest_pb2.NegotiateResponse.FromString(wire)) == message


@pytest.mark.parametrize(
    ("request_", "what"),
    [
        (guest_pb2.NegotiateRequest(), "empty message"),
        (guest_pb2.NegotiateRequest(hello=guest_pb2.Hello(boot_id=b"short")), "boot_id has 5 bytes"),
        (guest_pb2.NegotiateRequest(demand=guest_pb2.Demand()), "demand.urgency is missing"),
        (
            guest_pb2.NegotiateRequest(
                demand=guest_pb2.Demand(urgency=guest_pb2.URGENCY_NOW, needed=common_pb2.Resources(memory_bytes=2**63))
            ),
            "demand.needed.memory_bytes",
        ),
        (guest_pb2.NegotiateRequest(ack=guest_pb2.Ack()), "ack.kind is missing"),
        (
            guest_pb2.NegotiateRequest(heartbeat=guest_pb2.Heartbeat(usable=common_pb2.Usable(vcpus_online=2**32 - 1))),
            "usable.vcpus_online is 4294967295, more than 8192",
        ),
    ],
)
def test_nonsense_is_refused_with_the_fields_name(request_: guest_pb2.NegotiateRequest, what: str) -> None:
    with pytest.raises(ProtocolError, match=what):
        convert.guest_message_from_wire(request_)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    try:
        request = guest_pb2.NegotiateRequest.FromString(data)
    except Exception:  # not a message at all: gRPC itself refuses it
        return
    try:
        message = convert.guest_message_from_wire(request)
    except ProtocolError as error:
        assert len(str(error)) < 500
    else:
        assert isinstance(message, Hello | Demand | Ack | Heartbeat)


def test_texts_are_cut_and_stripped_of_control_characters() -> None:
    assert amounts.clean("a\x1b[31m\nb", 100) == "a�[31m�b"
    assert len(amounts.clean("x" * 1000, 64)) == 64


def test_a_message_of_a_newer_version_is_none_for_the_guest() -> None:
    assert convert.broker_message_from_wire(guest_pb2.NegotiateResponse()) is None


def test_every_enum_of_the_model_has_a_wire_value() -> None:
    assert set(words.CAPABILITY) == set(Capability)
    assert set(words.URGENCY) == set(Urgency)
    assert set(words.REFUSAL) == set(RefusalReason)
    assert set(words.ACK_STATUS) == set(AckStatus)
    assert set(words.GRANT_STAGE) == set(GrantStage)
    assert set(words.RECLAIM_STAGE) == set(ReclaimStage)
