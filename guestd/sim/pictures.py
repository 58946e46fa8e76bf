"""Pictures of a simulation, drawn from its JSON; the same JSON gives the same file.

Colours are those of Okabe and Ito, which are told apart without seeing red and green; what matters is also told by
tone or place. matplotlib is imported when the first picture is drawn: it is in the extra ``sim``.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from guestd.model.units import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, SKY, VERMILION, PURPLE, GREY, INK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#56B4E9",
    "#D55E00",
    "#CC79A7",
    "#8A9099",
    "#1F2937",
)
_STYLE: Final[Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E7EB",
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "svg.hashsalt": "guestd",
    "svg.fonttype": "none",
    "figure.facecolor": "#FFFFFF",
}
_LABELLED_SHARE: Final = 0.035  # of the picture's height: a thinner band has no room for its name


@contextmanager
def canvas(
    width: float, height: float, rows: Sequence[float] = (1.0,), columns: int = 1
) -> "Iterator[tuple[Figure, Any]]":
    """A figure in inches and its axes, (rows, columns); rows have these heights in proportion.

    :raise ModuleNotFoundError: When matplotlib is not installed.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={"height_ratios": list(rows)})


def save(figure: "Figure", path: Path) -> None:
    """Write a figure; the suffix says how (``.svg``, ``.png``)."""
    metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata=metadata, dpi=110)


def time_axis(axes: "Axes", seconds: float) -> tuple[float, str]:
    """Seconds per unit of a time axis of that length, and the unit; the axis is labelled."""
    scale, unit = next(
        (scale, unit)
        for limit, scale, unit in ((300, 1.0, "s"), (14_400, 60.0, "min"), (1e18, 3600.0, "h"))
        if seconds <= limit
    )
    axes.set_xlabel(f"virtual time ({unit})")
    axes.set_xlim(0, seconds / scale)
    return scale, unit


def draw_pool(document: Mapping[str, Any], kind: str, path: Path) -> None:
    """One kind of resource of a run: who holds what of the host, what is free, and how often it is moved.

    :param document: of `guestd.sim.result.as_json`; :param kind: ``cpu`` or ``memory``.
    """
    with canvas(11, 8.2, rows=(4, 1.3, 1.3)) as (figure, axes):
        pool, free, moves = axes[:, 0]
        memory = kind == "memory"
        unit, per = ("GiB", float(GIB)) if memory else ("CPUs", 1.0)
        times = np.array(document["series"]["times_seconds"])
        scale, _ = time_axis(moves, float(times[-1]))
        at = times / scale
        capacity = document["host"]["memory_bytes" if memory else "cpus"] / per
        held = _stack(document, "memory_held" if memory else "cpus_held") / per
        used = _stack(document, "memory_used" if memory else "tasks") / per
        needed = _stack(document, "memory_needed" if memory else "cpus_needed").sum(axis=0) / per
        _bands(pool, at, held, used, list(document["series"]["vms"]))
        pool.plot(
            at, np.minimum(needed, 1.15 * capacity), color=VERMILION, lw=1.1, ls=(0, (4, 2)), label="needed by all"
        )
        pool.axhline(capacity, color=INK, lw=1.4, label="the host has")
        pool.set_ylim(0, max(capacity * 1.08, float(held.sum(axis=0).max()) * 1.05))
        pool.set_ylabel(unit)
        pool.set_title(f"{'Memory' if memory else 'CPUs'}: what each VM holds (light) and uses (dark)")
        pool.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, fontsize=9)
        left = capacity - held.sum(axis=0)
        free.fill_between(at, left, step="post", color=SKY, alpha=0.55, lw=0)
        free.set_ylim(0, None)
        free.set_ylabel(unit)
        free.set_title("Free pool")
        _moves(moves, document, at, scale)
        for upper in (pool, free):
            upper.set_xlim(*moves.get_xlim())
            upper.tick_params(labelbottom=False)
        save(figure, path)


def draw_vms(document: Mapping[str, Any], kind: str, path: Path, most: int = 12) -> None:
    """One panel for each VM: its demand against its grant, and where it was short. At most so many VMs."""
    names = list(document["series"]["vms"])[:most]
    memory = kind == "memory"
    unit, per = ("GiB", float(GIB)) if memory else ("CPUs", 1.0)
    times = np.array(document["series"]["times_seconds"])
    columns = 1 if len(names) <= 3 else 2
    rows = -(-len(names) // columns)
    with canvas(11, 0.9 + 1.75 * rows, rows=(1.0,) * rows, columns=columns) as (figure, grid):
        for index, axes in enumerate(grid.ravel()):
            if index >= len(names):
                axes.set_axis_off()
                continue
            name = names[index]
            series = document["series"]["vms"][name]
            scale, _ = time_axis(axes, float(times[-1]))
            at = times / scale
            held = np.array(series["memory_held" if memory else "cpus_held"]) / per
            used = np.array(series["memory_used" if memory else "tasks"]) / per
            usable = np.array(series["memory_usable" if memory else "cpus_online"]) / per
            needed = np.array(series["memory_needed" if memory else "cpus_needed"]) / per
            axes.fill_between(at, held, step="post", color=SKY, alpha=0.4, lw=0, label="held")
            axes.fill_between(at, np.minimum(used, usable), color=BLUE, alpha=0.75, lw=0, label="used")
            axes.fill_between(at, usable, used, where=used > usable, color=VERMILION, lw=0, label="lacking")
            axes.step(at, needed, where="post", color=INK, lw=0.8, ls=(0, (3, 2)), label="needed")
            axes.set_title(name, fontsize=10)
            axes.set_ylabel(unit)
            axes.set_ylim(0, 1.3 * max(float(held.max()), float(used.max())))
            if index // columns < rows - 1 and index + columns < len(names):
                axes.set_xlabel("")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=4, fontsize=9)
        save(figure, path)


def _stack(document: Mapping[str, Any], column: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(VMs, times)."""
    return np.array([series[column] for series in document["series"]["vms"].values()], dtype=np.float64)


def _bands(axes: "Axes", at: Any, held: Any, used: Any, names: Sequence[str]) -> None:
    """VMs on top of each other; neighbours differ in colour, and a band with room for it has its name in it."""
    from matplotlib.patheffects import withStroke

    base = np.zeros(held.shape[1])
    height = float(held.sum(axis=0).max())
    for index, name in enumerate(names):
        colour = (BLUE, ORANGE, GREEN)[index % 3]
        top = base + held[index]
        axes.fill_between(at, base, top, step="post", color=colour, alpha=0.28, lw=0)
        axes.fill_between(at, base, base + np.minimum(used[index], held[index]), color=colour, alpha=0.75, lw=0)
        axes.step(at, top, where="post", color="white", lw=0.7)
        inner = slice(len(at) // 20, max(len(at) // 20 + 1, len(at) - len(at) // 20))
        widest = inner.start + int(np.argmax(_smooth(held[index])[inner]))
        if held[index][widest] > _LABELLED_SHARE * height and len(names) <= 24:
            words = axes.text(
                at[widest], base[widest] + held[index][widest] / 2, name, fontsize=8, ha="center", va="center"
            )
            words.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        base = top


def _smooth(values: Any) -> Any:
    """Means over a tenth of all: where a band is thick for long."""
    length = max(1, len(values) // 10)
    return np.convolve(values, np.ones(length) / length, mode="same")


def _moves(axes: "Axes", document: Mapping[str, Any], at: Any, scale: float) -> None:
    """Resizes of all VMs, counted in equal parts of the time."""
    resizes = _stack(document, "resizes").sum(axis=0)
    parts = min(60, len(at) - 1)
    edges = np.linspace(0, len(at) - 1, parts + 1).astype(int)
    counts = np.diff(resizes[edges])
    axes.bar(at[edges[:-1]], counts, width=np.diff(at[edges]) * 0.85, align="edge", color=GREY)
    seconds = float(np.median(np.diff(at[edges]))) * scale
    axes.set_ylabel(f"per {seconds:.0f} s")
    axes.set_title("Resizes of all VMs (CPUs and memory)")
