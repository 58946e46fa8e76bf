"""What messages between guest and broker are made of, beside amounts."""

from guestd.model.messages import OrderId, Usable
from guestd.v1 import common_pb2, guest_pb2
from guestd.wire.amounts import MAX_MEMORY_BYTES, MAX_VCPUS, within


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
        vcpus_online=within("usable.vcpus_online", usable.vcpus_online, MAX_VCPUS),
        vcpus_present=within("usable.vcpus_present", usable.vcpus_present, MAX_VCPUS),
        memory_online_bytes=within("usable.memory_online_bytes", usable.memory_online_bytes, MAX_MEMORY_BYTES),
        memory_total_bytes=within("usable.memory_total_bytes", usable.memory_total_bytes, MAX_MEMORY_BYTES),
        memory_block_bytes=within("usable.memory_block_bytes", usable.memory_block_bytes, MAX_MEMORY_BYTES),
    )


def id_to_wire(order: OrderId) -> guest_pb2.OrderId:
    return guest_pb2.OrderId(epoch=order.epoch, request_id=order.request_id, revision=order.revision)


def id_from_wire(order: guest_pb2.OrderId) -> OrderId:
    return OrderId(order.epoch, order.request_id, order.revision)
