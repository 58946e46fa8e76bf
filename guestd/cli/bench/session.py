"""The bench's course in a VM that is up: rounds of load and of the kernel's own steps in turn, then two idle minutes.

Before each step the VM is back at its minimum, and a little more time is let pass each round, so that the
daemon's own rhythm does not fall in with the bench's. The kernel's own time is that of a loop in the guest
which does nothing but look and switch on, asked for on another QMP socket while guestd is stopped and the
broker told to leave the VM alone.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from qemu.qmp import QMPClient, QMPError

from guestd.cli.bench.agent import AGENT_PORT, Agent, BenchError
from guestd.cli.bench.report import Footprint, Rounds, Usage
from guestd.lab.machine import Machine
from guestd.model.units import MIB
from guestd.model.view import GuestView
from guestd.wire.client import BrokerClient

STREAM_PORT = 9002
STREAM_METHOD = "/guestd.bench.Bare/Hold"
GUEST_DIR = "/run/guestd-bench"
SERVICE = "guestd.service"
BARE_SERVICE = "bench-bare.service"
_GUEST_PYTHON = "/opt/guestd/bin/python3"
_BARE_CPU = "bench-cpu"
_MEMORY_DEVICE = "vm0"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done, and how long it may take."""

    rounds: int = 10
    idle_seconds: float = 120.0
    processes: int = 4
    bytes_per_second: int = 100 * MIB
    limit_bytes: int = 700 * MIB
    step_limit_seconds: float = 15.0
    bare_step_bytes: int = 128 * MIB  # one memory block
    connect_seconds: float = 45.0
    settle_limit_seconds: float = 90.0
    steady_seconds: float = 1.5
    shift_seconds: float = 0.037  # later, from round to round
    quiet_seconds: float = 15.0  # before the idle minutes: what ran before must not show in them


@dataclass(slots=True)
class Session:
    """One bench of a VM that is up."""

    machine: Machine
    broker: BrokerClient
    guest_name: str
    plan: Plan
    say: Callable[[str], None] = print
    cpu: Rounds = field(default_factory=Rounds)
    memory: Rounds = field(default_factory=Rounds)
    footprint: Footprint | None = None
    qemu_version: str = "unknown"
    _agent: Agent = field(default_factory=Agent)
    _qmp: QMPClient = field(default_factory=lambda: QMPClient("bench"))

    async def run(self) -> None:
        """The whole course; what was measured is in `cpu`, `memory` and `footprint`.

        :raise BenchError: When a step cannot be done.
        """
        await self._qmp.connect(str(self.machine.paths.observer))
        await self._agent.listen(self.machine.uds_base)
        try:
            version = (await self.qmp("query-version"))["qemu"]
            self.qemu_version = "{major}.{minor}.{micro}".format(**version)
            await self._install()
            await self._agent.wait_connected(self.plan.connect_seconds)
            for number in range(self.plan.rounds):
                await self._round(number)
            self.footprint = await self._idle()
        finally:
            await self._agent.close()
            with contextlib.suppress(QMPError, OSError, EOFError):
                await self._qmp.disconnect()

    async def qmp(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """One command of QMP.

        :raise BenchError: When it is refused.
        """
        try:
            return await self._qmp.execute(command, arguments or {})
        except (QMPError, OSError) as error:
            raise BenchError(f"QMP {command}: {error}") from error

    async def _install(self) -> None:
        for name in ("guest_agent", "guest_bare", "guest_relay"):
            text = (Path(__file__).parent / f"{name}.py").read_text()
            await self._shell(
                f"mkdir -p {GUEST_DIR} && cat > {GUEST_DIR}/{name}.py <<'END-OF-FILE'\n{text}\nEND-OF-FILE"
            )
        await self.machine.console.spawn(f"exec python3 -S {GUEST_DIR}/guest_agent.py {AGENT_PORT} 2>{GUEST_DIR}/agent")

    async def _shell(self, command: str) -> str:
        return (await self.machine.console.run(command)).stdout

    # ---- rounds ----------------------------------------------------------------------------------

    async def _round(self, number: int) -> None:
        plan = self.plan
        await self._at_minimum(plan.shift_seconds * number)
        load: dict[str, Any] = {"limit_seconds": plan.step_limit_seconds}
        answer = await self._agent.ask("cpu-load", processes=plan.processes, **load)
        self.cpu.add_guestd(answer)
        await self._at_minimum(plan.shift_seconds * number)
        load |= {"bytes_per_second": plan.bytes_per_second, "limit_bytes": plan.limit_bytes}
        answer = await self._agent.ask("memory-load", **load)
        self.memory.add_guestd(answer)
        await self._at_minimum(0.0)
        await self._bare_steps()
        last = [rounds.last_in_words() for rounds in (self.cpu, self.memory)]
        self.say(f"round {number + 1} of {plan.rounds}: CPU {last[0]}, memory {last[1]}")

    async def _bare_steps(self) -> None:
        """Both of the kernel's own steps, with guestd stopped and the broker hands off."""
        await self.broker.pause_guest(self.guest_name)
        await self._shell(f"systemctl stop {SERVICE}")
        try:
            await self._bare_cpu()
            await self._bare_memory()
        finally:
            await self._shell(f"systemctl start {SERVICE}")
            await self.broker.resume_guest(self.guest_name)

    async def _bare_cpu(self) -> None:
        slots = [slot for slot in await self.qmp("query-hotpluggable-cpus") if "qom-path" not in slot]
        slot = min(slots, key=lambda one: sorted(one["props"].items()))
        self.cpu.add_kernel(
            *await self._bare("cpu-bare", "device_add", {"driver": slot["type"], "id": _BARE_CPU, **slot["props"]})
        )
        await self._agent.ask("cpu-offline")
        await self.qmp("device_del", {"id": _BARE_CPU})
        await self._until_at_minimum(0.0)

    async def _bare_memory(self) -> None:
        set_size = {"path": f"/machine/peripheral/{_MEMORY_DEVICE}", "property": "requested-size"}
        before = int(await self.qmp("qom-get", set_size))
        grown = {**set_size, "value": before + self.plan.bare_step_bytes}
        self.memory.add_kernel(*await self._bare("memory-bare", "qom-set", grown))
        await self.qmp("qom-set", {**set_size, "value": 0})
        await self._until_at_minimum(0.0)

    async def _bare(self, loop: str, command: str, arguments: dict[str, Any]) -> tuple[float | None, float]:
        """Seconds from the command's sending to what the loop waits for, and how much they may be wrong."""
        limit = self.plan.step_limit_seconds
        offset, doubt = await self._agent.clock_offset()
        self._agent.send(loop, limit)
        await self._agent.answer(limit)
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await self.qmp(command, arguments)
        grown_at = (await self._agent.answer(limit))["grown_at"]
        return (None if grown_at is None else float(grown_at) - offset - began), doubt

    async def _at_minimum(self, more_seconds: float) -> None:
        """The guest is connected and the VM is back at its minimum, and has been for a moment."""
        await self._until(self._connected, "guestd to be connected")
        await self._until_at_minimum(self.plan.steady_seconds)
        await asyncio.sleep(more_seconds)

    async def _connected(self) -> bool:
        return (await self._view()).connected

    async def _view(self) -> GuestView:
        return await self.broker.guest(self.guest_name)

    async def _until_at_minimum(self, steady_seconds: float) -> None:
        since: float | None = None

        async def steady() -> bool:
            nonlocal since
            vcpus, size, requested = await self._amounts()
            if (vcpus, size, requested) != (1, 0, 0):
                since = None
                return False
            since = since or time.monotonic()
            return time.monotonic() - since >= steady_seconds

        await self._until(steady, "the VM to be back at its minimum")

    async def _amounts(self) -> tuple[int, int, int]:
        """vCPUs, bytes of virtio-mem plugged, and bytes asked for."""
        vcpus = len(await self.qmp("query-cpus-fast"))
        devices = await self.qmp("query-memory-devices")
        data = next(device["data"] for device in devices if device["type"] == "virtio-mem")
        return vcpus, int(data["size"]), int(data["requested-size"])

    async def _until(self, reached: Callable[[], Any], what: str) -> None:
        try:
            async with asyncio.timeout(self.plan.settle_limit_seconds):
                while not await reached():  # noqa: ASYNC110 - most of it is known only by asking
                    await asyncio.sleep(0.1)
        except TimeoutError as error:
            raise BenchError(
                f"waited {self.plan.settle_limit_seconds:g} s in vain for {what}; the VM has "
                "{} vCPUs, {} bytes plugged of {} asked for".format(*await self._amounts())
            ) from error

    # ---- idle ------------------------------------------------------------------------------------

    async def _idle(self) -> Footprint:
        plan = self.plan
        await self._at_minimum(plan.quiet_seconds)
        guestd_alone = (await self._usage(SERVICE))[0]
        async with _stream_server(self.machine.uds_base) as opened:
            await self._start_bare()
            try:
                await asyncio.wait_for(opened.wait(), plan.connect_seconds)
            except TimeoutError as error:
                raise BenchError(f"the bare process did not come: {await self._bare_log()}") from error
            await self._at_minimum(plan.quiet_seconds)
            self.say(f"idle for {plan.idle_seconds:g} s")
            grows = await self._grows()
            before = await self._usage(SERVICE, BARE_SERVICE)
            await asyncio.sleep(plan.idle_seconds)
            after = await self._usage(SERVICE, BARE_SERVICE)
            grown = await self._grows() - grows
            for one, other in zip(before, after, strict=True):
                if one.pids != other.pids:
                    raise BenchError(f"processes came or went in the idle time: {one.pids}, then {other.pids}")
            await self._shell(f"systemctl stop {SERVICE}")
            bare_alone = (await self._usage(BARE_SERVICE))[0]
        return Footprint(before[0], after[0], before[1], after[1], guestd_alone.pss_bytes, bare_alone.pss_bytes, grown)

    async def _start_bare(self) -> None:
        path = f"{GUEST_DIR}/stream.sock"
        await self.machine.console.spawn(f"exec python3 -S {GUEST_DIR}/guest_relay.py {path} {STREAM_PORT}")
        await self.machine.console.wait_path(path, 30.0)
        program = f"{_GUEST_PYTHON} {GUEST_DIR}/guest_bare.py {path} {STREAM_METHOD}"
        await self._shell(f"systemd-run --quiet --unit={BARE_SERVICE} {program}")

    async def _bare_log(self) -> str:
        return await self._shell(f"journalctl -u {BARE_SERVICE} -n 8 -o cat --no-pager")

    async def _usage(self, *units: str) -> list[Usage]:
        answer = await self._agent.ask("usage", unit=" ".join(units))
        return [Usage(**answer[unit]) for unit in units]

    async def _grows(self) -> int:
        return sum(resource.grows for resource in (await self._view()).resources)


@contextlib.asynccontextmanager
async def _stream_server(uds_base: Path) -> AsyncIterator[asyncio.Event]:
    """A server for the bare process's stream, where the VM's vsock device delivers it; set once it is open."""
    opened = asyncio.Event()

    async def serve(requests: AsyncIterator[bytes], _context: object) -> AsyncIterator[bytes]:
        async for _ in requests:
            yield b"welcome"
            opened.set()

    service, method = STREAM_METHOD.strip("/").split("/")
    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {method: grpc.stream_stream_rpc_method_handler(serve)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    server.add_insecure_port(f"unix:{uds_base}_{STREAM_PORT}")
    await server.start()
    try:
        yield opened
    finally:
        await server.stop(None)
