"""`guestd run --dry-run` as a process of its own, against a broker's unix socket: it decides, and touches nothing."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from broker_rig import BrokerRig, eventually, guest_table, host_table, short_directory

from guestd.model.guest import Capability
from guestd.model.resources import Resources
from guestd.model.units import MIB


@pytest.fixture
def root() -> Iterator[Path]:
    with short_directory() as path:
        yield path


class Process:
    """A running `guestd run --dry-run`."""

    def __init__(self, root: Path) -> None:
        self._root, self.config, self.log = root, root / "guestd.toml", root / "guestd.log"
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        command = [sys.executable, "-m", "guestd.guest.main", "run", "--dry-run", "--config", str(self.config)]
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *command,
                stdout=log,
                stderr=log,
                env={"XDG_RUNTIME_DIR": str(self._root), "PYTHONPATH": ":".join(sys.path)},
            )

    async def ended(self) -> int:
        assert self.process is not None
        async with asyncio.timeout(15):
            return await self.process.wait()

    @property
    def said(self) -> str:
        return self.log.read_text()


@pytest.fixture
async def guestd(root: Path) -> AsyncIterator[Process]:
    one = Process(root)
    yield one
    if one.process is not None and one.process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            one.process.kill()
        await one.process.wait()


def _machine() -> dict[str, str]:
    """All that a daemon could have changed here."""
    places = [
        *Path("/sys/devices/system/cpu").glob("cpu*/online"),
        *Path("/sys/devices/system/memory").glob("memory*/state"),
    ]
    return {str(path): path.read_text() for path in places}


async def test_a_dry_run_reports_its_need_and_touches_nothing(root: Path, guestd: Process) -> None:
    before = _machine()
    config = host_table(root) + guest_table(root, "a")
    async with BrokerRig(root, config) as rig:
        guestd.config.write_text(f'broker_socket = "{root}/a_4747"\nlog_verbose = true\n')
        await guestd.start()
        await eventually(lambda: rig.connected("a"), "connected")
        state = rig.engine.machine.guests["a"]
        await eventually(lambda: state.demand is not None, "said what it needs")
        assert state.demand is not None
        assert state.demand.needed.memory_bytes > 0
        assert state.demand.usable.vcpus_online >= 1
        assert state.identity is not None
        assert Capability.DRY_RUN in state.identity.capabilities
        await asyncio.sleep(1.0)
        assert rig.vms["a"].requests == []
        assert rig.reserved("a") == Resources(1000, 512 * MIB)
        session = state.session
        await rig.stop()
        await rig.start()
        await eventually(lambda: rig.connected("a"), "it comes back by itself to a broker that was restarted")
        assert session
        assert guestd.process is not None
        guestd.process.send_signal(signal.SIGTERM)
        assert await guestd.ended() == 0
        await eventually(lambda: not rig.connected("a"), "gone")
    assert "Traceback" not in guestd.said
    assert _machine() == before


async def test_without_a_broker_it_waits(root: Path, guestd: Process) -> None:
    guestd.config.write_text(f'broker_socket = "{root}/nobody"\n')
    await guestd.start()
    await eventually(lambda: "no broker" in guestd.said, "says so")
    assert "everything stays as it is" in guestd.said
    assert guestd.process is not None
    assert guestd.process.returncode is None
    guestd.process.send_signal(signal.SIGTERM)
    assert await guestd.ended() == 0
    assert "Traceback" not in guestd.said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("port = 0", "guestd.toml: port = 0: must be within 1..4294967294"),
        ('port = "vsock"', "guestd.toml: port = 'vsock': expected `int`, got `str`"),
        ("prot = 4747", "guestd.toml: the file: has no key 'prot'"),
        ("port =", "guestd.toml: is not TOML"),
    ],
)
async def test_a_bad_configuration_ends_with_2(guestd: Process, text: str, said: str) -> None:
    guestd.config.write_text(text)
    await guestd.start()
    assert await guestd.ended() == 2
    assert said in guestd.said
    assert "Traceback" not in guestd.said


async def test_a_file_that_was_named_must_be_there(guestd: Process) -> None:
    await guestd.start()
    assert await guestd.ended() == 2
    assert "guestd.toml: cannot be read" in guestd.said
