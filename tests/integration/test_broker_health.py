"""A whole broker as a monitoring system sees it: its health, and its monitor on TCP."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from broker_rig import BrokerRig, eventually, guest_table, host_table, short_directory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pki import CA
from process_rig import Process
from remote_rig import free_port

from guestd.model.errors import DeniedError
from guestd.wire.client import BrokerClient
from guestd.wire.tls import TlsFiles

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def root() -> Iterator[Path]:
    with short_directory() as path:
        yield path


async def next_status(watch: "grpc.aio.UnaryStreamCall[object, object]") -> int:
    async with asyncio.timeout(15):
        return (await watch.read()).status  # type: ignore[no-any-return,union-attr]


async def test_it_does_not_serve_while_the_journal_cannot_be_written(root: Path) -> None:
    async with (
        BrokerRig(root, host_table(root) + guest_table(root, "a")) as rig,
        grpc.aio.insecure_channel(f"unix:{rig.run_dir}/admin.sock") as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert await next_status(watch) == SERVING
        journal = root / "state" / "journal.db"
        guest = rig.guest("a")
        await eventually(lambda: rig.connected("a"), "connected")
        journal.rename(root / "aside")
        guest.load.tasks = 4.2
        assert await next_status(watch) == NOT_SERVING
        (root / "aside").rename(journal)
        assert await next_status(watch) == SERVING
        await eventually(lambda: rig.reserved("a").cpu_millicores == 4000, "what could be recorded is done")


class RemoteBroker(Process):
    """`guestd-broker run` with a monitor on TCP."""

    def __init__(self, root: Path) -> None:
        super().__init__(root / "log")
        self.run_dir, self.address = root / "run", f"127.0.0.1:{free_port()}"
        self.files = CA.issue("broker").write(root, CA, "broker")
        self.client_files = CA.issue("client").write(root, CA, "client")
        self.config = root / "broker.toml"
        self.config.write_text(
            host_table(root)
            + f'[monitor]\nlisten = "{self.address}"\ncertificate = "{self.files.certificate}"\n'
            + f'key = "{self.files.key}"\nclient_ca = "{self.files.ca}"\n'
        )

    async def start(self) -> None:
        await self.spawn(sys.executable, "-m", "guestd.broker.main", "run", "--config", str(self.config))
        await eventually(lambda: " guests" in self.said or not self.running, "the broker serves", 20.0)
        assert self.running, self.said

    def client(self, files: TlsFiles) -> BrokerClient:
        return BrokerClient.remote(self.address, files.certificate, files.key, files.ca)

    async def stop(self) -> int:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return await self.ended()


@pytest.fixture
async def broker(root: Path) -> AsyncIterator[RemoteBroker]:
    one = RemoteBroker(root)
    yield one
    await one.kill()


async def test_a_broker_is_watched_from_elsewhere_until_it_stops(broker: RemoteBroker) -> None:
    await broker.start()
    async with broker.client(broker.client_files) as client:
        assert (await client.host()).epoch == 1
        with pytest.raises(DeniedError, match="on the host itself"):
            await client.pause_guest("a")
    async with grpc.aio.insecure_channel(f"unix:{broker.run_dir}/monitor.sock") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert await next_status(watch) == SERVING
        stopping = asyncio.create_task(broker.stop())
        assert await next_status(watch) == NOT_SERVING
    assert await stopping == 0
    assert f"the monitor listens on {broker.address}" in broker.said
    assert "Traceback" not in broker.said


async def test_strangers_leave_no_lines_in_the_log(broker: RemoteBroker) -> None:
    await broker.start()
    before = broker.said
    async with grpc.aio.insecure_channel(broker.address) as channel:
        call = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
    assert await broker.stop() == 0
    assert "handshake" not in broker.said.removeprefix(before).lower()


async def test_with_a_bad_certificate_it_says_so_once_and_serves_its_guests(broker: RemoteBroker) -> None:
    broker.files.certificate.unlink()
    await broker.start()
    async with BrokerClient(broker.run_dir) as client:
        assert (await client.host()).epoch == 1
    assert await broker.stop() == 0
    lines = [line for line in broker.said.splitlines() if "monitor" in line]
    assert len(lines) == 1, lines
    assert f"error: the monitor does not listen on {broker.address}: {broker.files.certificate}: cannot be" in lines[0]
    assert lines[0].endswith("; see to the file and its mode; trying again every 30 s")
