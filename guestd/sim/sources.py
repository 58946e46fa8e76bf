"""Profiles from trace files: which VMs there are in them, and how many are wanted.

A file is known by its first line: the header of a memory trace, or numbers. Numbers are percent of one VM: of its
memory where the file is called ``mem…``, else of its CPUs. ``cpu.csv.gz`` and ``mem.csv.gz`` of one folder are the same
VMs.
"""

import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guestd.model.errors import TraceError
from guestd.model.resources import Limits
from guestd.model.units import MILLICORES_PER_VCPU
from guestd.sim import traces
from guestd.sim.load import Array, Profile, from_memory, from_percent

_GOLDEN = 0.6180339887498949
DEFAULT_VMS = 4
"""VMs taken from a file that has hundreds."""


@dataclass(frozen=True, slots=True)
class Source:
    """One VM that can be had; `make` gives its load within limits.

    :param total_bytes: memory of the measured VM; None: not known.
    """

    name: str
    total_bytes: int | None
    make: Callable[[Limits], Profile]


def read(paths: Sequence[Path], vms: int | None = None) -> list[Source]:
    """So many VMs from files and folders of files, in the order given; without `vms` all measured ones, or the
    first `DEFAULT_VMS` of a slow file. Memory traces serve again from another place when they are too few.

    :raise TraceError: When a file cannot be used, there is none, or there are fewer VMs than wanted.
    """
    files = [file for path in paths for file in _expand(path)]
    fast = [traces.memory(file) for file in files if _is_memory(file)]
    slow = [file for file in files if not _is_memory(file)]
    if fast and slow:
        raise TraceError(
            str(slow[0]), 0, "percent of a VM, beside traces in bytes", "files of one kind; name those that you mean"
        )
    if fast:
        return [_measured(fast[number % len(fast)], number, len(fast)) for number in range(vms or len(fast))]
    return _percent(slow, DEFAULT_VMS if vms is None else vms)


def _expand(path: Path) -> list[Path]:
    if not path.is_dir():
        if not path.exists():
            raise TraceError(str(path), 0, "no such file or folder", "a trace file, or a folder of them")
        return [path]
    found = sorted(path.glob("*.csv.gz"))
    if not found:
        below = sorted({file.parent.name for file in path.glob("*/*.csv.gz")})
        hint = f"; there are some in {', '.join(below)}: name one of these" if below else ""
        raise TraceError(str(path), 0, f"no trace in this folder{hint}", "files named *.csv.gz")
    return found


def _is_memory(path: Path) -> bool:
    """Whether a file is a memory trace; one that cannot be read is for `traces` to complain about."""
    try:
        with gzip.open(path, "rt", encoding="ascii") as text:
            return text.readline(200).startswith(traces.MEMORY_COLUMNS[0])
    except (OSError, EOFError, UnicodeDecodeError):
        return False


def _measured(trace: traces.MemoryTrace, number: int, count: int) -> Source:
    again = number // count
    name = f"{trace.name}.{again + 1}" if again else trace.name
    shift = (number * _GOLDEN) % 1.0 * float(trace.time_seconds[-1] - trace.time_seconds[0]) if again else 0.0
    total = int(trace.total_bytes.max())
    return Source(name, total, lambda limits: from_memory(trace, name, shift))


def _percent(files: Sequence[Path], vms: int) -> list[Source]:
    sources: list[Source] = []
    taken: set[Path] = set()
    for file in files:
        if file in taken:
            continue
        is_memory = file.name.startswith("mem")
        other = file.with_name(file.name.replace("mem", "cpu", 1) if is_memory else file.name.replace("cpu", "mem", 1))
        pair = other != file and other in files
        taken |= {file, other} if pair else {file}
        first = traces.matrix(file)
        second = traces.matrix(other) if pair else None
        if second is not None and second.shape != first.shape:
            expected = f"{first.shape[0]} VMs of {first.shape[1]} samples, as in {file.name}"
            raise TraceError(str(other), 0, f"{second.shape[0]} VMs of {second.shape[1]} samples", expected)
        cpu, memory = (second, first) if is_memory else (first, second)
        stem = file.parent.name if pair else file.name.removesuffix(".csv.gz")
        rows = range(min(len(first), vms - len(sources)))
        sources += [_row(f"{stem}-{row:03}", _at(cpu, row), _at(memory, row)) for row in rows]
    if len(sources) < vms:
        raise TraceError(str(files[0]), 0, f"{len(sources)} VMs in all", f"{vms}, as many as --vms says")
    return sources


def _at(matrix: Array | None, row: int) -> Array | None:
    return None if matrix is None else np.asarray(matrix[row])


def _row(name: str, cpu: Array | None, memory: Array | None) -> Source:
    def make(limits: Limits) -> Profile:
        return from_percent(name, cpu, memory, limits.max.cpu_millicores / MILLICORES_PER_VCPU, limits.max.memory_bytes)

    return Source(name, None, make)
