"""The console against an agent that the test plays."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from guestd.lab.console import Console
from guestd.lab.errors import CommandFailed, ConsoleError, ConsoleTimeout


class Agent:
    """The guest's end of the port."""

    def __init__(self) -> None:
        self.connected = asyncio.Event()
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.connected.set()

    def say(self, line: str) -> None:
        self.writer.write(f"\n{line}\n".encode())

    async def hear(self) -> tuple[str, str, str]:
        while not (words := (await self.reader.readline()).decode().split()):
            pass
        return words[0], words[1], base64.b64decode(words[2]).decode()


def text(value: str) -> str:
    return base64.b64encode(value.encode()).decode() or "-"


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    made = Agent()
    server = await asyncio.start_unix_server(made.accept, str(tmp_path / "console"))
    yield made
    made.writer.close()
    server.close()
    await server.wait_closed()


@pytest.fixture
async def console(tmp_path: Path, agent: Agent) -> AsyncIterator[Console]:
    made = Console(tmp_path / "console")
    await made.connect()
    await agent.connected.wait()
    yield made
    await made.close()


async def test_answers_find_their_commands(console: Console, agent: Agent) -> None:
    agent.say("hello boot-1")
    first, second = asyncio.create_task(console.run("one")), asyncio.create_task(console.run("two"))
    heard = [await agent.hear(), await agent.hear()]
    assert [(action, command) for _, action, command in heard] == [("run", "one"), ("run", "two")]
    agent.say(f"{heard[1][0]} exit 0 {text('2')} -")
    agent.say("half a line from bef")
    agent.say("99 exit 0 - -")
    agent.say(f"{heard[0][0]} exit 0 {text('1')} {text('ä')}")
    assert (await first).stderr == "ä"
    assert (await second).stdout == "2"
    assert console.boot_id == "boot-1"


async def test_exit_codes(console: Console, agent: Agent) -> None:
    agent.say("hello boot-1")
    task = asyncio.create_task(console.run("false"))
    number, _, _ = await agent.hear()
    agent.say(f"{number} exit 1 - {text('why')}")
    with pytest.raises(CommandFailed, match="why") as caught:
        await task
    assert caught.value.exit_code == 1


async def test_no_agent_and_no_answer_are_timeouts(console: Console, agent: Agent) -> None:
    with pytest.raises(ConsoleTimeout, match="no agent"):
        await console.run("true", 0.01)
    agent.say("hello boot-1")
    with pytest.raises(ConsoleTimeout, match="no answer"):
        await console.run("true", 0.05)


async def test_a_restart_ends_what_was_pending(console: Console, agent: Agent) -> None:
    agent.say("hello boot-1")
    task = asyncio.create_task(console.run("sleep"))
    await agent.hear()
    agent.say("hello boot-2")
    with pytest.raises(ConsoleError, match="restarted"):
        await task
    assert console.boot_id == "boot-2"
    task = asyncio.create_task(console.run("sleep"))
    await agent.hear()
    console.expect_restart()
    with pytest.raises(ConsoleError, match="reset"):
        await task
    with pytest.raises(ConsoleTimeout):
        await console.wait_agent(0.01)


async def test_the_end_of_qemu_ends_what_was_pending(console: Console, agent: Agent) -> None:
    agent.say("hello boot-1")
    task = asyncio.create_task(console.run("sleep"))
    await agent.hear()
    agent.writer.close()
    with pytest.raises(ConsoleError, match="closed"):
        await task
    with pytest.raises(ConsoleError, match="closed"):
        await console.run("true")


async def test_nonsense_from_the_agent_is_an_error(console: Console, agent: Agent) -> None:
    agent.say("hello boot-1")
    for nonsense in ("pid 5", "exit 0 a -"):
        task = asyncio.create_task(console.run("true"))
        number, _, _ = await agent.hear()
        agent.say(f"{number} {nonsense}")
        with pytest.raises(ConsoleError):
            await task
