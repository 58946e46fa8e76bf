"""The QEMU driver and its VM's CPU group, on a scripted QMP server and a kernel in memory."""

import asyncio
import errno
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fake_cgroups import FakeCgroups
from scripted_qmp import ScriptedQmp, cpu, serving

from guestd.broker.cgroup.cpu_group import CpuGroup
from guestd.broker.hypervisor import qemu
from guestd.broker.hypervisor.qemu import QemuVm
from guestd.broker.hypervisor.qmp_link import LinkTiming
from guestd.model.errors import HypervisorError
from guestd.model.vm import VmState, VmStatus

QUICK = LinkTiming(answer_seconds=0.5, retry_min_seconds=0.01, retry_max_seconds=0.05)
BOOT_PATH = "/machine/unattached/device[0]"


class Rig:
    """A server, a kernel, and the driver between them. The server is this process: it is the peer that is seen."""

    def __init__(self, server: ScriptedQmp, version: int) -> None:
        self.server, self.kernel = server, FakeCgroups(version, pid=os.getpid())
        self.path = self.kernel.parent / "guestd-one"
        self.changes = 0
        self.driver = self.another()
        self.have_threads(101)

    def another(self) -> QemuVm:
        return QemuVm(self.server.path, QUICK, cpu_group=lambda pid: CpuGroup("one", pid, self.kernel))

    async def open(self) -> None:
        await self.driver.open(self.changed)
        await asyncio.sleep(0.02)

    def changed(self) -> None:
        self.changes += 1

    def have_threads(self, *threads: int) -> None:
        for thread in threads:
            self.kernel.spawn(thread)
        self.server.answers["query-cpus-fast"] = [{"thread-id": thread} for thread in threads]

    async def observe(self) -> VmState:
        return await self.driver.observe()

    async def reconnect(self) -> None:
        self.server.cut()
        for _ in range(100):
            await asyncio.sleep(0.02)
            if (await self.observe()).status is VmStatus.RUNNING:
                return
        raise AssertionError("did not connect again")


@pytest.fixture(params=[1, 2])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    async with serving(tmp_path / "qmp") as server:
        rig = Rig(server, request.param)
        await rig.open()
        yield rig
        await rig.driver.close()


async def test_a_vm_is_enforced_from_the_first_look_on(rig: Rig) -> None:
    state = await rig.observe()
    assert (state.cpu_enforced, state.cpu_quota_millicores, state.cpu_throttled_permille) == (True, 0, 0)
    assert rig.kernel.members(rig.path) == {101}


async def test_a_quota_is_set_at_once_and_told(rig: Rig) -> None:
    await rig.driver.request_cpu_quota(250)  # even before any look
    assert rig.kernel.members(rig.path) == {101}
    state = await rig.observe()
    assert (state.cpu_enforced, state.cpu_quota_millicores) == (True, 250)


async def test_a_hot_added_vcpu_is_bound_before_anybody_looks(rig: Rig) -> None:
    await rig.driver.request_cpu_quota(250)
    rig.have_threads(101, 103)
    rig.server.answers["query-hotpluggable-cpus"] = [cpu(1), cpu(0, BOOT_PATH)]
    await rig.driver.request_vcpus(2)
    assert [name for name, _ in rig.server.changes()] == ["device_add"]
    assert rig.kernel.members(rig.path) == {101, 103}


async def test_a_vcpu_that_somebody_else_added_is_bound_at_the_next_look(rig: Rig) -> None:
    await rig.observe()
    rig.have_threads(101, 103)
    await rig.observe()
    assert rig.kernel.members(rig.path) == {101, 103}
    rig.kernel.end(103)
    rig.have_threads(101)
    await rig.observe()
    assert rig.kernel.members(rig.path) == {101}


async def test_a_group_that_vanished_loses_nothing(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    await rig.driver.request_cpu_quota(250)
    rig.kernel.vanish(rig.path)
    state = await rig.observe()
    assert (state.cpu_enforced, state.cpu_quota_millicores) == (True, 250)
    assert rig.kernel.members(rig.path) == {101}
    assert f"one: {rig.path} was gone" in caplog.text


async def test_a_host_that_cannot_says_so_once_and_is_tried_again_on_reconnect(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="guestd.broker.hypervisor.cpu_bound")
    rig.kernel.refusals["mkdir"] = errno.EROFS
    for _ in range(3):
        state = await rig.observe()
        assert (state.status, state.cpu_enforced, state.cpu_quota_millicores) == (VmStatus.RUNNING, False, 0)
    with pytest.raises(HypervisorError, match=f"CPU time cannot be bound: {rig.path}: cannot be made: .*read-only"):
        await rig.driver.request_cpu_quota(250)
    await rig.reconnect()
    assert caplog.text.count("CPU time is not bound by the host") == 1
    assert f"{rig.path}: cannot be made: it is mounted read-only: mount it writable" in caplog.text
    rig.kernel.refusals.clear()
    assert not (await rig.observe()).cpu_enforced
    await rig.reconnect()
    assert (await rig.observe()).cpu_enforced


async def test_a_host_that_no_longer_can_is_not_enforced_any_more(rig: Rig) -> None:
    await rig.driver.request_cpu_quota(250)
    rig.kernel.vanish(rig.path)
    rig.kernel.refusals["mkdir"] = errno.EACCES
    state = await rig.observe()
    assert (state.status, state.cpu_enforced, state.cpu_quota_millicores) == (VmStatus.RUNNING, False, 0)


async def test_a_quota_that_the_kernel_refuses_leaves_the_old_one(rig: Rig) -> None:
    await rig.driver.request_cpu_quota(250)
    rig.kernel.refusals["cpu.cfs_quota_us" if rig.kernel.version == 1 else "cpu.max"] = errno.EINVAL
    with pytest.raises(HypervisorError, match="a group above has a smaller quota"):
        await rig.driver.request_cpu_quota(4000)
    state = await rig.observe()
    assert (state.cpu_enforced, state.cpu_quota_millicores) == (True, 250)


async def test_threads_of_another_pid_namespace_are_not_enforced(rig: Rig) -> None:
    rig.server.answers["query-cpus-fast"] = [{"thread-id": 7}]
    assert not (await rig.observe()).cpu_enforced
    with pytest.raises(HypervisorError, match="in the broker's pid namespace"):
        await rig.driver.request_cpu_quota(250)


async def test_another_broker_reads_the_quota_back(rig: Rig) -> None:
    await rig.driver.request_cpu_quota(750)
    await rig.driver.close()
    assert rig.kernel.exists(rig.path)
    rig.driver = rig.another()
    await rig.open()
    state = await rig.observe()
    assert (state.cpu_enforced, state.cpu_quota_millicores) == (True, 750)


async def test_throttling_is_told_without_any_event(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "_GLANCE_SECONDS", 0.02)
    await rig.driver.request_cpu_quota(250)
    await rig.observe()
    await asyncio.sleep(0.1)
    assert rig.changes == 1  # the connection
    rig.kernel.count(rig.path, 10, 8)
    await asyncio.sleep(0.2)
    assert rig.changes == 2
    assert (await rig.observe()).cpu_throttled_permille == 800


async def test_with_bandwidth_off_nothing_is_asked_or_touched(rig: Rig) -> None:
    await rig.driver.close()
    rig.server.commands.clear()
    rig.driver = QemuVm(rig.server.path, QUICK)
    await rig.open()
    assert not (await rig.observe()).cpu_enforced
    with pytest.raises(HypervisorError, match="cannot be bound: switched off for this host"):
        await rig.driver.request_cpu_quota(250)
    assert not rig.kernel.exists(rig.path)


async def test_of_a_vm_that_is_only_observed_nothing_is_made_or_moved(rig: Rig) -> None:
    await rig.driver.close()
    rig.driver = rig.another()
    rig.driver.only_observe(True)
    rig.server.commands.clear()
    await rig.open()
    assert not (await rig.observe()).cpu_enforced
    assert not rig.kernel.exists(rig.path)
    assert rig.kernel.writes == []
    assert rig.server.changes() == []
    rig.driver.only_observe(False)
    assert (await rig.observe()).cpu_enforced


async def test_a_quota_that_is_there_already_counts_and_outlives_an_observed_vm(rig: Rig) -> None:
    await rig.driver.request_cpu_quota(750)
    await rig.driver.close()
    rig.driver = rig.another()
    rig.driver.only_observe(True)
    rig.have_threads(101, 103)
    written = len(rig.kernel.writes)
    await rig.open()
    state = await rig.observe()
    assert (state.cpu_enforced, state.cpu_quota_millicores) == (True, 750)
    assert rig.kernel.members(rig.path) == {101}, "a thread that came is left outside"
    await rig.server.stop()
    rig.server.path.unlink(missing_ok=True)
    for _ in range(100):
        await asyncio.sleep(0.02)
        if (await rig.observe()).status is not VmStatus.RUNNING:
            break
    assert rig.kernel.exists(rig.path)
    assert len(rig.kernel.writes) == written


async def test_a_vm_that_is_only_observed_from_now_on_keeps_its_bound(rig: Rig) -> None:
    await rig.driver.request_cpu_quota(250)
    rig.driver.only_observe(True)
    rig.have_threads(101, 103)
    written = len(rig.kernel.writes)
    state = await rig.observe()
    assert (state.cpu_enforced, state.cpu_quota_millicores) == (True, 250)
    assert len(rig.kernel.writes) == written
    rig.driver.only_observe(False)
    await rig.observe()
    assert rig.kernel.members(rig.path) == {101, 103}
