"""The broker's configuration: what the host has, and which VMs there are.

``broker.toml`` and ``broker.toml.d/*.toml`` on top of it, in the order of their names; a later file wins
key by key. CPUs are written as 2, "1.5" or "250m", sizes as "512MiB" or in bytes.
"""

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from guestd.broker.core.ledger import HostCapacity, admit
from guestd.broker.outlets import (
    HistoryTable,
    LogTable,
    MetricsTable,
    MonitorTable,
    Outlets,
    RecordTable,
    WebTable,
    outlets,
)
from guestd.model.errors import AdmissionError, ConfigError
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import MILLICORES_PER_VCPU, parse_cpus, parse_size
from guestd.runtime import toml
from guestd.wire.amounts import MAX_CPU_MILLICORES, MAX_MEMORY_BYTES

DEFAULT_PATH = Path("/etc/guestd/broker.toml")
DEFAULT_PORT = 4747
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LONGEST_SOCKET_PATH = 107  # bytes: sun_path without its final 0

Amount = int | float | str
Mode = Literal["serve", "observe"]
"""Whether decisions are carried out, or only recorded and shown."""


class HostTable(msgspec.Struct, forbid_unknown_fields=True):
    """``[host]``"""

    cpus: Amount | None = None
    memory: Amount | None = None
    reserve_cpus: Amount = 0
    reserve_memory: Amount = 0
    overhead_memory_per_guest: Amount = 0
    cpu_overcommit: float = 1.0
    memory_overcommit: float = 1.0
    memory_idle_tax: float = 0.75
    cpu_bandwidth: Literal["auto", "off"] = "auto"


class BrokerTable(msgspec.Struct, forbid_unknown_fields=True):
    """``[broker]``"""

    state_dir: str = "/var/lib/guestd"
    run_dir: str = "/run/guestd-broker"
    port: int = DEFAULT_PORT
    heartbeat_seconds: float = 30.0
    mode: Mode = "serve"


class LimitsTable(msgspec.Struct, forbid_unknown_fields=True):
    """``cpu = { … }`` and ``memory = { … }`` of a guest. The burst's credit is in CPU-seconds or size x seconds,
    300 s of the whole burst when it is not said; the refill per second, a tenth of the burst when it is not said.
    """

    min: Amount
    max: Amount
    weight: int = 100
    burst: Amount | None = None
    burst_credit: Amount | None = None
    burst_refill: Amount | None = None


class GuestTable(msgspec.Struct, forbid_unknown_fields=True):
    """``[guests.NAME]``"""

    cpu: LimitsTable
    memory: LimitsTable
    qmp_socket: str
    cid: int | None = None
    vsock_path: str | None = None
    vsock_privileged_ports: bool = False
    park_cpus: bool = False
    mode: Mode = "serve"


class FileTable(msgspec.Struct, forbid_unknown_fields=True):
    """The whole file."""

    host: HostTable = msgspec.field(default_factory=HostTable)
    broker: BrokerTable = msgspec.field(default_factory=BrokerTable)
    guests: dict[str, dict[str, Any]] = msgspec.field(default_factory=dict)
    monitor: MonitorTable = msgspec.field(default_factory=MonitorTable)
    metrics: MetricsTable = msgspec.field(default_factory=MetricsTable)
    web: WebTable = msgspec.field(default_factory=WebTable)
    record: RecordTable = msgspec.field(default_factory=RecordTable)
    history: HistoryTable = msgspec.field(default_factory=HistoryTable)
    log: LogTable = msgspec.field(default_factory=LogTable)


class GuestConfig(msgspec.Struct, frozen=True):
    """One VM: its limits, and where its hypervisor and its channel are.

    `origin` is the last file that says something of it, or empty for one that was added by a call.
    """

    name: str
    limits: Limits
    qmp_socket: str
    cid: int | None = None
    vsock_path: str | None = None
    vsock_privileged_ports: bool = False
    origin: str = ""
    park_cpus: bool = False
    observe: bool = False


class BrokerConfig(msgspec.Struct, frozen=True):
    """All of it."""

    host: HostCapacity
    state_dir: Path
    run_dir: Path
    port: int
    heartbeat_seconds: float
    guests: dict[str, GuestConfig]
    cpu_bandwidth: bool = True
    observe: bool = False  # all guests, whatever their own tables say
    outlets: Outlets = Outlets()


def load(path: Path) -> BrokerConfig:
    """Read and check everything.

    :raise ConfigError: Naming file, key, value and what was expected. Nothing was started.
    """
    files = toml.read_files(path, required=True)
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for source, data in files:
        toml.convert(source, data, FileTable)
        merged = toml.merge(merged, data)
        origins |= dict.fromkeys(data.get("guests", {}), str(source))
    table = toml.convert(path, merged, FileTable)
    host = _host(path, table.host)
    guests = {name: _guest(origins[name], name, data) for name, data in table.guests.items()}
    _check_channels(path, guests.values())
    try:
        admit(host, {name: guest.limits for name, guest in guests.items()})
    except AdmissionError as error:
        raise ConfigError(str(path), "guests", None, str(error)) from error
    broker = table.broker
    if not 1 <= broker.port <= 0xFFFF_FFFE:
        raise ConfigError(str(path), "broker.port", broker.port, "must be within 1..4294967294")
    if not 1 <= broker.heartbeat_seconds <= 3600:
        raise ConfigError(str(path), "broker.heartbeat_seconds", broker.heartbeat_seconds, "must be within 1..3600")
    for key, value, longest in (
        ("state_dir", broker.state_dir, ""),
        ("run_dir", broker.run_dir, "/guests/server.sock"),
    ):
        if not Path(value).is_absolute():
            raise ConfigError(str(path), f"broker.{key}", value, "must be an absolute path")
        if longest and len(os.fsencode(value + longest)) > _LONGEST_SOCKET_PATH:
            most = _LONGEST_SOCKET_PATH - len(longest)
            raise ConfigError(str(path), f"broker.{key}", value, f"must have at most {most} bytes, for its sockets")
    return BrokerConfig(
        host,
        Path(broker.state_dir),
        Path(broker.run_dir),
        broker.port,
        broker.heartbeat_seconds,
        guests,
        table.host.cpu_bandwidth == "auto",
        broker.mode == "observe",
        outlets(str(path), table.monitor, table.metrics, table.web, table.record, table.history, table.log),
    )


def files_of(path: Path) -> list[Path]:
    """The file and its drop-ins, in the order in which they apply.

    :raise ConfigError: When one cannot be read.
    """
    return [source for source, _ in toml.read_files(path, required=True)]


class Setting(msgspec.Struct, frozen=True):
    """One value that holds, as it is written in a file. `origin` is that file, or "default"."""

    key: str
    value: str | int | float | bool | list[str]
    origin: str


def settings(path: Path) -> list[Setting]:
    """Every value that holds, by table; a value that nobody chose and that has no default is left out.

    :raise ConfigError: When a file cannot be read, or a value is not one of its type.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for source, data in toml.read_files(path, required=True):
        merged = toml.merge(merged, data)
        origins |= dict.fromkeys(_flat(data), str(source))
    table = toml.convert(path, merged, FileTable)
    guests = {name: _guest_table(str(path), f"guests.{name}", data) for name, data in table.guests.items()}
    values = _flat({**msgspec.to_builtins(table), "guests": msgspec.to_builtins(guests)})
    return [Setting(key, value, origins.get(key, "default")) for key, value in values.items() if value is not None]


def _flat(data: dict[str, Any], above: str = "") -> dict[str, Any]:
    """The values of all tables by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found


def _host(path: Path, table: HostTable) -> HostCapacity:
    def cpus(key: str, value: Amount) -> int:
        return _amount(str(path), f"host.{key}", value, MILLICORES_PER_VCPU, parse_cpus)

    def memory(key: str, value: Amount) -> int:
        return _amount(str(path), f"host.{key}", value, 1, parse_size)

    for key in ("cpu_overcommit", "memory_overcommit"):
        factor = getattr(table, key)
        if not (math.isfinite(factor) and 0 < factor <= 1000):
            raise ConfigError(str(path), f"host.{key}", factor, "must be above 0 and at most 1000")
    if not 0 <= table.memory_idle_tax <= 0.99:
        raise ConfigError(str(path), "host.memory_idle_tax", table.memory_idle_tax, "must be within 0..0.99")
    own_cpus = (os.cpu_count() or 1) * MILLICORES_PER_VCPU
    own_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cpu_capacity = own_cpus if table.cpus is None else cpus("cpus", table.cpus)
    memory_capacity = own_memory if table.memory is None else memory("memory", table.memory)
    capacity = Resources(
        _at_most(
            str(path),
            "host.cpu_overcommit",
            table.cpu_overcommit,
            int(cpu_capacity * table.cpu_overcommit),
            MILLICORES_PER_VCPU,
        ),
        _at_most(
            str(path),
            "host.memory_overcommit",
            table.memory_overcommit,
            int(memory_capacity * table.memory_overcommit),
            1,
        ),
    )
    reserve = Resources(cpus("reserve_cpus", table.reserve_cpus), memory("reserve_memory", table.reserve_memory))
    overhead = memory("overhead_memory_per_guest", table.overhead_memory_per_guest)
    physical = Resources(cpu_capacity, memory_capacity)
    return HostCapacity(capacity, reserve, Resources(0, overhead), physical, table.memory_idle_tax)


def _guest(source: str, name: str, data: dict[str, Any]) -> GuestConfig:
    key = f"guests.{name}"
    table = _guest_table(source, key, data)
    bounds = {
        Kind.CPU: _bounds(source, f"{key}.cpu", table.cpu, MILLICORES_PER_VCPU, parse_cpus),
        Kind.MEMORY: _bounds(source, f"{key}.memory", table.memory, 1, parse_size),
    }
    pairs = zip(bounds[Kind.CPU], bounds[Kind.MEMORY], strict=True)
    limits = Limits(*(Resources(*pair) for pair in pairs))
    config = GuestConfig(
        name,
        limits,
        table.qmp_socket,
        table.cid,
        table.vsock_path,
        table.vsock_privileged_ports,
        source,
        table.park_cpus,
        table.mode == "observe",
    )
    for problem in problems(config):
        raise ConfigError(source, key, None, problem)
    return config


def _bounds(
    source: str, key: str, table: LimitsTable, factor: int, parse: Callable[[str], int]
) -> tuple[int, int, int, int, int, int]:
    """The fields of `Limits` for one kind, in their order."""

    def amount(field: str, value: Amount) -> int:
        return _amount(source, f"{key}.{field}", value, factor, parse)

    low, high = amount("min", table.min), amount("max", table.max)
    if table.burst is None:
        for field in ("burst_credit", "burst_refill"):
            if getattr(table, field) is not None:
                raise ConfigError(source, f"{key}.{field}", getattr(table, field), "needs a burst beside it")
        return low, high, table.weight, 0, 0, 0
    burst = amount("burst", table.burst)
    credit, refill = Limits.usual_burst(high, burst)
    credit = credit if table.burst_credit is None else amount("burst_credit", table.burst_credit)
    refill = refill if table.burst_refill is None else amount("burst_refill", table.burst_refill)
    return low, high, table.weight, burst, credit, refill


def _guest_table(source: str, key: str, data: dict[str, Any]) -> GuestTable:
    try:
        return toml.convert(Path(source), data, GuestTable)
    except ConfigError as error:
        inner = key if error.key == "the file" else f"{key}.{error.key}"
        raise ConfigError(source, inner, error.value, error.expected) from error


def problems(guest: GuestConfig) -> list[str]:
    """What is wrong with a guest, whoever configured it; empty when nothing is."""
    found = guest.limits.problems()
    if not _NAME.fullmatch(guest.name):
        found.append(f"name {guest.name!r}: letters, digits, '.', '_' and '-', at most 64, a letter or digit first")
    if (guest.cid is None) == (guest.vsock_path is None):
        found.append("needs either cid (AF_VSOCK) or vsock_path (unix sockets PATH_PORT), and not both")
    if guest.cid is not None and not 3 <= guest.cid <= 0xFFFF_FFFE:
        found.append(f"cid {guest.cid}: must be within 3..4294967294 (0, 1 and 2 are taken by vsock itself)")
    if not guest.qmp_socket:
        found.append("qmp_socket is empty: the path of a QMP socket that is the broker's own")
    for path in (guest.qmp_socket, guest.vsock_path and f"{guest.vsock_path}_{DEFAULT_PORT}"):
        if path and len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
            found.append(f"{path}: longer than the {_LONGEST_SOCKET_PATH} bytes that a unix socket's path may have")
    return found


def _check_channels(path: Path, guests: Any) -> None:
    for attribute in ("cid", "vsock_path", "qmp_socket"):
        owners: dict[object, str] = {}
        for guest in guests:
            value = getattr(guest, attribute)
            if value is None:
                continue
            if value in owners:
                raise ConfigError(
                    guest.origin or str(path),
                    f"guests.{guest.name}.{attribute}",
                    value,
                    f"is {owners[value]}'s already; each VM needs its own",
                )
            owners[value] = guest.name


def check_channels(guests: dict[str, GuestConfig]) -> None:
    """Check that no two guests share a channel or a hypervisor socket.

    :raise ConfigError: When two do.
    """
    _check_channels(Path("guests"), guests.values())


def _amount(source: str, key: str, value: Amount, factor: int, parse: Callable[[str], int]) -> int:
    """An amount in millicores or bytes.

    :raise ConfigError: When it is negative, not a number, or not a whole amount.
    """
    if isinstance(value, str):
        try:
            return _at_most(source, key, value, parse(value), factor)
        except ValueError as error:
            raise ConfigError(source, key, value, str(error)) from error
    if isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise ConfigError(source, key, value, "must be a number, 0 or above")
    exact = value * factor
    if exact != int(exact):
        raise ConfigError(source, key, value, "is not a whole amount")
    return _at_most(source, key, value, int(exact), factor)


def _at_most(source: str, key: str, value: object, amount: int, factor: int) -> int:
    """The amount, if the protocol has room for it; `factor` tells CPUs from bytes."""
    kind, most = (Kind.CPU, MAX_CPU_MILLICORES) if factor == MILLICORES_PER_VCPU else (Kind.MEMORY, MAX_MEMORY_BYTES)
    if amount > most:
        raise ConfigError(source, key, value, f"must be at most {kind.show(most)}")
    return amount
