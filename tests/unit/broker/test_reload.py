"""What of a new configuration a reload takes over, and what takes a restart."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from guestd.broker.config import BrokerConfig
from guestd.broker.core.ledger import HostCapacity
from guestd.broker.outlets import Address, MutualTls, Outlets
from guestd.broker.reload import reloaded
from guestd.model.resources import Resources

RUNNING = BrokerConfig(HostCapacity(Resources(8000, 1 << 33)), Path("/state"), Path("/run"), 4747, 30.0, {})
ADDRESS = Address("127.0.0.1", 9756)
OUTLETS: dict[str, tuple[str, Any]] = {
    "monitor": ("[monitor]", MutualTls(ADDRESS, Path("/c"), Path("/k"), Path("/ca"))),
    "metrics": ("[metrics]", ADDRESS),
    "web": ("[web]", ADDRESS),
    "web_hosts": ("[web]", ("vm1.example",)),
    "record_bytes": ("[record]", 0),
    "history_bytes": ("[history]", 1 << 20),
    "json_logs": ("[log]", True),
}


@pytest.mark.parametrize("field", Outlets.__struct_fields__)
def test_each_outlet_takes_a_restart(field: str) -> None:
    name, value = OUTLETS[field]
    wanted = msgspec.structs.replace(RUNNING, outlets=msgspec.structs.replace(RUNNING.outlets, **{field: value}))
    assert reloaded(RUNNING, wanted) == (RUNNING, [name])


@pytest.mark.parametrize(
    ("field", "name", "value"),
    [
        ("state_dir", "broker.state_dir", Path("/elsewhere")),
        ("run_dir", "broker.run_dir", Path("/elsewhere")),
        ("port", "broker.port", 4748),
        ("heartbeat_seconds", "broker.heartbeat_seconds", 10.0),
        ("cpu_bandwidth", "host.cpu_bandwidth", False),
    ],
)
def test_what_was_made_at_the_start_stays_until_a_restart(field: str, name: str, value: Any) -> None:
    assert reloaded(RUNNING, msgspec.structs.replace(RUNNING, **{field: value})) == (RUNNING, [name])


def test_all_else_is_taken_over() -> None:
    host = HostCapacity(Resources(4000, 1 << 33))
    wanted = msgspec.structs.replace(RUNNING, host=host, observe=True)
    assert reloaded(RUNNING, wanted) == (wanted, [])
