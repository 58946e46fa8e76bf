"""The commands of `guestctl`.

Nothing is imported until it is needed: a command's module when it is meant or all are to be shown, grpc with the first
call to a broker, rich and plotext for what is shown, the lab with `lab`, `demo` and the benches.
"""

import sys
from importlib import import_module
from typing import Annotated, NoReturn

import typer

import guestd
from guestd.cli.commands import COMMANDS


def application(meant: str = "") -> typer.Typer:
    """That command alone, when there is one of that name; else all of them."""
    app = typer.Typer(
        help="Looks at and steers the virtual machines that guestd-broker serves.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_top)
    for name in [meant] if meant in COMMANDS else COMMANDS:
        command = getattr(import_module(f"guestd.cli.{COMMANDS[name]}"), name.replace("-", "_"))
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    app.command(
        "lab",
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(_lab)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"guestctl {guestd.__version__}")
        raise typer.Exit


def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _lab(context: typer.Context) -> None:
    """Builds, boots and looks into VMs for tests."""
    run_lab(context.args)


def run_lab(arguments: list[str]) -> NoReturn:
    """`guestctl lab …`: an application of its own, imported only when it is meant."""
    from guestd.cli.measure import exit_lab_missing

    try:
        from guestd.cli.lab import app as lab
    except ModuleNotFoundError as error:
        exit_lab_missing("lab", error)
    above = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False)
    above.add_typer(lab, name="lab")
    sys.exit(above(args=["lab", *arguments], prog_name="guestctl"))
