"""Entry point of `guestctl`.

Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 denied, 4 not found, 5 the broker cannot be reached or went
away. An error that is expected is a line on stderr, never a traceback. Ctrl-C (130) and a reader that has read enough
(0) end it without a word.
"""

import contextlib
import gc
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from guestd.cli.commands import QUESTIONS
from guestd.cli.text import printable
from guestd.model.errors import (
    ConfigError,
    DeniedError,
    GuestdError,
    NotFoundError,
    RecordError,
    TraceError,
    UnreachableError,
)

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_DENIED = 3
EXIT_NOT_FOUND = 4
EXIT_UNREACHABLE = 5
_INTERRUPTED = 130
_COLLECT_AFTER_OBJECTS = 100_000  # most commands are over before the garbage of their imports is worth a search

_CODES: tuple[tuple[type[GuestdError], int], ...] = (
    (ConfigError, EXIT_USAGE),
    (TraceError, EXIT_USAGE),
    (RecordError, EXIT_USAGE),
    (DeniedError, EXIT_DENIED),
    (NotFoundError, EXIT_NOT_FOUND),
    (UnreachableError, EXIT_UNREACHABLE),
    (GuestdError, EXIT_FAILED),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    gc.set_threshold(_COLLECT_AFTER_OBJECTS)
    try:
        from guestd.cli.app import application, run_lab
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        return _fail(f"{error.name} is missing; install it with: pip install 'guestd[cli]'", EXIT_USAGE)
    except KeyboardInterrupt:
        return _INTERRUPTED
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["lab"]:  # not through the application above it, which would eat a "--"
            run_lab(arguments[1:])
        application(*arguments[:1])(args=arguments, prog_name="guestctl")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except (OSError, UnicodeError) as error:  # a full disk behind stdout; a name that no text may hold
        return _fail(str(error), EXIT_FAILED)
    except GuestdError as error:
        return _fail(str(error), next(number for kind, number in _CODES if isinstance(error, kind)))
    return 0


def run() -> NoReturn:
    """The process. After a question Python need not take itself apart: that takes longer than the answer."""
    code = main()
    if sys.argv[1:2] and sys.argv[1] in QUESTIONS:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    sys.exit(code)


def _fail(text: str, code: int) -> int:
    with contextlib.suppress(BrokenPipeError):
        print(f"guestctl: {printable(text, 4096)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    run()
