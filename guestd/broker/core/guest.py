"""What the broker knows of one guest, put together from hypervisor, guest and operator."""

from dataclasses import dataclass, field

from guestd.broker.core.allocate import Claim
from guestd.broker.core.track import Track
from guestd.model.guest import Capability, Identity
from guestd.model.messages import Demand, Usable
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB, MIB, MILLICORES_PER_VCPU, round_up
from guestd.model.vm import VmState, VmStatus

DEFAULT_BLOCK_BYTES = 128 * MIB
"""Linux' memory block on x86-64 below 64 GiB (arch/x86/mm/init_64.c, probe_memory_block_size)."""
_LARGEST_BLOCK_BYTES = 2 * GIB


@dataclass(slots=True)
class GuestState:
    """One guest. `session` is 0 without a stream; each stream gets a higher number."""

    name: str
    limits: Limits
    paused: bool = False
    revision: int = 0
    vm: VmState | None = None
    vm_fresh: bool = False  # the last word came from the hypervisor, no failed command since
    session: int = 0
    identity: Identity | None = None
    demand: Demand | None = None
    usable: Usable = field(default_factory=Usable)
    last_seen: float | None = None
    tracks: dict[Kind, Track] = field(default_factory=lambda: {kind: Track(kind) for kind in Kind})

    @property
    def connected(self) -> bool:
        return self.session > 0

    @property
    def reserved(self) -> Resources:
        return Resources(self.tracks[Kind.CPU].reserved, self.tracks[Kind.MEMORY].reserved)

    def unit(self, kind: Kind) -> int:
        """The smallest step of a resize: one vCPU, or one memory block of guest and device."""
        if kind is Kind.CPU:
            return MILLICORES_PER_VCPU
        block = self.usable.memory_block_bytes
        sane = DEFAULT_BLOCK_BYTES <= block <= _LARGEST_BLOCK_BYTES and block & (block - 1) == 0
        device = self.vm.memory_unit_bytes if self.vm else 1
        return max(block if sane else DEFAULT_BLOCK_BYTES, device)

    def bounds(self, kind: Kind) -> tuple[int, int]:
        """Least and most that limits and hypervisor together allow."""
        low, high = self.limits.min.get(kind), self.limits.max.get(kind)
        if self.vm is not None and self.vm.status in (VmStatus.RUNNING, VmStatus.FROZEN):
            if kind is Kind.CPU:
                floor, ceiling = self.vm.vcpus_min * MILLICORES_PER_VCPU, self.vm.vcpus_max * MILLICORES_PER_VCPU
            else:
                floor, ceiling = self.vm.memory_min_bytes, self.vm.memory_max_bytes
            low, high = min(max(low, floor), ceiling), min(high, ceiling)
        return low, max(low, high)

    def stale(self, now: float, limit_seconds: float) -> bool:
        """Whether what the guest last said is too old to act on."""
        return self.last_seen is None or now - self.last_seen > limit_seconds

    def why_fixed(self, now: float, stale_seconds: float) -> str | None:
        """Why nothing may be decided about the guest now; None when it may."""
        reasons = (
            (self.paused, "paused by the operator"),
            (self.vm is None, "hypervisor not asked yet"),
            (self.vm is not None and self.vm.status is not VmStatus.RUNNING, f"VM is {self.vm and self.vm.status}"),
            (not self.vm_fresh, "asking the hypervisor again"),
            (not self.connected, "guest daemon is away"),
            (self.stale(now, stale_seconds), "guest has been silent"),
            (self.demand is None, "guest has not said yet what it needs"),
            (
                self.identity is not None and Capability.DRY_RUN in self.identity.capabilities,
                "guest runs with --dry-run",
            ),
        )
        return next((text for holds, text in reasons if holds), None)

    def claim(self, kind: Kind, now: float, stale_seconds: float) -> Claim:
        """What the guest is to compete for. One about which nothing may be decided claims what it has."""
        low, high = self.bounds(kind)
        weight = self.limits.weight.get(kind)
        held = self.tracks[kind].reserved
        if self.why_fixed(now, stale_seconds) is not None or self.demand is None:
            fixed = max(held, low)
            return Claim(self.name, fixed, fixed, fixed, weight, 1)
        needed = self.demand.needed.get(kind)
        if kind is Kind.MEMORY:
            needed = min(needed, max(self.demand.acceptable_memory_bytes, held))
        if not self.can(kind):
            needed = min(needed, held)
        return Claim(self.name, low, high, needed, weight, self.unit(kind))

    def can(self, kind: Kind) -> bool:
        """Whether the guest says that it can bring more of this kind online."""
        capabilities = self.identity.capabilities if self.identity else frozenset()
        return (Capability.CPU_ONLINE if kind is Kind.CPU else Capability.MEMORY_ONLINE) in capabilities

    def least(self, kind: Kind) -> int:
        """Below this the guest may not be shrunk now (invariant 7), in whole units."""
        low, _ = self.bounds(kind)
        floor = self.demand.floor.get(kind) if self.demand else self.tracks[kind].reserved
        return round_up(max(low, floor), self.unit(kind))
