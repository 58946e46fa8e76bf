"""What tests of commands that talk to a broker share."""

import pytest
from fake_client import EVENTS, FakeClient

import guestd.wire.client


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    """The fake that commands get for a client, with nothing said or done yet."""
    for name in ("GUESTD_RUN_DIR", "GUESTD_HOST", "GUESTD_CERT", "GUESTD_KEY", "GUESTD_CA", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(guestd.wire.client, "BrokerClient", FakeClient)
    for name in ("calls", "changes", "stream", "views"):
        monkeypatch.setattr(FakeClient, name, [])
    monkeypatch.setattr(FakeClient, "error", None)
    monkeypatch.setattr(FakeClient, "past", EVENTS)
    monkeypatch.setattr(FakeClient, "unknown_time", False)
    return FakeClient


@pytest.fixture(autouse=True)
def _no_width_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no terminal has no width, whoever runs the tests (and whatever textual's own tests leave behind)."""
    for name in ("COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
