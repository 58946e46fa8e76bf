"""Who may not: every admin call as another user, over TCP and from a guest; and what else is not for everybody."""

import asyncio
import grp
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from fake_operators import HOST, FakeOperators
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from pki import OTHER
from remote_rig import Place
from test_journal_faults import missing

from guestd.v1 import admin_pb2, monitor_pb2
from guestd.wire import serve_monitor as monitor_service
from guestd.wire.relay import IngressRelay, Peers
from guestd.wire.serve_admin import serve_admin
from guestd.wire.serve_guests import serve_guests
from guestd.wire.serve_monitor import serve_monitor, serve_remote_monitor

NOBODY = 65534
ADMIN, MONITOR, HEALTH, REFLECTION = (
    [f"/{service.full_name}/{method.name}" for service in file.services_by_name.values() for method in service.methods]
    for file in (admin_pb2.DESCRIPTOR, monitor_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
)
needs_root = pytest.mark.usefixtures("being_root")

AS_SOMEBODY = """
import asyncio, json, os, socket, sys
import grpc, grpc.aio
from pathlib import Path
from guestd.model.errors import GuestdError
from guestd.model.view import LimitsChange
from guestd.wire.client import BrokerClient

run_dir, uid, gid, methods = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
os.setgroups([])
os.setgid(gid)
os.setuid(uid)

def connect(name):
    with socket.socket(socket.AF_UNIX) as one:
        try:
            one.connect(str(run_dir / name))
        except OSError as error:
            return type(error).__name__
        return "connected"

async def client_says(call):
    try:
        return type(await call).__name__
    except GuestdError as error:
        return f"{type(error).__name__}: {error}"

async def main():
    said = {}
    async with grpc.aio.insecure_channel(f"unix:{run_dir}/admin.sock") as channel:
        for method in methods:
            try:
                await channel.unary_unary(method)(b"", timeout=10)
                said[method] = ["OK", ""]
            except grpc.aio.AioRpcError as error:
                said[method] = [error.code().name, error.details()]
    async with BrokerClient(run_dir) as client:
        return {
            "methods": said,
            "admin": connect("admin.sock"),
            "monitor": connect("monitor.sock"),
            "pause": await client_says(client.pause_guest("web-1")),
            "host": await client_says(client.host()),
        }

print(json.dumps(asyncio.run(main())))
"""


@pytest.fixture
def being_root() -> None:
    """Without it the test skips, or fails under GUESTD_REQUIRE_VM=1."""
    if os.geteuid() != 0:
        missing("only root can be somebody else")


@pytest.fixture
def root() -> Iterator[Path]:
    """A directory that anybody may enter."""
    with tempfile.TemporaryDirectory(prefix="gd", dir="/tmp") as path:
        Path(path).chmod(0o755)
        yield Path(path)


@pytest.fixture
async def place(root: Path) -> AsyncIterator[Place]:
    """A broker's sockets, and its monitor on TCP."""
    one = Place(root)
    servers = [
        await serve_remote_monitor(one.operators, one.address, one.files),
        await serve_monitor(one.operators, root / "monitor.sock"),
        await serve_admin(one.operators, root / "admin.sock"),
    ]
    yield one
    for server in servers:
        await server.stop(0)


async def as_somebody(root: Path, uid: int, gid: int, methods: Sequence[str] = ()) -> dict[str, Any]:
    """What another user gets to hear."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", AS_SOMEBODY, str(root), str(uid), str(gid), *methods),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, err.decode()
    found: dict[str, Any] = json.loads(out)
    return found


async def statuses(channel: grpc.aio.Channel, methods: Sequence[str]) -> dict[str, grpc.StatusCode]:
    found = {}
    for method in methods:
        call = channel.unary_unary(method)(b"", timeout=10)
        found[method] = await call.code()
    return found


def changes(operators: FakeOperators) -> list[object]:
    return [call for call in operators.calls if call[0] not in ("explain", "events", "follow", "history")]


def test_there_is_something_to_try() -> None:
    assert len(ADMIN) >= 7
    assert "/guestd.v1.AdminService/ReclaimGuest" in ADMIN


@needs_root
async def test_no_admin_call_is_for_another_user(place: Place) -> None:
    said = await as_somebody(place.root, NOBODY, NOBODY, ADMIN + REFLECTION)
    assert list(said["methods"]) == ADMIN + REFLECTION
    assert {code for code, _ in said["methods"].values()} == {"UNAVAILABLE"}
    assert all("Permission denied" in details for _, details in said["methods"].values())
    assert said["admin"] == "PermissionError"
    assert said["pause"].startswith("DeniedError: ")
    assert said["pause"].endswith("admin.sock may not be opened by this user; try with sudo")
    assert changes(place.operators) == []


@needs_root
async def test_the_monitor_is_for_its_group_and_nobody_else(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = next(one for one in grp.getgrall() if one.gr_gid not in (0, NOBODY))
    monkeypatch.setattr(monitor_service, "MONITOR_GROUP", group.gr_name)
    operators = FakeOperators()
    servers = [await serve_monitor(operators, root / "monitor.sock")]
    servers += [await serve_admin(operators, root / "admin.sock")]
    member = await as_somebody(root, NOBODY, group.gr_gid, ADMIN)
    assert (member["monitor"], member["host"]) == ("connected", type(HOST).__name__)
    assert {code for code, _ in member["methods"].values()} == {"UNAVAILABLE"}  # who may read may change nothing
    stranger = await as_somebody(root, NOBODY, NOBODY)
    assert stranger["monitor"] == "PermissionError"
    assert stranger["host"].endswith("monitor.sock may not be opened by this user; try with sudo")
    assert changes(operators) == []
    for server in servers:
        await server.stop(0)


@needs_root
async def test_a_closed_run_directory_is_denied_too(root: Path) -> None:
    (root / "run").mkdir(mode=0o700)
    said = await as_somebody(root / "run", NOBODY, NOBODY)
    assert said["host"].startswith("DeniedError: ")
    assert "in a directory that this user may not open" in said["host"]


async def test_over_tcp_there_is_no_admin_and_no_reflection(place: Place) -> None:
    async with place.channel(place.client_files) as channel:
        found = await statuses(channel, ADMIN + REFLECTION)
        assert set(found.values()) == {grpc.StatusCode.UNIMPLEMENTED}, found
        assert (await place.host(channel)).host.epoch == HOST.epoch
    assert changes(place.operators) == []


async def test_over_tcp_without_a_certificate_of_the_ca_there_is_nothing(place: Place) -> None:
    for files in (None, place.files_of(OTHER.issue("client"))):
        async with place.channel(files) as channel:
            found = await statuses(channel, ADMIN + MONITOR + HEALTH + REFLECTION)
        assert set(found.values()) == {grpc.StatusCode.UNAVAILABLE}, found
    assert place.operators.calls == []


async def test_the_monitors_socket_has_no_admin_and_no_reflection(place: Place) -> None:
    async with grpc.aio.insecure_channel(f"unix:{place.root}/monitor.sock") as channel:
        found = await statuses(channel, ADMIN + REFLECTION)
    assert set(found.values()) == {grpc.StatusCode.UNIMPLEMENTED}, found
    assert changes(place.operators) == []


async def test_a_guest_has_its_own_call_and_nothing_else(root: Path) -> None:
    peers = Peers()
    server = await serve_guests(FakeOperators(), peers, root / "server")  # type: ignore[arg-type]
    relay = IngressRelay(root / "server", peers)
    relay.listen_unix("web-1", root / "guest", privileged_ports=False)
    async with grpc.aio.insecure_channel(f"unix:{root}/guest") as channel:
        found = await statuses(channel, ADMIN + MONITOR + HEALTH + REFLECTION)
    assert set(found.values()) == {grpc.StatusCode.UNIMPLEMENTED}, found
    await relay.close()
    await server.stop(0)
