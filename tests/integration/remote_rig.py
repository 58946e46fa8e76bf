"""The monitor on TCP with a fake broker behind it, and the files of both sides."""

import asyncio
import socket
import ssl
from pathlib import Path

import grpc
import grpc.aio
from fake_operators import FakeOperators, event
from pki import CA, Pair

from guestd.v1 import monitor_pb2, monitor_pb2_grpc
from guestd.wire.client import BrokerClient
from guestd.wire.tls import TlsFiles


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Place:
    """A monitor on TCP, and the files of both sides."""

    def __init__(self, root: Path) -> None:
        self.root, self.port, self.operators = root, free_port(), FakeOperators()
        self.operators.record = [event(1), event(2)]
        (root / "broker").mkdir()
        self.files = CA.issue("broker").write(root / "broker", CA)
        self.client_files = CA.issue("client").write(root, CA)
        self.server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def client(self, files: TlsFiles | None = None, host: str = "127.0.0.1") -> BrokerClient:
        one = files or self.client_files
        return BrokerClient.remote(f"{host}:{self.port}", one.certificate, one.key, one.ca)

    def files_of(self, pair: Pair) -> TlsFiles:
        """A client's, which trusts the broker."""
        return pair.write(self.root, CA, "client")

    def channel(self, files: TlsFiles | None) -> grpc.aio.Channel:
        """As gRPC has it, without anything of guestd's; without a certificate when there are no files."""
        pair = (files.key.read_bytes(), files.certificate.read_bytes()) if files else (None, None)
        options = [("grpc.use_local_subchannel_pool", 1)]
        return grpc.aio.secure_channel(self.address, grpc.ssl_channel_credentials(CA.pem, *pair), options=options)

    async def host(self, channel: grpc.aio.Channel) -> monitor_pb2.GetHostResponse:
        return await monitor_pb2_grpc.MonitorServiceStub(channel).GetHost(monitor_pb2.GetHostRequest(), timeout=5)

    async def shown(self) -> bytes:
        """The certificate that a new connection sees, DER."""
        context = ssl.create_default_context(cadata=CA.pem.decode())
        context.load_cert_chain(self.client_files.certificate, self.client_files.key)
        context.set_alpn_protocols(["h2"])
        _, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=context)
        seen: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.transport.abort()
        return seen
