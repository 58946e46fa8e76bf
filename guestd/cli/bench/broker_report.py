"""What was measured of the broker, judged against the targets, as JSON and as a table. Pure."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from guestd.model.units import KIB

SCHEMA = 1
JUDGED_GUESTS = 5000
P99_SECONDS = 0.05
BYTES_PER_GUEST = 60 * KIB
RECOVERY_SECONDS = 5.0
FLOOD_RATIO = 2.0
SOLVE_SECONDS = 0.003


def spread(values: Sequence[float], missed: int = 0) -> dict[str, Any]:
    """Percentiles in seconds; what never came counts as endless, and an endless percentile is None."""
    ordered = sorted(values)

    def rank(share: float) -> float | None:
        index = max(0, math.ceil(share * (len(ordered) + missed)) - 1)
        return ordered[index] if index < len(ordered) else None

    return {
        "count": len(ordered),
        "missed": missed,
        "p50_seconds": rank(0.5),
        "p99_seconds": rank(0.99),
        "max_seconds": rank(1.0),
    }


def waits(answer: dict[str, Any]) -> dict[str, Any]:
    """What the load generator told about a while of demands."""
    up, down = answer["up_seconds"], answer["down_seconds"]
    return {
        "all": spread(up + down, answer["missed"]),
        "up": spread(up),
        "down": spread(down),
        "generator_late": spread(answer["late_seconds"]),
    }


def document(machine: dict[str, Any], sizes: list[dict[str, Any]], cores: dict[str, Any]) -> dict[str, Any]:
    """Everything, as it is written to `broker.json`. What was not measured is not reached."""
    judged = list(_judge(sizes, cores))
    return {
        "schema": SCHEMA,
        "reached": all(one["reached"] for one in judged),
        "machine": machine,
        "sizes": sizes,
        "cores": cores,
        "targets": judged,
    }


def _judge(sizes: list[dict[str, Any]], cores: dict[str, Any]) -> Iterator[dict[str, Any]]:
    size = next((size for size in sizes if size["guests"] == JUDGED_GUESTS), {})
    steady = size.get("steady", {}).get("all", {})
    yield _target("demand to grant, p99", steady.get("p99_seconds"), P99_SECONDS, "s")
    yield _target("memory for each guest", size.get("bytes_per_guest"), BYTES_PER_GUEST, "bytes")
    yield _target("all served after SIGKILL", size.get("recovery_seconds"), RECOVERY_SECONDS, "s")
    yield _target("guests ever below their minimum", size.get("below_minimum"), 0, "")
    yield _target("p99 of the others beside a flood", size.get("flood", {}).get("ratio"), FLOOD_RATIO, "times")
    yield _target("full solve, 10,000 guests", cores.get("solve", {}).get("again_p50_seconds"), SOLVE_SECONDS, "s")


def _target(name: str, value: float | None, most: float, unit: str) -> dict[str, Any]:
    return {"name": name, "value": value, "most": most, "unit": unit, "reached": value is not None and value <= most}


def table(result: dict[str, Any]) -> list[str]:
    """The whole result in lines; what is not reached is said in numbers."""
    machine = result["machine"]
    lines = [f"{machine['host_cpu']}, {machine['host_cores']} cores, guestd {machine['guestd']}", ""]
    sizes = result["sizes"]
    lines.append(f"{'guests, real sockets':<40}" + "".join(f"{size['guests']:>12,}" for size in sizes))
    for name, path, show in _ROWS:
        lines.append(f"{name:<40}" + "".join(f"{_shown(size, path, show):>12}" for size in sizes))
    cores = result["cores"]
    lines += ["", f"{'guests, the core alone':<40}{cores.get('machine', {}).get('guests', 0):>12,}"]
    for name, path, show in _CORE_ROWS:
        lines.append(f"{name:<40}{_shown(cores, path, show):>12}")
    lines += ["", f"targets ({JUDGED_GUESTS:,} guests)"]
    return lines + [_verdict(one) for one in result["targets"]]


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def _s(seconds: float) -> str:
    return f"{seconds:.2f} s"


def _kib(amount_bytes: float) -> str:
    return f"{amount_bytes / KIB:.1f} KiB"


def _rate(value: float) -> str:
    return f"{value:,.0f}/s"


_ROWS: tuple[tuple[str, str, Any], ...] = (
    ("memory for each guest (PSS)", "bytes_per_guest", _kib),
    ("all connected and at their minimum after", "ramp_seconds", _s),
    ("demand to grant, p50", "steady.all.p50_seconds", _ms),
    ("demand to grant, p99", "steady.all.p99_seconds", _ms),
    ("demand to grant, longest", "steady.all.max_seconds", _ms),
    ("  for more, p99", "steady.up.p99_seconds", _ms),
    ("  for less, p99", "steady.down.p99_seconds", _ms),
    ("  late by the load generator, p99", "steady.generator_late.p99_seconds", _ms),
    ("demands never covered", "steady.all.missed", str),
    ("broker's share of its core then", "steady.broker_cores", "{:.0%}".format),
    ("grants at full speed", "rush.grants_per_second", _rate),
    ("  per second of the broker's CPU", "rush.grants_per_core_second", _rate),
    ("beside a flood, p99", "flood.all.p99_seconds", _ms),
    ("  times that of without", "flood.ratio", "{:.2f}".format),
    ("  messages and streams of the flood", "flood.said", str),
    ("all served after SIGKILL", "recovery_seconds", _s),
    ("  of it CPU time of the broker", "recovery_broker_cpu_seconds", _s),
    ("  of it CPU time of the load generator", "recovery_load_cpu_seconds", _s),
    ("guests ever below their minimum", "below_minimum", str),
)
_CORE_ROWS: tuple[tuple[str, str, Any], ...] = (
    ("memory for each guest (RSS)", "machine.bytes_per_guest", _kib),
    ("grants per second and core", "machine.grants_per_core_second", _rate),
    ("share of a core at one change per 10 s", "machine.share_of_a_core", "{:.0%}".format),
    ("one round of decisions, p50", "machine.batch_p50_seconds", _ms),
    ("one round of decisions, p99", "machine.batch_p99_seconds", _ms),
    ("full solve of both kinds, p50", "solve.again_p50_seconds", _ms),
    ("full solve of new pools, p50", "solve.first_p50_seconds", _ms),
)


def _shown(part: dict[str, Any], path: str, show: Any) -> str:
    value: Any = part
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return "none" if value is None else str(show(value))


def _verdict(one: dict[str, Any]) -> str:
    show = {"s": _ms, "bytes": _kib, "times": "{:.2f} times".format}.get(one["unit"], str)
    value = "not measured" if one["value"] is None else show(one["value"])
    verdict = "reached" if one["reached"] else "not reached"
    return f"  {one['name']:<38}{value:>12}  {verdict} (at most {show(one['most'])})"
