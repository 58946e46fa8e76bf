"""Pictures of the scoreboard; the same results give the same files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from guestd.model.units import GIB
from guestd.sim.pictures import BLUE, GREY, INK, ORANGE, SKY, VERMILION, canvas, save
from guestd.sim.scoreboard.fast import EXAMPLE, GUESTD, HOST_BYTES, UNMET_SHARE, Result
from guestd.sim.scoreboard.fleet import KERNEL_BYTES, STEP_SECONDS, WARM_UP_SECONDS, Fleet
from guestd.sim.scoreboard.report import AIMS, AUTOPILOT, ORACLE, SlowScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = npt.NDArray[np.float64]

_EXAMPLE_SECONDS: Final = 600.0


def draw_slow(slow: SlowScores, path: Path) -> None:
    """Regime (a): slack against unmet demand, a panel for each data set. Lower left is better."""
    with canvas(4.6 * len(slow), 4.8, columns=len(slow)) as (figure, grid):
        for axes, (name, scores) in zip(grid[0], slow.items(), strict=True):
            points = {name: (100 * one.slack, 100 * one.unmet) for name, one in scores.items() if one.native}
            axes.set_yscale("symlog", linthresh=0.1, linscale=0.6)
            axes.set_xlim(0, min(100.0, 1.75 * max(x for x, _ in points.values())))
            axes.set_yticks([0, 0.05, 0.1, 0.5, 1, 5, 10], ["0", "0.05", "0.1", "0.5", "1", "5", "10"])
            axes.set_ylim(-0.03, max(1.0, max(y for _, y in points.values()) * 2))
            if AUTOPILOT in points:
                x, y = points[AUTOPILOT]
                axes.fill_between([0, x], -0.03, y, color=SKY, alpha=0.18, lw=0)
            if name in AIMS:
                axes.axvline(100 * AIMS[name], color=BLUE, lw=1, ls=(0, (4, 3)))
                axes.text(100 * AIMS[name], 0.985, " aim", transform=axes.get_xaxis_transform(), color=BLUE, va="top")
            _points(axes, points)
            axes.set_title(name)
            axes.set_xlabel("slack (% of what was given)")
        grid[0, 0].set_ylabel("unmet demand (% of use)")
        figure.suptitle(
            "5-minute traces: lower left is better; tinted: better than Autopilot-like on both", fontsize=11
        )
        save(figure, path)


def draw_vms_per_host(fast: Mapping[str, tuple[Fleet, Sequence[Result]]], path: Path) -> None:
    """Regime (b): VMs per host at equal unmet demand, a panel for each fleet."""
    most = max(len(results) for _, results in fast.values())
    with canvas(6.2 * len(fast), 1.5 + 0.36 * most, columns=len(fast)) as (figure, grid):
        for axes, (name, (fleet, results)) in zip(grid[0], fast.items(), strict=True):
            ordered = sorted(results, key=lambda one: (one.vms_per_host(fleet.vms) or 0.0, -one.ample.unmet_share))
            longest = max(one.vms_per_host(fleet.vms) or 0.0 for one in ordered)
            for row, one in enumerate(ordered):
                value = one.vms_per_host(fleet.vms)
                colour = {GUESTD: BLUE, ORACLE: INK}.get(one.policy, GREY)
                if value is None:
                    words = f"never: {one.ample.unmet_share:.2%} unmet with memory for all"
                    axes.text(0.01 * longest, row, words, va="center", fontsize=8.5, color=VERMILION)
                    continue
                axes.barh(row, value, color=colour, height=0.7)
                moves = one.fitting.resizes_per_vm_hour if one.fitting else 0.0
                axes.text(value, row, f" {value:.1f}   {moves:,.0f} resizes/VM·h", va="center", fontsize=8.5)
            axes.set_yticks(range(len(ordered)), [one.policy for one in ordered])
            for label in axes.get_yticklabels():
                label.set_fontweight("bold" if label.get_text() == GUESTD else "normal")
            axes.set_xlim(0, longest * 1.42)
            axes.set_ylim(-0.6, len(ordered) - 0.4)
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
            axes.set_title(f"{name} ({fleet.vms} VMs)")
            axes.set_xlabel(f"VMs per {HOST_BYTES // GIB} GiB host with at most {UNMET_SHARE:.1%} of the demand unmet")
        save(figure, path)


def draw_example(fleet: Fleet, used: Array, results: Sequence[Result], policies: Sequence[str], path: Path) -> None:
    """One VM's use, and what each policy gave it on the host that was just enough for that policy."""
    known = {one.policy: one for one in results}
    shown = [known[name] for name in policies if name in known]
    first = round(WARM_UP_SECONDS / STEP_SECONDS)
    part = slice(*_liveliest(used[first:, EXAMPLE], round(_EXAMPLE_SECONDS / STEP_SECONDS), first))
    minutes = np.arange(part.stop - part.start) * STEP_SECONDS / 60
    needed = (used[part, EXAMPLE] + KERNEL_BYTES) / GIB
    rows = -(-len(shown) // 2)
    with canvas(11, 0.7 + 2.1 * rows, rows=(1.0,) * rows, columns=2) as (figure, grid):
        top = max(float(one.example[part].max()) for one in shown) / GIB * 1.05
        for index, axes in enumerate(grid.ravel()):
            if index >= len(shown):
                axes.set_axis_off()
                continue
            one = shown[index]
            given = one.example[part] / GIB
            colour = BLUE if one.policy == GUESTD else ORANGE
            axes.fill_between(minutes, needed, color=GREY, alpha=0.45, lw=0, label="needed")
            axes.fill_between(minutes, given, needed, where=needed > given, color=VERMILION, lw=0, label="lacking")
            axes.plot(minutes, given, color=colour, lw=1.5, drawstyle="steps-post")
            outcome = one.fitting or one.ample
            note = f"slack {outcome.slack_share:.0%}, short {outcome.short_seconds_per_vm_hour:.0f} s per VM·h"
            axes.set_title(f"{one.policy}: {note}", fontsize=10)
            axes.set_xlim(0, minutes[-1])
            axes.set_ylim(0, top)
            if index % 2 == 0:
                axes.set_ylabel("GiB")
            if index + 2 >= len(shown):
                axes.set_xlabel("time (min)")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=9)
        figure.suptitle(f"{fleet.name}: what one VM needs, and what it is given (line)", x=0.01, ha="left", fontsize=11)
        save(figure, path)


def _liveliest(used: Array, length: int, offset: int) -> tuple[int, int]:
    """Where a VM's use moves most: a part of so many steps, its ends counted from the start of the run."""
    if len(used) <= length:
        return offset, offset + len(used)
    moved = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(used)))])
    begin = int(np.argmax(moved[length - 1 :] - moved[: len(moved) - length + 1]))
    return offset + begin, offset + begin + length


def _points(axes: "Axes", points: Mapping[str, tuple[float, float]]) -> None:
    """A marker and a name for each policy, one for those at the same place; names move apart where they would lie on
    each other or beyond the frame.
    """
    together: dict[tuple[float, float], list[str]] = {}
    for name, (x, y) in points.items():
        together.setdefault((round(x, 2), round(y, 4)), []).append(name)
    places = {point: axes.transData.transform(point) for point in together}
    right, top = axes.transAxes.transform((1, 1))
    _, bottom = axes.transAxes.transform((0, 0))
    taken = [(px - 5.0, py, 10.0) for px, py in places.values()]
    for point, names in sorted(together.items(), key=lambda entry: (GUESTD not in entry[1], entry[0])):
        mine, words = GUESTD in names, ", ".join(names)
        colour = BLUE if mine else INK if ORACLE in names else GREY
        axes.plot(*point, marker="*" if mine else "D" if ORACLE in names else "o", ms=14 if mine else 6, color=colour)
        px, py = places[point]
        width = 6.8 * len(words)
        tx = px - 9 - width if px + 9 + width > right else px + 9
        lifts = (0, 13, -13, 26, -26, 39, -39, 52, -52)
        ty = next((py + lift for lift in lifts if _free(tx, py + lift, width, bottom, top, taken)), py)
        taken.append((tx, ty, width))
        axes.annotate(
            words, point, xytext=((tx - px) * 72 / 100, (ty - py) * 72 / 100), textcoords="offset points", va="center",
            fontsize=9, color=colour if mine else INK, fontweight="bold" if mine else "normal",
            arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.5} if ty != py else None,
        )  # fmt: skip


def _free(
    x: float, y: float, width: float, bottom: float, top: float, taken: Sequence[tuple[float, float, float]]
) -> bool:
    """Whether a name has room there: inside the frame, below its head, and on none that is there."""
    inside = bottom + 6 < y < top - 22
    return inside and all(abs(y - y0) > 11 or x > x0 + w or x + width < x0 for x0, y0, w in taken)
