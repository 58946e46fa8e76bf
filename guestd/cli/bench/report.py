"""What was measured, judged against the targets, as JSON and as a table. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = 1
CPU_TARGET_SECONDS = 1.0
MEMORY_TARGET_SECONDS = 0.6
FOOTPRINT_TARGET_RATIO = 1.25


def median(values: Sequence[float | None]) -> float | None:
    """The median; a round in which nothing came counts as endless. None: there is none, or it is endless."""
    if not values:
        return None
    ordered = sorted(float("inf") if value is None else value for value in values)
    middle = len(ordered) // 2
    found = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return None if found == float("inf") else found


def largest(values: Sequence[float | None]) -> float | None:
    """The maximum; None when a round brought nothing, or there was none."""
    present = [value for value in values if value is not None]
    return max(present) if present and len(present) == len(values) else None


def ratio(one: float | None, other: float | None) -> float | None:
    """How many times the other; None where that makes no sense."""
    return None if one is None or not other else one / other


@dataclass(slots=True)
class Rounds:
    """All rounds of one kind: seconds, None for a round in which nothing came."""

    guestd_seconds: list[float | None] = field(default_factory=list)
    kernel_seconds: list[float | None] = field(default_factory=list)
    kernel_doubt_seconds: list[float] = field(default_factory=list)
    longest_gap_seconds: list[float] = field(default_factory=list)  # between two looks of the watcher

    def add_guestd(self, answer: dict[str, Any]) -> None:
        """A round under load, as the agent tells it."""
        grown_at = answer["grown_at"]
        self.guestd_seconds.append(None if grown_at is None else float(grown_at) - float(answer["onset"]))
        self.longest_gap_seconds.append(float(answer["longest_gap_seconds"]))

    def add_kernel(self, seconds: float | None, doubt_seconds: float) -> None:
        """A round of the kernel's own step, and how much its two clocks may disagree."""
        self.kernel_seconds.append(seconds)
        self.kernel_doubt_seconds.append(doubt_seconds)

    def last_in_words(self) -> str:
        """The newest round."""
        return f"{_seconds(self.guestd_seconds[-1])} (kernel {_seconds(self.kernel_seconds[-1])})"

    def document(self, target_seconds: float) -> dict[str, Any]:
        """All values and what follows from them."""
        p50, kernel_p50 = median(self.guestd_seconds), median(self.kernel_seconds)
        return {
            **asdict(self),
            "p50_seconds": p50,
            "max_seconds": largest(self.guestd_seconds),
            "kernel_p50_seconds": kernel_p50,
            "kernel_max_seconds": largest(self.kernel_seconds),
            "ratio_p50": ratio(p50, kernel_p50),
            "target_p50_seconds": target_seconds,
            "reached": p50 is not None and p50 <= target_seconds,
        }


@dataclass(frozen=True, slots=True)
class Usage:
    """What the processes of a service have used until a time of the guest's clock."""

    t: float
    pids: list[int]
    pss_bytes: int
    cpu_seconds: float
    context_switches: int


@dataclass(frozen=True, slots=True)
class Footprint:
    """Both services before and after the idle time, and the memory of each while the other did not run.

    While both run they share the pages of their libraries, which flatters both: hence the memory alone.
    """

    guestd_before: Usage
    guestd_after: Usage
    bare_before: Usage
    bare_after: Usage
    guestd_alone_pss_bytes: int
    bare_alone_pss_bytes: int
    grows: int

    def document(self) -> dict[str, Any]:
        """All values and what follows from them."""
        guestd = _side(self.guestd_before, self.guestd_after, self.guestd_alone_pss_bytes)
        bare = _side(self.bare_before, self.bare_after, self.bare_alone_pss_bytes)
        ratios = {name: ratio(guestd[name], bare[name]) for name in guestd if name != "processes"}
        judged = [ratios[name] for name in ("pss_bytes", "cpu_share", "context_switches_per_second")]
        return {
            "idle_seconds": self.guestd_after.t - self.guestd_before.t,
            "guestd": guestd,
            "bare": bare,
            "ratios": ratios,
            "grows_while_idle": self.grows,
            "target_ratio": FOOTPRINT_TARGET_RATIO,
            "reached": all(one is not None and one <= FOOTPRINT_TARGET_RATIO for one in judged),
        }


def _side(before: Usage, after: Usage, alone_bytes: int) -> dict[str, float]:
    seconds = after.t - before.t
    return {
        "processes": len(after.pids),
        "pss_bytes": alone_bytes,
        "pss_side_by_side_bytes": after.pss_bytes,
        "cpu_share": (after.cpu_seconds - before.cpu_seconds) / seconds,
        "context_switches_per_second": (after.context_switches - before.context_switches) / seconds,
    }


def document(machine: dict[str, Any], cpu: Rounds, memory: Rounds, footprint: Footprint | None) -> dict[str, Any]:
    """Everything, as it is written to `vm.json`. A part that was not measured is null, and not reached."""
    parts: dict[str, Any] = {
        "cpu": cpu.document(CPU_TARGET_SECONDS),
        "memory": memory.document(MEMORY_TARGET_SECONDS),
        "footprint": None if footprint is None else footprint.document(),
    }
    reached = all(part is not None and part["reached"] for part in parts.values())
    return {"schema": SCHEMA, "reached": reached, "machine": machine, **parts}


def table(result: dict[str, Any]) -> list[str]:
    """The whole result in lines; what is not reached is said in numbers."""
    machine = result["machine"]
    rounds = len(result["cpu"]["guestd_seconds"])
    lines = [
        f"Linux {machine['guest_kernel']} in QEMU {machine['qemu']} ({machine['accel']}), "
        f"{machine['host_cores']} cores, {rounds} rounds",
        "",
        f"{'':<34}{'guestd':>10}{'kernel':>10}{'ratio':>8}",
    ]
    for name, key in (("CPU onset to online", "cpu"), ("memory onset to usable", "memory")):
        part = result[key]
        target = part["target_p50_seconds"]
        verdict = _verdict(part["reached"], _seconds(part["p50_seconds"]), f"{target:g} s")
        lines.append(_row(f"{name}, p50", part["p50_seconds"], part["kernel_p50_seconds"], _seconds, verdict))
        lines.append(_row(f"{name}, max", part["max_seconds"], part["kernel_max_seconds"], _seconds))
    lines += ["", *_footprint_lines(result["footprint"])]
    return lines


def _footprint_lines(part: dict[str, Any] | None) -> Iterator[str]:
    if part is None:
        yield "footprint: not reached: it was not measured"
        return
    idle = f"{part['idle_seconds']:.0f} s idle"
    yield f"{idle:<34}{'guestd':>10}{'bare':>10}{'ratio':>8}"
    shows = {
        "pss_bytes": ("PSS of all processes", lambda value: f"{value / (1 << 20):.1f} MiB"),
        "cpu_share": ("CPU share", lambda value: f"{value:.2%}"),
        "context_switches_per_second": ("context switches per second", lambda value: f"{value:.1f}"),
    }
    target = part["target_ratio"]
    for key, (name, show) in shows.items():
        found = part["ratios"][key]
        shown = "unknown" if found is None else f"{found:.2f} times"
        verdict = _verdict(found is not None and found <= target, shown, f"{target:g} times")
        yield _row(name, part["guestd"][key], part["bare"][key], show, verdict)
    yield f"resizes begun while idle: {part['grows_while_idle']}"


def _verdict(reached: bool, value: str, target: str) -> str:
    return f"reached (target {target})" if reached else f"not reached: {value}, target {target}"


def _row(name: str, one: float | None, other: float | None, show: Any, verdict: str = "") -> str:
    times = ratio(one, other)
    shown = "?" if times is None else f"{times:.2f}"
    cells = "".join(f"{'none' if value is None else show(value):>10}" for value in (one, other))
    return f"{name:<34}{cells}{shown:>8}  {verdict}".rstrip()


def _seconds(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f} s"
