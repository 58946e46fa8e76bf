"""`guestctl demo`, the benches and `estimators`: what is run to see and to measure guestd itself."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from guestd.cli.options import Accelerator, Output, OutputOption


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
        exit_lab_missing("demo", error)
    raise typer.Exit(run_demo(load=not no_load, accel=accel, out_dir=out))


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
        exit_lab_missing("bench-guest", error)
    parts = tuple(part.strip() for part in only.split(","))
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(PARTS)}", param_hint="--only")
    wanted = Wanted(parts=parts, rounds=rounds, idle_seconds=idle_seconds)
    raise typer.Exit(run_guest_bench(wanted, accel=accel, out_dir=out))


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
        exit_lab_missing("bench-broker", error)
    raise typer.Exit(run_broker_bench(sizes=tuple(guests) if guests else SIZES, out_dir=out))


def bench_monitor(
    guests: Annotated[int, typer.Option(min=1, help="Other than 1000 are for development only.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="Fewer than 5 are for development only.")] = 5,
    out: Annotated[Path, typer.Option(help="Where monitor.json is written.", metavar="DIR")] = Path("build/bench"),
) -> None:
    """Measures what looking at the broker costs: guestctl, metrics, the live page, and the record of decisions."""
    try:
        from guestd.cli.bench.monitor import run_monitor_bench
    except ModuleNotFoundError as error:
        exit_lab_missing("bench-monitor", error, "dev")
    raise typer.Exit(run_monitor_bench(guests, rounds, out_dir=out))


def estimators(output: OutputOption = Output.TABLE) -> None:
    """Compares what guestd and its peers ask for on made-up loads whose truth is known."""
    from guestd.cli.estimators import print_estimators

    print_estimators(output is Output.JSON)


def exit_lab_missing(command: str, error: ModuleNotFoundError, extra: str = "lab") -> NoReturn:
    """Say which extra is missing, and end."""
    print(
        f"guestctl {command}: {error.name} is missing; install it with: pip install 'guestd[{extra}]'", file=sys.stderr
    )
    sys.exit(2)
