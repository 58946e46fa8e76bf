"""A host for tests: real VMs, a real broker as a process of its own, and one audit over all that they say.

`audit` compares three views that know nothing of each other: the broker's ledger (its monitor service), the
hypervisor (QMP, on the observers' socket) and the guest (its own /sys and /proc, over the console). A host
`converges` when the audit finds nothing and what the test wants holds too, within 30 seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from autopsy import autopsy

from guestd.lab.errors import ConsoleError, MachineError
from guestd.lab.image import GuestImage
from guestd.lab.machine import Machine, parse_cpu_list
from guestd.lab.qemu import GIB, MIB, MachineConfig
from guestd.model.errors import UnreachableError
from guestd.model.resources import Kind
from guestd.model.view import GuestView, HostView, ResizePhase
from guestd.model.vm import VmStatus
from guestd.wire.client import BrokerClient

PORT = 4747
BLOCK_BYTES = 128 * MIB
CONVERGE_SECONDS = 60.0
"""When a test gives up waiting. How quick things are is what the benchmarks say: here other work of the machine that
emulates the VMs makes twice as slow what it takes a moment of.
"""
OVERHEAD_BYTES = 64 * MIB

_BROKER_START_SECONDS = 20.0
_CLEAN_UP_SECONDS = 0.4
_LOOK_SECONDS = 0.15  # looking takes CPU that emulates the VM otherwise
_FACTS = (
    "cd /sys/devices/system; cat cpu/online memory/block_size_bytes;"
    " grep -lx online memory/memory*/state | wc -l; sed -n 's/^MemTotal: *\\([0-9]*\\).*/\\1/p' /proc/meminfo"
)

BUSY = "for i in $(seq {count}); do (while :; do :; done) & done; wait"
"""So many busy processes."""


@dataclass(frozen=True, slots=True)
class GuestSpec:
    """One guest of the host: its limits, and what its VM is."""

    cpu_max: int = 4
    memory_min_bytes: int = 512 * MIB
    memory_max_bytes: int = 2560 * MIB
    weight: int = 100
    cid: int = 3
    boot_memory_bytes: int = 512 * MIB
    vm_max_bytes: int = 0  # what the VM could have; 0: its maximum
    cpu: str = ""  # more of the file's `cpu = { … }`, such as "burst = 4"
    memory: str = ""
    park_cpus: bool = False
    dimm_slots: int = 0  # memory comes as DIMMs
    kernel_arguments: str = ""
    guest_agent_port: bool = False
    observe: bool = False


@dataclass(frozen=True, slots=True)
class Held:
    """The hypervisor's word on a VM; nothing of a VM whose process is gone."""

    vcpus: int = 0
    plugged_bytes: int = 0
    held_bytes: int = 0
    ballooned_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Facts:
    """The guest's word on itself."""

    cpus_online: frozenset[int]
    block_bytes: int
    online_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Look:
    """All views of one moment. `facts` is empty when nobody asked the guests."""

    host: HostView
    views: Mapping[str, GuestView]
    held: Mapping[str, Held]
    facts: Mapping[str, Facts] = field(default_factory=dict)

    def cpus(self, name: str) -> int:
        """vCPUs reserved for a guest, whole ones."""
        return self.views[name].resource(Kind.CPU).reserved // 1000

    def memory(self, name: str) -> int:
        """Bytes reserved for a guest."""
        return self.views[name].resource(Kind.MEMORY).reserved


class Host:
    """A broker and its VMs, from `async with` to their end; leaves no process and no file behind.

    :param guests: The guests by name; each gets a VM.
    :param cpus: What the host has for guests; :param memory_bytes: likewise, without the overhead.
    :param tables: More tables of the broker's configuration.
    """

    def __init__(
        self,
        image: GuestImage,
        guests: Mapping[str, GuestSpec],
        *,
        cpus: int = 4,
        memory_bytes: int = 4 * GIB,
        tables: str = "",
    ) -> None:
        self.guests = dict(guests)
        self.machines: dict[str, Machine] = {}
        self._image = image
        self._cpus, self._memory_bytes, self._tables = cpus, memory_bytes, tables
        self._directory = Path(tempfile.mkdtemp(prefix="gv-", dir="/tmp"))
        self._broker: asyncio.subprocess.Process | None = None
        self._client: BrokerClient | None = None

    async def __aenter__(self) -> Self:
        try:
            self.write_config()
            await asyncio.gather(*(self.start_vm(name) for name in self.guests))
            await self.start_broker()
            await asyncio.gather(*(machine.wait_booted() for machine in self.machines.values()))
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End everything that was started here: the VMs first, for the broker clears up behind them."""
        for machine in self.machines.values():
            if machine.running:
                await machine.kill()
        if self._broker is not None and self._broker.returncode is None and self.machines:
            with contextlib.suppress(AssertionError, UnreachableError):
                await self.until(
                    "all VMs gone",
                    lambda look: all(view.vm_status is VmStatus.GONE for view in look.views.values()),
                    5,
                )
            await asyncio.sleep(_CLEAN_UP_SECONDS)
        await self._close_client()
        if self._broker is not None and self._broker.returncode is None:
            self._broker.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await self._broker.wait()
            if self._broker.returncode is None:
                self._broker.kill()
                await self._broker.wait()
        for machine in self.machines.values():
            await machine.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    # ---- the broker ------------------------------------------------------------------------------

    @property
    def run_dir(self) -> Path:
        """Where the broker's sockets are."""
        return self._directory / "run"

    @property
    def client(self) -> BrokerClient:
        """A client of the broker that runs now."""
        assert self._client is not None, "no broker is running"
        return self._client

    @property
    def broker_log(self) -> str:
        """What all brokers of this host said."""
        return (self._directory / "broker.log").read_text(errors="replace")

    async def says(self, text: str, since: int, seconds: float = CONVERGE_SECONDS) -> None:
        """Wait until the broker says something after so many characters of its log; quicker than to look.

        :raise AssertionError: When it does not in time.
        """
        deadline = time.monotonic() + seconds
        while text not in self.broker_log[since:]:
            assert time.monotonic() < deadline, f"not said within {seconds:g} s: {text}\n{self.broker_log[since:]}"
            await asyncio.sleep(0.005)

    @property
    def config_path(self) -> Path:
        """The broker's configuration."""
        return self._directory / "broker.toml"

    def write_config(self) -> None:
        """Write the broker's configuration for the guests as they are."""
        memory = self._memory_bytes + OVERHEAD_BYTES * len(self.guests)
        lines = ["[host]", f"cpus = {self._cpus}", f"memory = {memory}"]
        lines += [f"overhead_memory_per_guest = {OVERHEAD_BYTES}", "", "[broker]", f"port = {PORT}"]
        lines += [
            f"state_dir = {_quoted(self._directory / 'state')}",
            f"run_dir = {_quoted(self.run_dir)}",
            "",
            self._tables,
        ]
        for name, spec in self.guests.items():
            cpu = f"min = 1, max = {spec.cpu_max}, weight = {spec.weight}"
            memory = f"min = {spec.memory_min_bytes}, max = {spec.memory_max_bytes}, weight = {spec.weight}"
            lines += [
                f"[guests.{name}]",
                f"cpu = {{ {', '.join(filter(None, (cpu, spec.cpu)))} }}",
                f"memory = {{ {', '.join(filter(None, (memory, spec.memory)))} }}",
                f"park_cpus = {str(spec.park_cpus).lower()}",
                f'mode = "{"observe" if spec.observe else "serve"}"',
                f"qmp_socket = {_quoted(self._directory / f'{name}.qmp')}",
                f"vsock_path = {_quoted(self._directory / name)}",
                "vsock_privileged_ports = true",
                "",
            ]
        self.config_path.write_text("\n".join(lines))

    async def start_broker(self) -> None:
        """Start a broker, on what an earlier one left, and wait until it answers."""
        with (self._directory / "broker.log").open("ab") as log:
            self._broker = await asyncio.create_subprocess_exec(
                *("setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "guestd.broker.main", "run"),
                *("--config", str(self.config_path)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._client = BrokerClient(self.run_dir)
        deadline = time.monotonic() + _BROKER_START_SECONDS
        while True:
            assert self._broker.returncode is None, f"the broker ended: {self.broker_log[-2000:]}"
            try:
                await self._client.host()
            except UnreachableError:
                assert time.monotonic() < deadline, f"the broker does not answer: {self.broker_log[-2000:]}"
                await self._client.close()  # a channel that failed once waits before it tries again
                await asyncio.sleep(0.05)
            else:
                return

    async def kill_broker(self) -> None:
        """SIGKILL, and nothing is left of it but its files."""
        await self._close_client()
        assert self._broker is not None
        self._broker.kill()
        await self._broker.wait()

    async def restart_broker(self) -> None:
        """SIGKILL, and a new one at once."""
        await self.kill_broker()
        await self.start_broker()

    def reload_broker(self) -> None:
        """SIGHUP, as `systemctl reload` does."""
        assert self._broker is not None
        self._broker.send_signal(signal.SIGHUP)

    async def guestctl(self, *arguments: str) -> str:
        """Run `guestctl` on this broker; its stdout.

        :raise AssertionError: When its exit code is not 0.
        """
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "guestd.cli.main", *arguments),
            env={**os.environ, "GUESTD_RUN_DIR": str(self.run_dir)},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await process.communicate()
        assert process.returncode == 0, f"guestctl {arguments} ended with {process.returncode}: {errors.decode()}"
        return output.decode()

    async def _close_client(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    # ---- the VMs ---------------------------------------------------------------------------------

    async def start_vm(self, name: str) -> None:
        """Start a guest's VM at the same sockets as ever; not waited for."""
        spec = self.guests[name]
        old = self.machines.get(name)
        if old is not None:
            await old.stop()
        config = MachineConfig(
            name=name,
            boot_memory_bytes=spec.boot_memory_bytes,
            max_cpus=spec.cpu_max,
            max_memory_bytes=spec.vm_max_bytes or spec.memory_max_bytes,
            dimm_slots=spec.dimm_slots,
            kernel_arguments=spec.kernel_arguments,
            guest_agent_port=spec.guest_agent_port,
            guest_cid=spec.cid,
            require_privileged_port=True,
        )
        accel = os.environ.get("GUESTD_LAB_ACCEL") or None
        machine = await Machine(self._image, config, accel=accel).__aenter__()
        self.machines[name] = machine
        # A machine's directory is a new one each time, the broker's configuration is not.
        _link(self._directory / f"{name}.qmp", machine.paths.qmp)
        _link(Path(f"{machine.uds_base}_{PORT}"), self._directory / f"{name}_{PORT}")

    async def shell(self, name: str, command: str, timeout_seconds: float = 60.0, *, check: bool = True) -> str:
        """Run a command as root in a guest; its stdout."""
        return (await self.machines[name].console.run(command, timeout_seconds, check=check)).stdout

    async def put(self, name: str, path: str, text: str) -> None:
        """Write a file in a guest."""
        directory = shlex.quote(str(Path(path).parent))
        await self.shell(name, f"mkdir -p {directory}; cat > {shlex.quote(path)} <<'END-OF-FILE'\n{text}\nEND-OF-FILE")

    async def wait_path(self, name: str, path: str, seconds: float) -> None:
        """Wait until a path exists in a guest.

        :raise AssertionError: When it does not in time, with what there is to be seen of the guest from inside.
        """
        try:
            await self.machines[name].console.wait_path(path, seconds)
        except ConsoleError as error:
            words = f"{self.words(await self.look())}\n{await autopsy(self.machines)}"
            raise AssertionError(f"{name}: {error}\n{words}") from error

    async def python(self, name: str, program: str, *arguments: object) -> str:
        """Bring a program of `loads` into a guest; the command that runs it."""
        script = f"/run/vm-test/{hashlib.sha256(program.encode()).hexdigest()[:8]}.py"
        await self.put(name, script, program)
        return f"python3 -S {script} {shlex.join(str(one) for one in arguments)} 2>> /run/vm-test/errors"

    async def guestd_python(self, name: str, program: str, *arguments: object) -> str:
        """The same for a program that uses guestd's own modules."""
        return (await self.python(name, program, *arguments)).replace("python3 -S", "/opt/guestd/bin/python3", 1)

    @contextlib.asynccontextmanager
    async def load(self, name: str, command: str) -> AsyncIterator[int]:
        """A command that runs in a guest until the end of the block, with all its children; its pid."""
        console = self.machines[name].console
        pid = await console.spawn(command)
        try:
            yield pid
        finally:
            with contextlib.suppress(ConsoleError, MachineError):  # a guest that was reset has no load any more
                await console.run(f"pkill -9 -s {pid}", 30, check=False)

    def busy(self, name: str, count: int) -> contextlib.AbstractAsyncContextManager[int]:
        """So many busy processes in a guest, until the end of the block."""
        return self.load(name, BUSY.format(count=count))

    # ---- looking ---------------------------------------------------------------------------------

    async def look(self, *, inside: bool = False) -> Look:
        """Ask broker and hypervisors, and the guests too when wanted."""
        host, views = await self.client.host(), await self.client.guests()
        held = {name: await self._held(machine) for name, machine in self.machines.items()}
        facts = {}
        if inside:
            running = {name: machine for name, machine in self.machines.items() if machine.running}
            facts = {name: await _facts(machine) for name, machine in running.items()}
        return Look(host, {view.name: view for view in views}, held, facts)

    async def _held(self, machine: Machine) -> Held:
        if not machine.running:
            return Held()
        slots: Any = await machine.query("query-hotpluggable-cpus")
        base: int = (await machine.query("query-memory-size-summary"))["base-memory"]
        balloon = base if machine.config.dimm_slots else (await machine.query("query-balloon"))["actual"]
        devices: Any = await machine.query("query-memory-devices")
        added = [device["data"] for device in devices if device["type"] == "virtio-mem"]
        dimms = sum(device["data"]["size"] for device in devices if device["type"] == "dimm")
        backends: Any = await machine.query("query-memdev")
        behind_dimms = sum(one["size"] for one in backends if one["id"].startswith("guestd-mem-"))
        boot = min(balloon, base)
        return Held(
            vcpus=sum("qom-path" in slot for slot in slots),
            plugged_bytes=boot + dimms + sum(device["size"] for device in added),
            held_bytes=boot + behind_dimms + sum(max(device["size"], device["requested-size"]) for device in added),
            ballooned_bytes=base - boot,
        )

    async def until(self, what: str, condition: Callable[[Look], bool], seconds: float = CONVERGE_SECONDS) -> float:
        """Wait until broker and hypervisors show something; the seconds it took.

        :raise AssertionError: When they don't in time.
        """
        started = time.monotonic()
        while True:
            look = await self.look()
            if condition(look):
                return time.monotonic() - started
            if time.monotonic() - started > seconds:
                words = f"{self.words(look)}\n{await autopsy(self.machines)}"
                raise AssertionError(f"not within {seconds:g} s: {what}\n{words}")
            await asyncio.sleep(_LOOK_SECONDS)

    def words(self, look: Look) -> str:
        """All views in words, with the end of the broker's log, for an error."""
        lines = []
        for name, view in look.views.items():
            lines.append(f"{name}: {view.vm_status}, connected {view.connected}; {look.held.get(name)}")
            lines += [f"  {one}" for one in view.resources]
            lines += [f"  {reason.code}: {reason.text}" for reason in view.demand_reasons]
            lines.append(f"  {look.facts.get(name, 'guest not asked')}")
        return "\n".join([*lines, "", *self.broker_log.splitlines()[-30:]])


async def _facts(machine: Machine) -> Facts:
    online, block, count, total = (await machine.console.run(_FACTS, 30)).stdout.split()
    block_bytes = int(block, 16)
    return Facts(parse_cpu_list(online), block_bytes, int(count) * block_bytes, int(total) * 1024)


def audit_of(look: Look, specs: Mapping[str, GuestSpec]) -> list[str]:
    """What does not fit together in one look at ledger, hypervisors and (when they were asked) guests."""
    found = []
    if set(look.views) != set(specs):
        found.append(f"the broker knows {sorted(look.views)}, there are {sorted(specs)}")
    for name, view in look.views.items():
        held, facts = look.held.get(name, Held()), look.facts.get(name)
        cpu, memory = view.resource(Kind.CPU), view.resource(Kind.MEMORY)
        for one in (cpu, memory):
            if one.phase is not ResizePhase.IDLE:
                found.append(f"{name}: {one.kind} is {one.phase}")
        bounded = min(held.vcpus * 1000, cpu.quota or held.vcpus * 1000)
        if cpu.reserved != bounded:
            found.append(f"{name}: {cpu.reserved} millicores reserved, {bounded} held ({held.vcpus} vCPUs plugged)")
        if memory.reserved != held.held_bytes:
            found.append(f"{name}: {memory.reserved} bytes reserved, {held.held_bytes} held in the hypervisor")
        if facts is None:
            continue
        parked = held.vcpus - len(facts.cpus_online) if specs[name].park_cpus else 0
        if len(facts.cpus_online) != held.vcpus - parked or len(facts.cpus_online) * 1000 < cpu.reserved:
            found.append(f"{name}: CPUs {sorted(facts.cpus_online)} online, {held.vcpus} plugged")
        online = facts.online_bytes - held.ballooned_bytes
        # A block can be online with only a part of it plugged: virtio-mem takes away piece by piece what it can.
        if online <= held.plugged_bytes - facts.block_bytes:
            found.append(f"{name}: {online} bytes online, {held.plugged_bytes} plugged")
        if not 0 < facts.total_bytes <= held.plugged_bytes:
            found.append(f"{name}: MemTotal {facts.total_bytes}, {held.plugged_bytes} plugged")
    for kind in Kind:
        reserved = [view.resource(kind).reserved for view in look.views.values()]
        charged = sum(max(view.resource(kind).reserved, view.limits.min.get(kind)) for view in look.views.values())
        room = look.host.capacity.get(kind) - look.host.reserve.get(kind) - look.host.overhead.get(kind)
        if charged > room:
            found.append(f"{kind}: {charged} charged, {room} there")
        if look.host.committed.get(kind) != sum(reserved):
            found.append(f"{kind}: {look.host.committed.get(kind)} committed, the guests' sum is {sum(reserved)}")
        if look.host.free.get(kind) != room - charged and charged <= room:
            found.append(f"{kind}: {look.host.free.get(kind)} free, {room} - {charged} expected")
    return found


async def audit(host: Host) -> list[str]:
    """Compare ledger, hypervisors and guests; empty when all agree and nothing is under way."""
    return audit_of(await host.look(inside=True), host.guests)


async def converges(
    host: Host, what: str, condition: Callable[[Look], bool], seconds: float = CONVERGE_SECONDS
) -> float:
    """Wait until the audit finds nothing and the condition holds as well; the seconds it took.

    The guests are asked only once the other two agree: under emulation a question costs them CPU time.

    :raise AssertionError: When it does not come to that in time.
    """
    started = time.monotonic()
    found: list[str] = []
    while True:
        look = await host.look()
        found = audit_of(look, host.guests)
        if not found and condition(look):
            with contextlib.suppress(ConsoleError):
                look = await host.look(inside=True)
                found = audit_of(look, host.guests)
                if not found and condition(look):
                    return time.monotonic() - started
        if time.monotonic() - started > seconds:
            words = f"{host.words(look)}\n{await autopsy(host.machines)}"
            raise AssertionError(f"not within {seconds:g} s: {what}; {found}\n{words}")
        await asyncio.sleep(_LOOK_SECONDS)


def at_minimum(host: Host) -> Callable[[Look], bool]:
    """A condition: all guests are served and hold their minimum, in memory to less than a block more.

    At its biggest the guest onlined a block or two for the kernel (MOVABLE : KERNEL must stay within bounds), and a
    page table or a slab in one of them then keeps its virtio-mem sub-block of 4 MiB plugged.
    """

    def holds(look: Look) -> bool:
        return all(
            view.connected
            and view.vm_status is VmStatus.RUNNING
            and look.cpus(name) == 1
            and 0 <= look.memory(name) - host.guests[name].memory_min_bytes < BLOCK_BYTES
            for name, view in look.views.items()
        )

    return holds


async def rests(host: Host, seconds: float = CONVERGE_SECONDS) -> float:
    """Wait until all guests are at their minimum and the audit finds nothing."""
    return await converges(host, "all at their minimum", at_minimum(host), seconds)


def _quoted(path: Path) -> str:
    return json.dumps(str(path))


def _link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)
