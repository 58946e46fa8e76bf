"""How the broker is seen from outside: the tables of `broker.toml` for listeners, stores and logs.

All of it is off or small unless somebody asked for it; what is wrong with a value is a `ConfigError` that names it.
"""

import ipaddress
from pathlib import Path
from typing import Literal

import msgspec

from guestd.model.errors import ConfigError
from guestd.model.units import parse_size

_SMALLEST_STORE_BYTES = 1 << 20


class MonitorTable(msgspec.Struct, forbid_unknown_fields=True):
    """``[monitor]``: the monitor service on TCP, with mutual TLS only."""

    listen: str = ""
    certificate: str = ""
    key: str = ""
    client_ca: str = ""


class MetricsTable(msgspec.Struct, forbid_unknown_fields=True):
    """``[metrics]``: Prometheus exposition over HTTP."""

    listen: str = ""


class WebTable(msgspec.Struct, forbid_unknown_fields=True):
    """``[web]``: the live page. `hosts` are further names that a browser may call it by."""

    listen: str = ""
    hosts: list[str] = msgspec.field(default_factory=list)


class RecordTable(msgspec.Struct, forbid_unknown_fields=True):
    """``[record]``: how much disk the replayable record of decisions may take; 0 for none."""

    size: str | int = "64MiB"


class HistoryTable(msgspec.Struct, forbid_unknown_fields=True):
    """``[history]``: how much disk events and history may take."""

    size: str | int = "256MiB"


class LogTable(msgspec.Struct, forbid_unknown_fields=True):
    """``[log]``"""

    format: Literal["plain", "json"] = "plain"


class Address(msgspec.Struct, frozen=True):
    """Where to listen on TCP."""

    host: str  # an IP address, without brackets
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return ipaddress.ip_address(self.host).is_loopback


class MutualTls(msgspec.Struct, frozen=True):
    """Files of the monitor's TCP listener, PEM."""

    listen: Address
    certificate: Path
    key: Path
    client_ca: Path


class Outlets(msgspec.Struct, frozen=True):
    """All of it; None is off."""

    monitor: MutualTls | None = None
    metrics: Address | None = None
    web: Address | None = None
    web_hosts: tuple[str, ...] = ()
    record_bytes: int = 64 << 20
    history_bytes: int = 256 << 20
    json_logs: bool = False


def outlets(
    source: str,
    monitor: MonitorTable,
    metrics: MetricsTable,
    web: WebTable,
    record: RecordTable,
    history: HistoryTable,
    log: LogTable,
) -> Outlets:
    """The tables, checked.

    :raise ConfigError: Naming `source`, key, value and what was expected.
    """
    return Outlets(
        monitor=_mutual_tls(source, monitor),
        metrics=_address(source, "metrics.listen", metrics.listen),
        web=_address(source, "web.listen", web.listen),
        web_hosts=tuple(host.lower() for host in web.hosts),
        record_bytes=_store(source, "record.size", record.size, may_be_off=True),
        history_bytes=_store(source, "history.size", history.size, may_be_off=False),
        json_logs=log.format == "json",
    )


def _mutual_tls(source: str, table: MonitorTable) -> MutualTls | None:
    listen = _address(source, "monitor.listen", table.listen)
    if listen is None:
        return None
    for key in ("certificate", "key", "client_ca"):
        value = getattr(table, key)
        if not Path(value).is_absolute():
            expected = "must be the absolute path of a PEM file: the monitor listens on TCP with mutual TLS only"
            raise ConfigError(source, f"monitor.{key}", value, expected)
    return MutualTls(listen, Path(table.certificate), Path(table.key), Path(table.client_ca))


def _address(source: str, key: str, text: str) -> Address | None:
    if not text:
        return None
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        ipaddress.ip_address(host)
        number = int(port)
    except ValueError:
        number = 0
    if not 1 <= number <= 65535:
        expected = 'must be an IP address and a port within 1..65535, such as "127.0.0.1:9756" or "[::1]:9756"'
        raise ConfigError(source, key, text, expected)
    return Address(host, number)


def _store(source: str, key: str, value: str | int, *, may_be_off: bool) -> int:
    try:
        amount = parse_size(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ConfigError(source, key, value, str(error)) from error
    if amount < _SMALLEST_STORE_BYTES and not (may_be_off and amount == 0):
        least = "must be at least 1MiB" + (", or 0 for none" if may_be_off else "")
        raise ConfigError(source, key, value, least)
    return amount
