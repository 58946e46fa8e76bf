"""The real broker on a hypervisor in another process (`guestd.sim.remote`).

``python -m guestd.sim.broker --config FILE --hypervisor SOCKET [--timing JSON]``: all of `guestd-broker run`, except
that VMs are `RemoteVm`s of the guests' names, and that guests with a `cid` dial a unix socket, ``RUN_DIR/guests.sock``.
There the peer is known by the abstract name that it is bound to (see `guest_address`), as a vsock peer is
by its CID: one listener serves thousands, whom the limit of descriptors would not leave one each.
Anybody may bind any such name: this is for guests that are simulated.
"""

import argparse
import asyncio
import logging
import socket
import sys
from functools import partial
from pathlib import Path

import msgspec

from guestd.broker import config as configuration
from guestd.broker import main as broker
from guestd.broker.config import BrokerConfig, GuestConfig
from guestd.broker.core.track import Timing
from guestd.broker.engine import Engine
from guestd.model.errors import GuestdError
from guestd.runtime import logs
from guestd.sim.remote import HypervisorLink, RemoteVm
from guestd.wire.relay import IngressRelay

SOCKET_NAME = "guests.sock"
_BACKLOG = 1024
_PREFIX = "guestd-sim-"


def guest_address(run_dir: Path, cid: int) -> str:
    """The abstract name, without its leading zero byte, from which that guest dials the broker of that directory."""
    return f"{_PREFIX}{run_dir}-{cid}"


def main() -> None:
    """Parse the command line and run. Exit codes: 0 done, 1 failed, 2 usage or configuration."""
    parser = argparse.ArgumentParser(prog="guestd.sim.broker", description="The broker on fake VMs.")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument("--hypervisor", type=Path, required=True, metavar="SOCKET")
    parser.add_argument("--timing", default="{}", metavar="JSON", help="fields of Timing that differ")
    arguments = parser.parse_args()
    logs.setup(logging.INFO)
    try:
        timing = msgspec.json.decode(arguments.timing, type=Timing)
        config = configuration.load(arguments.config)
        asyncio.run(_run(arguments.config, config, HypervisorLink(arguments.hypervisor), timing))
    except (GuestdError, OSError, msgspec.MsgspecError) as error:
        print(f"guestd.sim.broker: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(1)


async def _run(path: Path, config: BrokerConfig, link: HypervisorLink, timing: Timing) -> None:
    def make_vm(guest: GuestConfig) -> RemoteVm:
        return RemoteVm(link, guest.name)

    try:
        await broker.run(path, config, make_vm, _listen, timing)
    finally:
        await link.close()


def _listen(relay: IngressRelay, engine: Engine, config: BrokerConfig) -> None:
    path = config.run_dir / SOCKET_NAME
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen(_BACKLOG)
    relay.listen_vsock(sock, engine.guest_of_cid, partial(_peer, config.run_dir))


def _peer(run_dir: Path, connection: socket.socket) -> tuple[int, int]:
    """CID and port, as of a vsock connection; one that is bound to no guest's name has CID 0, nobody's."""
    name, prefix = connection.getpeername(), f"\0{guest_address(run_dir, 0)[:-1]}".encode()
    number = name[len(prefix) :] if isinstance(name, bytes) and name.startswith(prefix) else b"0"
    return (int(number) if number.isdigit() else 0), 1


if __name__ == "__main__":
    main()
