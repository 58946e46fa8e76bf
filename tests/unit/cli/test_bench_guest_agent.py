"""The bench's connection to its agent in the guest."""

import asyncio
import json
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from guestd.cli.bench.guest.agent import AGENT_PORT, Agent, BenchError

AHEAD_SECONDS = 1000.0  # the guest's clock is so far ahead


@asynccontextmanager
async def guest(answer: Callable[[dict[str, Any]], object]) -> AsyncIterator[Agent]:
    """An agent that answers as told; None: it hangs up."""
    with tempfile.TemporaryDirectory() as directory:
        agent = Agent()
        await agent.listen(Path(directory) / "vsock")
        reader, writer = await asyncio.open_unix_connection(f"{directory}/vsock_{AGENT_PORT}")

        async def serve() -> None:
            while line := await reader.readline():
                answered = answer(json.loads(line))
                if answered is None:
                    break
                writer.write(json.dumps(answered).encode() + b"\n")
            writer.close()

        serving = asyncio.create_task(serve())
        await agent.wait_connected(5.0)
        try:
            yield agent
        finally:
            await agent.close()
            await asyncio.wait_for(serving, 5.0)


async def test_a_step_and_its_answer() -> None:
    async with guest(lambda step: {"done": step["do"], "limit": step["limit_seconds"]}) as agent:
        assert await agent.ask("cpu-offline", 3.0) == {"done": "cpu-offline", "limit": 3.0}


async def test_the_difference_of_the_clocks() -> None:
    async with guest(lambda step: {"t": time.monotonic() + AHEAD_SECONDS}) as agent:
        offset, doubt = await agent.clock_offset()
    assert offset == pytest.approx(AHEAD_SECONDS, abs=doubt + 1e-3)
    assert 0 < doubt < 1.0


async def test_a_failed_step_is_an_error() -> None:
    async with guest(lambda step: {"error": "OSError(2)"}) as agent:
        with pytest.raises(BenchError, match=r"OSError\(2\)"):
            await agent.ask("usage")


async def test_an_agent_that_hangs_up_is_an_error() -> None:
    async with guest(lambda step: None) as agent:
        with pytest.raises(BenchError, match="gone"):
            await agent.ask("clock")


async def test_an_agent_that_never_comes_is_an_error() -> None:
    with tempfile.TemporaryDirectory() as directory:
        agent = Agent()
        await agent.listen(Path(directory) / "vsock")
        with pytest.raises(BenchError, match="no agent"):
            await agent.wait_connected(0.05)
        await agent.close()
