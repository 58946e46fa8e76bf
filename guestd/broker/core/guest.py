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
QUOTA_UNIT_MILLICORES = 10
"""Step of a CPU quota: 1 ms of the kernel's usual period of 100 ms, the least that it accepts."""


@dataclass(slots=True)
class GuestState:
    """One guest. `session` is 0 without a stream; each stream gets a higher number."""

    name: str
    limits: Limits
    park: bool = False  # vCPUs are left plugged and offline instead of unplugged, where a quota bounds them
    paused: bool = False
    observed: bool = False  # decided about and shown, never touched
    revision: int = 0
    vm: VmState | None = None
    vm_fresh: bool = False  # the last word came from the hypervisor, no failed command since
    session: int = 0
    identity: Identity | None = None
    demand: Demand | None = None
    usable: Usable = field(default_factory=Usable)
    last_seen: float | None = None
    throttled_permille: int = 0  # as the guest was told
    saved_credit: Resources | None = None  # burst credit as the journal had it at the start
    tracks: dict[Kind, Track] = field(default_factory=lambda: {kind: Track(kind) for kind in Kind})

    @property
    def connected(self) -> bool:
        return self.session > 0

    @property
    def reserved(self) -> Resources:
        return Resources(self.tracks[Kind.CPU].reserved, self.tracks[Kind.MEMORY].reserved)

    @property
    def bounded(self) -> bool:
        """Whether the host bounds the VM's CPU time by a quota."""
        return self.vm is not None and self.vm.cpu_enforced

    def unit(self, kind: Kind) -> int:
        """The smallest step of a resize: one vCPU, or of its quota; one memory block of guest and device."""
        if kind is Kind.CPU:
            return QUOTA_UNIT_MILLICORES if self.bounded else MILLICORES_PER_VCPU
        block = self.usable.memory_block_bytes
        sane = DEFAULT_BLOCK_BYTES <= block <= _LARGEST_BLOCK_BYTES and block & (block - 1) == 0
        device = self.vm.memory_unit_bytes if self.vm else 1
        return max(block if sane else DEFAULT_BLOCK_BYTES, device)

    def look_at_bounds(self) -> None:
        """Put limits and hypervisor together, after either may have changed."""
        for kind, track in self.tracks.items():
            low, high = self._bounds(kind)
            track.bounds = low, high
            # A minimum in whole units may be more than the maximum.
            track.sustained = max(high, round_up(low, self.unit(kind)))

    def _bounds(self, kind: Kind) -> tuple[int, int]:
        low, high = self.limits.min.get(kind), self.limits.max.get(kind)
        if self.vm is not None and self.vm.status in (VmStatus.RUNNING, VmStatus.FROZEN):
            if kind is Kind.CPU:
                floor = 0 if self.bounded else self.vm.vcpus_min * MILLICORES_PER_VCPU
                ceiling = self.vm.vcpus_max * MILLICORES_PER_VCPU
            else:
                floor, ceiling = self.vm.memory_min_bytes, self.vm.memory_max_bytes
            low, high = min(max(low, floor), ceiling), min(high, ceiling)
        return low, max(low, high)

    def bounds(self, kind: Kind) -> tuple[int, int]:
        """Least and most that limits and hypervisor together allow, without a burst."""
        return self.tracks[kind].bounds

    def sustained(self, kind: Kind) -> int:
        """The most that it may hold for good: its maximum, or a minimum in whole units where that is more."""
        return self.tracks[kind].sustained

    def burst_held(self, kind: Kind) -> int:
        """How much of what is reserved is above that."""
        track = self.tracks[kind]
        return max(0, track.reserved - track.sustained)

    def burst_ceiling(self, kind: Kind) -> int:
        """The most that it may hold by a burst now; 0 when it may not burst."""
        lend = self.tracks[kind].lend
        if lend is None or not lend.open:
            return 0
        ceiling = self.limits.burst.get(kind)
        if self.vm is not None:
            most = self.vm.vcpus_max * MILLICORES_PER_VCPU if kind is Kind.CPU else self.vm.memory_max_bytes
            ceiling = min(ceiling, most)
        return ceiling if ceiling > self.sustained(kind) else 0

    def stale(self, now: float, limit_seconds: float) -> bool:
        """Whether what the guest last said is too old to act on."""
        return self.last_seen is None or now - self.last_seen > limit_seconds

    def why_fixed(self, now: float, stale_seconds: float) -> str | None:
        """Why nothing may be decided about the guest now; None when it may."""
        return "only observed" if self.observed else self.why_unclear(now, stale_seconds)

    def why_unclear(self, now: float, stale_seconds: float) -> str | None:
        """Why it is not even known what would be decided, were the guest served; None when it is."""
        if self.paused:
            return "paused by the operator"
        if self.vm is None:
            return "hypervisor not asked yet"
        if self.vm.status is not VmStatus.RUNNING:
            return f"VM is {self.vm.status}"
        if not self.vm_fresh:
            return "asking the hypervisor again"
        if not self.connected:
            return "guest daemon is away"
        if self.stale(now, stale_seconds):
            return "guest has been silent"
        if self.demand is None:
            return "guest has not said yet what it needs"
        if self.identity is not None and Capability.DRY_RUN in self.identity.capabilities:
            return "guest runs with --dry-run"
        return None

    def claim(
        self, kind: Kind, now: float, stale_seconds: float, plenty: bool = False, rehearsing: bool = False
    ) -> Claim:
        """What the guest is to compete for. One about which nothing may be decided claims what it has, one that
        would not give something back claims that until it is asked again; while there is plenty also what it
        is likely to need again soon. `rehearsing`: as if it were served, where it is only observed.
        """
        low, high = self.bounds(kind)
        weight = self.limits.weight.get(kind)
        track = self.tracks[kind]
        why = self.why_unclear(now, stale_seconds) if rehearsing else self.why_fixed(now, stale_seconds)
        if self.demand is None or why is not None:
            fixed = max(track.reserved, low)
            return Claim(fixed, fixed, fixed, weight, 1)
        needed, used = self.demand.needed.get(kind), 0
        if kind is Kind.MEMORY:
            # More would starve its kernel, for a minimum too. That is reserved, and comes in stages.
            takes = max(self.demand.acceptable_memory_bytes, track.reserved)
            needed, low = min(needed, takes), min(low, takes)
            used = min(self.demand.floor.memory_bytes, needed)
            # What is in use cannot be taken by force, so others cannot have it (invariant 7).
            low = max(low, min(used, track.reserved, track.sustained))
        elif self.bounded:
            needed = round_up(needed, MILLICORES_PER_VCPU)
        if not self.can(kind):
            needed = min(needed, max(track.reserved, self.reach(kind)))
        if plenty:
            needed = max(needed, min(track.expected, track.reserved))
        if now < track.shrink_after:
            low = max(low, min(track.kept, track.reserved))
        return Claim(low, max(low, high), needed, weight, self.unit(kind), used, self.burst_ceiling(kind))

    def can(self, kind: Kind) -> bool:
        """Whether the guest says that it can bring more of this kind online."""
        capabilities = self.identity.capabilities if self.identity else frozenset()
        return (Capability.CPU_ONLINE if kind is Kind.CPU else Capability.MEMORY_ONLINE) in capabilities

    def reach(self, kind: Kind) -> int:
        """How much the VM can be given without the guest's doing: CPU time of the vCPUs that it has, and the
        memory that it booted with (a balloon is its kernel's business).
        """
        if self.vm is None:
            return 0
        if kind is Kind.MEMORY:
            return self.vm.boot_memory_bytes
        return self.vm.vcpus * MILLICORES_PER_VCPU if self.bounded else 0

    @property
    def parks(self) -> bool:
        """Whether its vCPUs stay plugged and only the quota moves: it is set so, or it cannot switch them itself."""
        return self.bounded and (self.park or (self.identity is not None and not self.can(Kind.CPU)))

    def least(self, kind: Kind) -> int:
        """Below this the guest may not be shrunk now (invariant 7), in whole units."""
        low, _ = self.bounds(kind)
        floor = self.demand.floor.get(kind) if self.demand else self.tracks[kind].reserved
        if kind is Kind.CPU and self.bounded:
            floor = 0  # a quota takes no CPU away
        return round_up(max(low, floor), self.unit(kind))

    def vcpus_for(self, millicores: int) -> int:
        """How many vCPUs it takes to use so much CPU time, and cannot be fewer."""
        least = self.vm.vcpus_min if self.vm else 1
        return max(least, -(-millicores // MILLICORES_PER_VCPU))

    def has(self, kind: Kind, amount: int) -> bool:
        """Whether the hypervisor has let it have so much."""
        if self.vm is None:
            return False
        if kind is Kind.MEMORY:
            return self.vm.plugged(kind) >= amount
        return self.vm.held(kind) >= amount

    def is_down_to(self, kind: Kind, amount: int) -> bool:
        """Whether the hypervisor has taken back what is above that."""
        if self.vm is None or self.vm.held(kind) > amount:
            return False
        return kind is Kind.MEMORY or self.parks or self.vm.vcpus <= self.vcpus_for(amount)
