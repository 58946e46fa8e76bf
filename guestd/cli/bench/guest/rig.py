"""One VM with a broker of its own, an agent inside it, and a daemon of choice: what all benchmarks stand on."""

import asyncio
import base64
import contextlib
import shlex
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qemu.qmp import QMPClient, QMPError

from guestd.cli.bench.guest.agent import AGENT_PORT, Agent, BenchError
from guestd.cli.demo.run import GUEST_NAME, _broker, end_vm
from guestd.cli.demo.verify import Expected
from guestd.lab import tools
from guestd.lab.image import GuestImage
from guestd.lab.machine import Machine
from guestd.lab.qemu import MachineConfig
from guestd.model.units import MIB
from guestd.model.view import GuestView
from guestd.wire.client import BrokerClient

SERVICE = "guestd.service"
POLLER = "bench-poller.service"
GUEST_DIR = "/var/lib/guestd-bench"  # on the disk: what is there uses no memory of the VM's
GUEST_PYTHON = "/opt/guestd/bin/python3"
WORK = f"{GUEST_DIR}/work"
BLOCK_BYTES = 128 * MIB
MEMORY_DEVICE = "/machine/peripheral/vm0"
_INSIDE = Path(__file__).parent / "inside"
_CHUNK_BYTES = 512 << 10
_CONNECT_SECONDS = 60.0
_SETTLE_SECONDS = 120.0

Say = Callable[[str], None]


@dataclass(slots=True)
class Rig:
    """A VM that is up. Amounts of memory are those of virtio-mem: what there is beside the memory at boot."""

    machine: Machine
    broker: BrokerClient
    say: Say
    qemu_version: str = "unknown"
    guest_kernel: str = "unknown"
    agent: Agent = field(default_factory=Agent)
    _qmp: QMPClient = field(default_factory=lambda: QMPClient("bench"))

    async def open(self, work: Path) -> None:
        """Puts the bench's programs into the VM and talks to them.

        :param work: The compiled `inside/work.c`.
        :raise BenchError: When the agent does not come.
        """
        await self._qmp.connect(str(self.machine.paths.observer))
        version = (await self.qmp("query-version"))["qemu"]
        self.qemu_version = "{major}.{minor}.{micro}".format(**version)
        self.guest_kernel = (await self.shell("uname -r")).strip()
        await self.agent.listen(self.machine.uds_base)
        text = (_INSIDE / "agent.py").read_text()
        await self.shell(f"mkdir -p {GUEST_DIR} && cat > {GUEST_DIR}/agent.py <<'END-OF-FILE'\n{text}\nEND-OF-FILE")
        await self.machine.console.spawn(f"exec python3 -S {GUEST_DIR}/agent.py {AGENT_PORT} 2>{GUEST_DIR}/agent.log")
        await self.agent.wait_connected(_CONNECT_SECONDS)
        for path in sorted(_INSIDE.glob("*.py")):
            await self.put(path.name, path.read_bytes())
        await self.put("work", work.read_bytes(), mode=0o755)

    async def close(self) -> None:
        """Lets go of the VM."""
        await self.agent.close()
        with contextlib.suppress(QMPError, OSError, EOFError):
            await self._qmp.disconnect()

    # ---- hands -----------------------------------------------------------------------------------

    async def qmp(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """One command of QMP.

        :raise BenchError: When it is refused.
        """
        try:
            return await self._qmp.execute(command, arguments or {})
        except (QMPError, OSError) as error:
            raise BenchError(f"QMP {command}: {error}") from error

    async def shell(self, command: str, timeout_seconds: float = 60.0) -> str:
        """A shell command in the guest; what it prints."""
        return (await self.machine.console.run(command, timeout_seconds)).stdout

    async def put(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """A file into `GUEST_DIR`."""
        for start in range(0, max(1, len(data)), _CHUNK_BYTES):
            part = base64.b64encode(data[start : start + _CHUNK_BYTES]).decode()
            await self.agent.ask("put", path=f"{GUEST_DIR}/{name}", data=part, append=start > 0, mode=mode)

    async def start_unit(self, unit: str, words: list[str], *properties: str) -> None:
        """A transient service."""
        options = [f"--property={one}" for one in properties]
        command = ["systemd-run", "--quiet", f"--unit={unit}", *options, *words]
        await self.shell(f"systemctl reset-failed {unit} 2>/dev/null; {shlex.join(command)}")

    async def request_memory(self, amount: int) -> None:
        """Tells virtio-mem what to have."""
        await self.qmp("qom-set", {"path": MEMORY_DEVICE, "property": "requested-size", "value": amount})

    # ---- which daemon ----------------------------------------------------------------------------

    async def use(self, daemon: str) -> None:
        """Has guestd ("guestd"), one of the pollers, or nobody ("") be the daemon, and waits for it at the broker."""
        await self.shell(f"systemctl stop {SERVICE} {POLLER} 2>/dev/null; true")
        await self.until(self._disconnected, "the broker to miss the daemon")
        if daemon == "guestd":
            await self.shell(f"systemctl start {SERVICE}")
        elif daemon:
            rank = ("Slice=guestd.slice", "MemoryMin=64M", "OOMScoreAdjust=-900", "KillMode=mixed")  # guestd's own
            await self.start_unit(POLLER, [GUEST_PYTHON, f"{GUEST_DIR}/poller.py", daemon], *rank)
        if daemon:
            await self.until(self._connected, f"{daemon} to be connected")

    async def view(self) -> GuestView:
        """The broker's word."""
        return await self.broker.guest(GUEST_NAME)

    async def _connected(self) -> bool:
        return (await self.view()).connected

    async def _disconnected(self) -> bool:
        return not (await self.view()).connected

    # ---- how much there is -----------------------------------------------------------------------

    async def amounts(self) -> tuple[int, int, int]:
        """vCPUs, bytes of virtio-mem plugged, and bytes asked for."""
        vcpus = len(await self.qmp("query-cpus-fast"))
        devices = await self.qmp("query-memory-devices")
        data = next(device["data"] for device in devices if device["type"] == "virtio-mem")
        return vcpus, int(data["size"]), int(data["requested-size"])

    async def plugged(self) -> int:
        """Bytes of virtio-mem that are plugged."""
        return (await self.amounts())[1]

    async def at_minimum(self, steady_seconds: float = 3.0, more_seconds: float = 0.0) -> None:
        """The VM is back at its minimum and has been for a moment."""
        since: float | None = None

        async def steady() -> bool:
            nonlocal since
            if await self.amounts() != (self.machine.config.cpus, 0, 0):
                since = None
                return False
            since = since or time.monotonic()
            return time.monotonic() - since >= steady_seconds

        await self.until(steady, "the VM to be back at its minimum")
        await asyncio.sleep(more_seconds)

    async def until(self, reached: Callable[[], Any], what: str, limit_seconds: float = _SETTLE_SECONDS) -> None:
        """:raise BenchError: When it is not reached in time."""
        try:
            async with asyncio.timeout(limit_seconds):
                while not await reached():  # noqa: ASYNC110 - most of it is known only by asking
                    await asyncio.sleep(0.05)
        except TimeoutError as error:
            raise BenchError(
                f"waited {limit_seconds:g} s in vain for {what}; the VM has "
                "{} vCPUs, {} bytes plugged of {} asked for".format(*await self.amounts())
            ) from error

    @contextlib.asynccontextmanager
    async def by_hand(self, then: str = "guestd") -> AsyncIterator[None]:
        """No daemon, and the broker leaves the VM alone; a daemon is there again afterwards."""
        await self.broker.pause_guest(GUEST_NAME)
        await self.use("")
        try:
            yield
        finally:
            await self.broker.resume_guest(GUEST_NAME)
            await self.use(then)

    async def emptied(self) -> None:
        """With nobody else at it: takes back all memory that was plugged.

        A guest that does not give it up at once tries again only after a minute, or when asked for something else.
        """
        for _ in range(6):
            await self.request_memory(0)
            with contextlib.suppress(BenchError):
                await self.until(self._empty, "the memory to come back", 12.0)
                return
            await self.request_memory(BLOCK_BYTES)
            await asyncio.sleep(0.5)
        raise BenchError(f"{await self.plugged()} bytes of memory do not come back")

    async def _empty(self) -> bool:
        return await self.plugged() == 0


@contextlib.asynccontextmanager
async def rig(
    image: GuestImage, config: MachineConfig, accel: str, out_dir: Path, say: Say, expected: Expected | None = None
) -> AsyncIterator[Rig]:
    """A VM with everything, and its end."""
    work = await compiled(out_dir)
    expected = expected or Expected(
        cpu_min=config.cpus,
        cpu_max=config.max_cpus,
        memory_min_bytes=config.boot_memory_bytes,
        memory_max_bytes=config.max_memory_bytes,
    )
    async with Machine(image, config, accel=accel) as machine, _broker(machine, expected, out_dir) as client:
        say(f"booted in {await machine.wait_booted():.1f} s")
        one = Rig(machine, client, say)
        try:
            await one.open(work)
            yield one
        finally:
            await one.close()
            await end_vm(machine, client)


async def compiled(out_dir: Path) -> Path:
    """`inside/work.c`, for any Linux of this machine's kind.

    :raise ImageError: When the compiler fails.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    program = out_dir / "work"
    await tools.run(["gcc", "-O2", "-static", "-s", "-o", str(program), str(_INSIDE / "work.c")])
    return program
