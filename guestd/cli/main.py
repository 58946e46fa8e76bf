"""Entry point of `guestctl`.

Exit codes: 0 done, 1 failed, 2 usage or configuration, 5 the broker cannot be reached. An error that is
expected is a line on stderr, never a traceback.
"""

import sys
from collections.abc import Sequence

from guestd.cli.text import printable
from guestd.model.errors import ConfigError, GuestdError, TraceError, UnreachableError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 5

_BROKER_HINT = "is guestd-broker running? See: systemctl status guestd-broker"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        from guestd.cli.app import app, run_lab
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        return _fail(f"{error.name} is missing; install it with: pip install 'guestd[cli]'", EXIT_USAGE)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["lab"]:  # not through the application above it, which would eat a "--"
            run_lab(arguments[1:])
        app(args=arguments, prog_name="guestctl")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except UnreachableError as error:
        return _fail(f"{error}; {_BROKER_HINT}", EXIT_UNREACHABLE)
    except (ConfigError, TraceError) as error:
        return _fail(str(error), EXIT_USAGE)
    except GuestdError as error:
        return _fail(str(error), EXIT_FAILED)
    return 0


def _fail(text: str, code: int) -> int:
    print(f"guestctl: {printable(text, 4096)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
