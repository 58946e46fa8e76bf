"""`guestctl top` as a process on a real terminal, against a broker in a process of its own."""

import asyncio
import fcntl
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from broker_rig import guest_table, host_table, short_directory
from process_rig import BrokerProcess, HypervisorProcess

from guestd.broker.core.track import Timing
from guestd.model.units import GIB, MIB
from guestd.model.view import LimitsChange
from guestd.sim.remote import VmSpec
from guestd.wire.client import BrokerClient

_ESCAPES = re.compile(r"\x1b(\[[0-9;?<>=!]*[ -/]*[@-~]|[()][0-9A-Za-z]|[=>78]|\].*?(\x07|\x1b\\)|P.*?\x1b\\)")
_COLUMNS, _ROWS = 100, 30


@pytest.fixture
def root() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@pytest.fixture
async def broker(root: Path) -> AsyncIterator[BrokerProcess]:
    specs = [VmSpec(name, boot_bytes=512 * MIB, device_bytes=4 * GIB) for name in ("web", "db")]
    config = host_table(root) + guest_table(root, "web") + guest_table(root, "db")
    async with HypervisorProcess(root, specs) as hypervisor:
        one = BrokerProcess(root, hypervisor.socket, config, Timing())
        try:
            await one.start()
            yield one
        finally:
            await one.kill()


class Terminal:
    """`guestctl top` on a pseudo terminal of its own; `said` is all that it has written."""

    def __init__(self, run_dir: Path, **environment: str) -> None:
        self._run_dir, self._environment = run_dir, environment
        self.raw = b""
        self._outer, self._inner = pty.openpty()
        fcntl.ioctl(self._inner, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, _COLUMNS, 0, 0))
        self.before = termios.tcgetattr(self._inner)
        self.process: asyncio.subprocess.Process

    async def __aenter__(self) -> "Terminal":
        arguments = ("-m", "guestd.cli.main", "top", "--run-dir", str(self._run_dir))
        environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "LINES")}
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, *arguments),
            stdin=self._inner,
            stdout=self._inner,
            stderr=self._inner,
            env={**environment, "TERM": "xterm-256color", **self._environment},
            start_new_session=True,
        )
        os.set_blocking(self._outer, False)
        asyncio.get_running_loop().add_reader(self._outer, self._read)
        return self

    async def __aexit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._outer)
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        os.close(self._inner)
        os.close(self._outer)

    def _read(self) -> None:
        self.raw += os.read(self._outer, 1 << 16)

    @property
    def said(self) -> str:
        return _ESCAPES.sub("", self.raw.decode(errors="replace"))

    def press(self, keys: str) -> None:
        os.write(self._outer, keys.encode())

    async def says(self, *parts: str, since: int = 0) -> None:
        """Wait until it wrote all of that; `since`: a length of `said`."""
        end = asyncio.get_running_loop().time() + 30
        while not all(part in self.said[since:] for part in parts):
            assert self.process.returncode is None, f"it ended:\n{self.said[-3000:]}"
            assert asyncio.get_running_loop().time() < end, f"{parts} is not in:\n{self.said[since:][-3000:]}"
            await asyncio.sleep(0.02)

    async def ended(self) -> int:
        async with asyncio.timeout(15):
            return await self.process.wait()

    def assert_restored(self) -> None:
        """The terminal is as it was: its modes, the screen before, the cursor."""
        assert termios.tcgetattr(self._inner) == self.before
        assert self.raw.rindex(b"\x1b[?1049l") > self.raw.rindex(b"\x1b[?1049h")
        assert self.raw.rindex(b"\x1b[?25h") > self.raw.rindex(b"\x1b[?25l")


async def test_top_lives_through_a_restart_of_the_broker_and_leaves_the_terminal_as_it_was(
    broker: BrokerProcess,
) -> None:
    async with Terminal(broker.run_dir) as top:
        await top.says("2 guests", "web", "db", "epoch 1", "0 of 2 connected")
        top.press("/we")
        await top.says("1 of 2 guests")
        async with BrokerClient(broker.run_dir) as client:
            await client.set_limits("web", LimitsChange(cpu_max_millicores=3000))
        await top.says("operator", "limits set")  # an event, live
        top.press("\x1b")
        at = len(top.said)
        await broker.kill()
        await top.says("broker gone for", since=at)
        at = len(top.said)
        await broker.start()
        await top.says("epoch 2", since=at)
        top.press("q")
        assert await top.ended() == 0
        top.assert_restored()
        assert "Traceback" not in top.said


@pytest.mark.parametrize("how", ["ctrl-c", "SIGTERM"])
async def test_top_leaves_the_terminal_as_it_was_however_it_ends(broker: BrokerProcess, how: str) -> None:
    async with Terminal(broker.run_dir) as top:
        await top.says("2 guests")
        if how == "ctrl-c":
            top.press("\x03")
        else:
            top.process.terminate()
        assert await top.ended() == 0
        top.assert_restored()


async def test_no_color_is_honoured(broker: BrokerProcess) -> None:
    coloured = re.compile(rb"\x1b\[(\d+;)*([349][0-7]|10[0-7]|[34]8;)[\d;]*m")
    for environment in ({}, {"NO_COLOR": "1"}):
        async with Terminal(broker.run_dir, **environment) as top:
            await top.says("2 guests", "needs")
            top.press("q")
            assert await top.ended() == 0
            assert bool(coloured.search(top.raw)) == (not environment)


async def test_top_without_a_broker_opens_no_screen_and_ends_with_5(root: Path) -> None:
    async with Terminal(root) as top:
        assert await top.ended() == 5
        assert "monitor.sock does not exist" in " ".join(top.said.split())
        assert b"\x1b[?1049h" not in top.raw
