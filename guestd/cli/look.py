"""`guestctl status`, `guestctl top` and `guestctl get`: what there is now."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Annotated, Final

import typer

from guestd.cli.broker import GuestName, Target, with_target
from guestd.cli.options import Output, OutputOption
from guestd.cli.screen import screen, show_json
from guestd.model.errors import UnreachableError
from guestd.model.view import GuestRemoved, GuestView, HostView

if TYPE_CHECKING:
    from guestd.wire.client import BrokerClient

_WATCH_INTERVAL_SECONDS: Final = 0.25
_PLAIN_INTERVAL_SECONDS: Final = 1.0
_SENT_SECONDS: Final = 0.001


@with_target
def status(
    target: Target,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on, and show every change.")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Shows the host and its guests.

    With --watch and --output json, every change is one line of JSON.
    """

    async def once(client: "BrokerClient") -> None:
        asked = asyncio.gather(client.host(), client.guests())
        await asyncio.sleep(_SENT_SECONDS)  # the question is on its way: until it is answered there is time for imports
        printed = _status_printer(output)
        printed(*await asked)

    target.run((lambda client: _watch(client, output)) if watch else once)


@with_target
def get(guest: GuestName, target: Target, output: OutputOption = Output.TABLE) -> None:
    """Shows all that is known of one guest."""
    view = target.run(lambda client: client.guest(guest))
    if output is Output.JSON:
        from guestd.cli.as_json import guest_json

        show_json("guest", {"guest": guest_json(view)})
    else:
        from guestd.cli.one_guest import render

        out = screen()
        out.show(render(view, out.width))


@with_target
def top(target: Target) -> None:
    """Shows the host and its guests, live, on the whole terminal."""
    from guestd.cli.top.run import run_top

    raise typer.Exit(run_top(target))


def _status_printer(output: Output) -> Callable[[HostView, tuple[GuestView, ...]], None]:
    if output is Output.JSON:
        from guestd.cli.as_json import status_json

        return lambda host, guests: show_json("status", status_json(host, guests))
    from guestd.cli.status import render

    out = screen()
    return lambda host, guests: out.show(render(host, guests, out.width))


async def _watch(client: "BrokerClient", output: Output) -> None:
    """Shows the status again after each change, in place on a terminal that can."""
    out = screen()
    with contextlib.ExitStack() as stack:
        live = None
        if output is Output.TABLE and out.colours:
            from rich.live import Live

            live = stack.enter_context(Live(auto_refresh=False, screen=False))
        try:
            async with contextlib.aclosing(_states(client)) as states:
                async for host, guests in states:
                    if live is None:
                        _status_printer(output)(host, guests)
                        await asyncio.sleep(_PLAIN_INTERVAL_SECONDS if output is Output.TABLE else 0)
                        continue
                    from rich.text import Text

                    from guestd.cli.status import fitted, render

                    out = screen()
                    lines = fitted(render(host, guests, out.width), (out.height or 24) - 1)
                    live.update(Text.from_ansi("\n".join(out.text(line) for line in lines)), refresh=True)
                    await asyncio.sleep(_WATCH_INTERVAL_SECONDS)
        except UnreachableError as error:
            raise UnreachableError(f"no more changes: {error}") from error


async def _states(client: "BrokerClient") -> AsyncGenerator[tuple[HostView, tuple[GuestView, ...]], None]:
    """The whole state now and after each change; what changes while the reader is busy comes as one."""
    guests = {guest.name: guest for guest in await client.guests()}
    changed = asyncio.Event()

    async def follow() -> None:
        async for change in client.watch_guests(_WATCH_INTERVAL_SECONDS):
            if isinstance(change, GuestRemoved):
                guests.pop(change.name, None)
            else:
                guests[change.name] = change
            changed.set()

    following = asyncio.create_task(follow())
    try:
        while True:
            yield await client.host(), tuple(guests[name] for name in sorted(guests))
            waiting = asyncio.create_task(changed.wait())
            await asyncio.wait({waiting, following}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if following.done():
                following.result()
                return
            changed.clear()
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
