"""The picture of a run: two panels over one time axis, drawn by hand as SVG.

In each panel the wide band is what the hypervisor gives and the line in it what the guest can use, so that
where they part can be seen; the filled area is the load; the dashed line what guestd says is needed. Time
counts from the onset of the load. Colours are told apart without seeing red and green, and the picture
brings its own background, light or dark.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

from guestd.cli.demo.timeline import Broker, Guest, Hypervisor, Machine, Timeline
from guestd.model.units import GIB, MILLICORES_PER_VCPU, format_size

WIDTH, HEIGHT = 960, 640
LEFT, RIGHT = 64, 936
CPU_TOP, CPU_BOTTOM = 156, 330
MEMORY_TOP, MEMORY_BOTTOM = 414, 588
_SMOOTH_SECONDS = 1.0

Point = tuple[float, float]

_STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; fill: #1f2937 }
.paper { fill: #fcfcfb; stroke: #d9dce1 }
.title { font-size: 21px; font-weight: 650 }
.panel { font-size: 15px; font-weight: 650 }
.small { font-size: 12px; fill: #5b6472 }
.note { font-size: 12px; fill: #1f2937 }
.grid { stroke: #e4e7eb; stroke-width: 1 }
.base { stroke: #9aa3af; stroke-width: 1 }
.phase { fill: #f4a259; fill-opacity: .11 }
.onset { stroke: #c2570c; stroke-width: 1; stroke-dasharray: 2 3 }
.onset-text { font-size: 12px; fill: #b04a06; font-weight: 600 }
.limit { stroke: #9aa3af; stroke-width: 1; stroke-dasharray: 1 4 }
.load { fill: #7c86ad; fill-opacity: .36 }
.given { fill: none; stroke: #93c1f5; stroke-width: 7; stroke-linejoin: round }
.usable { fill: none; stroke: #14509a; stroke-width: 2.2; stroke-linejoin: round }
.demand { fill: none; stroke: #d9660a; stroke-width: 1.8; stroke-dasharray: 6 4; stroke-linejoin: round }
@media (prefers-color-scheme: dark) {
  text, .note { fill: #e6e9ee }
  .paper { fill: #14181f; stroke: #2e3540 }
  .small { fill: #9aa5b4 }
  .grid { stroke: #252c36 }
  .base, .limit { stroke: #5d6877 }
  .onset { stroke: #f2994a }
  .onset-text { fill: #f7b069 }
  .load { fill: #8d9bb0; fill-opacity: .34 }
  .given { stroke: #2a5c99 }
  .usable { stroke: #a8d1ff }
  .demand { stroke: #ff9d45 }
}
"""


@dataclass(frozen=True, slots=True)
class _Panel:
    """Where a panel is, and how its values become pixels."""

    top: int
    bottom: int
    start: float
    end: float
    highest: float

    def x(self, t: float) -> float:
        share = (t - self.start) / (self.end - self.start)
        return LEFT + min(max(share, 0.0), 1.0) * (RIGHT - LEFT)

    def y(self, value: float) -> float:
        return self.bottom - min(max(value / self.highest, 0.0), 1.0) * (self.bottom - self.top)


def draw(timeline: Timeline, summary: dict[str, Any]) -> str:
    """The SVG of a run. Works for a run that was cut short, too."""
    guests, hypervisors, brokers = timeline.of(Guest), timeline.of(Hypervisor), timeline.of(Broker)
    start, end = _span(timeline)
    onset = timeline.load("cpu-onset")
    zero = onset.t if onset else start
    cpu = _Panel(CPU_TOP, CPU_BOTTOM, start, end, summary["cpu"]["max"] + 0.35)
    peak = max(
        [summary["memory"]["min_bytes"]]
        + [one.memory_bytes for one in hypervisors]
        + [one.memory_demand_bytes for one in brokers if one.t >= start]
    )
    memory = _Panel(MEMORY_TOP, MEMORY_BOTTOM, start, end, max(_ceil(peak * 1.06 / GIB, 0.25), 0.75))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img" aria-labelledby="title">',
        '<title id="title">CPUs and memory of a virtual machine follow its load</title>',
        f"<style>{_STYLE}</style>",
        f'<rect class="paper" x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10"/>',
        _text(28, 40, "A virtual machine that breathes", "title"),
        _text(28, 62, _subtitle(timeline, summary), "small"),
        *_legend(28, 86),
        *_phases(timeline, cpu, memory),
        *_frame(cpu, "CPUs", _cpu_note(summary), _steps(cpu.highest, 1), "{:g}"),
        *_curves(
            cpu,
            load=_busy(guests),
            given=[(one.t, float(one.vcpus)) for one in hypervisors],
            usable=[(one.t, float(one.cpus_online)) for one in guests],
            demand=[(one.t, one.cpu_demand_millicores / MILLICORES_PER_VCPU) for one in brokers],
        ),
        *_frame(memory, "Memory", _memory_note(summary), _steps(memory.highest, 0.5), "{:g} GiB"),
        *_limit(memory, summary["memory"]["min_bytes"] / GIB),
        *_curves(
            memory,
            load=[(one.t, (one.memory_total_bytes - one.memory_available_bytes) / GIB) for one in guests],
            given=[(one.t, one.memory_bytes / GIB) for one in hypervisors],
            usable=[(one.t, one.memory_total_bytes / GIB) for one in guests],
            demand=[(one.t, one.memory_demand_bytes / GIB) for one in brokers],
        ),
        *_onsets(timeline, cpu, memory),
        *_time_axis(memory, zero, bool(onset)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _span(timeline: Timeline) -> tuple[float, float]:
    """From the first look into the guest to the end; always longer than nothing."""
    times = [one.t for one in timeline.of(Guest)] + [one.t for one in timeline.of(Hypervisor)]
    start = min((one.t for one in timeline.of(Guest)), default=min(times, default=0.0))
    return start, max(max(times, default=0.0), start + 1.0)


def _busy(guests: Sequence[Guest]) -> list[Point]:
    """CPUs busy, from the counter of the kernel, over about a second each."""
    points = []
    first = 0
    for index, one in enumerate(guests):
        while first < index - 1 and one.guest_t - guests[first + 1].guest_t >= _SMOOTH_SECONDS:
            first += 1
        passed = one.guest_t - guests[first].guest_t
        if passed > 0.1:
            points.append((one.t - passed / 2, (one.busy_seconds - guests[first].busy_seconds) / passed))
    return points


def _curves(
    panel: _Panel,
    *,
    load: Sequence[Point],
    given: Sequence[Point],
    usable: Sequence[Point],
    demand: Sequence[Point],
) -> Iterator[str]:
    if load:
        yield f'<path class="load" d="{_area(panel, load)}"/>'
    for style, points in (("given", given), ("usable", usable), ("demand", demand)):
        if points:
            yield f'<path class="{style}" d="{_stairs(panel, points)}"/>'


def _stairs(panel: _Panel, points: Sequence[Point]) -> str:
    """A path that keeps a value until the next one; points that change nothing are left out."""
    inside = [point for point in points if point[0] >= panel.start] or list(points[-1:])
    t, value = inside[0]
    path = [f"M{panel.x(t):.1f} {panel.y(value):.1f}"]
    for (_, before), (t, value) in pairwise(inside):
        if value != before:
            path.append(f"H{panel.x(t):.1f}V{panel.y(value):.1f}")
    path.append(f"H{panel.x(inside[-1][0]):.1f}")
    return "".join(path)


def _area(panel: _Panel, points: Sequence[Point]) -> str:
    line = "L".join(f"{panel.x(t):.1f} {panel.y(value):.1f}" for t, value in points)
    return f"M{panel.x(points[0][0]):.1f} {panel.bottom}L{line}L{panel.x(points[-1][0]):.1f} {panel.bottom}Z"


def _frame(panel: _Panel, name: str, note: str, steps: Sequence[float], form: str) -> Iterator[str]:
    yield _text(28, panel.top - 24, name, "panel")
    yield _text(RIGHT, panel.top - 24, note, "note", anchor="end")
    for value in steps:
        y = panel.y(value)
        yield f'<line class="{"grid" if value else "base"}" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield _text(LEFT - 8, y + 4, form.format(value) if value else "0", "small", anchor="end")


def _limit(panel: _Panel, value: float) -> Iterator[str]:
    y = panel.y(value)
    yield f'<line class="limit" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _phases(timeline: Timeline, cpu: _Panel, memory: _Panel) -> Iterator[str]:
    """A tint behind the time in which a load ran, in the panel that it is about."""
    for panel, first, last in ((cpu, "cpu-onset", "cpu-end"), (memory, "memory-onset", "memory-end")):
        onset, end = timeline.load(first), timeline.load(last)
        if onset is not None:
            x = panel.x(onset.t)
            width = panel.x(end.t if end else panel.end) - x
            height = panel.bottom - panel.top
            yield f'<rect class="phase" x="{x:.1f}" y="{panel.top}" width="{width:.1f}" height="{height}"/>'


def _onsets(timeline: Timeline, cpu: _Panel, memory: _Panel) -> Iterator[str]:
    marks = (
        (cpu, "cpu-onset", "busy processes start"),
        (cpu, "cpu-end", "they end"),
        (memory, "memory-onset", "a process starts to grow"),
        (memory, "memory-end", "it exits"),
    )
    for panel, event, words in marks:
        found = timeline.load(event)
        if found is None:
            continue
        x = panel.x(found.t)
        if event == "cpu-onset" and found.detail:
            words = f"{found.detail} start"
        yield f'<line class="onset" x1="{x:.1f}" x2="{x:.1f}" y1="{panel.top - 14}" y2="{panel.bottom}"/>'
        yield _text(x + 5, panel.top - 5, words, "onset-text")


def _time_axis(panel: _Panel, zero: float, from_onset: bool) -> Iterator[str]:
    length = panel.end - panel.start
    step = next((one for one in (1, 2, 5, 10, 20, 30, 60) if length / one <= 14), 120)
    second = -int((zero - panel.start) // step) * step
    while zero + second <= panel.end:
        x = panel.x(zero + second)
        yield _text(x, panel.bottom + 18, f"{second} s", "small", anchor="middle")
        yield f'<line class="base" x1="{x:.1f}" x2="{x:.1f}" y1="{panel.bottom}" y2="{panel.bottom + 4}"/>'
        second += step
    words = "time since the onset of the load" if from_onset else "time"
    yield _text((LEFT + RIGHT) / 2, panel.bottom + 38, words, "small", anchor="middle")


def _legend(x: float, y: float) -> Iterator[str]:
    entries = (
        ("load", "load (busy CPUs, memory used)"),
        ("demand", "what guestd says is needed"),
        ("given", "given by the hypervisor (QMP)"),
        ("usable", "usable in the guest (/proc, /sys)"),
    )
    for style, words in entries:
        if style == "load":
            yield f'<rect class="load" x="{x}" y="{y - 6}" width="26" height="11" rx="1"/>'
        else:
            yield f'<path class="{style}" d="M{x} {y}h26"/>'
        yield _text(x + 33, y + 4, words, "note")
        x += 33 + 6.15 * len(words) + 22


def _subtitle(timeline: Timeline, summary: dict[str, Any]) -> str:
    machine = next(iter(timeline.of(Machine)), None)
    if machine is None:
        return "no machine was booted"
    how = "software emulation" if machine.accel == "tcg" else machine.accel.upper()
    words = f"A real VM: Linux {machine.guest_kernel} under QEMU ({how}), guestd as a systemd service"
    if summary["transport"] == "vsock":
        words += ", virtio-vsock"
    return words if summary["passed"] else f"{words}. NOT VERIFIED, see summary.json"


def _cpu_note(summary: dict[str, Any]) -> str:
    cpu = summary["cpu"]
    first, peak = cpu["onset_to_first_online_seconds"], cpu["onset_to_peak_seconds"]
    if first is None:
        return "no CPU was added"
    count = cpu["peak_online_in_guest"]
    words = f"all {count}" if count == cpu["max"] else f"{count}"
    return f"first new CPU online {first:.2f} s after the onset, {words} after {peak:.2f} s"


def _memory_note(summary: dict[str, Any]) -> str:
    memory = summary["memory"]
    first = memory["onset_to_first_usable_seconds"]
    if first is None:
        return "no memory was added"
    kills = memory["oom_kills"]
    words = "no OOM kill" if not kills else f"{kills} OOM kills"
    return (
        f"peak {format_size(memory['peak_size_in_hypervisor_bytes'])}, "
        f"first of it usable {first:.2f} s after the onset, {words}"
    )


def _steps(highest: float, least: float) -> list[float]:
    step = least
    while highest / step > 7:
        step *= 2
    return [index * step for index in range(int(highest / step) + 1)]


def _ceil(value: float, unit: float) -> float:
    return -(-value // unit) * unit


def _text(x: float, y: float, words: str, style: str, anchor: str = "start") -> str:
    place = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}"{place}>{escape(words)}</text>'
