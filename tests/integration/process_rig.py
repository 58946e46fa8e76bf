"""The real broker in a process of its own, on a hypervisor in another one."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

from guestd.broker.core.track import Timing
from guestd.model.errors import GuestdError
from guestd.sim.remote import HypervisorLink, VmSpec, encode_specs
from guestd.wire.client import BrokerClient

START_SECONDS = 20.0


class Process:
    """One child of the test, with its output in a file."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._process: asyncio.subprocess.Process | None = None

    async def spawn(self, *argv: str, environment: Mapping[str, str] | None = None) -> None:
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {})},
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def said(self) -> str:
        return self.log.read_text()

    async def ended(self, seconds: float = 15.0) -> int:
        """Wait for its end; the exit code, or minus the number of the signal."""
        assert self._process is not None
        async with asyncio.timeout(seconds):
            return await self._process.wait()

    async def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)
            await self._process.wait()


class HypervisorProcess(Process):
    """`guestd.sim.remote` with these VMs, and a link to it."""

    def __init__(self, root: Path, specs: Sequence[VmSpec]) -> None:
        super().__init__(root / "hypervisor.log")
        self.socket, self._spec = root / "hypervisor.sock", root / "vms.json"
        self._spec.write_bytes(encode_specs(list(specs)))
        self.link = HypervisorLink(self.socket)

    async def __aenter__(self) -> Self:
        await self.spawn(sys.executable, "-m", "guestd.sim.remote", str(self.socket), "--spec", str(self._spec))
        await self.link.start()
        await answering(lambda: self.link.truth(), "the hypervisor")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.link.close()
        await self.kill()


class BrokerProcess(Process):
    """`guestd.sim.broker` on that hypervisor. `config` is broker.toml's text.

    :param before: what comes before the interpreter on the command line, such as nsenter.
    """

    def __init__(self, root: Path, hypervisor: Path, config: str, timing: Timing, before: Sequence[str] = ()) -> None:
        super().__init__(root / "broker.log")
        self.root, self.run_dir, self.config = root, root / "run", root / "broker.toml"
        self.config.write_text(config)
        self._argv = (*before, sys.executable, "-m", "guestd.sim.broker", "--config", str(self.config))
        self._argv += ("--hypervisor", str(hypervisor), "--timing", msgspec.json.encode(timing).decode())

    async def start(self, environment: Mapping[str, str] | None = None, serving: bool = True) -> None:
        await self.spawn(*self._argv, environment=environment)
        if serving:
            async with BrokerClient(self.run_dir) as client:
                await answering(client.host, "the broker", self)

    async def logged(self, text: str, seconds: float = 15.0) -> None:
        """Wait until it said that."""
        async with asyncio.timeout(seconds):
            while text not in self.said:
                assert self.running, f"ended, and never said {text!r}:\n{self.said[-2000:]}"
                await asyncio.sleep(0.02)


async def answering(ask: Any, what: str, process: Process | None = None, seconds: float = START_SECONDS) -> Any:
    """Ask until there is an answer."""
    end = asyncio.get_running_loop().time() + seconds
    while True:
        try:
            return await ask()
        except GuestdError:
            said = process.said[-2000:] if process is not None else ""
            assert process is None or process.running, f"{what} ended:\n{said}"
            assert asyncio.get_running_loop().time() < end, f"{what} does not answer:\n{said}"
            await asyncio.sleep(0.02)
