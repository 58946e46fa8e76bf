"""A VM as its hypervisor sees it: the only authority on what the VM really has."""

from dataclasses import dataclass
from enum import StrEnum

from guestd.model.resources import Kind
from guestd.model.units import MILLICORES_PER_VCPU


class VmStatus(StrEnum):
    """Whether decisions about the VM make sense now."""

    RUNNING = "running"
    FROZEN = "frozen"  # paused or migrating: decisions wait
    GONE = "gone"  # its process is gone: it holds nothing
    UNREACHABLE = "unreachable"  # no answer: it holds what it last held, or more


@dataclass(frozen=True, slots=True)
class VmState:
    """One answer of the hypervisor.

    `held` is what must be charged against the host (an upper bound of what the VM may use without
    asking anybody); `plugged` is what the guest can see now. For memory `held` is
    ``boot - ballooned + max(size, requested-size)`` and `plugged` ``boot - ballooned + size``.
    The amounts of a VM that is GONE are 0; those of one that is UNREACHABLE mean nothing.

    CPU is bounded by the host where `cpu_enforced`: all vCPU threads together get `cpu_quota_millicores`
    of CPU time, whatever the guest brings online. Then that is what is charged, and what is plugged
    above it is parked.
    """

    status: VmStatus
    vcpus: int = 0  # plugged now
    vcpus_min: int = 1  # cannot be unplugged (boot CPUs)
    vcpus_max: int = 1  # slots
    boot_memory_bytes: int = 0
    memory_plugged_bytes: int = 0
    memory_held_bytes: int = 0
    memory_min_bytes: int = 0  # reachable with what the VM has: boot memory, or less with a balloon
    memory_max_bytes: int = 0  # boot memory + size of the memory device
    memory_unit_bytes: int = 1  # granularity of the memory device
    resets: int = 0  # guest resets seen since the connection was made
    cpu_enforced: bool = False  # the host can bound the VM's CPU time
    cpu_quota_millicores: int = 0  # the bound; 0: none was set yet
    cpu_throttled_permille: int = 0  # share of the last second's periods in which the bound was hit
    memory_ballooned_bytes: int = 0  # of the boot memory; where the balloon is going no hypervisor tells

    def held(self, kind: Kind) -> int:
        """What is charged, in millicores or bytes."""
        if kind is Kind.MEMORY:
            return self.memory_held_bytes
        plugged = self.vcpus * MILLICORES_PER_VCPU
        return min(plugged, self.cpu_quota_millicores or plugged)

    def plugged(self, kind: Kind) -> int:
        """What the guest can see, in millicores or bytes."""
        return self.vcpus * MILLICORES_PER_VCPU if kind is Kind.CPU else self.memory_plugged_bytes
