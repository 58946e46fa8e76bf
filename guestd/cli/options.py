"""Options that several commands have, and the parsers of their values."""

from collections.abc import Callable
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Final

import typer

from guestd.cli import when
from guestd.model.units import format_cpus, format_size, parse_cpus, parse_size

_MAX_MILLICORES: Final = 1 << 31
_MAX_BYTES: Final = 1 << 56


class Accelerator(StrEnum):
    """What runs the VM's instructions."""

    KVM = "kvm"
    TCG = "tcg"


class Output(StrEnum):
    """How a command prints what it found."""

    TABLE = "table"
    JSON = "json"


def _amount(
    parse: Callable[[str], int], least: int, highest: int, show: Callable[[int], str]
) -> Callable[[str | int], int]:
    """A parser for an option: what is wrong with a value is said in words, and typer names the option."""

    def parsed(text: str | int) -> int:
        if isinstance(text, int):
            return text
        try:
            amount = parse(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        except OverflowError:
            amount = highest + 1
        if amount < least:
            raise typer.BadParameter(f"{text!r} must be above 0")
        if amount > highest:
            raise typer.BadParameter(f"{text!r} is above the highest possible value, {show(highest)}")
        return amount

    return parsed


def _weight(text: str | int) -> int:
    try:
        weight = int(text)
    except ValueError:
        weight = 0
    if not 1 <= weight <= 10_000:
        raise typer.BadParameter(f"{text!r} must be a whole number within 1..10000")
    return weight


def _point(text: str | datetime) -> datetime:
    if isinstance(text, datetime):
        return text
    try:
        return when.point(text, when.now())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _span(text: str | float) -> float:
    if not isinstance(text, str):
        return text
    try:
        return when.duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


OutputOption = Annotated[Output, typer.Option("--output", "-o", help="How to print it.")]
_CPUS, _SIZE = "CPUs such as 2, 1.5 or 250m", "A size such as 512MiB or 1.5GiB"
Cpus = typer.Option(parser=_amount(parse_cpus, 1, _MAX_MILLICORES, format_cpus), metavar="CPUS", help=f"{_CPUS}.")
Size = typer.Option(parser=_amount(parse_size, 1, _MAX_BYTES, format_size), metavar="SIZE", help=f"{_SIZE}.")
CpusOrNone = typer.Option(
    parser=_amount(parse_cpus, 0, _MAX_MILLICORES, format_cpus), metavar="CPUS", help=f"{_CPUS}; 0 for none."
)
SizeOrNone = typer.Option(
    parser=_amount(parse_size, 0, _MAX_BYTES, format_size), metavar="SIZE", help=f"{_SIZE}; 0 for none."
)
Weight = typer.Option(parser=_weight, metavar="1..10000", help="Share of what is scarce.")

_TIME = "a span such as 1h (ago), 14:02, or 2026-03-01T14:02:00"


def time_option(text: str) -> Any:
    """An option for a point in time; `text` begins its help."""
    return typer.Option(parser=_point, metavar="TIME", help=f"{text}: {_TIME}.", show_default=False)


Wait = Annotated[bool, typer.Option("--wait", help="Wait until the VM has settled into it; exit 1 when it does not.")]
Timeout = Annotated[
    float | None,
    typer.Option(
        parser=_span, metavar="SPAN", help="How long --wait waits; 60s when it is not said.", show_default=False
    ),
]
_WAIT_SECONDS: Final = 60.0


def wait_seconds(wait: bool, timeout: float | None) -> float | None:
    """How long to wait; None: not at all.

    :raise typer.BadParameter: When a timeout is named and nothing waits.
    """
    if timeout is not None and not wait:
        raise typer.BadParameter("only together with --wait", param_hint="--timeout")
    return (timeout or _WAIT_SECONDS) if wait else None
