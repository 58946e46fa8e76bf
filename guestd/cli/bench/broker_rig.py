"""The bench's processes: hypervisor, broker and load, pinned to cores, in a directory of their own."""

import asyncio
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from pathlib import Path
from typing import Any

from guestd.model.errors import GuestdError
from guestd.sim import swarm
from guestd.sim.broker import SOCKET_NAME
from guestd.sim.remote import HypervisorLink, VmSpec, encode_specs

_START_SECONDS = 30.0


class BenchError(GuestdError):
    """Something did not come up, or ended on its own."""


class BrokerRig:
    """`count` VMs and one more in a hypervisor process, a broker for them that may be killed and started again,
    and a swarm of `count` guests; 0: no VMs at all.

    Use as an async context manager; leaving it ends all processes.
    """

    def __init__(self, count: int) -> None:
        self.count, self._vms = count, count and count + 1
        self.root = Path(tempfile.mkdtemp(prefix="gb", dir="/tmp"))
        self.run_dir = self.root / "run"
        self.link = HypervisorLink(self.root / "hv.sock")
        self.epoch = 0
        self._log = (self.root / "broker.log").open("wb")
        cores = sorted(os.sched_getaffinity(0))
        self._broker_core, self._other_core = cores[0], cores[-1]
        self._processes: list[Process] = []
        self.broker: Process
        self._load: Process

    async def __aenter__(self) -> "BrokerRig":
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # three descriptors for a guest: inherited
        try:
            (self.root / "spec.json").write_bytes(encode_specs([_spec(index) for index in range(self._vms)]))
            (self.root / "broker.toml").write_text(_config(self.root, self._vms))
            spec = str(self.root / "spec.json")
            arguments = (str(self.root / "hv.sock"), "--spec", spec)
            hypervisor = await self._spawn("guestd.sim.remote", *arguments, core=self._other_core)
            await self._until(self.root / "hv.sock", hypervisor)
            await self.link.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End everything."""
        await self.link.close()
        for process in self._processes:
            if process.returncode is None:
                process.kill()
                await process.wait()
        self._log.close()
        shutil.rmtree(self.root, ignore_errors=True)

    async def start_broker(
        self, timing: dict[str, float] | None = None, program: tuple[str, ...] = ("guestd.sim.broker",)
    ) -> None:
        """Start the broker (again).

        :param program: the module to run, and arguments that come before the others.
        """
        self.broker = await self._spawn(
            *program,
            *("--config", str(self.root / "broker.toml"), "--hypervisor", str(self.root / "hv.sock")),
            *("--timing", json.dumps(timing or {})),
            core=self._broker_core,
        )
        self.epoch += 1

    async def ready(self) -> None:
        """Wait until the broker listens.

        :raise BenchError: When it does not in time.
        """
        await self._until(self.run_dir / SOCKET_NAME, self.broker)

    async def kill_broker(self) -> float:
        """SIGKILL; returns when, on the monotonic clock."""
        at = time.monotonic()
        self.broker.send_signal(signal.SIGKILL)
        await self.broker.wait()
        return at

    async def start_load(self) -> None:
        """Have all guests dial."""
        arguments = (str(self.run_dir), str(self.count))
        self._load = await self._spawn("guestd.cli.bench.broker_load", *arguments, core=self._other_core, talks=True)
        await self.load(do="start")

    @property
    def load_pid(self) -> int:
        """The load generator's process."""
        return self._load.pid

    async def load(self, **order: Any) -> Any:
        """Tell the swarm what to do, and wait for the answer.

        :raise BenchError: When it is gone.
        """
        assert self._load.stdin is not None
        assert self._load.stdout is not None
        self._load.stdin.write(json.dumps(order).encode() + b"\n")
        answer = await self._load.stdout.readline()
        if not answer:
            raise BenchError("the load generator ended")
        return json.loads(answer)

    async def settled(self, seconds: float = 60.0) -> float:
        """Wait until all guests know what they have from the running broker; returns when that was.

        :raise BenchError: When some do not in time.
        """
        answer = await self.load(do="settled", epoch=self.epoch, seconds=seconds)
        if answer["missing"]:
            raise BenchError(f"{answer['missing']} of {self.count} guests were not served within {seconds:g} s")
        return float(answer["at"])

    async def flood(self, index: int, seconds: float) -> Any:
        """One guest says as much as it can; returns how many messages and streams those were."""
        arguments = (str(self.run_dir), "--flood", str(index), str(seconds))
        process = await self._spawn("guestd.cli.bench.broker_load", *arguments, core=self._other_core, talks=True)
        os.setpriority(os.PRIO_PROCESS, process.pid, 10)  # it shares the load's core, and is not to starve it
        assert process.stdout is not None
        return json.loads(await process.stdout.readline())

    def log_tail(self) -> str:
        """What the broker said last."""
        return "\n".join((self.root / "broker.log").read_text(errors="replace").splitlines()[-5:])

    async def _until(self, path: Path, process: Process) -> None:
        end = time.monotonic() + _START_SECONDS
        while not path.exists():
            if time.monotonic() > end or process.returncode is not None:
                raise BenchError(f"{path} did not appear: {self.log_tail()}")
            await asyncio.sleep(0.02)

    async def _spawn(self, module: str, *arguments: str, core: int, talks: bool = False) -> Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", module, *arguments),
            stdin=PIPE if talks else DEVNULL,
            stdout=PIPE if talks else self._log,
            stderr=None if talks else self._log,
            limit=1 << 26,
        )
        os.sched_setaffinity(process.pid, {core})  # threads that it starts later inherit it
        self._processes.append(process)
        return process


def pss_bytes(pid: int) -> int:
    """Proportional set size of a process."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise BenchError(f"process {pid} has no Pss")


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _spec(index: int) -> VmSpec:
    boot, most = swarm.BOOT, swarm.MAX
    return VmSpec(
        swarm.guest_name(index),
        boot_bytes=boot.memory_bytes,
        device_bytes=most.memory_bytes - boot.memory_bytes,
        vcpus=boot.cpu_millicores // 1000,
        vcpus_max=most.cpu_millicores // 1000,
    )


def _config(root: Path, count: int) -> str:
    """A host with room for all, and its guests."""
    low, high = swarm.MIN, swarm.MAX
    lines = [
        f"[host]\ncpus = {(count + 1) * 4}\nmemory = {(count + 1) * high.memory_bytes}",
        f'[broker]\nstate_dir = "{root}/state"\nrun_dir = "{root}/run"',
    ]
    for index in range(count):
        name = swarm.guest_name(index)
        lines.append(
            f"[guests.{name}]\n"
            f"cpu = {{ min = {low.cpu_millicores // 1000}, max = {high.cpu_millicores // 1000} }}\n"
            f"memory = {{ min = {low.memory_bytes}, max = {high.memory_bytes} }}\n"
            f'qmp_socket = "{root}/{name}.qmp"\ncid = {swarm.FIRST_CID + index}'
        )
    return "\n".join(lines) + "\n"
