"""Taking, in one real VM with a real broker: CPUs at awkward moments, and memory that grows forty-fold under load."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from host import BLOCK_BYTES, GuestSpec, Host, converges, rests

from guestd.broker.hypervisor.qemu import QemuVm
from guestd.lab.image import GuestImage
from guestd.lab.qemu import GIB, MIB
from guestd.model.resources import Kind
from guestd.model.units import round_up

pytestmark = [pytest.mark.vm, pytest.mark.timeout(480), pytest.mark.asyncio(loop_scope="module")]

VM = "taker"
BIG = 40 * 512 * MIB
SPEC = GuestSpec(memory_max_bytes=BIG)
CPU_STATES = "cd /sys/devices/system/cpu; cat present online; systemctl show -P NRestarts guestd"

CHURN = '''
"""Take memory and give it back over and over, at most half of what is available: LIMIT_MIB MIB_PER_SECOND OUT."""
import sys, time

def available():
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) >> 10 for line in file if line.startswith("MemAvailable"))

limit, step, out = int(sys.argv[1]), int(sys.argv[2]) // 10, sys.argv[3]
rounds, most = 0, 0
while True:
    pieces = []
    while len(pieces) * step < limit and available() > len(pieces) * step + step:
        pieces.append(bytearray(b"Z") * (step << 20))
        time.sleep(0.1)
    rounds, most = rounds + 1, max(most, len(pieces) * step)
    with open(out, "w") as file:
        file.write(f"{rounds} {most}")
'''

FILES = '''
"""Make and remove many small files, so that inodes, directory entries and tmpfs pages come and go: COUNT OUT."""
import os, shutil, sys

count, out, place = int(sys.argv[1]), sys.argv[2], "/dev/shm/vm-test"
rounds = 0
while True:
    for directory in range(count // 500):
        os.makedirs(f"{place}/{directory}")
        for number in range(500):
            with open(f"{place}/{directory}/a-file-with-a-name-of-some-length-{number}", "w") as file:
                file.write("x")
    shutil.rmtree(place)
    rounds += 1
    with open(out, "w") as file:
        file.write(str(rounds))
'''

ZONES = """
import json
zones, zone = {}, ""
for line in open("/proc/zoneinfo"):
    words = line.split()
    if line.startswith("Node"):
        zone = words[-1]
    elif words[0] == "present":
        zones[zone] = zones.get(zone, 0) + int(words[1]) * 4096
print(json.dumps(zones))
"""
BLOCKS = "cd /sys/devices/system/memory; cat memory*/state | sort | uniq -c"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(guest_image: GuestImage) -> AsyncIterator[Host]:
    """A VM that got one vCPU while its firmware ran and one while its kernel booted, long before guestd was there."""
    host = Host(guest_image, {VM: SPEC}, memory_bytes=BIG)
    try:
        host.write_config()
        await host.start_vm(VM)
        machine = host.machines[VM]
        begun = time.monotonic()
        driver = QemuVm(machine.paths.qmp)  # as a broker did that died of it
        await driver.open(lambda: None)
        await driver.request_vcpus(2)
        first = time.monotonic() - begun
        await asyncio.sleep(2.0)  # a quick machine has booted after 5 s
        await driver.request_vcpus(3)
        second = time.monotonic() - begun
        assert machine.console.boot_id is None  # not even the lab's own agent is up
        await driver.close()
        await host.start_broker()
        await machine.wait_booted()
        print(f"booted in {machine.boot_seconds:.1f} s, a vCPU after {first:.1f} s and one after {second:.1f} s")
        yield host
        assert await machine.oom_kills() == 0
    finally:
        await host.close()


@pytest_asyncio.fixture(loop_scope="module")
async def host(shared: Host) -> AsyncIterator[Host]:
    """The host at rest."""
    await rests(shared, 60)
    yield shared


async def warnings(host: Host, since: str) -> str:
    return await host.shell(VM, f"journalctl -u guestd -p warning --since=@{since} -q -o cat --no-pager")


async def now(host: Host) -> str:
    return (await host.shell(VM, "date +%s")).strip()


# ---- CPUs ----------------------------------------------------------------------------------------


async def test_cpus_that_arrive_during_early_boot(shared: Host) -> None:
    seen = (await shared.shell(VM, CPU_STATES)).split()
    look = await shared.look()
    print(f"after the boot: {look.held[VM].vcpus} vCPUs plugged, present {seen[0]}, online {seen[1]}")
    back = await rests(shared, 60)  # nobody needs them
    async with shared.busy(VM, 4):
        up = await converges(shared, "all four, in the same slots", lambda look: look.cpus(VM) == 4)
        assert (await shared.look(inside=True)).facts[VM].cpus_online == {0, 1, 2, 3}
    assert (await shared.shell(VM, CPU_STATES)).split()[2] == "0"
    print(f"given back within {back:.1f} s; four busy processes had all four after {up:.1f} s")
    print("\n".join(line for line in shared.broker_log.splitlines() if " cpu: " in line))


async def test_cpus_that_arrive_again_and_again(host: Host) -> None:
    since, before = await now(host), (await host.look()).views[VM].resource(Kind.CPU)
    times = []
    for _ in range(2):
        async with host.busy(VM, 2):
            up = await converges(host, "a second CPU", lambda look: look.cpus(VM) >= 2)
            # Its events once more: it was added, it is online.
            await host.shell(
                VM, "for event in add add online online; do echo $event > /sys/devices/system/cpu/cpu1/uevent; done"
            )
            await asyncio.sleep(0.5)
            assert (await host.look(inside=True)).facts[VM].cpus_online >= {0, 1}
        times.append((round(up, 1), round(await rests(host, 60), 1)))
    after = (await host.look()).views[VM].resource(Kind.CPU)
    assert (after.failures, after.partials) == (before.failures, before.partials)
    assert await warnings(host, since) == ""
    print(f"the same slot twice, its events doubled; seconds until there and gone: {times}")


# ---- memory --------------------------------------------------------------------------------------


async def test_memory_grows_forty_fold_under_load_and_goes_back(host: Host) -> None:
    machine = host.machines[VM]
    churn = await host.python(VM, CHURN, 1536, 300, "/run/vm-test/churned")
    files = await host.python(VM, FILES, 10_000, "/run/vm-test/filed")
    log_before = len(host.broker_log)
    async with host.load(VM, churn), host.load(VM, files):
        await host.guestctl("set-limits", VM, "--memory-min", str(BIG))
        up = await converges(host, "20 GiB", lambda look: look.memory(VM) == BIG, 120)
        look = await host.look(inside=True)
        zones = json.loads(await host.shell(VM, f"python3 -S -c '{ZONES}'"))
        states = (await host.shell(VM, BLOCKS)).split()
        await machine.console.wait_path("/run/vm-test/churned", 40)
        await machine.console.wait_path("/run/vm-test/filed", 40)
    stages = [
        line.split("growing to ")[1] for line in host.broker_log[log_before:].splitlines() if "growing to" in line
    ]
    rounds, most = map(int, (await host.shell(VM, "cat /run/vm-test/churned")).split())
    filed = int(await host.shell(VM, "cat /run/vm-test/filed"))
    kernel = sum(size for zone, size in zones.items() if zone != "Movable")
    ratio = zones["Movable"] / round_up(kernel, BLOCK_BYTES)  # what firmware keeps of a block is not held against it
    print(f"512 MiB to 20 GiB in {up:.1f} s: {zones}, MOVABLE : KERNEL {ratio:.2f}, {states}")
    print(
        f"meanwhile {rounds} rounds of up to {most} MiB, {filed} rounds of 10,000 files; {len(stages)} grows: {stages}"
    )
    assert len(stages) > 1, "never more at once than its kernel has memory for"
    assert states == [str(BIG // BLOCK_BYTES), "online"]
    assert look.facts[VM].online_bytes == BIG
    assert ratio <= 4.0
    assert rounds >= 1 and filed >= 1
    assert await machine.oom_kills() == 0

    await host.shell(VM, "rm -rf /dev/shm/vm-test")
    await host.guestctl("set-limits", VM, "--reset")
    # Besides all that is movable much of what was onlined for the kernel goes, block by block.
    down = await converges(host, "nearly all has gone", lambda look: look.memory(VM) < 2 * GIB, 150)
    left = (await host.look()).memory(VM)
    print(f"back to {left // MIB} MiB after {down:.1f} s")
    assert left < kernel
    assert await machine.oom_kills() == 0
