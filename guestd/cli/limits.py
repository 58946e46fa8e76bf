"""`guestctl set-limits`."""

from typing import Annotated

import typer

from guestd.cli.broker import GuestName, Target, with_target
from guestd.cli.options import (
    Cpus,
    CpusOrNone,
    Output,
    OutputOption,
    Size,
    SizeOrNone,
    Timeout,
    Wait,
    Weight,
    wait_seconds,
)
from guestd.cli.steer import change
from guestd.cli.text import printable
from guestd.model.units import format_cpus, format_size
from guestd.model.view import GuestView, LimitsChange


@with_target
def set_limits(
    guest: GuestName,
    target: Target,
    cpu_min: Annotated[int | None, Cpus] = None,
    cpu_max: Annotated[int | None, Cpus] = None,
    cpu_weight: Annotated[int | None, Weight] = None,
    memory_min: Annotated[int | None, Size] = None,
    memory_max: Annotated[int | None, Size] = None,
    memory_weight: Annotated[int | None, Weight] = None,
    cpu_burst: Annotated[int | None, CpusOrNone] = None,
    cpu_burst_credit: Annotated[int | None, CpusOrNone] = None,
    cpu_burst_refill: Annotated[int | None, CpusOrNone] = None,
    memory_burst: Annotated[int | None, SizeOrNone] = None,
    memory_burst_credit: Annotated[int | None, SizeOrNone] = None,
    memory_burst_refill: Annotated[int | None, SizeOrNone] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Go back to the limits of the file.")] = False,
    wait: Wait = False,
    timeout: Timeout = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Changes limits of a guest; what is not named stays as it is.

    The new limits win over those of the configuration file until --reset, also over restarts. A burst is a
    ceiling above max, 0 for none; its credit counts CPU-seconds or bytes x seconds, its refill the same per second.
    """
    new = LimitsChange(
        cpu_min,
        cpu_max,
        cpu_weight,
        memory_min,
        memory_max,
        memory_weight,
        cpu_burst,
        cpu_burst_credit,
        cpu_burst_refill,
        memory_burst,
        memory_burst_credit,
        memory_burst_refill,
    )
    if reset and new != LimitsChange():
        raise typer.BadParameter("goes alone, without new limits", param_hint="--reset")
    if not reset and new == LimitsChange():
        raise typer.BadParameter("nothing to change; name a limit, or --reset", param_hint="set-limits")
    if cpu_min is not None and cpu_max is not None and cpu_min > cpu_max:
        raise typer.BadParameter(
            f"{format_cpus(cpu_min)} is above --cpu-max {format_cpus(cpu_max)}", param_hint="--cpu-min"
        )
    if memory_min is not None and memory_max is not None and memory_min > memory_max:
        raise typer.BadParameter(
            f"{format_size(memory_min)} is above --memory-max {format_size(memory_max)}",
            param_hint="--memory-min",
        )
    change(
        target,
        lambda client: client.reset_limits(guest) if reset else client.set_limits(guest, new),
        wait_seconds(wait, timeout),
        output,
        _words,
    )


def _words(guest: GuestView) -> str:
    low, high, weight, burst = guest.limits.min, guest.limits.max, guest.limits.weight, guest.limits.burst
    cpu_burst = f" burst {format_cpus(burst.cpu_millicores)}" if burst.cpu_millicores else ""
    memory_burst = f" burst {format_size(burst.memory_bytes)}" if burst.memory_bytes else ""
    return (
        f"{printable(guest.name)}: CPUs {format_cpus(low.cpu_millicores)}..{format_cpus(high.cpu_millicores)}"
        f"{cpu_burst} weight {weight.cpu_millicores},"
        f" memory {format_size(low.memory_bytes)}..{format_size(high.memory_bytes)}"
        f"{memory_burst} weight {weight.memory_bytes} (from {guest.limits_origin})"
    )
