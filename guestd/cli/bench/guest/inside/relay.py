"""Relays one connection of a unix socket to a port of the host, for `guest_bare`. Standard library alone."""

import select
import socket
import sys
from pathlib import Path

HOST_CID = 2


def relay(one: socket.socket, other: socket.socket) -> None:
    """Copies both ways until one side ends."""
    poll = select.poll()
    across = {one.fileno(): (one, other), other.fileno(): (other, one)}
    for descriptor in across:
        poll.register(descriptor, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            source, target = across[descriptor]
            data = source.recv(65_536)
            if not data:
                return
            target.sendall(data)


def main(path: str, port: int) -> None:
    """Listens, takes one connection, relays it."""
    Path(path).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(1)
        client, _ = listener.accept()
    family: int = socket.AF_VSOCK
    with client, socket.socket(family, socket.SOCK_STREAM) as host:
        host.bind((socket.VMADDR_CID_ANY, 901))
        host.connect((HOST_CID, port))
        relay(client, host)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
