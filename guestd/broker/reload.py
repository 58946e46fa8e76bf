"""What of a new configuration a reload takes over, and what takes a restart."""

from typing import Final

import msgspec

from guestd.broker.config import BrokerConfig

_NEED_RESTART: Final = {
    "state_dir": "broker.state_dir",
    "run_dir": "broker.run_dir",
    "port": "broker.port",
    "heartbeat_seconds": "broker.heartbeat_seconds",
    "cpu_bandwidth": "host.cpu_bandwidth",
}
_OUTLETS: Final = {
    "monitor": "[monitor]",
    "metrics": "[metrics]",
    "web": "[web]",
    "web_hosts": "[web]",
    "record_bytes": "[record]",
    "history_bytes": "[history]",
    "json_logs": "[log]",
}


def reloaded(running: BrokerConfig, wanted: BrokerConfig) -> tuple[BrokerConfig, list[str]]:
    """The configuration that holds after a reload, and what was changed and does not: keys and tables of the file."""
    names = [name for field, name in _NEED_RESTART.items() if getattr(running, field) != getattr(wanted, field)]
    for field, name in _OUTLETS.items():
        if getattr(running.outlets, field) != getattr(wanted.outlets, field) and name not in names:
            names.append(name)
    kept = {field: getattr(running, field) for field in (*_NEED_RESTART, "outlets")}
    return msgspec.structs.replace(wanted, **kept), names
