"""The real `guestctl`, in a process of its own, against a real broker."""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pytest
from broker_rig import (
    USABLE,
    BrokerRig,
    RawGuest,
    demand,
    eventually,
    guest_table,
    host_table,
    short_directory,
)
from jsonschema import Draft202012Validator
from pki import CA, OTHER
from remote_rig import free_port

from guestd.broker.hypervisor.fake import FakeVm
from guestd.model.guest import Capability, Identity
from guestd.model.messages import Heartbeat, Hello
from guestd.model.resources import Kind
from guestd.model.units import MIB
from guestd.wire.serve_monitor import serve_remote_monitor
from guestd.wire.tls import TlsFiles

NASTY = "[red]x[/red]\x1b[2J\u202eevil"
SCHEMA = Draft202012Validator(json.loads((files("guestd.cli") / "schema" / "v1.json").read_text()))


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


class Guestctl:
    """Runs the program on the broker of a rig."""

    def __init__(self, rig: BrokerRig) -> None:
        self.rig = rig

    async def start(
        self, *arguments: str, before: tuple[str, ...] = (), **environment: str
    ) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(*before, sys.executable, "-m", "guestd.cli.main", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "GUESTD_RUN_DIR": str(self.rig.run_dir), **environment},
        )

    async def __call__(self, *arguments: str, before: tuple[str, ...] = (), **environment: str) -> Done:
        return await ended(await self.start(*arguments, before=before, **environment))

    async def all(self, *commands: str, **environment: str) -> list[Done]:
        """All of them at once."""
        return await asyncio.gather(*(self(*command.split(), **environment) for command in commands))


async def ended(process: asyncio.subprocess.Process) -> Done:
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode is not None
    assert b"Traceback" not in err
    return Done(process.returncode, out.decode(), err.decode())


async def line_of(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(30):
        return (await process.stdout.readline()).decode()


@pytest.fixture
async def rig() -> AsyncIterator[BrokerRig]:
    with short_directory() as root:
        async with BrokerRig(root, host_table(root) + guest_table(root, "web-1")) as rig:
            rig.guest("web-1")
            await eventually(lambda: rig.connected("web-1"), "the guest is connected")
            yield rig


@pytest.fixture
def guestctl(rig: BrokerRig) -> Guestctl:
    return Guestctl(rig)


async def test_exit_code_0_is_done_and_real_output_is_what_the_schema_says(rig: BrokerRig, guestctl: Guestctl) -> None:
    commands = (
        "status",
        "explain web-1",
        "events web-1",
        "history web-1",
        "set-limits web-1 --cpu-weight 200",
        "reclaim web-1 --dry-run",
        f"config show {rig.config_path}",
    )
    for command, done in zip(commands, await guestctl.all(*(f"{one} --output json" for one in commands)), strict=True):
        assert (done.code, done.err) == (0, ""), command
        assert [error.message for error in SCHEMA.iter_errors(json.loads(done.out))] == [], command


async def test_exit_code_1_is_failed(rig: BrokerRig, guestctl: Guestctl) -> None:
    await rig.engine.pause_guest("web-1", True)
    too_much, paused = await guestctl.all(
        "set-limits web-1 --memory-min 100GiB --memory-max 200GiB",
        "set-limits web-1 --cpu-max 2 --wait --timeout 0.5s",
    )
    assert too_much.code == paused.code == 1
    assert "8 GiB" in too_much.err
    assert "it is paused; guestctl resume web-1" in paused.err


async def test_output_that_finds_no_room_is_an_error_in_a_line(guestctl: Guestctl) -> None:
    full = await guestctl("status", before=("sh", "-c", 'exec "$@" > /dev/full', "sh"))
    assert (full.code, full.err) == (1, "guestctl: [Errno 28] No space left on device\n")


async def test_a_name_that_is_no_text_is_an_error_in_a_line(guestctl: Guestctl) -> None:
    done = await guestctl("get", "web-\udcff")
    assert done.code == 1
    assert done.err.startswith("guestctl: ")
    assert done.err.count("\n") == 1


async def test_a_past_that_cannot_be_read_is_exit_code_1_and_says_what_to_do(
    rig: BrokerRig, guestctl: Guestctl
) -> None:
    await rig.stop()
    (rig.root / "state" / "history.db").unlink()
    (rig.root / "state" / "history.db").mkdir()
    await rig.start()
    await eventually(lambda: rig.connected("web-1"), "the guest is served all the same")
    commands = ("history web-1", "history web-1 -o json", "explain web-1 --at 1m -o json")
    for done in await guestctl.all(*commands):
        assert (done.code, done.out) == (1, "")
        assert f"history {rig.root}/state/history.db: " in done.err
        assert f"make {rig.root}/state and what is in it writable" in done.err


async def test_exit_code_2_is_usage_or_configuration(guestctl: Guestctl) -> None:
    usage, refused, configuration = await guestctl.all(
        "events --since yesterday", "set-limits web-1 --cpu-min 5", "config check /nonexistent/broker.toml"
    )
    assert usage.code == refused.code == configuration.code == 2
    assert "write for example 1h (ago)" in " ".join(usage.err.split())
    assert "min 5 CPU is above max 4 CPU" in refused.err
    assert "cannot be read" in configuration.err


async def test_exit_code_3_is_denied(rig: BrokerRig, guestctl: Guestctl) -> None:
    (rig.run_dir / "admin.sock").chmod(0)
    before = ()
    if os.geteuid() == 0:  # root, but not above permissions
        before = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    done = await guestctl("pause", "web-1", before=before)
    assert (done.code, done.out) == (3, "")
    assert "admin.sock may not be opened by this user; try with sudo" in done.err
    elsewhere = await guestctl("pause", "web-1", "--host", "127.0.0.1:1")
    assert elsewhere.code == 3
    assert "only possible on the host itself" in elsewhere.err


async def test_exit_code_4_is_not_found(guestctl: Guestctl) -> None:
    for done in await guestctl.all("get nobody", "events nobody", "history nobody", "reclaim nobody"):
        assert (done.code, done.out) == (4, "")
        assert done.err == "guestctl: no guest named 'nobody'; guestctl status lists those that there are\n"


async def test_exit_code_5_is_unreachable(guestctl: Guestctl, tmp_path: Path) -> None:
    with short_directory() as root:
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(root / "monitor.sock"))
        for done in await guestctl.all(f"status --run-dir {tmp_path}", f"get web-1 --run-dir {root}"):
            assert (done.code, done.out) == (5, "")
            assert "systemctl status guestd-broker" in done.err


@pytest.mark.parametrize("arguments", [("events", "--follow"), ("status", "--watch", "-o", "json")])
async def test_a_stream_that_is_cut_in_the_middle_is_said(
    rig: BrokerRig, guestctl: Guestctl, arguments: tuple[str, ...]
) -> None:
    process = await guestctl.start(*arguments)
    assert await line_of(process)
    await rig.stop()
    done = await ended(process)
    assert done.code == 5
    assert "no more " in done.err
    assert "systemctl status guestd-broker" in done.err
    await rig.start()


async def test_ctrl_c_ends_it_without_a_word(guestctl: Guestctl) -> None:
    # Who runs the tests in the background may ignore the signal, and so would what they start.
    process = await guestctl.start("status", "--watch", "-o", "json", before=("env", "--default-signal=INT"))
    assert await line_of(process)
    process.send_signal(signal.SIGINT)
    done = await ended(process)
    assert (done.code, done.err) == (130, "")


async def test_a_reader_that_has_read_enough_ends_it_without_a_word(rig: BrokerRig, guestctl: Guestctl) -> None:
    process = await guestctl.start("events", "--follow", "-o", "json")
    assert json.loads(await line_of(process))["schema"] == "guestd/v1/event"
    transport = process._transport.get_pipe_transport(1)  # type: ignore[attr-defined]
    transport.close()
    for _ in range(2):
        await rig.engine.pause_guest("web-1", True)
        await rig.engine.pause_guest("web-1", False)
    async with asyncio.timeout(30):
        assert process.stderr is not None
        assert await process.stderr.read() == b""
        assert await process.wait() == 0


LONGEST = "a-guest-" * 8


@pytest.mark.parametrize("name", ["web-1", LONGEST])
async def test_40_columns_are_enough(rig: BrokerRig, guestctl: Guestctl, name: str) -> None:
    if name != "web-1":
        await rig.reload(host_table(rig.root) + guest_table(rig.root, name))
        rig.guest(name)
        await eventually(lambda: rig.connected(name), "the guest is connected")
    commands = (
        "status",
        "events",
        f"explain {name}",
        f"explain {name} --at 1s",
        f"get {name}",
        f"set-limits {name} --cpu-weight 200",
        f"reclaim {name} --dry-run",
        f"config show --origin {rig.config_path}",
    )
    for command, done in zip(commands, await guestctl.all(*commands, COLUMNS="40"), strict=True):
        assert done.code == 0 or "--at" in command, done.err  # a second ago there may have been nothing to decide
        assert max(map(len, done.out.splitlines())) <= 40, command
        assert "\x1b" not in done.out


async def test_what_a_guest_says_of_itself_is_escaped(rig: BrokerRig, guestctl: Guestctl) -> None:
    await rig.reload(host_table(rig.root) + guest_table(rig.root, "evil"))
    async with RawGuest(rig.root, "evil") as guest:
        identity = Identity(b"b" * 16, 1, NASTY, NASTY, NASTY, frozenset({Capability.CPU_ONLINE}))
        await guest.send(Hello(1, 1, identity, USABLE))
        await eventually(lambda: rig.connected("evil"), "the guest is connected")
        shown, printed = await guestctl.all("get evil", "get evil -o json")
    assert shown.code == printed.code == 0
    assert shown.out.count("[red]x[/red]") == 3
    assert all(one.isprintable() for one in shown.out.replace("\n", ""))
    assert printed.out.rstrip("\n").isprintable()
    assert "[red]x[/red]" in json.loads(printed.out)["guest"]["hostname"]


async def test_wait_returns_when_the_vm_has_what_was_wanted(rig: BrokerRig, guestctl: Guestctl) -> None:
    guest = rig.guests["web-1"]
    more = await guestctl("set-limits", "web-1", "--cpu-min", "3", "--wait", "--timeout", "30s")
    assert (more.code, more.err) == (0, "")
    assert len(guest.vm.guest_cpus) >= 3
    less = await guestctl("set-limits", "web-1", "--cpu-min", "1", "--cpu-max", "1", "--wait", "--timeout", "30s")
    assert (less.code, less.err) == (0, "")
    assert len(guest.vm.guest_cpus) == 1


async def beat(guest: RawGuest) -> None:
    while True:
        await guest.send(Heartbeat())
        await asyncio.sleep(0.5)


async def test_what_the_broker_does_not_care_to_take_is_not_waited_for(rig: BrokerRig, guestctl: Guestctl) -> None:
    roomy = rig.vms["roomy"] = FakeVm()
    await roomy.request_memory(1536 * MIB)
    await rig.reload(host_table(rig.root) + guest_table(rig.root, "roomy"))
    async with RawGuest(rig.root, "roomy") as guest:
        await guest.hello()
        await guest.send(demand(1, 1000, 1280 * MIB))
        memory = rig.engine.machine.guests["roomy"].tracks[Kind.MEMORY]
        await eventually(lambda: memory.target == 1280 * MIB, "it is to have less")
        beating = asyncio.create_task(beat(guest))
        waited, why = await guestctl.all(
            "set-limits roomy --cpu-weight 200 --wait --timeout 10s", "explain roomy --output json"
        )
        beating.cancel()
    assert (waited.code, waited.err) == (0, "")
    assert (memory.reserved, memory.target) == (1536 * MIB, 1280 * MIB)
    _, found = json.loads(why.out)["resources"]
    assert found["reason"]["code"] == "slight"
    assert "less than a quarter is not taken while there is plenty" in found["summary"]


async def test_a_broker_elsewhere_is_watched_by_mutual_tls(rig: BrokerRig, guestctl: Guestctl) -> None:
    address = f"127.0.0.1:{free_port()}"
    (rig.root / "tls").mkdir()
    server = await serve_remote_monitor(rig.engine, address, CA.issue("broker").write(rig.root / "tls", CA))
    try:
        stranger = OTHER.issue("client").write(rig.root, CA)
        good = CA.issue("client").write(rig.root, CA, "good")
        known, unknown = await guestctl.all(*(f"status --host {address} {options(one)}" for one in (good, stranger)))
        assert (known.code, known.err) == (0, "")
        assert "web-1" in known.out
        assert (unknown.code, unknown.out) == (3, "")
    finally:
        await server.stop(None)
    (gone,) = await guestctl.all(f"status --host {address} {options(good)}")
    assert gone.code == 5
    assert "[monitor]" in gone.err


def options(tls: TlsFiles) -> str:
    return f"--cert {tls.certificate} --key {tls.key} --ca {tls.ca}"
