"""Claims of many guests at once, for benchmarks and tests."""

import random

from guestd.broker.core.allocate import Claim
from guestd.model.resources import Kind
from guestd.model.units import GIB, MIB, MILLICORES_PER_VCPU

_WEIGHTS = (25, 50, 100, 100, 100, 200, 400, 1000)


def random_claims(count: int, kind: Kind, seed: int) -> dict[str, Claim]:
    """Claims of so many different guests: sizes over a factor of 32, weights over one of 40, memory units from 128 MiB
    to 2 GiB, a third of the guests with a burst. The same arguments give the same claims.
    """
    source = random.Random(f"{kind} {seed}")  # noqa: S311 (not a secret)
    make = _cpu if kind is Kind.CPU else _memory
    return {f"vm-{number:05}": make(source) for number in range(count)}


def _cpu(source: random.Random) -> Claim:
    high = source.choice((1, 2, 4, 8, 16, 32)) * MILLICORES_PER_VCPU
    burst = high * 2 if source.random() < 1 / 3 else 0
    low = source.randint(1, max(1, high // 4000)) * 250
    demand = round(high * source.uniform(0.05, 1.8))
    return Claim(low, high, demand, source.choice(_WEIGHTS), source.choice((1000, 1000, 1000, 250)), burst=burst)


def _memory(source: random.Random) -> Claim:
    unit = source.choice((128, 128, 128, 256, 512, 1024, 2048)) * MIB
    high = source.choice((2, 4, 8, 16, 32, 64)) * GIB
    burst = high + high // 2 if source.random() < 1 / 3 else 0
    low = source.randint(1, 4) * high // 16
    demand = round(high * source.uniform(0.05, 1.8))
    used = round(demand * source.uniform(0.2, 1.0))
    return Claim(low, high, demand, source.choice(_WEIGHTS), unit, used, burst)
