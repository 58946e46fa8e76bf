"""`guestctl replay`: a recorded stretch of decisions, made again by the broker's own core.

The core is imported when the command runs: it needs numpy (extra ``broker``).
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guestd.cli.as_json import event_json
from guestd.cli.events import render
from guestd.cli.options import Output, OutputOption
from guestd.cli.screen import Line, paragraph, screen, show_json
from guestd.cli.text import printable
from guestd.cli.when import now
from guestd.model.event import Event, SeenEvent

if TYPE_CHECKING:
    from guestd.broker.record.replay import ReplayResult

_LONGEST_ACTION = 2000
_DIFFERENT, _UNUSABLE = 1, 2


def replay(
    file: Annotated[
        Path, typer.Argument(help="A file of record/ in the broker's state_dir.", metavar="FILE", show_default=False)
    ],
    guest: Annotated[
        str | None, typer.Option(metavar="NAME", help="Print only the decisions about this one.", show_default=False)
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Makes recorded decisions again, and says whether they come out the same.

    Exit code 1: something is decided differently now; the first difference is printed.
    """
    try:
        from guestd.broker.record.replay import replay as replay_file
    except ModuleNotFoundError as error:
        print(f"guestctl: {error.name} is missing; install it with: pip install 'guestd[broker]'", file=sys.stderr)
        raise typer.Exit(_UNUSABLE) from None
    result = replay_file(file)
    chosen = [event for event in result.decisions if guest in (None, event.guest)]
    if output is Output.JSON:
        _show_json(result, chosen)
    else:
        _show(result, chosen)
    if result.difference is not None:
        raise typer.Exit(_DIFFERENT)


def _show(result: "ReplayResult", chosen: list[Event]) -> None:
    out, present = screen(), now()
    lines: list[Line] = [line for event in chosen for line in render(SeenEvent(event), present, out.width)]
    if result.cut:
        lines.append((("The file ends in the middle of an entry: what came after it is lost.", "yellow"),))
    count = f"{len(result.decisions)} decisions in {result.rounds} rounds replayed"
    if result.difference is None:
        lines.append(((f"{count}, all the same", "bold"),))
    else:
        at = result.difference.at.astimezone().isoformat(sep=" ", timespec="milliseconds")
        lines.append(((f"{count} the same, then a difference at {at}:", "red"),))
        for word, action in (("recorded", result.difference.recorded), ("replayed", result.difference.replayed)):
            lines += paragraph(((f"  {word}  ", "dim"),), printable(action, _LONGEST_ACTION), out.width, indent=4)
    out.show(lines)


def _show_json(result: "ReplayResult", chosen: list[Event]) -> None:
    difference = result.difference and {
        "at": result.difference.at.isoformat(),
        "recorded": result.difference.recorded,
        "replayed": result.difference.replayed,
    }
    fields = {
        "version": result.header.guestd,
        "epoch": result.header.epoch,
        "rounds": result.rounds,
        "decisions": len(result.decisions),
        "events": [event_json(event) for event in chosen],
        "cut": result.cut,
        "difference": difference,
    }
    show_json("replay", fields)
