"""The hypervisor in another process: here its two ends in one, over a real socket."""

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from guestd.model.errors import HypervisorError, HypervisorGone, HypervisorUnreachable, OutcomeUnknown
from guestd.model.units import GIB, MIB
from guestd.model.vm import VmState, VmStatus
from guestd.sim.remote import Hypervisor, HypervisorLink, RemoteVm, VmSpec, encode_specs


class Rig:
    """A server, which can be stopped and started on the same VMs, and one client."""

    def __init__(self, root: Path, *specs: VmSpec) -> None:
        self.path = root / "hv.sock"
        self.hypervisor = Hypervisor(list(specs))
        self.link = HypervisorLink(self.path)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self.hypervisor.run(self.path))
        await until(self.path.exists)
        await self.link.start()

    async def stop(self) -> None:
        await self.link.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def vm(self, name: str) -> RemoteVm:
        return RemoteVm(self.link, name)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="gd", dir="/tmp") as root:
        one = Rig(Path(root), VmSpec("a"), VmSpec("slow", plug_rate=GIB, command_seconds=0.05))
        await one.start()
        yield one
        await one.stop()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():  # noqa: ASYNC110 - whatever a test waits for
            await asyncio.sleep(0.005)


async def test_requests_change_the_vm_and_only_observe_tells(rig: Rig) -> None:
    vm = rig.vm("a")
    await vm.request_vcpus(3)
    await vm.request_memory(GIB)
    state = await vm.observe()
    assert (state.status, state.vcpus, state.memory_plugged_bytes) == (VmStatus.RUNNING, 3, GIB)
    assert await rig.link.truth() == {"a": state, "slow": await rig.vm("slow").observe()}


async def test_memory_moves_in_real_time(rig: Rig) -> None:
    vm, told = rig.vm("slow"), asyncio.Event()
    await vm.open(told.set)
    await vm.request_memory(GIB)
    began = (await vm.observe()).memory_plugged_bytes
    told.clear()
    async with asyncio.timeout(5):
        await told.wait()
        while (await vm.observe()).memory_plugged_bytes < GIB:
            told.clear()
            await told.wait()
    assert began < GIB, "it was there at once"


async def test_each_change_is_told_to_all_who_watch(rig: Rig) -> None:
    other = HypervisorLink(rig.path)
    await other.start()
    heard: list[str] = []
    for link in (rig.link, other):
        for name in ("a", "slow"):
            link.watch(name, lambda name=name: heard.append(name))  # type: ignore[misc]
    await other.truth()  # both are connected and watch
    heard.clear()
    await rig.vm("a").request_vcpus(2)
    await until(lambda: len(heard) == 2)
    assert heard == ["a", "a"]
    other.unwatch("a")
    await rig.vm("a").request_vcpus(3)
    await until(lambda: len(heard) == 3)
    await other.close()


async def test_errors_come_back_as_themselves(rig: Rig) -> None:
    with pytest.raises(HypervisorError, match="9 vCPUs asked for, 4 slots"):
        await rig.vm("a").request_vcpus(9)
    with pytest.raises(HypervisorError, match="no VM named 'nobody'"):
        await rig.vm("nobody").observe()
    await rig.link.call("a", "kill", 0, type(None))
    with pytest.raises(HypervisorGone):
        await rig.vm("a").request_vcpus(2)
    assert await rig.vm("a").observe() == VmState(VmStatus.GONE)


async def test_the_log_holds_every_request_in_order(rig: Rig) -> None:
    await rig.vm("slow").request_memory(GIB)
    await rig.vm("a").request_vcpus(2)
    await rig.vm("a").settle_memory()
    log = await rig.link.log()
    assert [(one.vm, one.method, one.amount) for one in log] == [
        ("slow", "request_memory", GIB),
        ("a", "request_vcpus", 2),
        ("a", "settle_memory", 0),
    ]


async def test_the_least_is_noted_however_short_it_lasts(rig: Rig) -> None:
    vm = rig.vm("a")
    await vm.request_memory(2 * GIB)
    await rig.link.lows_from_now()
    assert (await rig.link.lows())["a"] == (1, 2 * GIB)
    await vm.request_memory(GIB)
    await vm.request_memory(2 * GIB)
    assert (await rig.link.lows())["a"] == (1, GIB)


async def test_a_guest_keeps_what_it_needs(rig: Rig) -> None:
    await rig.vm("a").request_memory(2 * GIB)
    await rig.link.call("a", "guest_keeps", GIB, type(None))
    await rig.vm("a").request_memory(512 * MIB)
    state = await rig.vm("a").observe()
    assert state.memory_plugged_bytes == GIB


async def test_without_a_server_a_vm_is_unreachable_and_later_it_is_not() -> None:
    with tempfile.TemporaryDirectory(prefix="gd", dir="/tmp") as root:
        rig = Rig(Path(root), VmSpec("a"))
        told = asyncio.Event()
        await rig.vm("a").open(told.set)
        assert (await rig.vm("a").observe()).status is VmStatus.UNREACHABLE
        with pytest.raises(HypervisorUnreachable):
            await rig.vm("a").request_vcpus(2)
        told.clear()
        await rig.start()
        async with asyncio.timeout(5):
            await told.wait()
        assert (await rig.vm("a").observe()).status is VmStatus.RUNNING
        await rig.stop()


async def test_what_a_broken_connection_left_open_is_unknown() -> None:
    with tempfile.TemporaryDirectory(prefix="gd", dir="/tmp") as root:
        asked = asyncio.Event()

        async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.IncompleteReadError):
                await reader.readexactly(1)
                await asked.wait()
            writer.close()

        server = await asyncio.start_unix_server(hang_up, Path(root) / "hv.sock")
        link = HypervisorLink(Path(root) / "hv.sock")
        await link.start()
        request = asyncio.create_task(RemoteVm(link, "a").request_vcpus(2))
        await asyncio.sleep(0)
        asked.set()
        with pytest.raises(OutcomeUnknown):
            await request
        await link.close()
        server.close()


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps([{"name": "a", "vcpu": 2}]))
    command = [sys.executable, "-m", "guestd.sim.remote", str(tmp_path / "hv.sock"), "--spec", str(spec)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert str(spec) in done.stderr
    assert "vcpu" in done.stderr


def test_specs_are_read_as_they_were_written(tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_bytes(encode_specs([VmSpec("a", plug_rate=GIB), VmSpec("b")]))
    assert [one["name"] for one in json.loads((tmp_path / "spec.json").read_text())] == ["a", "b"]
