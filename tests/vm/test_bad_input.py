"""Bad input, in real VMs: time that jumps, and a broker (of the test's own making) that asks for what cannot be."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from broker_rig import short_directory
from host import BLOCK_BYTES, PORT, GuestSpec, Host, Look, converges, rests
from scripted_broker import ScriptedBroker

from guestd.broker.hypervisor.qemu import QemuVm
from guestd.lab.image import GuestImage
from guestd.lab.machine import Machine
from guestd.lab.qemu import GIB, MIB, MachineConfig
from guestd.model.messages import AckStatus, RefusalReason
from guestd.model.resources import Kind
from guestd.model.vm import VmStatus

pytestmark = [pytest.mark.vm, pytest.mark.timeout(480), pytest.mark.asyncio(loop_scope="module")]

VM = "timely"
ALONE = "alone"
BOOT = 512 * MIB
SERVICE = "systemctl show -P NRestarts -P ActiveState guestd"
JOURNAL = "journalctl --sync; journalctl -u guestd -b -q -o cat --no-pager"
DAY = 86_400


# ---- time ----------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host(guest_image: GuestImage) -> AsyncIterator[Host]:
    async with Host(guest_image, {VM: GuestSpec()}) as host:
        await rests(host, 60)
        yield host


def resizes(look: Look) -> list[int]:
    """How often what came of resizes, of both kinds."""
    views = look.views[VM].resources
    return [count for one in views for count in (one.grows, one.shrinks, one.partials, one.refusals, one.failures)]


async def obeys(host: Host) -> float:
    """Seconds until a load has its CPU; then all is at rest again."""
    async with host.busy(VM, 2):
        up = await converges(host, "a second CPU", lambda look: look.cpus(VM) >= 2)
    await rests(host, 60)
    return up


async def test_a_vm_that_stood_still(host: Host) -> None:
    before = await host.look()
    await host.machines[VM].pause()
    await asyncio.sleep(10.0)
    stopped = await host.look()
    assert stopped.views[VM].vm_status is VmStatus.FROZEN
    assert resizes(stopped) == resizes(before)
    await host.machines[VM].resume()
    await host.until("it runs and is served", lambda look: look.views[VM].connected)
    await asyncio.sleep(5.0)
    after = await host.look()
    assert resizes(after) == resizes(before)
    up = await obeys(host)
    # With work to do when it is stopped, and stopped for longer than an order's deadline.
    async with host.busy(VM, 4):
        await host.until("it is growing", lambda look: look.cpus(VM) >= 2)
        await host.machines[VM].pause()
        await asyncio.sleep(12.0)
        await host.machines[VM].resume()
        again = await converges(host, "all four", lambda look: look.cpus(VM) == 4)
    await rests(host, 60)
    assert (await host.shell(VM, SERVICE)).split() == ["0", "active"]
    print(f"stopped for 10 s: no resize, then a CPU after {up:.1f} s; stopped in a grow: four CPUs {again:.1f} s later")


async def test_the_clock_of_the_guest_jumps(host: Host) -> None:
    before = await host.look()
    for jump in (f"+{DAY}", f"-{2 * DAY}", f"+{DAY}"):
        await host.shell(VM, f"date -s @$(( $(date +%s) {jump[0]} {jump[1:]} ))")
        await asyncio.sleep(4.0)
        look = await host.look()
        assert look.views[VM].connected
        assert resizes(look) == resizes(before)
        up = await obeys(host)
        before = await host.look()
        print(f"clock {jump} s: no resize, then a CPU after {up:.1f} s")
    assert (await host.shell(VM, SERVICE)).split() == ["0", "active"]


# ---- orders --------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alone(guest_image: GuestImage) -> AsyncIterator[tuple[Machine, ScriptedBroker]]:
    """A VM with two vCPUs whose guestd is served by the test."""
    config = MachineConfig(name=ALONE, cpus=2, max_memory_bytes=BOOT + 2 * GIB, require_privileged_port=True)
    with short_directory() as directory:
        async with (
            Machine(guest_image, config) as machine,
            ScriptedBroker(directory, Path(f"{machine.uds_base}_{PORT}")) as broker,
        ):
            await machine.wait_booted()
            await broker.until("hello and a need", lambda: broker.demand is not None)
            yield machine, broker


async def said(machine: Machine) -> str:
    return (await machine.console.run(JOURNAL)).stdout


async def survived(machine: Machine) -> None:
    assert (await machine.console.run(SERVICE)).stdout.split() == ["0", "active"]
    assert "Traceback" not in await said(machine)
    assert await machine.oom_kills() == 0


async def test_a_cpu_that_fails_to_come_up_once(alone: tuple[Machine, ScriptedBroker]) -> None:
    machine, broker = alone
    answer = await broker.ask(broker.reclaim(Kind.CPU, 1000, 1))
    assert (answer.status, answer.achieved) == (AckStatus.DONE, 1000)
    states = (await machine.console.read_file("/sys/devices/system/cpu/hotplug/states")).splitlines()
    (state,) = [line.split(":")[0] for line in states if "workqueue:online" in line]
    fail = "/sys/devices/system/cpu/cpu1/hotplug/fail"
    await machine.console.run(f"echo {state} > {fail}")
    begun = time.monotonic()
    answer = await broker.ask(broker.grant(Kind.CPU, 2000, 2))
    took = time.monotonic() - begun
    assert (answer.status, answer.achieved) == (AckStatus.DONE, 2000)
    assert await machine.online_cpus() == {0, 1}
    lines = [line for line in (await said(machine)).splitlines() if "cpu 1 online" in line]
    print(f"cpu 1 online after {took:.1f} s: {lines}")
    assert "failed (EAGAIN)" in lines[0] or "leaving it alone for 2 s" in " ".join(lines)
    assert took >= 2.0
    await survived(machine)


async def test_orders_that_are_obsolete_or_come_twice(alone: tuple[Machine, ScriptedBroker]) -> None:
    machine, broker = alone
    grant = broker.grant(Kind.CPU, 2000, 10)
    first = await broker.ask(grant)
    again = await broker.ask(grant)
    assert first == again
    for order in (
        broker.reclaim(Kind.CPU, 1000, 9),
        broker.grant(Kind.CPU, 1000, 9),
        broker.reclaim(Kind.CPU, 1000, 11, epoch=broker.epoch - 1),
        broker.reclaim(Kind.MEMORY, BOOT // 2, 11, epoch=broker.epoch + 1),
    ):
        answer = await broker.ask(order)
        assert (answer.status, answer.refusal) == (AckStatus.REFUSED, RefusalReason.STALE)
        assert answer.text
    assert await machine.online_cpus() == {0, 1}
    await survived(machine)


async def test_a_reclaim_of_everything(alone: tuple[Machine, ScriptedBroker]) -> None:
    machine, broker = alone
    answer = await broker.ask(broker.reclaim(Kind.CPU, 0, 20))
    assert await machine.online_cpus() == {0}
    assert (answer.status, answer.achieved, answer.refusal) == (AckStatus.PARTIAL, 1000, RefusalReason.PINNED)
    answer = await broker.ask(broker.reclaim(Kind.CPU, 0, 21))
    assert (answer.status, answer.achieved, answer.refusal) == (AckStatus.REFUSED, 1000, RefusalReason.PINNED)
    assert broker.demand is not None
    answer = await broker.ask(broker.reclaim(Kind.MEMORY, 0, 20))
    print(f"asked for all: {answer.text}")
    assert answer.status is AckStatus.PARTIAL
    assert answer.refusal is RefusalReason.IN_USE
    assert 128 * MIB < answer.achieved < BOOT
    assert answer.text
    assert await machine.memory_total_bytes() > BOOT * 3 // 4  # nothing was touched: it is the host that takes it
    grant = await broker.ask(broker.grant(Kind.CPU, 2000, 22))
    assert grant.status is AckStatus.DONE
    await survived(machine)


async def test_a_grant_beyond_all_bounds(alone: tuple[Machine, ScriptedBroker]) -> None:
    machine, broker = alone
    driver = QemuVm(machine.paths.qmp)
    await driver.open(lambda: None)
    try:
        await driver.request_memory(BOOT + GIB)
        begun = time.monotonic()
        cpus, memory = await asyncio.gather(
            broker.ask(broker.grant(Kind.CPU, 2_000_000, 30), 40),
            broker.ask(broker.grant(Kind.MEMORY, 1 << 55, 30), 40),
        )
        print(f"after {time.monotonic() - begun:.1f} s: {cpus.text}; {memory.text}")
        assert (cpus.status, cpus.achieved, cpus.refusal) == (AckStatus.PARTIAL, 2000, RefusalReason.TIMEOUT)
        assert memory.status is AckStatus.PARTIAL
        assert memory.refusal is RefusalReason.TIMEOUT
        assert memory.achieved == BOOT + GIB  # what there is was taken all the same
        assert "did not come" in memory.text

        # 1 EiB is no amount at all: that ends the stream, in words, and the guest comes back.
        streams = len(broker.hellos)
        broker.say(broker.grant(Kind.MEMORY, 1 << 60, 31))
        await broker.until("it comes back", lambda: len(broker.hellos) > streams and broker.connected)
        text = await said(machine)
        assert f"is {1 << 60}, more than" in text
        print([line for line in text.splitlines() if "more than" in line])
        assert broker.hellos[-1].last_revision == 30
        answer = await broker.ask(broker.grant(Kind.MEMORY, BOOT + GIB, 32))
        assert answer.status is AckStatus.DONE

        answer = await broker.ask(broker.reclaim(Kind.MEMORY, BOOT, 33))
        assert answer.status in (AckStatus.DONE, AckStatus.PARTIAL)
        await driver.request_memory(max(BOOT, answer.achieved))
        end = time.monotonic() + 20
        while (held := (await driver.observe()).memory_plugged_bytes) >= BOOT + BLOCK_BYTES:
            assert time.monotonic() < end, f"{held} bytes are still there; {answer}"
            await asyncio.sleep(0.2)
    finally:
        await driver.close()
    await survived(machine)
