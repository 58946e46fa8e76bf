"""`guestd`: the guest's daemon. Imports nothing heavy: the root helper is forked from here and stays small."""

import os
import socket
import sys

from guestd.guest import helper


def main() -> None:
    """Fork the root helper where there is root to be had and something to switch, and be the daemon or the command in
    the child.
    """
    arguments = sys.argv[1:]
    runs = arguments[:1] == ["run"] and "--dry-run" not in arguments and "--help" not in arguments
    if runs and os.geteuid() == 0 and _may_switch():
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        child = os.fork()
        if child:
            theirs.close()
            sys.exit(helper.run(ours, child))
        ours.close()
        _be_the_daemon(arguments, theirs)
    else:
        _be_the_daemon(arguments, None)


def _may_switch() -> bool:
    """Root of a container may not: its /sys is read-only, or belongs to another root."""
    return any(os.access(f"/sys/devices/system/{one}", os.W_OK) for one in ("cpu", "memory"))


def _be_the_daemon(arguments: list[str], sock: socket.socket | None) -> None:
    # asyncio imports TLS, but goes without where Python was built without: 4 MiB less.
    sys.modules["ssl"] = None  # type: ignore[assignment]  # what the import system takes for "there is none"
    from guestd.guest import app  # the heavy imports begin here

    app.main(arguments, sock)


if __name__ == "__main__":
    main()
