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
    """What a VM may hold, per kind: `min` always, up to `max` for as long as it needs it, and up to `burst`
    while it has credit.

    The credit is a token bucket: what is held above `max` is taken from it, second by second, and
    `burst_refill` is added in each second in which nothing is, up to `burst_credit` (resource x seconds:
    millicore-seconds, byte-seconds). A `burst` of 0 is none. `weight` (1..10000, plain numbers in the fields
    of the kinds) shares what is scarce.
    """

    min: Resources
    max: Resources
    weight: Resources = field(default_factory=lambda: Resources(100, 100))
    burst: Resources = field(default_factory=Resources)
    burst_credit: Resources = field(default_factory=Resources)
    burst_refill: Resources = field(default_factory=Resources)

    @staticmethod
    def usual_burst(maximum: int, burst: int) -> tuple[int, int]:
        """Credit and refill of a burst when nobody chose: five minutes of all of it, and a tenth of it back
        per second.
        """
        above = max(0, burst - maximum)
        return above * 300, above // 10

    def ceiling(self, kind: Kind) -> int:
        """The most that the VM may ever hold."""
        return max(self.max.get(kind), self.burst.get(kind))

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
            found += self._burst_problems(kind)
        return found

    def _burst_problems(self, kind: Kind) -> list[str]:
        high, burst = self.max.get(kind), self.burst.get(kind)
        credit, refill = self.burst_credit.get(kind), self.burst_refill.get(kind)
        if burst == 0:
            return [f"{kind}: burst credit or refill without a burst"] if credit or refill else []
        found = []
        if burst <= high:
            found.append(f"{kind}: burst {kind.show(burst)} is not above max {kind.show(high)}")
        elif credit < burst - high:
            found.append(
                f"{kind}: a burst credit of {kind.show(credit)} x seconds does not last for one second of the "
                f"burst, {kind.show(burst - high)} above max"
            )
        if refill > max(0, burst - high):
            found.append(
                f"{kind}: a burst refill of {kind.show(refill)} per second is more than the burst takes, "
                f"{kind.show(burst - high)}; raise max instead"
            )
        return found
