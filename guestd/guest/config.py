"""The guest daemon's configuration: almost nothing, and nothing that names the VM (images are cloned)."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from guestd.model.errors import ConfigError

DEFAULT_PATH = Path("/etc/guestd/guestd.toml")
DEFAULT_PORT = 4747
_LONGEST_HOOK_SECONDS = 600  # the helper takes no longer deadline


@dataclass(frozen=True, slots=True)
class GuestConfig:
    """``guestd.toml``; every key may be missing, and so may the file."""

    port: int = DEFAULT_PORT  # the broker's vsock port on the host
    user: str = "guestd"  # whom the daemon runs as
    broker_socket: str = ""  # a unix socket to dial instead of vsock: for guests without vsock, and tests
    log_verbose: bool = False
    shrink_hook_seconds: int = 30  # what all hooks together have before a shrink: so long it waits for them
    grow_hook_seconds: int = 60  # and after a grow: nobody waits for them, but the next ones


def load(path: Path) -> GuestConfig:
    """Read the file and its drop-ins; without any the defaults hold.

    :raise ConfigError: Naming file, key, value and what was expected.
    """
    if path == DEFAULT_PATH and not path.exists() and not path.with_name(path.name + ".d").exists():
        return GuestConfig()
    import msgspec  # 3 MiB with what it imports, which a guest without a file does not pay

    from guestd.runtime import toml

    known = msgspec.defstruct(
        "GuestConfig",
        [(field.name, field.type, field.default) for field in fields(GuestConfig)],
        forbid_unknown_fields=True,
    )
    data: dict[str, Any] = {}
    for source, found in toml.read_files(path, required=path != DEFAULT_PATH):
        toml.convert(source, found, known)
        data = toml.merge(data, found)
    config = GuestConfig(**data)
    if not 1 <= config.port <= 0xFFFF_FFFE:
        raise ConfigError(str(path), "port", config.port, "must be within 1..4294967294")
    for key in ("shrink_hook_seconds", "grow_hook_seconds"):
        if not 1 <= (seconds := getattr(config, key)) <= _LONGEST_HOOK_SECONDS:
            raise ConfigError(str(path), key, seconds, f"must be within 1..{_LONGEST_HOOK_SECONDS}")
    return config
