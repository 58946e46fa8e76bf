"""`guestctl pause`, `resume` and `reclaim`, and what all commands that change something have in common."""

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guestd.cli.broker import GuestName, Target, with_target
from guestd.cli.options import CpusOrNone, Output, OutputOption, SizeOrNone, Timeout, Wait, wait_seconds
from guestd.cli.screen import Line, paragraph, screen, show_json
from guestd.cli.settle import Missing, missing_for_pause, missing_for_reclaim, missing_for_rest, settled
from guestd.cli.text import printable
from guestd.model.explanation import ReclaimedResource, ReclaimRequest
from guestd.model.view import GuestView

if TYPE_CHECKING:
    from guestd.wire.client import BrokerClient


def change(
    target: Target,
    call: "Callable[[BrokerClient], Coroutine[Any, Any, GuestView]]",
    seconds: float | None,
    output: Output,
    words: Callable[[GuestView], str],
    missing: Missing = missing_for_rest,
) -> None:
    """Change something on this host, wait for it if `seconds` are given, and say what there is now.

    :raise DeniedError: When the target is no broker of this machine.
    :raise GuestdError: When nothing came of it in time.
    """
    target.need_local()

    async def work(client: "BrokerClient") -> GuestView:
        guest = await call(client)
        return guest if seconds is None else await settled(client, guest, missing, seconds)

    guest = target.run(work)
    if output is Output.JSON:
        from guestd.cli.as_json import guest_json

        show_json("guest", {"guest": guest_json(guest)})
    else:
        out = screen()
        out.show(paragraph((), words(guest), out.width))


@with_target
def pause(
    guest: GuestName,
    target: Target,
    wait: Wait = False,
    timeout: Timeout = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Leaves a VM as it is until resume; it goes on running.

    With --wait, until a resize that is under way has come to its end.
    """
    seconds = wait_seconds(wait, timeout)
    change(
        target,
        lambda client: client.pause_guest(guest),
        seconds,
        output,
        lambda view: f"{printable(view.name)}: paused; it keeps what it has",
        missing_for_pause,
    )


@with_target
def resume(
    guest: GuestName,
    target: Target,
    wait: Wait = False,
    timeout: Timeout = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Decides about a paused VM again."""
    seconds = wait_seconds(wait, timeout)
    change(
        target,
        lambda client: client.resume_guest(guest),
        seconds,
        output,
        lambda view: f"{printable(view.name)}: resumed",
    )


@with_target
def reclaim(
    guest: GuestName,
    target: Target,
    cpu: Annotated[int | None, CpusOrNone] = None,
    memory: Annotated[int | None, SizeOrNone] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be asked of the guest.")] = False,
    wait: Wait = False,
    timeout: Timeout = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Asks a guest now for what it can spare.

    At most so much as is named, of what is named; without --cpu and --memory all that is spare of both.
    """
    target.need_local()
    seconds = wait_seconds(wait, timeout)
    if dry_run and wait:
        raise typer.BadParameter("not together with --dry-run: nothing is done", param_hint="--wait")
    if cpu is not None or memory is not None:
        cpu, memory = cpu or 0, memory or 0
    request = ReclaimRequest(cpu, memory, dry_run)

    async def work(client: "BrokerClient") -> None:
        resources, view = await client.reclaim_guest(guest, request)
        _print_reclaim(resources, view, output, dry_run)
        if seconds is not None:
            await settled(client, view, missing_for_reclaim(resources), seconds)

    target.run(work)


def _print_reclaim(resources: tuple[ReclaimedResource, ...], guest: GuestView, output: Output, dry_run: bool) -> None:
    if output is Output.JSON:
        from guestd.cli.as_json import reclaim_json

        show_json("reclaim", reclaim_json(resources, guest, dry_run))
        return
    out = screen()
    out.show(line for one in resources for line in _reclaim_lines(one, guest, dry_run, out.width))


def _reclaim_lines(one: ReclaimedResource, guest: GuestView, dry_run: bool, width: int | None) -> list[Line]:
    kind = one.kind
    asked = "would be asked" if dry_run else "is asked"
    what = f"has {kind.show(one.reserved)}"
    what += f", {asked} to go down to {kind.show(one.goal)}" if one.goal < one.reserved else ", keeps all of it"
    why = f"; {printable(one.reason.text)}" if one.reason.text else ""
    return paragraph(((printable(guest.name), "bold"), (f"  {kind}: ", "")), f"{what}{why}", width)
