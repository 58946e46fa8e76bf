"""The guest daemon's configuration: almost nothing, and nothing that names the VM (images are cloned)."""

from pathlib import Path

import msgspec

from guestd.model.errors import ConfigError
from guestd.runtime import toml

DEFAULT_PATH = Path("/etc/guestd/guestd.toml")
DEFAULT_PORT = 4747


class GuestConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``guestd.toml``; every key may be missing, and so may the file."""

    port: int = DEFAULT_PORT  # the broker's vsock port on the host
    run_dir: str = "/run/guestd"
    user: str = "guestd"  # whom the daemon runs as
    broker_socket: str = ""  # a unix socket to dial instead of vsock: for guests without vsock, and tests
    log_verbose: bool = False


def load(path: Path) -> GuestConfig:
    """Read the file and its drop-ins; without any the defaults hold.

    :raise ConfigError: Naming file, key, value and what was expected.
    """
    data: dict[str, object] = {}
    for source, found in toml.read_files(path, required=path != DEFAULT_PATH):
        toml.convert(source, found, GuestConfig)
        data = toml.merge(data, found)
    config = toml.convert(path, data, GuestConfig)
    if not 1 <= config.port <= 0xFFFF_FFFE:
        raise ConfigError(str(path), "port", config.port, "must be within 1..4294967294")
    return config
