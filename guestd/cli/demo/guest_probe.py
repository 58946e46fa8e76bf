"""Describes a systemd service from within the guest, once. Python's standard library alone.

Prints lines of JSON: the state of the service as systemd has it, and each vsock socket that a process of
its cgroup holds. That a socket is AF_VSOCK is what the kernel says of it (the name of its protocol, and
the kernel's list of vsock sockets, asked by netlink), never what the program believes.
"""

import argparse
import json
import os
import re
import socket
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NETLINK_SOCK_DIAG = 4
_AF_VSOCK = 40
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST_DUMP = 0x1 | 0x300
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_ALL_STATES = 0xFFFFFFFF
_HEADER = struct.Struct("=LHHLL")  # nlmsghdr
_REQUEST = struct.Struct("=BBHLLL2L")  # vsock_diag_req
_MESSAGE = struct.Struct("=BBBBLLLLL2L")  # vsock_diag_msg
_STATES = {1: "established", 2: "connecting", 7: "closed", 10: "listening", 11: "closing"}


@dataclass(frozen=True)
class Vsock:
    """One vsock socket of the kernel's list."""

    state: str
    local_cid: int
    local_port: int
    peer_cid: int
    peer_port: int


def parse_dump(data: bytes) -> tuple[dict[int, Vsock], bool]:
    """The sockets in a part of the kernel's answer, by inode, and whether it was the last part.

    :raise OSError: When the kernel answered with an error.
    """
    found: dict[int, Vsock] = {}
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, offset)
        body = data[offset + _HEADER.size : offset + length]
        if kind == _NLMSG_DONE:
            return found, True
        if kind == _NLMSG_ERROR:
            code = -struct.unpack_from("=l", body)[0]
            raise OSError(code, os.strerror(code))
        if kind == _SOCK_DIAG_BY_FAMILY and len(body) >= _MESSAGE.size:
            _, _, state, _, *ends = _MESSAGE.unpack_from(body)
            local_cid, local_port, peer_cid, peer_port, inode = ends[:5]
            word = _STATES.get(state, str(state))
            found[inode] = Vsock(word, local_cid, local_port, peer_cid, peer_port)
        offset += max(-(-length // 4) * 4, _HEADER.size)
    return found, False


def vsock_sockets() -> dict[int, Vsock]:
    """All vsock sockets of this machine by inode, as the kernel lists them (its module vsock_diag).

    :raise OSError: When the kernel does not list them.
    """
    body = _REQUEST.pack(_AF_VSOCK, 0, 0, _ALL_STATES, 0, 0, 0, 0)
    head = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0)
    found: dict[int, Vsock] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(5)
        netlink.send(head + body)
        last = False
        while not last:
            part, last = parse_dump(netlink.recv(65_536))
            found.update(part)
    return found


def held_sockets(proc: Path, pids: list[int]) -> Iterator[tuple[int, int, str]]:
    """Process, inode and protocol of each socket that one of the processes holds."""
    for pid in pids:
        try:
            descriptors = list((proc / str(pid) / "fd").iterdir())
        except OSError:
            continue  # it is gone
        for descriptor in descriptors:
            try:
                match = re.fullmatch(r"socket:\[(\d+)\]", str(descriptor.readlink()))
                if match is not None:
                    name = os.getxattr(descriptor, "system.sockprotoname")
                    yield pid, int(match[1]), name.rstrip(b"\0").decode()
            except OSError:
                continue  # it was closed meanwhile


def parse_properties(text: str) -> dict[str, str]:
    """The ``Name=value`` lines of ``systemctl show``."""
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def service_processes(control_group: str) -> list[int]:
    """All processes of a cgroup and of those below it."""
    found: list[int] = []
    if control_group:
        for path in Path(f"/sys/fs/cgroup{control_group}").rglob("cgroup.procs"):
            found.extend(int(line) for line in path.read_text().split())
    return found


def main() -> None:
    """Describes the service."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("service")
    options = parser.parse_args()
    wanted = "ActiveState,ActiveEnterTimestampMonotonic,NRestarts,MainPID,ControlGroup"
    shown = subprocess.run(
        ["systemctl", "show", options.service, "--property", wanted],
        check=True,
        capture_output=True,
        text=True,
    )
    properties = parse_properties(shown.stdout)
    service = {
        "source": "service",
        "state": properties.get("ActiveState", ""),
        "active_since_us": int(properties.get("ActiveEnterTimestampMonotonic") or 0),
        "restarts": int(properties.get("NRestarts") or 0),
        "main_pid": int(properties.get("MainPID") or 0),
    }
    print(json.dumps(service))
    listed = vsock_sockets()
    for pid, inode, family in held_sockets(Path("/proc"), service_processes(properties.get("ControlGroup", ""))):
        if family == "AF_VSOCK":
            known = listed.get(inode, Vsock("unlisted", 0, 0, 0, 0))
            print(json.dumps({"source": "socket", "pid": pid, "family": family, **vars(known)}))


if __name__ == "__main__":
    main()
