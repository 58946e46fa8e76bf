"""The words of a closed list, and their numbers on the wire."""

from guestd.model.guest import Capability
from guestd.model.messages import AckStatus, GrantStage, ReclaimStage, RefusalReason, Urgency
from guestd.v1 import guest_pb2

CAPABILITY = {
    Capability.CPU_ONLINE: guest_pb2.CAPABILITY_CPU_ONLINE,
    Capability.MEMORY_ONLINE: guest_pb2.CAPABILITY_MEMORY_ONLINE,
    Capability.VIRTIO_MEM: guest_pb2.CAPABILITY_VIRTIO_MEM,
    Capability.BALLOON: guest_pb2.CAPABILITY_BALLOON,
    Capability.PSI: guest_pb2.CAPABILITY_PSI,
    Capability.DRY_RUN: guest_pb2.CAPABILITY_DRY_RUN,
}
URGENCY = {
    Urgency.NORMAL: guest_pb2.URGENCY_NORMAL,
    Urgency.SOON: guest_pb2.URGENCY_SOON,
    Urgency.NOW: guest_pb2.URGENCY_NOW,
}
GRANT_STAGE = {
    GrantStage.OFFERED: guest_pb2.GRANT_STAGE_OFFERED,
    GrantStage.SETTLED: guest_pb2.GRANT_STAGE_SETTLED,
    GrantStage.ENDING: guest_pb2.GRANT_STAGE_ENDING,
}
RECLAIM_STAGE = {
    ReclaimStage.ASK: guest_pb2.RECLAIM_STAGE_ASK,
    ReclaimStage.URGE: guest_pb2.RECLAIM_STAGE_URGE,
    ReclaimStage.OVERDUE: guest_pb2.RECLAIM_STAGE_OVERDUE,
}
ACK_STATUS = {
    AckStatus.DONE: guest_pb2.ACK_STATUS_DONE,
    AckStatus.PARTIAL: guest_pb2.ACK_STATUS_PARTIAL,
    AckStatus.REFUSED: guest_pb2.ACK_STATUS_REFUSED,
}
REFUSAL = {
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
CAPABILITY_BACK = {number: capability for capability, number in CAPABILITY.items()}
URGENCY_BACK = {number: urgency for urgency, number in URGENCY.items()}
GRANT_STAGE_BACK = {number: stage for stage, number in GRANT_STAGE.items()}
RECLAIM_STAGE_BACK = {number: stage for stage, number in RECLAIM_STAGE.items()}
ACK_STATUS_BACK = {number: status for status, number in ACK_STATUS.items()}
REFUSAL_BACK = {number: reason for reason, number in REFUSAL.items()}
