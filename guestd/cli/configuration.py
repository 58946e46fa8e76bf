"""`guestctl config`: the broker's configuration, checked and shown. The broker itself is not asked."""

import json
from pathlib import Path
from typing import Annotated, Final

import typer

from guestd.cli.options import Output, OutputOption
from guestd.cli.screen import paragraph, screen, show_json
from guestd.cli.text import printable

_DEFAULT_PATH: Final = Path("/etc/guestd/broker.toml")
_File = Annotated[Path, typer.Argument(metavar="FILE", help="The broker's file; FILE.d/*.toml lie on top of it.")]
config = typer.Typer(help="Checks and shows the broker's configuration.", no_args_is_help=True, rich_markup_mode=None)


@config.command()
def check(file: _File = _DEFAULT_PATH, output: OutputOption = Output.TABLE) -> None:
    """Checks the configuration as the broker would, and changes nothing.

    Certificates and keys that it names are read too. Exit code 2 when the broker would refuse it, or could not listen.
    """
    from guestd.broker.check import check as check_all
    from guestd.broker.config import files_of

    guests, files = check_all(file).guests, files_of(file)
    if output is Output.JSON:
        show_json("config-check", {"files": [str(one) for one in files], "guests": len(guests)})
        return
    out = screen()
    what = f"{len(guests)} guest{'s' if len(guests) != 1 else ''}"
    out.show(paragraph((), f"{', '.join(printable(str(one)) for one in files)}: fine, {what}", out.width))


@config.command()
def show(
    file: _File = _DEFAULT_PATH,
    origin: Annotated[bool, typer.Option("--origin", help="Also which file a value comes from.")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Shows the configuration that the broker would take: all files on top of each other, and defaults."""
    from guestd.broker.config import load, settings

    load(file)
    found = settings(file)
    if output is Output.JSON:
        show_json(
            "config",
            {"settings": [{"key": one.key, "value": one.value, "origin": one.origin} for one in found]},
        )
        return
    out = screen()
    for one in found:
        comment = f"  # {printable(one.origin)}" if origin else ""
        out.show(paragraph(((f"{printable(one.key)} = ", ""),), f"{_value(one.value)}{comment}", out.width))


def _value(value: object) -> str:
    return printable(json.dumps(value, ensure_ascii=False))
