"""`guestctl estimators`: what guestd and its peers ask for on loads whose truth is known."""

import json
from typing import TYPE_CHECKING

from guestd.cli.simulate import PLAIN_WIDTH, exit_sim_missing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guestd.sim.estimators.compare import Score


def print_estimators(as_json: bool) -> None:
    """Play all shapes and print what came of it."""
    try:
        from guestd.sim.estimators import compare
    except ModuleNotFoundError as error:
        exit_sim_missing("estimators", error)
    scores = compare.compare()
    if as_json:
        print(json.dumps(compare.as_json(scores)))
    else:
        _print_table(scores)


def _print_table(scores: "Sequence[Score]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="What is asked for, against what is needed", title_justify="left")
    table.add_column("load")
    table.add_column("asker")
    for heading in ("asked after s", "too much ·s", "too little ·s", "changes", "most asked"):
        table.add_column(heading, justify="right")
    before = ""
    for one in scores:
        met = "never" if one.met_seconds is None else f"{one.met_seconds:.2f}"
        name = "" if one.shape == before else one.shape
        numbers = (met, f"{one.over:,.1f}", f"{one.under:,.1f}", f"{one.changes:,}", f"{one.highest:.2f}")
        table.add_row(name, one.asker, *numbers, style="bold" if one.asker == "guestd" else None)
        before = one.shape
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    console.print(table)
    console.print("CPUs or GiB, and those times seconds. What is asked for is there 0.3 s later.")
