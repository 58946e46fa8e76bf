"""The host's end of the agent in the guest: one connection, a line each way, and the difference of the clocks."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

from guestd.model.errors import GuestdError

AGENT_PORT = 9001
_CLOCK_QUESTIONS = 8
_GRACE_SECONDS = 20.0


class BenchError(GuestdError):
    """The bench cannot go on."""


class Agent:
    """Steps in the guest, asked for one after the other. The guest dials; `listen` before it does."""

    def __init__(self) -> None:
        self._connected: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = (
            asyncio.get_running_loop().create_future()
        )
        self._server: asyncio.Server | None = None

    async def listen(self, uds_base: Path) -> None:
        """Waits for it where the VM's vsock device delivers connections to `AGENT_PORT`."""

        def arrived(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if self._connected.done():
                writer.close()
            else:
                self._connected.set_result((reader, writer))

        self._server = await asyncio.start_unix_server(arrived, f"{uds_base}_{AGENT_PORT}")

    async def wait_connected(self, timeout_seconds: float) -> None:
        """:raise BenchError: When the agent does not come in time."""
        try:
            await asyncio.wait_for(asyncio.shield(self._connected), timeout_seconds)
        except TimeoutError as error:
            raise BenchError(f"no agent in the guest after {timeout_seconds:g} s") from error

    async def close(self) -> None:
        """Hangs up; the agent ends."""
        if self._connected.done():
            self._connected.result()[1].close()
        else:
            self._connected.cancel()
        if self._server is not None:
            self._server.close()

    async def ask(self, do: str, limit_seconds: float = 20.0, **values: Any) -> dict[str, Any]:
        """One step and its answer.

        :raise BenchError: When it fails, or there is no answer in time.
        """
        self.send(do, limit_seconds, **values)
        return await self.answer(limit_seconds)

    def send(self, do: str, limit_seconds: float = 20.0, **values: Any) -> None:
        """Begins a step; `answer` gives its answers, one by one."""
        writer = self._connected.result()[1]
        writer.write(json.dumps({"do": do, "limit_seconds": limit_seconds, **values}).encode() + b"\n")

    async def answer(self, limit_seconds: float) -> dict[str, Any]:
        """:raise BenchError: When the step failed, or there is no answer in time."""
        try:
            line = await asyncio.wait_for(self._connected.result()[0].readline(), limit_seconds + _GRACE_SECONDS)
        except TimeoutError as error:
            raise BenchError("the agent in the guest does not answer") from error
        except OSError as error:
            raise BenchError(f"the agent in the guest is gone: {error}") from error
        if not line:
            raise BenchError("the agent in the guest is gone")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"the agent in the guest: {answer['error']}")
        return answer

    async def clock_offset(self) -> tuple[float, float]:
        """Guest clock minus host clock, and how much it may be wrong: from the quickest of several questions."""
        best = (float("inf"), 0.0)
        for _ in range(_CLOCK_QUESTIONS):
            before = time.monotonic()
            guest = float((await self.ask("clock"))["t"])
            after = time.monotonic()
            best = min(best, (after - before, guest - (before + after) / 2))
        return best[1], best[0] / 2
