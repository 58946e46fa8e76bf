"""Entry of `guestctl top`."""

import asyncio
import os
import sys
from typing import Final

from guestd.cli.top.feed import Connect, Feed

_USAGE: Final = 2
_POOR_TERMINALS: Final = ("", "dumb", "unknown")


def run_top(connect: Connect) -> int:
    """Show the host until the user quits; the exit code.

    :param connect: makes a client of the broker, as often as one is needed.
    :raise GuestdError: When nobody answers at the start: then the screen is never opened.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM", "") in _POOR_TERMINALS:
        print(
            "guestctl top: needs a terminal that can place its cursor; without one use: guestctl status",
            file=sys.stderr,
        )
        return _USAGE
    asyncio.run(_first_word(connect))
    from guestd.cli.top.app import Top

    top = Top(Feed(connect), plain="NO_COLOR" in os.environ)
    top.run()
    return top.return_code or 0


async def _first_word(connect: Connect) -> None:
    async with connect() as client:
        await client.host()
