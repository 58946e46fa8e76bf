"""The disk under the history is full or broken, for real: that is said once, and all goes on by itself when there is
room again.
"""

import asyncio
import errno
import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from broker_rig import short_directory
from test_journal_faults import FailingDisk, SmallDisk, missing

# Made for pytest here under their own names, too: fixtures of a test module are not seen elsewhere.
from test_journal_faults import disk as disk
from test_journal_faults import library as library

CHILD = """
import asyncio, logging, sys
from pathlib import Path
from guestd.broker.history import store as module
from guestd.broker.history.store import Store
from guestd.model.event import EventCode, EventQuery

async def main():
    module._WRITE_SECONDS = 0.05
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr)
    store = Store(Path(sys.argv[1]), 8 << 20)
    await store.start()
    print("ok", flush=True)
    loop = asyncio.get_running_loop()
    while line := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
        if line == "stop":
            await store.stop()
            print("stopped", flush=True)
            return
        if line != "ask":
            store.note(EventCode.OPERATOR, line)
        print(*(one.text for one in await store.events(EventQuery()) if one.code == EventCode.OPERATOR), flush=True)

asyncio.run(main())
"""


@pytest.fixture
def root() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@pytest.fixture
async def small_disk(root: Path) -> AsyncIterator[SmallDisk]:
    if os.geteuid() != 0:
        missing("mounting a tmpfs takes root")
    one = SmallDisk(root)
    try:
        yield one
    finally:
        await one.kill()


class StoreProcess:
    """A store in a process of its own. Each line is an event, and is answered with all events there are."""

    def __init__(self, path: Path, log: Path, before: tuple[str, ...] = (), disk: FailingDisk | None = None) -> None:
        self._argv = (*before, sys.executable, "-c", CHILD, str(path))
        self._log, self._environment = log, {**os.environ, **(disk.environment if disk else {})}
        self._process: asyncio.subprocess.Process

    async def __aenter__(self) -> "StoreProcess":
        pipe = asyncio.subprocess.PIPE
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._argv, stdin=pipe, stdout=pipe, stderr=log, env=self._environment
            )
        assert await self._answer() == "ok"
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.communicate()

    async def say(self, line: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        return await self._answer()

    async def _answer(self) -> str:
        assert self._process.stdout is not None
        async with asyncio.timeout(30):
            return (await self._process.stdout.readline()).decode().strip()

    def warnings(self) -> list[str]:
        return self._log.read_text().splitlines()


async def again(store: StoreProcess) -> None:
    """Wait until it writes again, and said so: every second warning says that."""
    async with asyncio.timeout(20):
        while len(store.warnings()) % 2:
            await store.say("ask")
    assert "history can be written again" in store.warnings()[-1]


@pytest.mark.parametrize(
    ("failing", "said"),
    [
        ({"write": errno.ENOSPC}, "the disk is full; make room on the file system of"),
        ({"write": errno.EIO}, "the disk or its file system failed; see the kernel's log"),
    ],
)
async def test_what_cannot_be_written_is_said_once_and_goes_on_by_itself(
    root: Path, disk: FailingDisk, failing: dict[str, int], said: str
) -> None:
    path = root / "state" / "history.db"
    async with StoreProcess(path, root / "log", disk=disk) as store:
        assert await store.say("before") == "before"
        disk.fail(**failing)
        for number in range(20):
            assert (await store.say(f"lost{number}")).split()[0] == "before"
        assert disk.failed >= 3
        (warning,) = store.warnings()
        assert f"history {path}: " in warning
        assert said in warning
        assert "the broker goes on" in warning
        disk.fail()
        await again(store)
        assert (await store.say("after")).split()[-1] == "after"
        assert len(store.warnings()) == 2
        assert await store.say("stop") == "stopped"
    assert [one.name for one in path.parent.iterdir()] == ["history.db"]
    async with StoreProcess(path, root / "log2") as store:
        found = (await store.say("ask")).split()
        assert found[0] == "before"
        assert found[-1] == "after"
        assert store.warnings() == []


async def test_a_disk_without_room_from_the_start(root: Path, small_disk: SmallDisk) -> None:
    await small_disk.mount("1m")
    small_disk.fill()
    path = small_disk.path / "history.db"
    async with StoreProcess(path, root / "log", before=small_disk.enter) as store:
        assert await store.say("early") == "early"
        (warning,) = store.warnings()
        assert f"make room on the file system of {small_disk.path}" in warning
        small_disk.make_room()
        await again(store)
        assert "after" in await store.say("after")
        small_disk.fill()
        for number in range(100):
            await store.say("x" * 400 + str(number))
        assert len(store.warnings()) == 3
        small_disk.make_room()
        await again(store)
        await store.say("last")
        assert await store.say("stop") == "stopped"
    async with StoreProcess(path, root / "log2", before=small_disk.enter) as store:
        found = (await store.say("ask")).split()
        assert "after" in found
        assert found[-1] == "last"
