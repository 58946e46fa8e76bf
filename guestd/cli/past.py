"""`guestctl events`, `history` and `explain`: what was, and why."""

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from guestd.cli import when
from guestd.cli.broker import GuestName, Target, guest_names, with_target
from guestd.cli.options import Output, OutputOption, time_option
from guestd.cli.screen import screen, show_json
from guestd.cli.text import printable
from guestd.model.errors import GuestdError, UnreachableError
from guestd.model.event import EventQuery, SeenEvent
from guestd.model.resources import Kind

if TYPE_CHECKING:
    from guestd.wire.client import BrokerClient


@with_target
def events(
    target: Target,
    guest: Annotated[
        str, typer.Argument(metavar="GUEST", help="Only of this one.", show_default=False, autocompletion=guest_names)
    ] = "",
    since: Annotated[datetime | None, time_option("Not before")] = None,
    until: Annotated[datetime | None, time_option("Before")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with those that come.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many of the past, the newest.")] = 50,
    output: OutputOption = Output.TABLE,
) -> None:
    """Shows what happened, oldest first: decisions with their reasons, and what came of them.

    With --follow and --output json, every event is one line of JSON.
    """
    if follow and until is not None:
        raise typer.BadParameter("not together with --follow", param_hint="--until")
    _check_range(since, until)
    query = EventQuery(guest, since, until, limit=limit, newest=True)

    async def work(client: "BrokerClient") -> None:
        # What comes between the list and the stream is in the stream: it begins after the list, or where that is empty
        # after what was newest before it.
        newest = await client.events(EventQuery(limit=1, newest=True)) if follow else ()
        found = await client.events(query)
        if guest and not found:
            await client.guest(guest)  # one that never was is an error, one that was removed has its events
        if not follow:
            _print_events(tuple(SeenEvent(event) for event in found), output)
            return
        for event in found:
            _print_event(SeenEvent(event), output)
        last = (found or newest)[-1].id if found or newest else 0
        try:
            async for seen in client.watch_events(guest, last):
                last = seen.event.id
                _print_event(seen, output)
        except UnreachableError as error:
            raise UnreachableError(f"no more events after number {last}: {error}") from error

    target.run(work)


@with_target
def history(
    guest: GuestName,
    target: Target,
    since: Annotated[datetime | None, time_option("From; an hour ago when it is not said")] = None,
    until: Annotated[datetime | None, time_option("To; now when it is not said")] = None,
    kind: Annotated[Kind | None, typer.Option(help="Only this one.", show_default=False)] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Plots what a guest needed, was granted, had plugged and could use.

    Where there is no terminal of at least 60 columns, a table stands for the plot.
    """
    begin = since or when.point("1h", when.now())
    _check_range(begin, until)
    out = screen()
    points = 300 if out.width is None else max(20, min(300, out.width))
    found = target.run(lambda client: client.history(guest, begin, until, points))
    kinds = tuple(Kind) if kind is None else (kind,)
    if output is Output.JSON:
        from guestd.cli.as_json import history_json

        show_json("history", history_json(guest, found, kinds))
        return
    if not found.points:
        raise GuestdError(f"{printable(guest)}: nothing is recorded of that time")
    from guestd.cli.history import render

    out.show(render(guest, found, kinds, out))


@with_target
def explain(
    guest: GuestName,
    target: Target,
    at: Annotated[datetime | None, time_option("As of then, from what is recorded")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Says why a guest has what it has, and what it would take to get more."""
    if at is not None and at > when.now():
        raise typer.BadParameter(f"{when.shown(at, when.now())} is in the future", param_hint="--at")
    found = target.run(lambda client: client.explain(guest, at))
    if output is Output.JSON:
        from guestd.cli.as_json import explanation_json

        show_json("explanation", explanation_json(found, at))
    else:
        from guestd.cli.explain import render

        out = screen()
        out.show(render(found, at, when.now(), out.width))
    if found.unknown_time and at is not None:
        raise GuestdError(f"nothing is recorded of {when.shown(at, when.now())}; guestctl events {guest} shows what is")


def _check_range(since: datetime | None, until: datetime | None) -> None:
    if since is not None and until is not None and since >= until:
        raise typer.BadParameter("must be after --since", param_hint="--until")


def _print_events(seen: tuple[SeenEvent, ...], output: Output) -> None:
    if output is Output.JSON:
        from guestd.cli.as_json import event_json

        show_json("events", {"events": [event_json(one.event) for one in seen]})
    elif seen:
        for one in seen:
            _print_event(one, output)
    else:
        screen().show([(("No events.", ""),)])


def _print_event(seen: SeenEvent, output: Output) -> None:
    if output is Output.JSON:
        from guestd.cli.as_json import event_json

        show_json("event", {"event": event_json(seen.event), "missed": seen.missed})
        return
    from guestd.cli.events import render

    out = screen()
    out.show(render(seen, when.now(), out.width))
