"""Man pages from the tree of commands: ``python -m guestd.cli.manpage DIR`` writes guestctl.1 and one for each command.

What the commands say of themselves with --help is the only source.
"""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import typer.main

import guestd
from guestd.cli.app import application

_EXIT_CODES: Final = (
    ("0", "Done."),
    ("1", "Failed: the broker refused, something did not come about in time, or nothing is recorded."),
    ("2", "Usage, or a configuration that cannot be used."),
    ("3", "Denied: this user, certificate or machine may not do that."),
    ("4", "No guest of that name."),
    ("5", "The broker cannot be reached, or went away in the middle."),
)
_ENVIRONMENT: Final = (
    ("GUESTD_RUN_DIR, GUESTD_HOST, GUESTD_CERT, GUESTD_KEY, GUESTD_CA", "Stand for the options of these names."),
    ("NO_COLOR", "Without colours, when it is not empty; so does TERM=dumb."),
    ("COLUMNS", "How wide the output is to be."),
)
_FILES: Final = (
    ("/etc/guestd/broker.toml", "The broker's configuration; broker.toml.d/*.toml lie on top of it."),
    ("/run/guestd-broker", "The broker's sockets: monitor.sock to look, admin.sock to change."),
)


def pages() -> dict[str, str]:
    """The text of each page by the name of its file."""
    root = typer.main.get_command(application())
    commands = {f"guestctl-{'-'.join(path)}": (path, command) for path, command in _leaves(root, ())}
    found = {"guestctl.1": _top_page(root, commands)}
    for name, (path, command) in commands.items():
        found[f"{name}.1"] = _command_page(name, path, command)
    return found


def _leaves(command: Any, above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, below in command.commands.items():
        if hasattr(below, "commands"):
            yield from _leaves(below, (*above, name))
        elif not below.hidden:
            yield (*above, name), below


def _top_page(root: Any, commands: dict[str, tuple[tuple[str, ...], Any]]) -> str:
    lines = [
        *_head("guestctl", _sentence(root.help)),
        *(".SH SYNOPSIS", ".B guestctl", "[\\fIOPTIONS\\fR] \\fICOMMAND\\fR [\\fIARGUMENTS\\fR]"),
        *(".SH DESCRIPTION", *_paragraphs(root.help)),
        ".SH COMMANDS",
    ]
    for name, (path, command) in commands.items():
        lines += [
            ".TP",
            f"\\fBguestctl {_text(' '.join(path))}\\fR",
            f"{_line(_sentence(command.help))} See {_text(name)}(1).",
        ]
    lines += _options(root)
    for title, rows in (("EXIT STATUS", _EXIT_CODES), ("ENVIRONMENT", _ENVIRONMENT), ("FILES", _FILES)):
        lines += [f".SH {title}", *(line for label, text in rows for line in _item(f"\\fB{_text(label)}\\fR", text))]
    return "\n".join(lines) + "\n"


def _command_page(name: str, path: tuple[str, ...], command: Any) -> str:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    words = " ".join(_argument(one) if one.required else f"[{_argument(one)}]" for one in arguments)
    lines = [
        *_head(name, _sentence(command.help)),
        *(".SH SYNOPSIS", f".B guestctl {_text(' '.join(path))}", f"[\\fIOPTIONS\\fR] {words}".rstrip()),
        *(".SH DESCRIPTION", *_paragraphs(command.help)),
    ]
    described = [one for one in arguments if one.help]
    if described:
        lines += [".SH ARGUMENTS"]
        for one in described:
            lines += _item(_argument(one), one.help)
    lines += [*_options(command), ".SH SEE ALSO", ".BR guestctl (1)"]
    return "\n".join(lines) + "\n"


def _argument(one: Any) -> str:
    return f"\\fI{_text(one.metavar or one.name.upper())}\\fR"


def _head(name: str, purpose: str) -> list[str]:
    title = f'.TH {name.upper()} 1 "" "guestd {guestd.__version__}" "guestd"'
    return [title, ".SH NAME", f"{_text(name)} \\- {_text(purpose[:1].lower() + purpose[1:].rstrip('.'))}"]


def _options(command: Any) -> list[str]:
    lines = [".SH OPTIONS"]
    context = typer.Context(command)
    for one in command.get_params(context):
        record = one.get_help_record(context) if one.param_type_name == "option" else None
        if record is not None:
            lines += _item(f"\\fB{_text(record[0])}\\fR", record[1])
    return lines


def _item(label: str, text: str) -> list[str]:
    return [".TP", label, _line(" ".join(text.split())) or "\\&"]


def _paragraphs(text: str | None) -> list[str]:
    lines: list[str] = []
    for paragraph in inspect.cleandoc(text or "").split("\n\n"):
        lines += [".PP", _line(" ".join(paragraph.split()))]
    return lines[1:]


def _sentence(text: str | None) -> str:
    """The first sentence or paragraph, whichever ends first."""
    first = " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())
    return first.partition(". ")[0].rstrip(".") + "."


def _line(text: str) -> str:
    """Running text at the beginning of a line, where a dot or a quote would begin a request."""
    shown = _text(text)
    return f"\\&{shown}" if shown.startswith((".", "'")) else shown


def _text(text: str) -> str:
    """Text in which nothing is a request or an escape, and a hyphen stays one that can be copied."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return "".join(one if one.isascii() else f"\\[u{ord(one):04X}]" for one in escaped)


def main() -> int:
    """Write all pages into a directory."""
    if len(sys.argv) != 2:
        print("usage: python -m guestd.cli.manpage DIR", file=sys.stderr)
        return 2
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (directory / name).write_text(text, encoding="ascii")
    return 0


if __name__ == "__main__":
    sys.exit(main())
