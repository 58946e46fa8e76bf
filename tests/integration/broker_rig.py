"""A whole broker in this process: engine, journal, relay and servers on real sockets, fake VMs, real guest daemons."""

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc.aio

from guestd.broker import config as configuration
from guestd.broker.config import BrokerConfig, GuestConfig
from guestd.broker.core.track import Timing
from guestd.broker.engine import Engine
from guestd.broker.hypervisor.fake import FakeVm
from guestd.broker.journal import Journal
from guestd.guest.core.machine import GuestMachine
from guestd.guest.core.need import EstimateSettings
from guestd.guest.core.need_cpu import CpuEstimator
from guestd.guest.core.need_memory import MemoryEstimator
from guestd.guest.core.ops import HandResult, Op
from guestd.guest.daemon import Daemon, dial_unix
from guestd.guest.hands import DryHands
from guestd.model.guest import Capability, Identity
from guestd.model.messages import BrokerMessage, Demand, GuestMessage, Hello, Urgency, Usable, Welcome
from guestd.model.reason import Reason
from guestd.model.resources import Resources
from guestd.model.units import GIB, MIB
from guestd.sim.kernel import GuestKernel, Load
from guestd.v1 import guest_pb2
from guestd.wire import convert
from guestd.wire.relay import IngressRelay, Peers
from guestd.wire.serve_admin import serve_admin
from guestd.wire.serve_guests import serve_guests
from guestd.wire.serve_monitor import serve_monitor

QUICK = Timing(cool_down_seconds=0.3, retry_seconds=0.3, ask_seconds=1.0, urge_seconds=1.0, overdue_seconds=1.0)
CAPABLE = frozenset({Capability.CPU_ONLINE, Capability.MEMORY_ONLINE, Capability.VIRTIO_MEM, Capability.PSI})
USABLE = Usable(1, 1, 512 * MIB, 460 * MIB, 128 * MIB)
_STEP_SECONDS = 0.02


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """A directory whose path leaves room for a unix socket's name."""
    path = Path(tempfile.mkdtemp(prefix="gd", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


async def eventually(holds: Callable[[], bool], what: str, seconds: float = 15.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.01)


def guest_table(root: Path, name: str, *, cpus: tuple[int, int] = (1, 4), weight: int = 100) -> str:
    """A guest's part of broker.toml."""
    return (
        f"[guests.{name}]\n"
        f"cpu = {{ min = {cpus[0]}, max = {cpus[1]}, weight = {weight} }}\n"
        f'memory = {{ min = "512MiB", max = "2GiB", weight = {weight} }}\n'
        f'qmp_socket = "{root}/{name}.qmp"\n'
        f'vsock_path = "{root}/{name}"\n'
    )


def host_table(root: Path, cpus: int = 8, memory: str = "8GiB") -> str:
    """The host's and the broker's part of broker.toml."""
    return (
        f'[host]\ncpus = {cpus}\nmemory = "{memory}"\ncpu_bandwidth = "off"\n'
        f'[broker]\nstate_dir = "{root}/state"\nrun_dir = "{root}/run"\nheartbeat_seconds = 1\n'
    )


class FakeHands(DryHands):
    """Hands on a fake kernel."""

    def __init__(self, kernel: GuestKernel) -> None:
        self._kernel = kernel

    async def batch(self, ops: Sequence[Op], deadline_seconds: float = 10.0) -> list[HandResult]:
        return [self._kernel.perform(op) for op in ops]


class GuestRig:
    """A VM: fake hypervisor, fake kernel, and the real daemon on a real socket."""

    def __init__(self, name: str, root: Path, vm: FakeVm) -> None:
        self.name, self.vm, self.load = name, vm, Load()
        self.kernel = GuestKernel(vm, self.load)
        self.root, self.path = root, root / f"{name}_{configuration.DEFAULT_PORT}"
        self.generation = 0
        self.daemon: Daemon | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the daemon, as a newer one than any before."""
        self.generation += 1
        identity = Identity(b"b" * 16, self.generation, "rig", self.name, "fake", CAPABLE)
        machine = GuestMachine(identity, time.monotonic())
        settings = EstimateSettings(hold_seconds=1.5)  # longer than the window over which rates are taken
        machine.cpu_estimator, machine.memory_estimator = CpuEstimator(settings), MemoryEstimator(settings)
        self.daemon = Daemon(
            machine,
            lambda quick: self.kernel.sample(),
            self.kernel.inventory,
            FakeHands(self.kernel),
            lambda: dial_unix(str(self.path)),
        )
        self.vm.on_guest_change = self.daemon.on_hotplug
        self._task = asyncio.create_task(self.daemon.run())

    async def stop(self) -> None:
        """Stop the daemon; nothing changes in the VM."""
        self.vm.on_guest_change = lambda: None
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def has(self, cpus: int, memory_bytes: int) -> bool:
        """Whether hypervisor and guest agree on so much."""
        return (
            len(self.vm.guest_cpus) == len(self.kernel.online_cpus) == cpus
            and self.vm.guest_memory_bytes == memory_bytes
            and len(self.kernel.online_blocks) * 128 * MIB == memory_bytes
        )


class BrokerRig:
    """The broker, as `guestd-broker run` puts it together, but with fake VMs."""

    def __init__(self, root: Path, config: str, timing: Timing = QUICK) -> None:
        self.root, self.timing, self.config_path = root, timing, root / "broker.toml"
        self.config_path.write_text(config)
        self.vms: dict[str, FakeVm] = {}
        self.guests: dict[str, GuestRig] = {}
        self.run_dir = root / "run"
        self.engine: Engine
        self._time: asyncio.Task[None] | None = None
        self._relay: IngressRelay
        self._servers: list[grpc.aio.Server] = []

    async def __aenter__(self) -> "BrokerRig":
        await self.start()
        self._time = asyncio.create_task(self._pass_time())
        return self

    async def __aexit__(self, *_: object) -> None:
        for guest in self.guests.values():
            await guest.stop()
        await self.stop()
        if self._time is not None:
            self._time.cancel()
            await asyncio.gather(self._time, return_exceptions=True)

    def load(self) -> BrokerConfig:
        return configuration.load(self.config_path)

    async def start(self) -> None:
        config = self.load()
        guests_dir = config.run_dir / "guests"
        guests_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        peers = Peers()
        self._relay = IngressRelay(guests_dir / "server.sock", peers)
        self.engine = Engine(config, Journal(config.state_dir / "journal.db"), self._make_vm, self._relay, self.timing)
        await self.engine.start()
        self._servers = [
            await serve_guests(self.engine, peers, guests_dir / "server.sock"),
            await serve_monitor(self.engine, config.run_dir / "monitor.sock"),
            await serve_admin(self.engine, config.run_dir / "admin.sock"),
        ]

    async def stop(self) -> None:
        await self._relay.close()
        for server in self._servers:
            await server.stop(0.2)
        await self.engine.stop()

    async def reload(self, config: str) -> None:
        self.config_path.write_text(config)
        await self.engine.reload(self.load())

    def guest(self, name: str) -> GuestRig:
        """The VM of that name with its daemon, started at once."""
        guest = self.guests[name] = GuestRig(name, self.root, self._vm(name))
        guest.start()
        return guest

    def reserved(self, name: str) -> Resources:
        return self.engine.machine.guests[name].reserved

    def connected(self, name: str) -> bool:
        return self.engine.machine.guests[name].connected

    def _vm(self, name: str) -> FakeVm:
        if name not in self.vms:
            self.vms[name] = FakeVm(plug_rate=8 * GIB, unplug_rate=4 * GIB, cpu_unplug_seconds=0.02)
        return self.vms[name]

    def _make_vm(self, guest: GuestConfig) -> FakeVm:
        return self._vm(guest.name)

    async def _pass_time(self) -> None:
        before = time.monotonic()
        while True:
            await asyncio.sleep(_STEP_SECONDS)
            now = time.monotonic()
            passed, before = now - before, now
            for guest in self.guests.values():
                guest.vm.advance(passed)
                guest.kernel.step(passed)


class RawGuest:
    """A gRPC client on one guest's channel that says whatever a test wants."""

    def __init__(self, root: Path, name: str) -> None:
        path = root / f"{name}_{configuration.DEFAULT_PORT}"
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 1 << 20)]
        self._channel = grpc.aio.insecure_channel(f"unix:{path}", options=options)
        method = f"/{guest_pb2.DESCRIPTOR.services_by_name['GuestService'].full_name}/Negotiate"
        self.call: Any = self._channel.stream_stream(method)()  # raw bytes both ways

    async def __aenter__(self) -> "RawGuest":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.call.cancel()
        await self._channel.close()

    async def send(self, message: GuestMessage | guest_pb2.NegotiateRequest | bytes) -> None:
        if isinstance(message, bytes):
            await self.call.write(message)
        elif isinstance(message, guest_pb2.NegotiateRequest):
            await self.call.write(message.SerializeToString())
        else:
            await self.call.write(convert.guest_message_to_wire(message).SerializeToString())

    async def read(self) -> BrokerMessage | None:
        """The next message; None at the end of the stream."""
        async with asyncio.timeout(20):
            raw = await self.call.read()
        return (
            None
            if raw is grpc.aio.EOF
            else convert.broker_message_from_wire(guest_pb2.NegotiateResponse.FromString(raw))
        )

    async def hello(self, generation: int = 1, boot: bytes = b"b" * 16) -> Welcome:
        """Say hello and get the welcome."""
        await self.send(hello(generation, boot))
        welcome = await self.read()
        assert isinstance(welcome, Welcome)
        return welcome

    async def status(self) -> grpc.StatusCode:
        """How the stream ended; what came before is read and dropped (gRPC tells the status only then)."""
        async with asyncio.timeout(5):
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await self.call.read() is not grpc.aio.EOF:
                    pass
            return await self.call.code()  # type: ignore[no-any-return]


def hello(generation: int = 1, boot: bytes = b"b" * 16) -> Hello:
    return Hello(1, 1, Identity(boot, generation, "raw", "raw", "raw", CAPABLE), USABLE)


def demand(sequence: int, cpu: int, memory: int) -> Demand:
    """A demand for millicores and bytes."""
    reasons = (Reason("test", "the test wants it"),)
    floor = Resources(1000, 256 * MIB)
    return Demand(sequence, Resources(cpu, memory), floor, 1 << 40, Urgency.NORMAL, reasons, USABLE)


async def messages(guest: RawGuest) -> AsyncIterator[BrokerMessage]:
    while (message := await guest.read()) is not None:
        yield message
