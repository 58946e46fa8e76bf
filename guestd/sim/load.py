"""What the programs of one VM want over time: measured, or made up from a seed.

A `Profile` is a line of points. Memory in use runs straight from one point to the next (programs take and free
memory in small parts; what happened between two samples nobody knows), the number of runnable tasks
holds until the next point. After the last point everything stays.

The made-up loads are for looking at behaviour, not for scores: ``steps`` jumps between levels, ``ramp`` grows and
falls steadily, ``noisy`` trembles around a level, ``diurnal`` is a day with its peak and small noise on it.
Everything follows from the seed and the VM's number.
"""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from guestd.model.units import MIB
from guestd.sim.traces import SAMPLE_SECONDS, MemoryTrace

Array = npt.NDArray[np.float64]

IDLE_TASKS = 0.1
"""Runnable tasks of a VM about whose CPU use nothing is known."""
LEAST_BYTES = 120 * MIB
"""Memory in use of a made-up VM that does nothing."""
_DAY_SECONDS = 86_400.0


class LoadKind(StrEnum):
    """Loads that can be made up."""

    NOISY = "noisy"
    STEPS = "steps"
    RAMP = "ramp"
    DIURNAL = "diurnal"


@dataclass(frozen=True, slots=True)
class Profile:
    """The load of one VM: arrays of equal length, times rising from 0.

    :param tasks: runnable tasks; from its point on, until the next.
    :param memory_bytes: in use without page cache; a straight line from point to point.
    """

    name: str
    time_seconds: Array
    tasks: Array
    memory_bytes: Array

    @property
    def seconds(self) -> float:
        """Its length."""
        return float(self.time_seconds[-1])


def from_memory(trace: MemoryTrace, name: str, shift_seconds: float = 0.0) -> Profile:
    """A measured VM, begun `shift_seconds` into its trace and run round: after the end comes the beginning.

    The turn is a straight line of one sample's length.
    """
    times = trace.time_seconds - trace.time_seconds[0]
    length = float(times[-1] + np.median(np.diff(times)))
    points: Array = np.array(sorted({0.0, length, *((times - shift_seconds) % length).tolist()}), np.float64)
    values: Array = np.interp(points + shift_seconds, times, trace.used_bytes, period=length)
    return Profile(name, points, np.full(len(points), IDLE_TASKS), values)


def from_percent(name: str, cpu: Array | None, memory: Array | None, vcpus: float, memory_bytes: float) -> Profile:
    """A VM of a slow trace; 100 % are `vcpus` and `memory_bytes`. What is None is idle."""
    given = next(row for row in (cpu, memory) if row is not None)
    times = np.array([number * SAMPLE_SECONDS for number in range(len(given))])
    tasks = np.full(len(given), IDLE_TASKS) if cpu is None else cpu * vcpus / 100
    used = np.full(len(given), float(LEAST_BYTES)) if memory is None else memory * memory_bytes / 100
    return Profile(name, times, tasks, used)


def generated(kind: LoadKind, name: str, number: int, seed: int, seconds: float, vcpus: float, size: float) -> Profile:
    """A made-up VM, the `number`-th of its kind, that can use up to `vcpus` and `size` bytes."""
    rng = np.random.default_rng([seed, number])
    times, level, tremble = _SHAPES[kind](rng, seconds)
    tasks = np.clip(level * vcpus * (1 + 0.5 * tremble), IDLE_TASKS, None)
    top = max(size * 0.8, LEAST_BYTES)  # programs are written for less than there is
    memory = np.clip(LEAST_BYTES + (top - LEAST_BYTES) * level * (1 + 0.1 * tremble), LEAST_BYTES, size)
    return Profile(name, times, tasks, memory)


def _steps(rng: np.random.Generator, seconds: float) -> tuple[Array, Array, Array]:
    """Levels that hold for a minute or two, with edges of a second."""
    edges = np.cumsum(rng.uniform(30, 150, size=max(2, int(seconds / 30) + 2)))
    edges = edges[edges < max(seconds, 60.0)]
    levels = rng.choice(np.array([0.05, 0.2, 0.5, 0.9]), size=len(edges) + 1)
    times = np.concatenate([[0.0], np.repeat(edges, 2) + np.tile([0.0, 1.0], len(edges))])
    return times, np.repeat(levels, 2)[: len(times)], np.zeros(len(times))


def _ramp(rng: np.random.Generator, seconds: float) -> tuple[Array, Array, Array]:
    """Up for a third, a while at the top, down for a third; each VM begins somewhat later."""
    late = rng.uniform(0, 0.15) * seconds
    times = np.linspace(0, seconds, 301)
    level = np.clip(np.minimum((times - late) / (seconds / 3), (seconds - times) / (seconds / 3)), 0.02, 0.9)
    return times, level, np.zeros(len(times))


def _noisy(rng: np.random.Generator, seconds: float) -> tuple[Array, Array, Array]:
    """One level each, and a tremble that forgets itself in seconds."""
    times = np.arange(0, max(seconds, 2.0) + 1)
    return times, np.full(len(times), rng.uniform(0.2, 0.6)), _tremble(rng, len(times))


def _diurnal(rng: np.random.Generator, seconds: float) -> tuple[Array, Array, Array]:
    """A day with one peak, at its own hour for each VM."""
    times = np.arange(0, max(seconds, 20.0) + 10, 10)
    peak = rng.uniform(9, 17) * 3600
    day = (1 + np.cos(2 * np.pi * (times - peak) / _DAY_SECONDS)) / 2
    return times, 0.05 + 0.75 * day**2, _tremble(rng, len(times)) * 0.5


def _tremble(rng: np.random.Generator, count: int) -> Array:
    """Noise around 0, within about ±1, of which 0.8 stays from one point to the next."""
    steps = rng.normal(0, 0.2, count)
    values, value = np.empty(count), 0.0
    for index, step in enumerate(steps):
        value = 0.8 * value + step
        values[index] = value
    return values


_SHAPES = {LoadKind.STEPS: _steps, LoadKind.RAMP: _ramp, LoadKind.NOISY: _noisy, LoadKind.DIURNAL: _diurnal}
