"""Disks that are full, read-only or broken, for real: a tmpfs of the test's own, and a preloaded library that fails
system calls (`failing_disk.c`). What is not durable is not granted, and guests keep what they have.
"""

import asyncio
import contextlib
import errno
import mmap
import os
import shutil
import sqlite3
import struct
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from broker_rig import QUICK, RawGuest, demand, eventually, guest_table, hello, host_table, short_directory
from process_rig import BrokerProcess, HypervisorProcess, Process

from guestd.broker import config as configuration
from guestd.broker.core.actions import Record
from guestd.broker.engine import Engine
from guestd.broker.failpoint import VARIABLE, Failpoint
from guestd.broker.hypervisor.fake import FakeVm
from guestd.broker.journal import Journal
from guestd.model.errors import GuestdError
from guestd.model.messages import Grant
from guestd.model.resources import Kind, Resources
from guestd.model.units import GIB, MIB
from guestd.model.view import LimitsChange
from guestd.sim.remote import VmSpec
from guestd.wire.client import BrokerClient
from guestd.wire.relay import IngressRelay, Peer, Peers

SHIM = Path(__file__).with_name("failing_disk.c")
_CONTROL = struct.Struct("iiii64s")

# A journal in a process of its own: each line of input is done and answered with "ok" or what is wrong.
CHILD = """
import asyncio, os, sys
from pathlib import Path
from guestd.broker.core.actions import Record
from guestd.broker.journal import Journal
from guestd.model.errors import JournalError
from guestd.model.resources import Resources

async def main():
    journal = Journal(Path(sys.argv[1]))
    if len(sys.argv) > 2:
        os.setgid(int(sys.argv[2])), os.setuid(int(sys.argv[2]))
    try:
        await journal.open()
        print("ok", flush=True)
        for line in sys.stdin:
            names = line.split()
            try:
                await journal.record([Record(name, Resources(1, 1), 1) for name in names])
                print("ok", flush=True)
            except JournalError as error:
                print(error, flush=True)
    except JournalError as error:
        print(error, flush=True)
    await journal.close()

asyncio.run(main())
"""


@pytest.fixture
def root() -> Iterator[Path]:
    with short_directory() as path:
        yield path


# ---- tools ---------------------------------------------------------------------------------------


def missing(what: str) -> None:
    if os.environ.get("GUESTD_REQUIRE_VM") == "1":
        pytest.fail(what)
    pytest.skip(what)


class FailingDisk:
    """A disk that fails when it is told to, for a process that is started with `environment`."""

    def __init__(self, library: Path, control: Path) -> None:
        control.write_bytes(bytes(_CONTROL.size))
        self.environment = {"LD_PRELOAD": str(library), "FAILING_DISK": str(control)}
        with control.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), _CONTROL.size)
        self.watch(".db")

    def watch(self, match: str) -> None:
        """From now on only files with that in their path are concerned; count anew."""
        self._shared[:] = _CONTROL.pack(0, 0, 0, 0, match.encode())

    def fail(self, *, sync: int = 0, write: int = 0) -> None:
        """Which errno syncs and writes end with from now on; 0: they work."""
        self._shared[:8] = struct.pack("ii", sync, write)

    @property
    def synced(self) -> int:
        return int(_CONTROL.unpack(self._shared[:])[2])

    @property
    def failed(self) -> int:
        return int(_CONTROL.unpack(self._shared[:])[3])


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc")
    if compiler is None:
        missing("gcc is not installed (Debian: gcc libc6-dev)")
    path = tmp_path_factory.mktemp("shim") / "failing_disk.so"
    arguments = ["-Wall", "-Werror", "-O1", "-shared", "-fPIC", "-o", str(path), str(SHIM), "-ldl"]
    assert os.spawnv(os.P_WAIT, str(compiler), ["gcc", *arguments]) == 0
    return path


@pytest.fixture
def disk(library: Path, root: Path) -> FailingDisk:
    return FailingDisk(library, root / "control")


class SmallDisk(Process):
    """A tmpfs in a mount namespace of its own, which lives as long as this process. `inside` leads there from here."""

    def __init__(self, root: Path) -> None:
        super().__init__(root / "mount.log")
        self.path = root / "state"

    async def mount(self, size: str) -> None:
        self.path.mkdir()
        script = f"mount -t tmpfs -o size={size} none {self.path} && echo mounted && exec sleep 300"
        await self.spawn("unshare", "--mount", "--propagation", "private", "sh", "-c", script)
        for _ in range(500):
            if not self.running or "mounted" in self.said:
                break
            await asyncio.sleep(0.01)
        if "mounted" not in self.said:
            missing(f"cannot mount a tmpfs: {self.said}")

    @property
    def inside(self) -> Path:
        return Path(f"/proc/{self.pid}/root{self.path}")

    @property
    def enter(self) -> tuple[str, ...]:
        """What to put before a command that is to live there."""
        return ("nsenter", f"--mount=/proc/{self.pid}/ns/mnt", f"--wdns={Path.cwd()}")

    def fill(self) -> None:
        """Leave not one byte."""
        fd = os.open(self.inside / "filler", os.O_WRONLY | os.O_CREAT)
        try:
            with contextlib.suppress(OSError):
                while True:
                    os.write(fd, bytes(4096))
        finally:
            os.close(fd)

    def make_room(self) -> None:
        (self.inside / "filler").unlink()

    async def read_only(self) -> None:
        process = await asyncio.create_subprocess_exec(*self.enter, "mount", "-o", "remount,ro", str(self.path))
        assert await process.wait() == 0


@pytest.fixture
async def small_disk(root: Path) -> AsyncIterator[SmallDisk]:
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("nsenter") is None:
        missing("mounting a tmpfs takes root, unshare and nsenter")
    one = SmallDisk(root)
    try:
        yield one
    finally:
        await one.kill()


class JournalProcess:
    """A journal in a process of its own."""

    def __init__(
        self, path: Path, *arguments: str, before: tuple[str, ...] = (), disk: FailingDisk | None = None
    ) -> None:
        self._argv = (*before, sys.executable, "-c", CHILD, str(path), *arguments)
        self._environment = {**os.environ, **(disk.environment if disk else {})}
        self._process: asyncio.subprocess.Process

    async def __aenter__(self) -> "JournalProcess":
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *self._argv, stdin=pipe, stdout=pipe, env=self._environment
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def answer(self) -> str:
        assert self._process.stdout is not None
        async with asyncio.timeout(20):
            return (await self._process.stdout.readline()).decode().strip()

    async def record(self, *names: str) -> str:
        """Record something for these guests; "ok", or what is wrong."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(names).encode() + b"\n")
        return await self.answer()

    async def kill(self) -> None:
        """As a crash would."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.communicate()


async def opening(path: Path, *arguments: str, before: tuple[str, ...] = ()) -> str:
    """What a journal says that is opened."""
    async with JournalProcess(path, *arguments, before=before) as journal:
        return await journal.answer()


async def recorded(path: Path) -> set[str]:
    """The guests that the next broker finds."""
    journal = Journal(path)
    try:
        return set((await journal.open()).reserved)
    finally:
        await journal.close()


# ---- the journal at its start --------------------------------------------------------------------


async def test_a_full_disk_at_the_start(root: Path, small_disk: SmallDisk) -> None:
    await small_disk.mount("256k")
    small_disk.fill()
    path = small_disk.path / "journal.db"
    said = await opening(path, before=small_disk.enter)
    assert f"journal {path}: " in said
    assert f"the disk is full; make room on the file system of {small_disk.path}" in said
    small_disk.make_room()
    assert await opening(path, before=small_disk.enter) == "ok"
    small_disk.fill()
    assert "the disk is full" in await opening(path, before=small_disk.enter)
    small_disk.make_room()
    assert await opening(path, before=small_disk.enter) == "ok"


async def test_a_read_only_file_system_at_the_start(root: Path, small_disk: SmallDisk) -> None:
    await small_disk.mount("256k")
    path = small_disk.path / "journal.db"
    assert await opening(path, before=small_disk.enter) == "ok"
    before = (small_disk.inside / "journal.db").read_bytes()
    await small_disk.read_only()
    for one in (path, small_disk.path / "new.db"):
        said = await opening(one, before=small_disk.enter)
        assert f"journal {one}: " in said
        assert f"the file system of {small_disk.path} is read-only; mount it writable" in said
    assert (small_disk.inside / "journal.db").read_bytes() == before


async def test_a_file_or_directory_that_may_not_be_written(root: Path) -> None:
    if os.geteuid() != 0:
        missing("becoming another user takes root")
    nobody = 65534
    state = root / "state"
    path = state / "journal.db"
    assert await opening(path) == "ok"
    root.chmod(0o755)
    state.chmod(0o755)
    said = await opening(path, str(nobody))
    assert f"{state} is read-only for user {nobody}; make that user its owner" in said
    os.chown(state, nobody, nobody)
    path.chmod(0o444)
    said = await opening(path, str(nobody))
    assert f"{path} is read-only for user {nobody}" in said
    for one in state.iterdir():  # the log too: `opening` ends as a crash does
        os.chown(one, nobody, nobody)
        one.chmod(0o600)
    assert await opening(path, str(nobody)) == "ok"


# ---- the journal while it runs -------------------------------------------------------------------


async def test_every_commit_is_synced_once(root: Path, disk: FailingDisk) -> None:
    async with JournalProcess(root / "journal.db", disk=disk) as journal:
        assert await journal.answer() == "ok"
        disk.watch("-wal")
        for number in range(50):
            assert await journal.record(f"g{number}") == "ok"
        assert disk.synced == 50
        disk.watch("-wal")
        assert await journal.record(*(f"h{number}" for number in range(500))) == "ok"
        assert disk.synced == 1


@pytest.mark.parametrize(
    ("failing", "said"),
    [
        ({"sync": errno.EIO}, "the disk or its file system failed; see the kernel's log"),
        ({"write": errno.EIO}, "the disk or its file system failed; see the kernel's log"),
        ({"write": errno.ENOSPC}, "the disk is full; make room on the file system of"),
    ],
)
async def test_what_failed_is_told_and_gone_and_what_follows_is_durable(
    root: Path, disk: FailingDisk, failing: dict[str, int], said: str
) -> None:
    path = root / "journal.db"
    async with JournalProcess(path, disk=disk) as journal:
        assert await journal.answer() == "ok"
        assert await journal.record("before") == "ok"
        disk.fail(**failing)
        for _ in range(3):
            answer = await journal.record("lost")
            assert f"journal {path}: " in answer
            assert said in answer
        assert disk.failed >= 3
        disk.fail()
        assert await journal.record("after") == "ok"
        await journal.kill()
    assert await recorded(path) == {"before", "after"}


async def test_after_a_failed_sync_the_log_is_not_built_upon(root: Path, disk: FailingDisk) -> None:
    """The kernel takes what it could not write for written, so that another sync of it proves nothing."""
    path = root / "journal.db"
    log = path.with_name("journal.db-wal")
    async with JournalProcess(path, disk=disk) as journal:
        assert await journal.answer() == "ok"
        for number in range(20):
            assert await journal.record(f"g{number}") == "ok"
        before = log.stat().st_size
        disk.fail(sync=errno.EIO)
        assert "failed" in await journal.record("lost")
        assert log.stat().st_size > before  # there it is, and nobody knows whether on disk
        assert "failed" in await journal.record("lost")
        disk.fail()
        disk.watch("journal.db")
        assert await journal.record("after") == "ok"
        assert log.stat().st_size < before  # a new one
        assert disk.synced >= 3  # the old log, the main file, the new log
        await journal.kill()
    assert await recorded(path) == {*(f"g{number}" for number in range(20)), "after"}


async def test_a_file_damaged_while_in_use_stops_decisions_and_says_so(root: Path, disk: FailingDisk) -> None:
    path = root / "journal.db"
    async with JournalProcess(path, disk=disk) as journal:
        assert await journal.answer() == "ok"
        assert await journal.record("a") == "ok"
        disk.fail(sync=errno.EIO)
        assert "failed" in await journal.record("b")
        with path.open("r+b") as file:
            file.write(b"\xa5" * 4096)
        disk.fail()
        for _ in range(2):
            answer = await journal.record("a")
            assert "damaged" in answer or "malformed" in answer


# ---- the broker ----------------------------------------------------------------------------------


class Broker:
    """The real broker on a disk that fails, with one guest whose messages the test writes itself."""

    def __init__(self, root: Path, hypervisor: HypervisorProcess, process: BrokerProcess) -> None:
        self.root, self.hypervisor, self.process = root, hypervisor, process

    async def requests(self) -> list[tuple[str, int]]:
        return [(one.method, one.amount) for one in await self.hypervisor.link.log() if one.vm == "a"]

    async def reserved(self) -> Resources:
        async with BrokerClient(self.process.run_dir) as client:
            view = await client.guest("a")
            return Resources(view.resource(Kind.CPU).reserved, view.resource(Kind.MEMORY).reserved)

    async def committed(self, cpu_millicores: int) -> None:
        """Wait until so much is in the book."""
        async with BrokerClient(self.process.run_dir) as client, asyncio.timeout(15):
            while (await client.host()).committed.cpu_millicores < cpu_millicores:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def broker_on(
    root: Path, before: tuple[str, ...] = (), environment: dict[str, str] | None = None, others: int = 0
) -> AsyncIterator[Broker]:
    names = ["a", "b", *(f"with-a-name-that-takes-room-{number}" for number in range(others))]
    async with HypervisorProcess(root, [VmSpec(name=name) for name in names]) as hypervisor:
        text = host_table(root, cpus=8 + others, memory=f"{8 + others}GiB")
        text += "".join(guest_table(root, name) for name in names)
        process = BrokerProcess(root, hypervisor.socket, text, QUICK, before)
        await process.start(environment)
        try:
            yield Broker(root, hypervisor, process)
        finally:
            await process.kill()


async def grant_of(raw: RawGuest, kind: Kind, amount: int) -> Grant:
    """Read on until that is granted."""
    while True:
        message = await raw.read()
        assert message is not None, "the stream ended"
        if isinstance(message, Grant) and message.kind is kind and message.amount == amount:
            return message


async def nothing_is_granted_until(broker: Broker, raw: RawGuest, said: str, mend: Callable[[], None]) -> None:
    """The journal cannot be written now: nothing moves, and the way out is told. When it can, all goes on."""
    asked_before, had_before = await broker.requests(), await broker.hypervisor.link.truth()
    await raw.send(demand(3, 3000, GIB))
    await broker.process.logged(said)
    await broker.process.logged("until then nothing is decided and guests keep what they have")
    reading = asyncio.create_task(grant_of(raw, Kind.CPU, 3000))
    async with BrokerClient(broker.process.run_dir) as client:
        with pytest.raises(GuestdError, match=said):
            await client.set_limits("b", LimitsChange(cpu_weight=7))
        assert (await client.guest("b")).limits.weight.cpu_millicores == 100
    await asyncio.sleep(1.5)  # more than one try
    assert not reading.done()
    assert await broker.requests() == asked_before
    assert await broker.hypervisor.link.truth() == had_before
    assert broker.process.said.count(said) <= 3  # told once a cause, not once a try
    mend()
    await raw.send(demand(4, 3000, GIB))  # what was said before is out of date by now on a slow machine
    try:
        await reading
    except TimeoutError:
        raise AssertionError(
            f"nothing is granted although there is room again:\n{broker.process.said[-4000:]}"
        ) from None
    await broker.process.logged("the journal can be written again")


async def test_on_a_full_disk_nothing_is_granted_until_there_is_room(root: Path, small_disk: SmallDisk) -> None:
    """With guests enough for the main file to have to grow: else the journal makes room by emptying its log."""
    await small_disk.mount("512k")
    async with broker_on(root, small_disk.enter, others=150) as broker:
        async with RawGuest(root, "a") as raw:
            assert (await raw.hello()).epoch == 1
            await raw.send(demand(1, 1000, 512 * MIB))
            await grant_of(raw, Kind.CPU, 1000)
            await broker.committed(cpu_millicores=152_000)
            await raw.send(demand(2, 2000, 512 * MIB))
            await grant_of(raw, Kind.CPU, 2000)  # so that the records before it are durable
            small_disk.fill()
            await nothing_is_granted_until(broker, raw, "the disk is full; make room", small_disk.make_room)
        await broker.process.kill()
        small_disk.fill()  # and at the start
        await broker.process.start(serving=False)
        assert await broker.process.ended() == 1
        assert "guestd.sim.broker: journal" in broker.process.said
        small_disk.make_room()
        await broker.process.start()
        async with RawGuest(root, "a") as raw:
            assert (await raw.hello(2)).epoch == 2
            await raw.send(demand(1, 3000, GIB))
            await grant_of(raw, Kind.CPU, 3000)
        assert (await broker.reserved()).cpu_millicores == 3000


async def test_when_syncs_fail_nothing_is_granted_until_they_work(root: Path, disk: FailingDisk) -> None:
    async with broker_on(root, environment=disk.environment) as broker, RawGuest(root, "a") as raw:
        await raw.hello()
        await raw.send(demand(1, 1000, 512 * MIB))
        await grant_of(raw, Kind.CPU, 1000)
        disk.fail(sync=errno.EIO)
        await nothing_is_granted_until(broker, raw, "the disk or its file system failed", disk.fail)
        assert disk.failed >= 2
        await broker.process.kill()
        await broker.process.start()
        assert (await broker.reserved()).cpu_millicores == 3000


async def test_when_the_file_system_turns_read_only_nothing_is_granted(root: Path, disk: FailingDisk) -> None:
    """As after errors=remount-ro."""
    async with broker_on(root, environment=disk.environment) as broker, RawGuest(root, "a") as raw:
        await raw.hello()
        await raw.send(demand(1, 1000, 512 * MIB))
        await grant_of(raw, Kind.CPU, 1000)
        disk.fail(write=errno.EROFS, sync=errno.EROFS)
        await nothing_is_granted_until(broker, raw, "the disk or its file system failed", disk.fail)


async def test_what_was_granted_was_durable_before(root: Path, disk: FailingDisk) -> None:
    """The guest heard it: the next broker finds it, whatever the last one had no time for."""
    async with broker_on(root, environment={VARIABLE: f"{Failpoint.ANSWERED}:3"}) as broker:
        async with RawGuest(root, "a") as raw:
            await raw.hello()
            await raw.send(demand(1, 4000, 2 * GIB))
            assert await broker.process.ended() == -9
        database = sqlite3.connect(root / "state" / "journal.db")
        found = database.execute("SELECT cpu_millicores, memory_bytes FROM reserved WHERE guest = 'a'").fetchone()
        database.close()
        truth = (await broker.hypervisor.link.truth())["a"]
        assert found[0] >= truth.vcpus * 1000
        assert found[1] >= truth.memory_held_bytes


# ---- group commit --------------------------------------------------------------------------------


async def test_a_burst_of_decisions_costs_few_commits(root: Path) -> None:
    count = 200
    names = [f"g{number:03}" for number in range(count)]
    text = host_table(root, cpus=1000, memory="1000GiB") + "".join(guest_table(root, name) for name in names)
    (root / "broker.toml").write_text(text)
    config = configuration.load(root / "broker.toml")
    vms = {name: FakeVm() for name in names}
    commits: list[int] = []

    class Counting(Journal):
        async def record(self, records: list[Record]) -> None:  # type: ignore[override]
            commits.append(len(records))
            await super().record(records)

    relay = IngressRelay(root / "server.sock", Peers())
    engine = Engine(config, Counting(root / "journal.db"), lambda guest: vms[guest.name], relay, QUICK)
    await engine.start()
    try:
        peers = {name: Peer(name, "test") for name in names}
        sessions = {name: engine.connect(peers[name], hello())[0] for name in names}
        await eventually(
            lambda: all(guest.reserved.memory_bytes == 512 * MIB for guest in engine.machine.guests.values()),
            "all VMs are in the book",
        )
        commits.clear()
        for name in names:
            engine.receive(peers[name], sessions[name], demand(1, 3000, 2 * GIB))
        await eventually(
            lambda: all(len(vm.guest_cpus) == 3 and vm.guest_memory_bytes == 2 * GIB for vm in vms.values()),
            "all have what they asked for",
        )
        assert sum(commits) >= 2 * count  # CPU and memory of each
        assert len(commits) <= 5, commits
    finally:
        await relay.close()
        await engine.stop()
