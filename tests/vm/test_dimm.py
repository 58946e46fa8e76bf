"""Memory that comes and goes as DIMMs: the driver alone with a real guest, and the whole path."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import loads
import pytest
from conftest import MachineFactory
from host import GuestSpec, Host, converges, rests

from guestd.broker.hypervisor.qemu import QemuVm
from guestd.lab.image import GuestImage
from guestd.lab.machine import Machine
from guestd.lab.qemu import MIB, MachineConfig
from guestd.model.vm import VmState

pytestmark = [pytest.mark.vm, pytest.mark.timeout(480)]

BOOT = 512 * MIB
DIMM = 512 * MIB
SLOTS = 3
VM = "dimm"

BLOCKS = "cd /sys/devices/system/memory; for b in $(ls -d memory* | sort -V); do echo $b $(cat $b/state); done"
"""All memory blocks with their states, the lowest first."""
SWITCH = "cd /sys/devices/system/memory; for b in {blocks}; do echo {state} > $b/state; done"
FAIL_OFFLINE = (
    "modprobe memory-notifier-error-inject; mountpoint -q /sys/kernel/debug || mount -t debugfs none /sys/kernel/debug;"
    " echo {error} > /sys/kernel/debug/notifier-error-inject/memory/actions/MEM_GOING_OFFLINE/error"
)


@pytest.fixture
async def machine(machine_factory: MachineFactory) -> Machine:
    config = MachineConfig(name=VM, boot_memory_bytes=BOOT, max_memory_bytes=BOOT + SLOTS * DIMM, dimm_slots=SLOTS)
    return await machine_factory(config)


@pytest.fixture
async def driver(machine: Machine) -> AsyncIterator[QemuVm]:
    driver = QemuVm(machine.paths.qmp)
    await driver.open(lambda: None)
    yield driver
    await driver.close()


async def blocks(machine: Machine, state: str) -> list[str]:
    """The memory blocks in this state, lowest first."""
    lines = (await machine.console.run(BLOCKS)).stdout.split("\n")
    return [line.split()[0] for line in lines if line.endswith(f" {state}")]


async def switch(machine: Machine, names: list[str], state: str) -> None:
    await machine.console.run(SWITCH.format(blocks=" ".join(names), state=state), 60)


async def arrived(machine: Machine, count: int) -> list[str]:
    """The offline blocks, as soon as they are so many."""
    for _ in range(200):
        found = await blocks(machine, "offline")
        if len(found) == count:
            return found
        await asyncio.sleep(0.1)
    raise AssertionError(f"not {count} blocks but {found}")


async def until(driver: QemuVm, wanted: Callable[[VmState], bool], seconds: float = 20.0) -> tuple[VmState, float]:
    begun = time.monotonic()
    while not wanted(state := await driver.observe()):
        assert time.monotonic() - begun < seconds, state
        await asyncio.sleep(0.02)
    return state, time.monotonic() - begun


async def test_dimms_come_offline_and_go_once_their_blocks_are(machine: Machine, driver: QemuVm) -> None:
    state = await driver.observe()
    assert (state.memory_unit_bytes, state.memory_max_bytes) == (DIMM, BOOT + SLOTS * DIMM)
    before = await machine.memory_total_bytes()
    begun = time.monotonic()
    await driver.request_memory(BOOT + 3 * DIMM)
    new = await arrived(machine, 12)
    came = time.monotonic() - begun
    await switch(machine, new, "online_movable")
    assert await machine.memory_total_bytes() >= before + 3 * DIMM - 32 * MIB
    await switch(machine, new[4:], "offline")
    await driver.request_memory(BOOT + DIMM)
    state, took = await until(driver, lambda state: state.memory_held_bytes == BOOT + DIMM)
    assert state.memory_plugged_bytes == BOOT + DIMM
    assert await blocks(machine, "offline") == []
    backends = [one["id"] for one in await machine.query("query-memdev")]
    assert sorted(backends) == ["guestd-mem-0", "ram0"]
    print(f"three DIMMs seen after {came:.2f} s, two gone after {took:.2f} s")


async def test_a_dimm_that_the_guest_keeps_is_left_and_another_one_goes(
    machine: Machine, driver: QemuVm, caplog: pytest.LogCaptureFixture
) -> None:
    await driver.request_memory(BOOT + 2 * DIMM)
    new = await arrived(machine, 8)
    await switch(machine, new, "online_movable")
    await switch(machine, new[:4], "offline")
    await machine.console.run(FAIL_OFFLINE.format(error=-16))
    await driver.request_memory(BOOT + DIMM)
    state, took = await until(driver, lambda state: state.memory_held_bytes == BOOT + DIMM)
    left = [one["data"]["id"] for one in await machine.query("query-memory-devices")]
    assert left == ["guestd-dimm-1"]
    assert "guestd-dimm-1 was not removed: the guest keeps it" in caplog.text
    assert await blocks(machine, "offline") == []
    await driver.request_memory(BOOT)
    await asyncio.sleep(2.0)
    assert (await driver.observe()).memory_held_bytes == BOOT + DIMM
    await machine.console.run(FAIL_OFFLINE.format(error=0))
    state, later = await until(driver, lambda state: state.memory_held_bytes == BOOT)  # after its rest, unasked
    assert state.memory_plugged_bytes == BOOT
    print(f"one refused and the other gone after {took:.2f} s, the first {later:.1f} s after it could")


async def test_memory_follows_a_load_by_dimms_and_goes_back(guest_image: GuestImage) -> None:
    spec = GuestSpec(memory_min_bytes=BOOT, memory_max_bytes=BOOT + SLOTS * DIMM, dimm_slots=SLOTS)
    async with Host(guest_image, {VM: spec}) as host:
        await rests(host, 60)
        grow = await host.python(VM, loads.GROW, 1000, 100, 1000, "/dev/null")
        begun = time.monotonic()
        async with host.load(VM, grow):
            await host.until("a DIMM is plugged", lambda look: look.held[VM].plugged_bytes > BOOT)
            first = time.monotonic() - begun
            await converges(host, "grown by DIMMs", lambda look: look.memory(VM) >= BOOT + 2 * DIMM)
            grown = time.monotonic() - begun
            await host.restart_broker()
            look = await host.look()
            await converges(host, "found again", lambda now: now.memory(VM) >= BOOT + 2 * DIMM)
            assert look.held[VM].plugged_bytes % DIMM == 0
        said = len(host.broker_log)
        await host.says("asking down", said)
        await host.restart_broker()
        back = await rests(host, 90)
        look = await host.look(inside=True)
        assert look.held[VM].held_bytes == look.held[VM].plugged_bytes == BOOT
        assert await host.machines[VM].oom_kills() == 0
        words = ("ended short", "was not removed", "no answer", "charged")
        counts = {text: host.broker_log.count(text) for text in words}
        print(f"DIMMs: first after {first:.1f} s, grown after {grown:.1f} s, all gone {back:.1f} s after a restart")
        print(counts)
        assert counts["charged"] == 0


async def test_dimms_of_a_guest_that_was_reset_go_too(guest_image: GuestImage) -> None:
    spec = GuestSpec(memory_min_bytes=BOOT, memory_max_bytes=BOOT + SLOTS * DIMM, dimm_slots=SLOTS)
    async with Host(guest_image, {VM: spec}) as host:
        await rests(host, 60)
        grow = await host.python(VM, loads.GROW, 600, 200, 1000, "/dev/null")
        async with host.load(VM, grow):
            await converges(host, "grown by a DIMM", lambda look: look.memory(VM) >= BOOT + DIMM)
            await host.machines[VM].reset()
        booted = await host.machines[VM].wait_booted()
        back = await rests(host, 90)
        look = await host.look(inside=True)
        assert look.held[VM].held_bytes == BOOT
        assert look.facts[VM].online_bytes == BOOT
        print(f"reset with DIMMs: booted in {booted:.1f} s, at its minimum {back:.1f} s later")
