"""One VM, one broker, one boot for all: each test begins and ends with the VM at its minimum."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator

import loads
import pytest
import pytest_asyncio
from host import Host, GuestSpec, Look, audit, converges, rests

from guestd.lab.image import GuestImage
from guestd.lab.qemu import MIB
from guestd.model.resources import Kind
from guestd.model.view import LimitsOrigin, ResizePhase
from guestd.model.vm import VmStatus

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

VM = "one"
SERVICE_PIDS = "systemctl show -P MainPID guestd; pgrep -P $(systemctl show -P MainPID guestd) -u guestd"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(guest_image: GuestImage) -> AsyncIterator[Host]:
    async with Host(guest_image, {VM: GuestSpec()}) as host:
        print(f"booted in {host.machines[VM].boot_seconds:.1f} s")
        yield host


@pytest_asyncio.fixture(loop_scope="module")
async def host(shared: Host) -> AsyncIterator[Host]:
    """The host at rest."""
    waited = await rests(shared, 60)
    print(f"at rest after {waited:.1f} s")
    kills = await shared.machines[VM].oom_kills()
    yield shared
    assert await shared.machines[VM].oom_kills() in (kills, 0)  # 0 after a reset


async def service_pids(host: Host) -> tuple[int, int]:
    """The root helper, which is the unit's main process, and the daemon, its child without root."""
    helper, daemon = (await host.shell(VM, SERVICE_PIDS)).split()
    return int(helper), int(daemon)


def resizing(kind: Kind, phase: ResizePhase) -> object:
    return lambda look: look.views[VM].resource(kind).phase is phase


# ---- 1 -------------------------------------------------------------------------------------------


async def test_cpus_follow_four_busy_processes(host: Host) -> None:
    begun = time.monotonic()
    async with host.busy(VM, 4):
        await host.until("a second vCPU is reserved", lambda look: look.cpus(VM) >= 2)
        first = time.monotonic() - begun
        await converges(host, "4 CPUs online", lambda look: look.cpus(VM) == 4)
        peak = time.monotonic() - begun
        look = await host.look(inside=True)
        assert look.held[VM].vcpus == 4
        assert look.facts[VM].cpus_online == {0, 1, 2, 3}
    back = await rests(host)
    look = await host.look(inside=True)
    assert look.held[VM].vcpus == 1
    assert look.facts[VM].cpus_online == {0}
    print(f"CPUs: second after {first:.1f} s, all four online after {peak:.1f} s, back to one after {back:.1f} s")


# ---- 2 -------------------------------------------------------------------------------------------


async def test_memory_arrives_ahead_of_a_growing_process(host: Host) -> None:
    before = await host.look()
    grow = await host.python(VM, loads.GROW, 1536, 100, 2, "/run/vm-test/grown")
    begun = time.monotonic()
    async with host.load(VM, grow):
        await host.until("memory is plugged", lambda look: look.held[VM].plugged_bytes > 512 * MIB)
        first = time.monotonic() - begun
        await host.machines[VM].console.wait_path("/run/vm-test/grown", 60)
        peak = await host.look()
    result = json.loads(await host.shell(VM, "cat /run/vm-test/grown; rm /run/vm-test/grown"))
    back = await rests(host)
    after = await host.look()
    print(f"memory: first plugged after {first:.1f} s, released after {back:.1f} s, {result}")
    assert result["mib"] >= 1530
    assert peak.held[VM].plugged_bytes >= (1536 + 64) * MIB
    assert result["least_available_mib"] >= 16
    assert await host.machines[VM].oom_kills() == 0
    assert after.held[VM].held_bytes == before.held[VM].held_bytes == 512 * MIB
    assert after.host.free == before.host.free


# ---- 5 -------------------------------------------------------------------------------------------


async def test_broker_killed_while_growing_and_while_shrinking(host: Host) -> None:
    epoch = (await host.look()).host.epoch
    grow = await host.python(VM, loads.GROW, 768, 100, 1000, "/dev/null")
    async with host.busy(VM, 4), host.load(VM, grow):
        await host.until("the broker grows the VM", resizing(Kind.CPU, ResizePhase.PLUGGING))
        await host.restart_broker()
        await host.until("memory grows", resizing(Kind.MEMORY, ResizePhase.PLUGGING))
        await host.restart_broker()
        up = await converges(
            host, "grown in spite of it", lambda look: look.cpus(VM) == 4 and look.memory(VM) >= 1024 * MIB
        )
    await host.until("memory is unplugged", resizing(Kind.MEMORY, ResizePhase.UNPLUGGING))
    await host.restart_broker()
    await host.until("a CPU is unplugged", resizing(Kind.CPU, ResizePhase.UNPLUGGING))
    await host.restart_broker()
    down = await rests(host)
    assert (await host.look()).host.epoch == epoch + 4
    print(f"broker killed 4 times: grown {up:.1f} s, shrunk {down:.1f} s after the last restart")


async def test_daemon_and_helper_killed_in_the_middle(host: Host) -> None:
    helper, daemon = await service_pids(host)
    # The helper goes at the very moment at which it is to bring a new CPU online, the daemon a CPU later.
    watch = "while [ ! -e /sys/devices/system/cpu/cpu{cpu} ]; do :; done; kill -9 {pid}"
    async with host.busy(VM, 3), host.load(VM, watch.format(cpu=1, pid=helper)):
        up = await converges(host, "3 CPUs in spite of a killed helper", lambda look: look.cpus(VM) >= 3)
        helper2, daemon2 = await service_pids(host)
        assert (helper2, daemon2) != (helper, daemon)
        async with host.busy(VM, 1), host.load(VM, watch.format(cpu=3, pid=daemon2)):
            again = await converges(host, "4 CPUs in spite of a killed daemon", lambda look: look.cpus(VM) == 4)
        helper3, _ = await service_pids(host)
        assert helper3 != helper2
    await host.until("the guest is asked for CPUs", resizing(Kind.CPU, ResizePhase.ASKING))
    await host.shell(VM, f"kill -9 {helper3}")
    down = await rests(host)
    helper4, _ = await service_pids(host)
    assert helper4 != helper3
    print(f"helper and daemon killed: 3 CPUs after {up:.1f} s, 4 after {again:.1f} s, back after {down:.1f} s")


async def test_guest_reset_while_it_is_big(host: Host) -> None:
    grow = await host.python(VM, loads.GROW, 512, 100, 1000, "/dev/null")
    async with host.busy(VM, 4), host.load(VM, grow):
        await converges(host, "big", lambda look: look.cpus(VM) == 4 and look.memory(VM) >= 768 * MIB)
        begun = time.monotonic()
        await host.machines[VM].reset()
    booted = await host.machines[VM].wait_booted()
    back = await rests(host)
    print(f"reset: booted in {booted:.1f} s, at its minimum {time.monotonic() - begun:.1f} s after ({back:.1f} s)")


async def test_qemu_killed_and_started_anew(host: Host) -> None:
    async with host.busy(VM, 4):
        await converges(host, "4 CPUs", lambda look: look.cpus(VM) == 4)
        await host.machines[VM].kill()
    begun = time.monotonic()

    def freed(look: Look) -> bool:
        view = look.views[VM]
        return (
            view.vm_status is VmStatus.GONE
            and not view.connected
            and not any(view.resource(kind).reserved for kind in Kind)
        )

    gone = await converges(host, "the broker knows that the VM is gone", freed)
    assert not any((await host.look()).host.committed.get(kind) for kind in Kind)
    await host.start_vm(VM)
    booted = await host.machines[VM].wait_booted()
    await rests(host)
    assert await audit(host) == []
    print(f"QEMU killed: freed after {gone:.1f} s, booted in {booted:.1f} s, {time.monotonic() - begun:.1f} s in all")
