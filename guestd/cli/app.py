"""The commands of `guestctl`.

Nothing heavy is imported until a command needs it: grpc with the first call to a broker, the lab with
`lab`, `demo` and the benches.
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn, TypeVar

import typer

import guestd
from guestd.cli.scoreboard import scoreboard
from guestd.cli.simulate import simulate
from guestd.cli.text import printable
from guestd.model.units import format_cpus, format_size, parse_cpus, parse_size
from guestd.model.view import GuestRemoved, GuestView, HostView, LimitsChange

if TYPE_CHECKING:
    from rich.console import Console

    from guestd.wire.client import BrokerClient

_T = TypeVar("_T")

DEFAULT_RUN_DIR: Final = Path("/run/guestd-broker")
_MAX_MILLICORES: Final = 1 << 31
_MAX_BYTES: Final = 1 << 56
_WATCH_INTERVAL_SECONDS: Final = 0.25
_PLAIN_INTERVAL_SECONDS: Final = 1.0


class Accelerator(StrEnum):
    """What runs the VM's instructions."""

    KVM = "kvm"
    TCG = "tcg"


class Output(StrEnum):
    """How a command prints what it found."""

    TABLE = "table"
    JSON = "json"


app = typer.Typer(
    help="Looks at and steers the virtual machines that guestd-broker serves.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"guestctl {guestd.__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _parameter(parse: Callable[[str], int], highest: int, show: Callable[[int], str]) -> Callable[[str | int], int]:
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
        if amount <= 0:
            raise typer.BadParameter(f"{text!r} must be above 0")
        if amount > highest:
            raise typer.BadParameter(f"{text!r} is above the highest possible value, {show(highest)}")
        return amount

    return parsed


_cpus = _parameter(parse_cpus, _MAX_MILLICORES, format_cpus)
_size = _parameter(parse_size, _MAX_BYTES, format_size)


def _weight(text: str | int) -> int:
    """A parser like those above, for a plain number."""
    try:
        weight = int(text)
    except ValueError:
        weight = 0
    if not 1 <= weight <= 10_000:
        raise typer.BadParameter(f"{text!r} must be a whole number within 1..10000")
    return weight


_RunDir = Annotated[
    Path,
    typer.Option("--run-dir", envvar="GUESTD_RUN_DIR", help="Directory of the broker's sockets.", metavar="DIR"),
]
_Output = Annotated[Output, typer.Option("--output", "-o", help="How to print it.")]
_Cpus = typer.Option(parser=_cpus, metavar="CPUS", help="CPUs such as 2, 1.5 or 250m.")
_Size = typer.Option(parser=_size, metavar="SIZE", help="A size such as 512MiB or 1.5GiB.")
_Weight = typer.Option(parser=_weight, metavar="1..10000", help="Share of what is scarce.")


@app.command()
def status(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on, and show every change.")] = False,
    output: _Output = Output.TABLE,
    run_dir: _RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Shows the host and its guests.

    With --watch and --output json, every change is one line of JSON.
    """
    if not watch:
        host, guests = asyncio.run(_with_broker(run_dir, _read))
        _print_status(host, guests, output)
        return
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_with_broker(run_dir, lambda client: _watch(client, output)))


@app.command("set-limits")
def set_limits(
    guest: Annotated[str, typer.Argument(help="Name of the guest.", show_default=False)],
    cpu_min: Annotated[int | None, _Cpus] = None,
    cpu_max: Annotated[int | None, _Cpus] = None,
    cpu_weight: Annotated[int | None, _Weight] = None,
    memory_min: Annotated[int | None, _Size] = None,
    memory_max: Annotated[int | None, _Size] = None,
    memory_weight: Annotated[int | None, _Weight] = None,
    cpu_burst: Annotated[int | None, _Cpus] = None,
    cpu_burst_credit: Annotated[int | None, _Cpus] = None,
    cpu_burst_refill: Annotated[int | None, _Cpus] = None,
    memory_burst: Annotated[int | None, _Size] = None,
    memory_burst_credit: Annotated[int | None, _Size] = None,
    memory_burst_refill: Annotated[int | None, _Size] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Go back to the limits of the file.")] = False,
    output: _Output = Output.TABLE,
    run_dir: _RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Changes limits of a guest; what is not named stays as it is.

    The new limits win over those of the configuration file until --reset, also over restarts. A burst is a
    ceiling above max, 0 for none; its credit counts CPU-seconds or bytes x seconds, its refill the same per second.
    """
    change = LimitsChange(
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
    if reset and change != LimitsChange():
        raise typer.BadParameter("goes alone, without new limits", param_hint="--reset")
    if not reset and change == LimitsChange():
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

    async def apply(client: "BrokerClient") -> GuestView:
        return await (client.reset_limits(guest) if reset else client.set_limits(guest, change))

    _print_limits(asyncio.run(_with_broker(run_dir, apply)), output)


@app.command()
def demo(
    no_load: Annotated[
        bool, typer.Option("--no-load", help="Run nothing in the guest: then nothing moves, and exit is 1.")
    ] = False,
    accel: Annotated[
        Accelerator | None, typer.Option(help="Without it, kvm where it works, else tcg.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Where timeline and summary are written.", metavar="DIR")] = Path(
        "build/demo"
    ),
) -> None:
    """Boots a real VM, loads it, and verifies that its CPUs and memory follow the load."""
    try:
        from guestd.cli.demo.run import run_demo
    except ModuleNotFoundError as error:
        _exit_lab_missing("demo", error)
    raise typer.Exit(run_demo(load=not no_load, accel=accel, out_dir=out))


@app.command("bench-guest")
def bench_guest(
    only: Annotated[
        str, typer.Option(help="Parts, with commas: reaction, ramp, tax, reclaim, quiet.", metavar="PARTS")
    ] = "reaction,ramp,tax,reclaim,quiet",
    rounds: Annotated[int, typer.Option(min=1, help="Fewer than 3 are for development only.")] = 3,
    idle_seconds: Annotated[float, typer.Option(min=1, help="Fewer than 600 are for development only.")] = 600.0,
    accel: Annotated[
        Accelerator | None, typer.Option(help="Without it, kvm where it works, else tcg.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Where guest.json is written.", metavar="DIR")] = Path("build/bench"),
) -> None:
    """Measures in real VMs what the guest daemon does for them and costs them, beside what others do."""
    try:
        from guestd.cli.bench.guest.run import PARTS, Wanted, run_guest_bench
    except ModuleNotFoundError as error:
        _exit_lab_missing("bench-guest", error)
    parts = tuple(part.strip() for part in only.split(","))
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(PARTS)}", param_hint="--only")
    wanted = Wanted(parts=parts, rounds=rounds, idle_seconds=idle_seconds)
    raise typer.Exit(run_guest_bench(wanted, accel=accel, out_dir=out))


@app.command("bench-broker")
def bench_broker(
    guests: Annotated[
        list[int] | None, typer.Option(min=1, help="Other numbers of guests than 1000 and 5000.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Where broker.json is written.", metavar="DIR")] = Path("build/bench"),
) -> None:
    """Measures the broker with thousands of simulated guests."""
    try:
        from guestd.cli.bench.broker import SIZES, run_broker_bench
    except ModuleNotFoundError as error:
        _exit_lab_missing("bench-broker", error)
    raise typer.Exit(run_broker_bench(sizes=tuple(guests) if guests else SIZES, out_dir=out))


app.command()(simulate)
app.command()(scoreboard)


@app.command()
def estimators(output: _Output = Output.TABLE) -> None:
    """Compares what guestd and its peers ask for on made-up loads whose truth is known."""
    from guestd.cli.estimators import print_estimators

    print_estimators(output is Output.JSON)


@app.command(
    "lab",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def _lab(context: typer.Context) -> None:
    """Builds, boots and looks into VMs for tests."""
    run_lab(context.args)


def run_lab(arguments: list[str]) -> NoReturn:
    """`guestctl lab …`: an application of its own, imported only when it is meant."""
    try:
        from guestd.cli.lab import app as lab
    except ModuleNotFoundError as error:
        _exit_lab_missing("lab", error)
    above = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False)
    above.add_typer(lab, name="lab")
    sys.exit(above(args=["lab", *arguments], prog_name="guestctl"))


def _exit_lab_missing(command: str, error: ModuleNotFoundError) -> NoReturn:
    print(f"guestctl {command}: {error.name} is missing; install it with: pip install 'guestd[lab]'", file=sys.stderr)
    sys.exit(2)


async def _with_broker(run_dir: Path, work: "Callable[[BrokerClient], Coroutine[Any, Any, _T]]") -> _T:
    from guestd.wire.client import BrokerClient

    async with BrokerClient(run_dir) as client:
        return await work(client)


async def _read(client: "BrokerClient") -> tuple[HostView, tuple[GuestView, ...]]:
    return await client.host(), await client.guests()


async def _watch(client: "BrokerClient", output: Output) -> None:
    """Shows the status again after each change, in place on a terminal."""
    from rich.live import Live

    from guestd.cli.status import render

    console = _console()
    async with contextlib.AsyncExitStack() as stack:
        live = None
        if output is Output.TABLE and console.is_terminal:
            live = stack.enter_context(Live(console=console, auto_refresh=False))
        states = await stack.enter_async_context(contextlib.aclosing(_states(client)))
        async for host, guests in states:
            if live is not None:
                live.update(render(host, guests), refresh=True)
                await asyncio.sleep(_WATCH_INTERVAL_SECONDS)
            else:
                _print_status(host, guests, output)
                await asyncio.sleep(_PLAIN_INTERVAL_SECONDS if output is Output.TABLE else 0)


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


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def _print_status(host: HostView, guests: tuple[GuestView, ...], output: Output) -> None:
    from guestd.cli.status import as_json, render

    if output is Output.JSON:
        print(json.dumps(as_json(host, guests)), flush=True)
    else:
        _console().print(render(host, guests))


def _print_limits(guest: GuestView, output: Output) -> None:
    from guestd.cli.status import SCHEMA, guest_json

    if output is Output.JSON:
        print(json.dumps({"schema": SCHEMA, "guest": guest_json(guest)}))
        return
    low, high, weight, burst = guest.limits.min, guest.limits.max, guest.limits.weight, guest.limits.burst
    cpu_burst = f" burst {format_cpus(burst.cpu_millicores)}" if burst.cpu_millicores else ""
    memory_burst = f" burst {format_size(burst.memory_bytes)}" if burst.memory_bytes else ""
    print(
        f"{printable(guest.name)}: CPUs {format_cpus(low.cpu_millicores)}..{format_cpus(high.cpu_millicores)}"
        f"{cpu_burst} weight {weight.cpu_millicores},"
        f" memory {format_size(low.memory_bytes)}..{format_size(high.memory_bytes)}"
        f"{memory_burst} weight {weight.memory_bytes} (from {guest.limits_origin})"
    )
