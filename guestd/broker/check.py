"""What `guestd-broker check` and `guestctl config check` look at."""

from pathlib import Path

from guestd.broker import config as configuration
from guestd.broker.config import BrokerConfig


def check(path: Path) -> BrokerConfig:
    """Read and check everything, and the files that the configuration names for TLS. With bad ones a broker starts
    all the same, and does not listen there.

    :raise ConfigError: Naming file, key, value and what was expected.
    """
    config = configuration.load(path)
    monitor = config.outlets.monitor
    if monitor is not None:
        from guestd.wire.tls import ServerCertificates, TlsFiles  # with gRPC: only where there are any

        ServerCertificates(TlsFiles(monitor.certificate, monitor.key, monitor.client_ca))
    return config
