"""Statistics, targets and tables of all parts, and the one file they go into. Pure, but for reading and writing it."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
P99_ROUNDS = 200
"""Fewer values than this have no 99th percentile worth the name."""

Seconds = Sequence[float | None]
"""None for a round in which nothing came."""


def median(values: Seconds) -> float | None:
    """The median; a round in which nothing came counts as endless. None: there is none, or it is endless."""
    return quantile(values, 0.5)


def quantile(values: Seconds, share: float) -> float | None:
    """The value below which a share of all lies, between neighbours in proportion; as for `median`."""
    if not values:
        return None
    ordered = sorted(float("inf") if value is None else value for value in values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    if ordered[high] == float("inf"):
        return None if place > low or ordered[low] == float("inf") else ordered[low]
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def largest(values: Seconds) -> float | None:
    """The maximum; None when a round brought nothing, or there was none."""
    present = [value for value in values if value is not None]
    return max(present) if present and len(present) == len(values) else None


def ratio(one: float | None, other: float | None) -> float | None:
    """How many times the other; None where that makes no sense."""
    return None if one is None or not other else one / other


def less(one: float | None, other: float | None) -> float | None:
    """The difference, None where one is not known."""
    return None if one is None or other is None else one - other


def summary(values: Seconds) -> dict[str, Any]:
    """All values, p50 and max, and p99 from `P99_ROUNDS` on."""
    return {
        "rounds": len(values),
        "values": list(values),
        "p50": median(values),
        "p99": quantile(values, 0.99) if len(values) >= P99_ROUNDS else None,
        "max": largest(values),
    }


@dataclass(frozen=True, slots=True)
class Target:
    """One thing to reach: at least (or at most) so much."""

    name: str
    value: float | None
    target: float
    unit: str = "times"
    at_most: bool = False
    note: str = ""

    @property
    def reached(self) -> bool:
        """A value that is not known reaches nothing."""
        if self.value is None:
            return False
        return self.value <= self.target if self.at_most else self.value >= self.target

    def document(self) -> dict[str, Any]:
        """As it is written."""
        return {**asdict(self), "reached": self.reached}


def merged(before: dict[str, Any] | None, machine: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """The whole document: new parts in place of old ones, those that were not measured now stay as they were.

    Each part says on what it was measured: those of different runs may differ.
    """
    known = dict(before["parts"]) if before is not None and before.get("schema") == SCHEMA else {}
    known.update({name: {"machine": machine, **part} for name, part in parts.items()})
    targets = [target for part in known.values() for target in part["targets"]]
    return {"schema": SCHEMA, "reached": bool(targets) and all(one["reached"] for one in targets), "parts": known}


def read(path: Path) -> dict[str, Any] | None:
    """An earlier document, None where there is none that can be read."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found


def target_lines(targets: Iterable[dict[str, Any]]) -> list[str]:
    """A line for each target, also for those that are not reached."""
    lines = []
    for one in targets:
        sign, value = "≤" if one["at_most"] else "≥", one["value"]
        shown = "not measured" if value is None else f"{value:.3g} {one['unit']}"
        verdict = "reached" if one["reached"] else "NOT REACHED"
        note = f" ({one['note']})" if one["note"] else ""
        lines.append(f"  {verdict:<12}{one['name']}: {shown}, target {sign} {one['target']:g}{note}")
    return lines


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns as wide as they must be; the first to the left, the others to the right."""
    table = [list(head), *[list(row) for row in rows]]
    widths = [max(len(row[index]) for row in table) for index in range(len(head))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in table
    ]


def seconds(value: float | None) -> str:
    """For a table."""
    return "none" if value is None else f"{value:.3f} s"


def times(value: float | None) -> str:
    """For a table."""
    return "?" if value is None else f"{value:.2f}x"
