"""The commands of `guestctl`.

Nothing heavy is imported until a command needs it: grpc with the first call to a broker, rich and plotext for what
is shown, the lab with `lab`, `demo` and the benches.
"""

import sys
from typing import Annotated, NoReturn

import typer

import guestd
from guestd.cli.broker import Target, with_target
from guestd.cli.configuration import app as config
from guestd.cli.limits import set_limits
from guestd.cli.look import get, status
from guestd.cli.measure import bench_broker, bench_guest, bench_monitor, demo, estimators, exit_lab_missing
from guestd.cli.past import events, explain, history
from guestd.cli.replay import replay
from guestd.cli.scoreboard import scoreboard
from guestd.cli.simulate import simulate
from guestd.cli.steer import pause, reclaim, resume

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


@with_target
def top(target: Target) -> None:
    """Shows the host and its guests, live, on the whole terminal."""
    from guestd.cli.top.run import run_top

    raise typer.Exit(run_top(target))


app.command()(status)
app.command()(top)
app.command()(get)
app.command()(explain)
app.command()(events)
app.command()(history)
app.command("set-limits")(set_limits)
app.command()(pause)
app.command()(resume)
app.command()(reclaim)
app.add_typer(config, name="config")
app.command()(demo)
app.command("bench-guest")(bench_guest)
app.command("bench-broker")(bench_broker)
app.command("bench-monitor")(bench_monitor)
app.command()(replay)
app.command()(simulate)
app.command()(scoreboard)
app.command()(estimators)


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
        exit_lab_missing("lab", error)
    above = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False)
    above.add_typer(lab, name="lab")
    sys.exit(above(args=["lab", *arguments], prog_name="guestctl"))
