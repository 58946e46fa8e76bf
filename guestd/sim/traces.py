"""Load traces: real measurements, read from files into arrays.

The layout of a traces folder; each part may be absent, and the names of days and builds are free::

    planetlab/DAY.csv.gz             CPU use, percent of one VM; one VM a line, one 5-minute mean a column
    google2011/{cpu,mem}.csv.gz      CPU and memory use, percent; the same; line N of both is the same VM
    build-memory/NAME.csv.gz         memory of one VM, a line each 1-3 seconds, with a header line
    three-vms/NAME.csv.gz            the same, of VMs on one host at the same time

The law: a file is read as a whole or not at all. What is missing, no gzip, empty, of uneven width, not a
number, not finite or negative is a `TraceError` that names file, line and what was expected. Nothing is skipped,
filled in or cut.
"""

import gzip
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from guestd.model.errors import TraceError

Array = npt.NDArray[np.float64]

SAMPLE_SECONDS = 300.0
"""Length of one sample of the slow traces."""
WARM_UP_SAMPLES = 24
"""Samples at the start of a slow trace that are not scored (2 h)."""
MEMORY_COLUMNS = ("time_s", "used_bytes", "cached_bytes", "host_rss_bytes", "total_bytes")


@dataclass(frozen=True, slots=True)
class MemoryTrace:
    """Memory of one VM over time: arrays of equal length, times strictly rising.

    :param used_bytes: without page cache, as is `cached_bytes` the page cache alone.
    :param host_rss_bytes: what the VM's process held on the host.
    """

    name: str
    time_seconds: Array
    used_bytes: Array
    cached_bytes: Array
    host_rss_bytes: Array
    total_bytes: Array


def planetlab(root: Path) -> dict[str, Array]:
    """CPU use in percent of one VM by day, (VMs, samples) each; no days when the folder is not there.

    :raise TraceError: When a file cannot be used.
    """
    return {_stem(path): matrix(path) for path in _files(root, "planetlab")}


def google(root: Path) -> dict[str, Array]:
    """``cpu`` and ``mem`` use in percent, (VMs, samples), the same VM in the same row; empty without the folder.

    :raise TraceError: When a file cannot be used, or the two don't match.
    """
    folder = root / "google2011"
    if not _present(folder):
        return {}
    both = {kind: matrix(folder / f"{kind}.csv.gz") for kind in ("cpu", "mem")}
    if both["cpu"].shape != both["mem"].shape:
        (vms, samples), (others, expected) = both["mem"].shape, both["cpu"].shape
        want = f"{others} of {expected}, as in cpu.csv.gz"
        raise TraceError(str(folder / "mem.csv.gz"), 0, f"{vms} VMs of {samples} samples", want)
    return both


def build_memory(root: Path) -> list[MemoryTrace]:
    """Memory of single VMs during builds, by name; none when the folder is not there.

    :raise TraceError: When a file cannot be used.
    """
    return [memory(path) for path in _files(root, "build-memory")]


def three_vms(root: Path) -> list[MemoryTrace]:
    """Memory of VMs that ran on one host together, by name; none when the folder is not there.

    :raise TraceError: When a file cannot be used.
    """
    return [memory(path) for path in _files(root, "three-vms")]


def matrix(path: Path) -> Array:
    """One slow file: a VM a line, a sample a column.

    :raise TraceError: When the file cannot be used.
    """
    least = WARM_UP_SAMPLES + 1
    rows: list[list[float]] = []
    for number, line in _lines(path):
        row = _numbers(path, number, line)
        if len(row) < least:
            raise TraceError(str(path), number, f"{len(row)} samples", f"at least {least} numbers with commas between")
        if rows and len(row) != len(rows[0]):
            raise TraceError(str(path), number, f"{len(row)} samples", f"{len(rows[0])}, as in line 1")
        rows.append(row)
    if not rows:
        raise TraceError(str(path), 0, "empty", "a line for each VM")
    return np.array(rows)


def memory(path: Path) -> MemoryTrace:
    """One file of memory over time.

    :raise TraceError: When the file cannot be used.
    """
    header = ",".join(MEMORY_COLUMNS)
    rows: list[list[float]] = []
    for number, line in _lines(path):
        if number == 1:
            if line != header:
                raise TraceError(str(path), 1, f"header {line[:100]!r}", repr(header))
            continue
        row = _numbers(path, number, line)
        if len(row) != len(MEMORY_COLUMNS):
            raise TraceError(str(path), number, f"{len(row)} columns", f"{len(MEMORY_COLUMNS)}: {header}")
        if rows and row[0] <= rows[-1][0]:
            raise TraceError(str(path), number, f"time {row[0]:g} s after {rows[-1][0]:g} s", "rising times")
        rows.append(row)
    if len(rows) < 2:
        raise TraceError(str(path), 0, f"{len(rows)} samples", "a header line and at least two samples")
    return MemoryTrace(_stem(path), *np.array(rows).T.copy())


def _stem(path: Path) -> str:
    return path.name.removesuffix(".csv.gz")


def _present(folder: Path) -> bool:
    """Whether a part of the traces is there.

    :raise TraceError: When not even the folder around it is.
    """
    if not folder.parent.is_dir():
        raise TraceError(str(folder.parent), 0, "no such folder", "a folder of load traces (TRACES=DIR)")
    return folder.is_dir()


def _files(root: Path, part: str) -> list[Path]:
    if not _present(root / part):
        return []
    found = sorted((root / part).glob("*.csv.gz"))
    if not found:
        raise TraceError(str(root / part), 0, "no file in it", "files named *.csv.gz")
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1.

    :raise TraceError: When the file is missing, no gzip, damaged or no text.
    """
    if not path.is_file():
        raise TraceError(str(path), 0, "missing", "a gzip file of numbers")
    number = 0
    try:
        with gzip.open(path, "rt", encoding="ascii") as text:
            for number, line in enumerate(text, 1):
                yield number, line.rstrip("\r\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise TraceError(str(path), number + 1, f"cannot be read ({error})", "a whole gzip file of text") from error


def _numbers(path: Path, number: int, line: str) -> list[float]:
    """:raise TraceError: When one is not a finite number from 0 up."""
    try:
        row = [float(field) for field in line.split(",")]
    except ValueError:
        bad = next(column for column, field in enumerate(line.split(","), 1) if not _is_number(field))
        field = line.split(",")[bad - 1]
        raise TraceError(str(path), number, f"column {bad} is {field[:40]!r}", "a number") from None
    if not (min(row) >= 0 and math.isfinite(math.fsum(row))):
        bad = next(column for column, value in enumerate(row, 1) if not 0 <= value < math.inf)
        raise TraceError(str(path), number, f"column {bad} is {row[bad - 1]:g}", "a finite number from 0 up")
    return row


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True
