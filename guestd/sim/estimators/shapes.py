"""Made-up loads with a truth: what one VM's programs want from moment to moment.

Each shape begins with `LEAD_SECONDS` of its own rest level, so that every asker has settled. Nothing is random: noise
is a sum of waves.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from guestd.model.resources import Kind
from guestd.model.units import MIB

LEAD_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Want:
    """What programs want at one moment.

    :param tasks: runnable tasks.
    :param memory_bytes: in use, without cache.
    :param files_bytes: files read over and over: cache of that size is worth its memory.
    :param stream_pages_per_second: files read once, as fast as that.
    :param cgroup: tasks, or memory, are kept back by a limit in the VM: they wait, and more would not help.
    """

    tasks: float = 0.1
    memory_bytes: int = 300 * MIB
    files_bytes: int = 0
    stream_pages_per_second: float = 0.0
    cgroup: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """A load by name.

    :param want: by seconds since the load began; below 0 is rest.
    :param true_tasks: CPUs that would be used if they were there (None: the tasks): what a spike or a cgroup is worth.
    :param quota_millicores: the host holds the VM back to this (0: not at all).
    """

    name: str
    kind: Kind
    seconds: float
    want: Callable[[float], Want]
    worth: Callable[[float], float] | None = None
    quota_millicores: int = 0

    def truth(self, at: float) -> float:
        """CPUs, or bytes in use with the files that are read over and over, that programs can make use of."""
        if self.worth is not None:
            return self.worth(at)
        want = self.want(at)
        return math.ceil(want.tasks) if self.kind is Kind.CPU else float(want.memory_bytes + want.files_bytes)


def _step(tasks: float) -> Callable[[float], Want]:
    return lambda at: Want(tasks if 0 <= at < 60 else 0.1)


def _ramp(mib_per_second: float) -> Callable[[float], Want]:
    return lambda at: Want(memory_bytes=round(300 * MIB + min(3000 * MIB, max(0.0, at) * mib_per_second * MIB)))


def _sawtooth(at: float) -> Want:
    return Want(memory_bytes=round(500 * MIB + (max(0.0, at) % 60) / 60 * 1000 * MIB))


def _noise(at: float) -> float:
    """Within about -1..1."""
    return (math.sin(at * 2.1) + math.sin(at * 0.77) + math.sin(at * 5.3)) / 3


def _noisy_memory(at: float) -> Want:
    return Want(memory_bytes=round((1000 + 45 * _noise(at)) * MIB))


def _noisy_cpu(at: float) -> Want:
    return Want(tasks=1.5 + 0.45 * _noise(at))


def _boot(at: float) -> Want:
    return Want(4.0 if 0 <= at < 8 else 0.1)


def _fork_storm(at: float) -> Want:
    return Want(16.0 if at >= 0 and at % 10 < 0.2 else 0.1)


def _cpu_cgroup(at: float) -> Want:
    return Want(6.0 if at >= 0 else 0.1, cgroup=at >= 0)


def _reread(at: float) -> Want:
    return Want(files_bytes=1000 * MIB if at >= 0 else 0)


def _streamed(at: float) -> Want:
    return Want(stream_pages_per_second=20_000 if at >= 0 else 0)


def _memory_cgroup(at: float) -> Want:
    return Want(memory_bytes=500 * MIB, cgroup=at >= 0)


def _stalled(at: float) -> Want:
    return Want(memory_bytes=(300 if at < 0 else 1500) * MIB)


SHAPES = (
    Shape("step to 2 tasks", Kind.CPU, 90, _step(2)),
    Shape("step to 64 tasks", Kind.CPU, 90, _step(64)),
    Shape("service start, 8 s", Kind.CPU, 60, _boot),
    Shape("fork storms of 0.2 s", Kind.CPU, 120, _fork_storm, lambda at: 1.0),
    Shape("noise around 1.5 CPUs", Kind.CPU, 3600, _noisy_cpu, lambda at: 2.0),
    Shape("cgroup at its cpu.max", Kind.CPU, 120, _cpu_cgroup, lambda at: 1.0),
    Shape("held back by a quota", Kind.CPU, 90, _step(4), None, 1000),
    Shape("ramp of 20 MiB/s", Kind.MEMORY, 180, _ramp(20)),
    Shape("ramp of 200 MiB/s", Kind.MEMORY, 60, _ramp(200)),
    Shape("ramp of 800 MiB/s", Kind.MEMORY, 60, _ramp(800)),
    Shape("sawtooth of a minute", Kind.MEMORY, 600, _sawtooth),
    Shape("step of 1.2 GiB, stalled", Kind.MEMORY, 60, _stalled),
    Shape("noise around 1000 MiB", Kind.MEMORY, 3600, _noisy_memory),
    Shape("1000 MiB read again", Kind.MEMORY, 180, _reread),
    Shape("a stream read once", Kind.MEMORY, 120, _streamed),
    Shape("cgroup at its memory.max", Kind.MEMORY, 120, _memory_cgroup, lambda at: 500.0 * MIB),
)
