"""A real VM: its disk, its vsock device, its QEMU, and the guest's own word about itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qemu.qmp import QMPClient, QMPError

from guestd.lab import accel as accelerators
from guestd.lab import tcg, tools
from guestd.lab.console import Console
from guestd.lab.errors import ConsoleError, MachineError
from guestd.lab.image import GuestImage
from guestd.lab.qemu import MachineConfig, MachinePaths, command_line
from guestd.lab.vsock_device import VsockDevice

BOOTED_PATH = "/run/lab-booted"
"""Appears in the guest when its multi-user target is reached."""

_SOCKETS_SECONDS = 20.0
_STOP_SECONDS = 3.0

log = logging.getLogger(__name__)


class Machine:
    """One VM, from `async with` to its end; leaves no process and no file behind.

    :param image: What it boots.
    :param config: What it is.
    :param accel: "kvm", "tcg", or None for what works here.
    :param run_directory: Where its directory is made; its name must be short. The system's default for None.
    :param keep_directory: Leave the directory (logs) there at the end.
    """

    def __init__(
        self,
        image: GuestImage,
        config: MachineConfig | None = None,
        *,
        accel: str | None = None,
        run_directory: Path | None = None,
        keep_directory: bool = False,
    ) -> None:
        self.config = config or MachineConfig()
        self.boot_seconds: float | None = None
        self._image = image
        self._accel = accel
        self._run_directory = run_directory
        self._keep_directory = keep_directory
        self._paths: MachinePaths | None = None
        self._device: VsockDevice | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._console: Console | None = None
        self._keeper: QMPClient | None = None
        self._observer: QMPClient | None = None
        self._started = 0.0

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def paths(self) -> MachinePaths:
        """Its files and sockets."""
        if self._paths is None:
            raise MachineError("the machine was not started")
        return self._paths

    @property
    def uds_base(self) -> Path:
        """A connection of the guest to host port P arrives at the unix socket `{uds_base}_P`."""
        return self.paths.uds_base

    @property
    def console(self) -> Console:
        """Commands in the guest."""
        if self._console is None:
            raise MachineError("the machine was not started")
        return self._console

    @property
    def vsock(self) -> VsockDevice:
        """The vsock device, for its counters and its fault."""
        if self._device is None:
            raise MachineError("the machine was not started")
        return self._device

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        if self._process is None:
            raise MachineError("the machine was not started")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether QEMU is alive."""
        return self._process is not None and self._process.returncode is None

    async def wait_booted(self, timeout_seconds: float = 120.0) -> float:
        """Wait for the guest's multi-user target; the seconds since QEMU was started or reset.

        :raise MachineError: When it is not reached in time; with the end of the kernel's messages.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                await self.console.wait_agent(timeout_seconds)
                await self.console.wait_path(BOOTED_PATH, timeout_seconds)
        except (ConsoleError, TimeoutError) as error:
            raise MachineError(f"{self.config.name} did not boot: {error}\n{self._last_words()}") from error
        self.boot_seconds = time.monotonic() - self._started
        return self.boot_seconds

    async def query(self, command: str, **arguments: Any) -> Any:
        """Ask QEMU, on the observers' socket. Only what changes nothing is allowed.

        :raise ValueError: When the command is not one that only looks.
        :raise MachineError: When QEMU refuses or is gone.
        """
        if not command.startswith("query-") and command not in {"qom-get", "qom-list"}:
            raise ValueError(f"{command} is not a question")
        if self._observer is None:
            self._observer = await _connect_qmp(self.paths.observer, f"{self.config.name}-observer")
        return await _execute(self._observer, command, arguments)

    async def reset(self) -> None:
        """Reset the VM as by its button. Its connections end; `wait_booted` waits for the new boot.

        :raise MachineError: When QEMU refuses or is gone.
        """
        self.console.expect_restart()
        self._started = time.monotonic()
        await self._keep("system_reset")
        self.vsock.drop_connections()

    async def pause(self) -> None:
        """Stop the VM's CPUs."""
        await self._keep("stop")

    async def resume(self) -> None:
        """Let them run again."""
        await self._keep("cont")

    async def kill(self) -> None:
        """End QEMU by SIGKILL, as a crash would."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def wait_exited(self) -> int:
        """Wait until QEMU has ended; its exit code, negative for a signal."""
        if self._process is None:
            raise MachineError("the machine was not started")
        return await self._process.wait()

    async def stop(self) -> None:
        """End QEMU and the vsock device and remove the files. May be called again."""
        await self._end_qemu()
        for client in (self._observer, self._keeper):
            if client is not None:
                await _disconnect(client)
        self._observer = self._keeper = None
        if self._console is not None:
            await self._console.close()
        if self._device is not None:
            await self._device.stop()
            self._device = None
        if self._paths is not None and not self._keep_directory:
            shutil.rmtree(self._paths.directory, ignore_errors=True)

    # What the guest says about itself.

    async def online_cpus(self) -> frozenset[int]:
        """The numbers of the CPUs that are online in the guest."""
        return parse_cpu_list(await self.console.read_file("/sys/devices/system/cpu/online"))

    async def memory_total_bytes(self) -> int:
        """The guest's MemTotal, in bytes."""
        for line in (await self.console.read_file("/proc/meminfo")).splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
        raise MachineError("no MemTotal in the guest's /proc/meminfo")

    async def oom_kills(self) -> int:
        """Processes that the guest's kernel killed for want of memory since its boot."""
        for line in (await self.console.read_file("/proc/vmstat")).splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
        raise MachineError("no oom_kill in the guest's /proc/vmstat")

    # Inside.

    async def _start(self) -> None:
        tools.require(tools.RUN_TOOLS)
        accel = await accelerators.choose(self._image, self._accel)
        directory = Path(tempfile.mkdtemp(prefix="guestd-", dir=self._run_directory))
        self._paths = paths = MachinePaths(directory, self._image.kernel, self._image.initrd)
        backing = ["-b", str(self._image.disk), "-F", "raw"]
        await tools.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(paths.overlay)])
        self._device = VsockDevice(
            paths.vhost_vsock,
            self.config.guest_cid,
            paths.uds_base,
            require_privileged_port=self.config.require_privileged_port,
        )
        await self._device.start()
        self._started = time.monotonic()
        with paths.qemu_log.open("wb") as output:
            self._process = await asyncio.create_subprocess_exec(
                *command_line(self.config, paths, accel),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=await tcg.environment(self._image) if accel == "tcg" else None,
            )
        self._console = Console(paths.console)
        await self._until_listening(self._console)
        self._keeper = await _connect_qmp(paths.keeper, f"{self.config.name}-keeper")

    async def _until_listening(self, console: Console) -> None:
        deadline = time.monotonic() + _SOCKETS_SECONDS
        while True:
            try:
                await console.connect()
            except OSError as error:
                if not self.running or time.monotonic() > deadline:
                    raise MachineError(f"QEMU did not start: {self._last_words()}") from error
                await asyncio.sleep(0.02)
            else:
                return

    async def _keep(self, command: str) -> None:
        if self._keeper is None:
            raise MachineError("the machine was not started")
        await _execute(self._keeper, command, {})

    async def _end_qemu(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    def _last_words(self) -> str:
        texts = []
        for path in (self.paths.qemu_log, self.paths.serial_log):
            with contextlib.suppress(OSError):
                texts.append(path.read_text(errors="replace")[-2000:].strip())
        return "\n".join(text for text in texts if text)


def parse_cpu_list(text: str) -> frozenset[int]:
    """The kernel's list format, as in "0-2,5".

    :raise ValueError: When it is something else.
    """
    numbers: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


async def _connect_qmp(path: Path, name: str) -> QMPClient:
    client = QMPClient(name)
    try:
        await client.connect(str(path))
    except (QMPError, OSError) as error:
        raise MachineError(f"no QMP at {path}: {error}") from error
    return client


async def _execute(client: QMPClient, command: str, arguments: dict[str, Any]) -> Any:
    try:
        return await client.execute(command, arguments)
    except (QMPError, OSError) as error:
        raise MachineError(f"QMP {command}: {error}") from error


async def _disconnect(client: QMPClient) -> None:
    with contextlib.suppress(QMPError, OSError, EOFError):
        await client.disconnect()
