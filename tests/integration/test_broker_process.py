"""`guestd-broker run` as a process of its own: how it starts, refuses to, reloads and ends."""

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from broker_rig import RawGuest, demand, eventually, guest_table, host_table, short_directory
from remote_rig import free_port
from scripted_qmp import serving

from guestd.model.errors import UnreachableError
from guestd.model.event import EventQuery
from guestd.model.units import MIB
from guestd.model.view import GuestView
from guestd.model.vm import VmStatus
from guestd.wire.client import BrokerClient


@pytest.fixture
def root() -> Iterator[Path]:
    with short_directory() as path:
        yield path


class Broker:
    """A running `guestd-broker`."""

    def __init__(self, root: Path) -> None:
        self.config, self.run_dir, self.log = root / "broker.toml", root / "run", root / "log"
        self._process: asyncio.subprocess.Process

    async def start(self, command: str = "run") -> None:
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "guestd.broker.main",
                command,
                "--config",
                str(self.config),
                stderr=log,
                stdout=log,
            )

    async def ended(self, seconds: float = 15) -> int:
        async with asyncio.timeout(seconds):
            return await self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def serving(self) -> None:
        await eventually(lambda: (self.run_dir / "admin.sock").exists(), "the broker serves")
        await self.logged("guests")

    async def logged(self, text: str) -> None:
        await eventually(lambda: text in self.said, f"it says {text!r}")

    @property
    def said(self) -> str:
        return self.log.read_text()

    async def stop(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


@pytest.fixture
async def broker(root: Path) -> AsyncIterator[Broker]:
    one = Broker(root)
    try:
        yield one
    finally:
        with contextlib.suppress(AttributeError):  # never started
            await one.stop()


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (("cpus = 8", "cpus = -3"), "broker.toml: host.cpus = -3: must be a number, 0 or above"),
        (("cpus = 8", "cpus = nan"), "broker.toml: host.cpus = nan: must be a number, 0 or above"),
        (("cpus = 8", "cpu = 8"), "broker.toml: host: has no key 'cpu'"),
        (("min = 1, max = 4", "min = 5, max = 4"), "guests.a: cpu: min 5 CPU is above max 4 CPU"),
        (('min = "512MiB"', 'min = "much"'), "guests.a.memory.min = 'much': 'much' is not a size"),
        (("cpus = 8", "cpus = 0"), "the minimums of 1 guests add up to 1 CPU, but the host has 0 CPU"),
        (("heartbeat_seconds = 1", "heartbeat_seconds = 0"), "broker.heartbeat_seconds = 0.0: must be within 1..3600"),
        (("[host]", "[host"), "broker.toml: is not TOML"),
    ],
)
async def test_a_bad_configuration_ends_with_2_and_starts_nothing(
    root: Path, broker: Broker, broken: tuple[str, str], said: str
) -> None:
    text = host_table(root) + guest_table(root, "a")
    assert broken[0] in text
    broker.config.write_text(text.replace(*broken))
    await broker.start()
    assert await broker.ended() == 2
    assert said in broker.said
    assert "Traceback" not in broker.said
    assert sorted(path.name for path in root.iterdir()) == ["broker.toml", "log"]


async def test_a_missing_file_ends_with_2(broker: Broker) -> None:
    await broker.start()
    assert await broker.ended() == 2
    assert "broker.toml: cannot be read" in broker.said


async def test_check_says_nothing_when_all_is_well(root: Path, broker: Broker) -> None:
    broker.config.write_text(host_table(root) + guest_table(root, "a"))
    await broker.start("check")
    assert await broker.ended() == 0
    assert sorted(path.name for path in root.iterdir()) == ["broker.toml", "log"]


async def test_check_looks_at_certificates_without_which_a_broker_starts_all_the_same(
    root: Path, broker: Broker
) -> None:
    names = "".join(f'{name} = "{root}/{name}.pem"\n' for name in ("certificate", "key", "client_ca"))
    table = f'[monitor]\nlisten = "127.0.0.1:{free_port()}"\n{names}'
    broker.config.write_text(host_table(root) + guest_table(root, "a") + table)
    await broker.start("check")
    assert await broker.ended() == 2
    assert f"guestd-broker: {root}/certificate.pem: cannot be read: No such file" in broker.said
    await broker.start()
    await broker.serving()
    await broker.logged("trying again every 30 s")
    broker.signal(signal.SIGTERM)
    assert await broker.ended() == 0


async def test_a_journal_that_cannot_be_used_ends_with_1_and_the_reason(root: Path, broker: Broker) -> None:
    broker.config.write_text(host_table(root) + guest_table(root, "a"))
    (root / "state").mkdir()
    (root / "state" / "journal.db").write_bytes(b"not a database" * 100)
    await broker.start()
    assert await broker.ended() == 1
    assert "journal.db: file is not a database" in broker.said
    assert "Traceback" not in broker.said


async def test_a_missing_qmp_socket_degrades_that_guest_only(root: Path, broker: Broker) -> None:
    async with serving(root / "b.qmp"):
        broker.config.write_text(host_table(root) + guest_table(root, "a") + guest_table(root, "b"))
        await broker.start()
        await broker.serving()
        async with BrokerClient(broker.run_dir) as client:
            shown: dict[str, GuestView] = {}
            end = time.monotonic() + 10
            while time.monotonic() < end and (not shown or shown["b"].vm_status is not VmStatus.RUNNING):
                shown = {one.name: one for one in await client.guests()}
                await asyncio.sleep(0.05)
            assert shown["b"].vm_status is VmStatus.RUNNING
            assert shown["b"].degraded == ""
            assert shown["a"].vm_status is VmStatus.UNREACHABLE
            assert "QMP socket does not answer" in shown["a"].degraded
            async with RawGuest(root, "b") as raw:
                await raw.hello()
                await raw.send(demand(1, 1000, 512 * MIB))
                assert (await client.guest("b")).connected
        broker.signal(signal.SIGTERM)
        assert await broker.ended() == 0


async def test_it_ends_quickly_and_cleanly_with_streams_open(root: Path, broker: Broker) -> None:
    broker.config.write_text(host_table(root) + guest_table(root, "a"))
    await broker.start()
    await broker.serving()
    async with RawGuest(root, "a") as raw, BrokerClient(broker.run_dir) as client:
        await raw.hello()
        changes = client.watch_guests()
        assert isinstance(await anext(changes), GuestView)
        began = time.monotonic()
        broker.signal(signal.SIGTERM)
        assert await broker.ended() == 0
        assert time.monotonic() - began < 3
        with pytest.raises(UnreachableError):
            while True:
                await anext(changes)
    assert "Traceback" not in broker.said
    assert "Error" not in broker.said


async def test_reload_of_a_broken_file_changes_nothing(root: Path, broker: Broker) -> None:
    good = host_table(root) + guest_table(root, "a")
    broker.config.write_text(good)
    await broker.start()
    await broker.serving()
    async with RawGuest(root, "a") as raw, BrokerClient(broker.run_dir) as client:
        await raw.hello()
        before = (await client.guest("a")).limits
        for broken, said in (
            (good.replace("max = 4", "max = 0"), "min 1 CPU is above max 0 CPU"),
            (host_table(root) + "[guests.b]\nnonsense = 1\n", "guests.b"),
            ("[[", "is not TOML"),
        ):
            broker.config.write_text(broken)
            broker.signal(signal.SIGHUP)
            await broker.logged(said)
            assert "reload refused, nothing changed" in broker.said
            assert [one.name for one in await client.guests()] == ["a"]
            assert (await client.guest("a")).limits == before
        broker.config.write_text(good + guest_table(root, "b"))
        broker.signal(signal.SIGHUP)
        await broker.logged("reloaded: 2 guests")
        assert [one.name for one in await client.guests()] == ["a", "b"]
        assert (await client.guest("a")).connected  # its stream was never dropped
    broker.signal(signal.SIGTERM)
    assert await broker.ended() == 0


async def test_reload_says_what_takes_a_restart(root: Path, broker: Broker) -> None:
    good = host_table(root) + guest_table(root, "a")
    broker.config.write_text(good)
    await broker.start()
    await broker.serving()
    late = 'port = 4800\n[web]\nlisten = "127.0.0.1:1"\nhosts = ["x"]\n[log]\nformat = "json"\n'
    broker.config.write_text(good.replace("heartbeat_seconds = 1\n", late))
    told = "reloaded: 1 guests; not taken over, it takes a restart: broker.port, broker.heartbeat_seconds, [web], [log]"
    async with BrokerClient(broker.run_dir) as client:
        for _ in range(2):  # it is so until the restart
            broker.log.write_text("")
            broker.signal(signal.SIGHUP)
            await broker.logged(f"warning: {told}")
        assert (await client.events(EventQuery(newest=True, limit=1)))[0].text == told
    broker.signal(signal.SIGTERM)
    assert await broker.ended() == 0


async def test_a_broker_that_was_killed_comes_back_on_its_leftovers(root: Path, broker: Broker) -> None:
    broker.config.write_text(host_table(root) + guest_table(root, "a"))
    await broker.start()
    await broker.serving()
    async with RawGuest(root, "a") as raw:
        epoch = (await raw.hello()).epoch
    broker.signal(signal.SIGKILL)
    await broker.ended()
    broker.log.write_text("")
    await broker.start()
    await broker.serving()
    async with RawGuest(root, "a") as raw:
        assert (await raw.hello()).epoch == epoch + 1
    assert (broker.run_dir / "guests").stat().st_mode & 0o777 == 0o700
    broker.signal(signal.SIGTERM)
    assert await broker.ended() == 0
