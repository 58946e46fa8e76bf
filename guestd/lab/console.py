"""Commands in the guest, over a virtio serial port: works without network, vsock or guestd.

The other end is `guest/lab-agent`. Answers are matched by number, so several commands run at once.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import shlex
from dataclasses import dataclass
from pathlib import Path

from guestd.lab.errors import CommandFailed, ConsoleError, ConsoleTimeout

_LINE_LIMIT = 32 << 20


@dataclass(frozen=True)
class CommandResult:
    """How a command ended. Output is cut after 8 MiB each."""

    exit_code: int
    stdout: str
    stderr: str


class Console:
    """The connection to one guest's agent.

    :param path: The unix socket QEMU listens on.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._pending: dict[int, asyncio.Future[list[str]]] = {}
        self._last_id = 0
        self._hello = asyncio.Event()
        self.boot_id: str | None = None
        self.closed = False

    async def connect(self) -> None:
        """Connect to QEMU; the guest need not be up.

        :raise OSError: When nobody listens.
        """
        reader, self._writer = await asyncio.open_unix_connection(str(self._path), limit=_LINE_LIMIT)
        self._reading = asyncio.get_running_loop().create_task(self._read(reader))

    async def close(self) -> None:
        """End the connection. May be called again."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        if self._writer is not None:
            self._writer.close()
        self._fail_all("the console was closed")

    def expect_restart(self) -> None:
        """Wait for a new agent before the next command: the guest is being reset."""
        self._hello.clear()
        self.boot_id = None
        self._fail_all("the guest was reset")

    async def wait_agent(self, timeout_seconds: float) -> str:
        """Wait until the agent is up and return the guest's boot id.

        :raise ConsoleTimeout: When it is not in time.
        """
        try:
            await asyncio.wait_for(self._hello.wait(), timeout_seconds)
        except TimeoutError as error:
            raise ConsoleTimeout(f"no agent in the guest after {timeout_seconds:g} s") from error
        if self.closed or self.boot_id is None:
            raise ConsoleError("QEMU closed the console")
        return self.boot_id

    async def run(self, command: str, timeout_seconds: float = 60.0, *, check: bool = True) -> CommandResult:
        """Run a shell command as root in the guest and wait for its end.

        :param check: Whether an exit code other than 0 is an error.
        :raise CommandFailed: When `check` is set and the exit code is not 0.
        :raise ConsoleTimeout: When there is no answer in time; the command may still be running.
        :raise ConsoleError: When the guest was reset, or QEMU ended, meanwhile.
        """
        _, code, stdout, stderr = await self._ask("run", command, command, timeout_seconds, words=4)
        result = CommandResult(int(code), _text(stdout), _text(stderr))
        if check and result.exit_code:
            raise CommandFailed(command, result.exit_code, result.stdout, result.stderr)
        return result

    async def spawn(self, command: str, timeout_seconds: float = 30.0) -> int:
        """Start a shell command in the background, in a session of its own; its process id in the guest.

        :raise ConsoleError: As for `run`.
        """
        return int((await self._ask("spawn", command, command, timeout_seconds, words=2))[1])

    async def read_file(self, path: str, timeout_seconds: float = 30.0) -> str:
        """The text of a file in the guest.

        :raise CommandFailed: When it cannot be read.
        """
        return (await self.run(f"cat -- {shlex.quote(path)}", timeout_seconds)).stdout

    async def wait_path(self, path: str, timeout_seconds: float) -> None:
        """Wait until a path exists in the guest.

        :raise ConsoleTimeout: When it does not in time.
        """
        await self._ask("wait", path, f"wait for {path}", timeout_seconds, words=4)

    async def _ask(self, action: str, argument: str, what: str, timeout_seconds: float, words: int) -> list[str]:
        if self._writer is None:
            raise ConsoleError("the console is not connected")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        await self.wait_agent(timeout_seconds)
        self._last_id += 1
        number = self._last_id
        future: asyncio.Future[list[str]] = loop.create_future()
        self._pending[number] = future
        try:
            encoded = base64.b64encode(argument.encode()).decode()
            self._writer.write(f"\n{number} {action} {encoded}\n".encode())
            answer = await asyncio.wait_for(future, max(0.0, deadline - loop.time()))
        except TimeoutError as error:
            raise ConsoleTimeout(f"no answer within {timeout_seconds:g} s to {what!r}") from error
        finally:
            self._pending.pop(number, None)
        if len(answer) != words:
            raise ConsoleError(f"an answer of {len(answer)} words to {what!r}")
        return answer

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                self._on_line(line)
        except (OSError, ValueError):
            pass  # a broken connection, or a line beyond the limit: both end the console
        finally:
            self.closed = True
            self._hello.set()
            self._fail_all("QEMU closed the console")

    def _on_line(self, line: bytes) -> None:
        words = line.decode(errors="replace").split()
        if len(words) < 2:
            return  # an empty line, or half of one from before a reset
        if words[0] == "hello":
            if self._hello.is_set():
                self._fail_all("the guest restarted")
            self.boot_id = words[1]
            self._hello.set()
        elif words[0].isdecimal():
            answer = self._pending.get(int(words[0]))
            if answer is not None and not answer.done():
                answer.set_result(words[1:])

    def _fail_all(self, reason: str) -> None:
        for answer in self._pending.values():
            if not answer.done():
                answer.set_exception(ConsoleError(reason))


def _text(encoded: str) -> str:
    if encoded == "-":
        return ""
    try:
        return base64.b64decode(encoded).decode(errors="replace")
    except binascii.Error as error:
        raise ConsoleError(f"the agent sent something that is not base64: {error}") from error
