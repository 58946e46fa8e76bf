"""Entry of `guestctl top`."""

import os
import sys
from typing import Final

from guestd.cli.broker import Target
from guestd.cli.top.feed import Feed

_USAGE: Final = 2
_POOR_TERMINALS: Final = ("", "dumb", "unknown")


def run_top(target: Target) -> int:
    """Show the host until the user quits; the exit code.

    :raise GuestdError: When nobody answers at the start: then the screen is never opened.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM", "") in _POOR_TERMINALS:
        print(
            "guestctl top: needs a terminal that can place its cursor; without one use: guestctl status",
            file=sys.stderr,
        )
        return _USAGE
    target.run(lambda client: client.host())
    from guestd.cli.top.app import Top

    plain = bool(os.environ.get("NO_COLOR"))
    if not plain:
        os.environ.pop("NO_COLOR", None)  # an empty one counts as none, but not for textual
    top = Top(Feed(target.client), plain=plain)
    top.run()
    return top.return_code or 0
