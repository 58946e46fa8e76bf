"""What was measured of looking at a broker, judged against the targets, as JSON and as a table. Pure."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

SCHEMA = 1
JUDGED_GUESTS = 1000
STATUS_SECONDS = 0.6
SCRAPE_SECONDS = 0.15
PAINT_SECONDS = 1.0
WATCHED_CORES = 0.1
MEMORY_SHARE = 0.05


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and extremes."""
    known = {"count": len(values)}
    if not values:
        return {**known, "median": None, "min": None, "max": None}
    return {**known, "median": statistics.median(values), "min": min(values), "max": max(values)}


_OWNERS = {"record": ("Recorder.", "record"), "history": ("Store.", "history")}


def counted_share(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Which share of the broker's CPU time went into record and history between two answers of the bench's broker;
    `parts` are the calls and threads that this was.
    """
    process = after["process"] - before["process"]
    parts = {
        name: (value - before[where].get(name, 0.0)) / process
        for where in ("loop", "threads")
        for name, value in after[where].items()
    }
    shares = {
        word: sum(value for name, value in parts.items() if name.startswith(prefixes))
        for word, prefixes in _OWNERS.items()
    }
    return {**shares, "both": sum(shares.values()), "parts": parts}


def document(machine: dict[str, Any], guests: int, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything, as it is written to `monitor.json`. What was not measured is not reached.

    :param rounds: each with `status_seconds`, `scrape_seconds` (lists), `paint_seconds`, `rows_seconds`, and cores that
        the broker used: `quiet_cores`, `watched_cores`, `forgetful_cores`, and `counted`.
    """

    def each(name: str) -> list[Any]:
        return [one[name] for one in rounds if name in one]

    def flat(name: str) -> list[float]:
        return [value for values in each(name) for value in values]

    shares = [1 - one["forgetful_cores"] / one["quiet_cores"] for one in rounds if "forgetful_cores" in one]
    extra = [one["watched_cores"] - one["quiet_cores"] for one in rounds if "watched_cores" in one]
    measured = {
        "status_seconds": spread(flat("status_seconds")),
        "scrape_seconds": spread(flat("scrape_seconds")),
        "scrape_bytes": spread(each("scrape_bytes")),
        "first_paint_seconds": spread(each("paint_seconds")),
        "guests_on_page_seconds": spread(each("rows_seconds")),
        "quiet_cores": spread(each("quiet_cores")),
        "watched_cores": spread(each("watched_cores")),
        "watching_cores": spread(extra),
        "forgetful_cores": spread(each("forgetful_cores")),
        "memory_share": spread(shares),
        "counted_share": {
            word: spread([one[word] for one in each("counted")]) for word in ("record", "history", "both")
        },
    }
    judged = list(_judge(guests, measured))
    return {
        "schema": SCHEMA,
        "reached": all(one["reached"] for one in judged),
        "machine": machine,
        "guests": guests,
        "measured": measured,
        "targets": judged,
        "rounds": rounds,
    }


def _judge(guests: int, measured: dict[str, Any]) -> Iterator[dict[str, Any]]:
    def median(part: dict[str, Any]) -> float | None:
        return part["median"] if guests == JUDGED_GUESTS else None

    yield _target("guestctl status, from process start", median(measured["status_seconds"]), STATUS_SECONDS, "s")
    yield _target("a scrape of the metrics", median(measured["scrape_seconds"]), SCRAPE_SECONDS, "s")
    yield _target("the live page's first paint", median(measured["first_paint_seconds"]), PAINT_SECONDS, "s")
    yield _target("broker's CPU for a watched page", median(measured["watching_cores"]), WATCHED_CORES, "of a core")
    counted = median(measured["counted_share"]["both"])
    compared = median(measured["memory_share"])
    yield _target("record and history, counted", counted, MEMORY_SHARE, "of the broker's CPU")
    yield _target("record and history, with and without", compared, MEMORY_SHARE, "of the broker's CPU")


def _target(name: str, value: float | None, most: float, unit: str) -> dict[str, Any]:
    return {"name": name, "value": value, "most": most, "unit": unit, "reached": value is not None and value <= most}


def table(result: dict[str, Any]) -> list[str]:
    """The whole result in lines; what is not reached is said in numbers."""
    machine, measured = result["machine"], result["measured"]
    lines = [f"{machine['host_cpu']}, {machine['host_cores']} cores, guestd {machine['guestd']}", ""]
    lines.append(
        f"{result['guests']:,} guests, {len(result['rounds'])} rounds{'':>13}{'median':>12}{'least':>12}{'most':>12}"
    )
    for name, path, show in _ROWS:
        part: Any = measured
        for key in path.split("."):
            part = part[key]
        values = ("none" if part[key] is None else show(part[key]) for key in ("median", "min", "max"))
        lines.append(f"{name:<40}" + "".join(f"{value:>12}" for value in values))
    lines += ["", f"targets ({JUDGED_GUESTS:,} guests, medians)"]
    return lines + [_verdict(one) for one in result["targets"]]


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def _share(value: float) -> str:
    return f"{value:.1%}"


_ROWS: tuple[tuple[str, str, Any], ...] = (
    ("guestctl status, from process start", "status_seconds", _ms),
    ("a scrape of the metrics", "scrape_seconds", _ms),
    ("  its bytes on the wire", "scrape_bytes", "{:,.0f}".format),
    ("the live page's first paint", "first_paint_seconds", _ms),
    ("  until guests are on it", "guests_on_page_seconds", _ms),
    ("broker's share of a core, guests steady", "quiet_cores", _share),
    ("  the same, page watched", "watched_cores", _share),
    ("  more for the page", "watching_cores", _share),
    ("  without record and history", "forgetful_cores", _share),
    ("record and history, with and without", "memory_share", _share),
    ("record and history, counted", "counted_share.both", _share),
    ("  record alone", "counted_share.record", _share),
    ("  history alone", "counted_share.history", _share),
)


def _verdict(one: dict[str, Any]) -> str:
    show = _ms if one["unit"] == "s" else _share
    value = "not measured" if one["value"] is None else show(one["value"])
    unit = "" if one["unit"] == "s" else f" {one['unit']}"
    verdict = "reached" if one["reached"] else "not reached"
    return f"  {one['name']:<38}{value:>12}  {verdict} (at most {show(one['most'])}{unit})"
