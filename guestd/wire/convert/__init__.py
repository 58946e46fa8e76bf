"""Between the words of `guestd.model.messages` and the wire.

Everything that comes in is checked here, once: ranges, lengths, enums, presence. What does not make
sense raises `ProtocolError` with the field's name; texts are cut and stripped of control characters.
"""

from guestd.v1 import guest_pb2
from guestd.wire.convert.broker import broker_message_from_bytes, broker_message_from_wire, broker_message_to_wire
from guestd.wire.convert.guest import guest_message_from_bytes, guest_message_from_wire, guest_message_to_wire

__all__ = [
    "NEGOTIATE",
    "broker_message_from_bytes",
    "broker_message_from_wire",
    "broker_message_to_wire",
    "guest_message_from_bytes",
    "guest_message_from_wire",
    "guest_message_to_wire",
]

NEGOTIATE = f"/{guest_pb2.DESCRIPTOR.services_by_name['GuestService'].full_name}/Negotiate"
"""The path of the one call between guest and broker."""
