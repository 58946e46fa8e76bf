"""What is shared out: two kinds of resource, amounts of them, and limits on the amounts."""

from dataclasses import dataclass, field, replace
from enum import StrEnum

from guestd.model.units import format_cpus, format_size


class Kind(StrEnum):
    """A kind of resource. CPU is counted in millicores, memory in bytes."""

    CPU = "cpu"
    MEMORY = "memory"

    def show(self, amount: int) -> str:
        """The amount for people, with its unit."""
        return f"{format_cpus(amount)} CPU" if self is Kind.CPU else format_size(amount)


@dataclass(frozen=True, slots=True)
class Resources:
    """An amount of each kind: CPU in millicores, memory in bytes."""

    cpu_millicores: int = 0
    memory_bytes: int = 0

    def get(self, kind: Kind) -> int:
        return self.cpu_millicores if kind is Kind.CPU else self.memory_bytes

    def with_(self, kind: Kind, amount: int) -> "Resources":
        if kind is Kind.CPU:
            return replace(self, cpu_millicores=amount)
        return replace(self, memory_bytes=amount)

    def __add__(self, other: "Resources") -> "Resources":
        return Resources(self.cpu_millicores + other.cpu_millicores, self.memory_bytes + other.memory_bytes)

    def __sub__(self, other: "Resources") -> "Resources":
        return Resources(self.cpu_millicores - other.cpu_millicores, self.memory_bytes - other.memory_bytes)

    def __str__(self) -> str:
        return f"{Kind.CPU.show(self.cpu_millicores)}, {Kind.MEMORY.show(self.memory_bytes)}"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a VM may hold: never less than `min`, never more than `max`; `weight` (1..10000, in
    `cpu_millicores`/`memory_bytes` fields as plain numbers) shares what is scarce.
    """

    min: Resources
    max: Resources
    weight: Resources = field(default_factory=lambda: Resources(100, 100))

    def problems(self) -> list[str]:
        """Every contradiction in words with the numbers; empty when the limits are sound."""
        found = []
        for kind in Kind:
            low, high, weight = self.min.get(kind), self.max.get(kind), self.weight.get(kind)
            if low <= 0:
                found.append(f"{kind}: min is {kind.show(low)}, must be above 0")
            if low > high:
                found.append(f"{kind}: min {kind.show(low)} is above max {kind.show(high)}")
            if not 1 <= weight <= 10_000:
                found.append(f"{kind}: weight is {weight}, must be within 1..10000")
        return found
