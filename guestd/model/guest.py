"""A guest as it sees itself: load samples and an inventory of CPUs and memory blocks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Capability(StrEnum):
    """What a guest can do; what is missing here is never asked of it."""

    CPU_ONLINE = "cpu-online"  # CPUs can be onlined and offlined through sysfs
    MEMORY_ONLINE = "memory-online"  # memory blocks can be onlined through sysfs
    VIRTIO_MEM = "virtio-mem"
    BALLOON = "balloon"
    PSI = "psi"
    DRY_RUN = "dry-run"  # decides and logs, touches nothing


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at the load. Cumulative counters are as the kernel gives them; None = not offered here.

    CPU counters are keyed by CPU number, so that hotplug between two samples cannot shift them.
    """

    cpu_busy_seconds: Mapping[int, float]  # cumulative, per online CPU
    cpu_idle_seconds: Mapping[int, float]  # cumulative, per online CPU; idle and iowait
    cpu_steal_seconds: float  # cumulative, all CPUs
    runnable: int  # tasks running or waiting for a CPU now, without the sampler itself
    cpu_some_us: int | None  # PSI total
    memory_some_us: int | None  # PSI total
    memory_full_us: int | None  # PSI total
    memory_total_bytes: int
    memory_available_bytes: int
    swap_used_bytes: int
    refaults: int  # cumulative, pages (workingset_refault_file + _anon)
    memory_free_bytes: int = 0  # used for nothing at all
    io_some_us: int | None = None  # PSI total
    swap_in_pages: int = 0  # cumulative
    oom_kills: int = 0  # cumulative


class BlockState(StrEnum):
    """State of a memory block as sysfs names it."""

    ONLINE = "online"
    OFFLINE = "offline"
    GOING_OFFLINE = "going-offline"


@dataclass(frozen=True, slots=True)
class MemoryBlock:
    """One memory block of sysfs; `movable` tells whether it is (only) in ZONE_MOVABLE."""

    index: int
    state: BlockState
    movable: bool = False
    node: int = 0  # NUMA


@dataclass(frozen=True, slots=True)
class NodeZones:
    """The memory of one NUMA node, by what it may be used for; bytes."""

    node: int = 0
    kernel_present_bytes: int = 0  # in zones that kernel allocations can use
    kernel_free_bytes: int = 0  # free in those zones
    movable_present_bytes: int = 0  # in ZONE_MOVABLE


@dataclass(frozen=True, slots=True)
class Inventory:
    """CPUs and memory blocks that the guest kernel has now. Empty fields: not offered here."""

    cpus_possible: frozenset[int] = frozenset()
    cpus_present: frozenset[int] = frozenset()
    cpus_online: frozenset[int] = frozenset()
    cpus_pinned: frozenset[int] = frozenset()  # isolated, or without an `online` file: never offlined
    block_bytes: int = 0
    blocks: tuple[MemoryBlock, ...] = ()
    zones: tuple[NodeZones, ...] = ()  # one per NUMA node with memory
    memory_online_bytes: int = field(init=False, compare=False)  # both counted once: a big VM has thousands of blocks
    memory_offline_bytes: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        offline = sum(block.state is BlockState.OFFLINE for block in self.blocks)
        object.__setattr__(self, "memory_offline_bytes", self.block_bytes * offline)
        object.__setattr__(self, "memory_online_bytes", self.block_bytes * (len(self.blocks) - offline))

    @property
    def kernel_zone_bytes(self) -> int:
        """Memory present in zones that kernel allocations can use."""
        return sum(node.kernel_present_bytes for node in self.zones)

    @property
    def kernel_free_bytes(self) -> int:
        """Free memory in those zones."""
        return sum(node.kernel_free_bytes for node in self.zones)

    @property
    def movable_zone_bytes(self) -> int:
        """Memory present in ZONE_MOVABLE."""
        return sum(node.movable_present_bytes for node in self.zones)


@dataclass(frozen=True, slots=True)
class Identity:
    """What a guest says of itself. Only informative: the channel is the identity."""

    boot_id: bytes  # 16 bytes of /proc/sys/kernel/random/boot_id
    generation: int  # CLOCK_BOOTTIME in ns at the daemon's start: higher is newer within a boot
    agent_version: str = ""
    hostname: str = ""
    kernel: str = ""
    capabilities: frozenset[Capability] = field(default_factory=frozenset)
