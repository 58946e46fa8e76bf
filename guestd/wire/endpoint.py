"""Where a broker is reached: a unix socket on this host, or TCP with mutual TLS."""

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import grpc
import grpc.aio

from guestd.model.errors import ConfigError, DeniedError, GuestdError, UnreachableError
from guestd.wire.tls import TlsFiles, tls_problem

_LONGEST_SOCKET_PATH = 107  # bytes: sun_path without its final 0
_OPTIONS = (
    ("grpc.max_receive_message_length", 16 << 20),  # a page of 1000 guests with all their reasons
    ("grpc.enable_http_proxy", 0),
)
_ADDRESS = re.compile(r"(?P<host>[^\s:\[\]/]+|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})")


class Endpoint(Protocol):
    """One address of a broker; its text is the address."""

    def open(self) -> grpc.aio.Channel:
        """A channel to it.

        :raise UnreachableError: When nobody can be there.
        :raise DeniedError: When this user is not let in.
        :raise ConfigError: When a file that it takes is of no use.
        """
        ...

    async def problem(self) -> GuestdError:
        """Why nobody answers there."""
        ...


@dataclass(frozen=True, slots=True)
class UnixEndpoint:
    """A socket in the broker's run directory."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def open(self) -> grpc.aio.Channel:
        """See `Endpoint`."""
        problem = socket_problem(self.path)
        if problem is not None:
            raise problem
        return grpc.aio.insecure_channel(f"unix:{self.path.absolute()}", options=_OPTIONS)

    async def problem(self) -> GuestdError:
        """See `Endpoint`."""
        return socket_problem(self.path) or UnreachableError(f"{self.path}: nobody answers")


@dataclass(frozen=True, slots=True)
class TlsEndpoint:
    """A monitor on TCP."""

    host: str  # without brackets
    port: int
    files: TlsFiles

    @classmethod
    def parse(cls, address: str, files: TlsFiles) -> Self:
        """From ``HOST:PORT``.

        :raise ConfigError: When it is none.
        """
        found = _ADDRESS.fullmatch(address)
        if found is None or not 1 <= int(found["port"]) <= 65535:
            raise ConfigError("address of the broker", "", None, f'{address!r} is no HOST:PORT, such as "db1:9756"')
        return cls(found["host"].strip("[]"), int(found["port"]), files)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def open(self) -> grpc.aio.Channel:
        """See `Endpoint`."""
        certificate, key, ca = self.files.read()
        return grpc.aio.secure_channel(str(self), grpc.ssl_channel_credentials(ca, key, certificate), options=_OPTIONS)

    async def problem(self) -> GuestdError:
        """See `Endpoint`."""
        return await tls_problem(self.host, self.port, self.files)


@dataclass(frozen=True, slots=True)
class LocalOnly:
    """What a broker does not offer to other hosts."""

    address: str

    def __str__(self) -> str:
        return self.address

    def open(self) -> grpc.aio.Channel:
        """See `Endpoint`."""
        raise DeniedError(f"{self.address}: changes are made on the host itself; from here it can only be watched")

    async def problem(self) -> GuestdError:
        """See `Endpoint`."""
        return UnreachableError(f"{self.address}: nobody answers")


def socket_problem(path: Path) -> GuestdError | None:
    """Why nobody can answer at a socket, as far as its path tells; None when it may well work."""
    if len(os.fsencode(path.absolute())) > _LONGEST_SOCKET_PATH:
        return UnreachableError(f"{path}: a path of a unix socket has at most {_LONGEST_SOCKET_PATH} bytes")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return UnreachableError(f"{path} does not exist")
    except PermissionError:
        return DeniedError(f"{path} is in a directory that this user may not open; try with sudo")
    except OSError as error:
        return UnreachableError(f"{path}: {error.strerror}")
    if not stat.S_ISSOCK(mode):
        return UnreachableError(f"{path} is not a socket")
    if not os.access(path, os.R_OK | os.W_OK):
        return DeniedError(f"{path} may not be opened by this user; try with sudo")
    return None
