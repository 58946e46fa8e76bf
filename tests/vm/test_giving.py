"""Giving, in real VMs: a kernel that says no, a load that begins in the middle, and a VM that is full to the brim."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator

import loads
import pytest
import pytest_asyncio
from host import BLOCK_BYTES, GuestSpec, Host, Look, converges, rests

from guestd.lab.errors import ConsoleError
from guestd.lab.image import GuestImage
from guestd.lab.qemu import GIB, MIB
from guestd.model.resources import Kind
from guestd.model.view import ResizePhase

pytestmark = [pytest.mark.vm, pytest.mark.timeout(480), pytest.mark.asyncio(loop_scope="module")]

PAGES, DIMMS = "pages", "dimms"
SERVICE = "systemctl show -P NRestarts -P ActiveState guestd"
ACTIONS = "/sys/kernel/debug/notifier-error-inject/memory/actions"
PREPARE = (
    "modprobe memory-notifier-error-inject; mountpoint -q /sys/kernel/debug || mount -t debugfs none /sys/kernel/debug;"
    f" ls {ACTIONS}"
)
NAMES = {-16: "EBUSY", -12: "ENOMEM", -5: "EIO"}
FAIL_BELOW = (
    "cd /sys/devices/system/memory; while [ $(grep -lx online memory*/state | wc -l) -gt {blocks} ]; do :; done;"
    f" echo {{error}} > {ACTIONS}/MEM_GOING_OFFLINE/error"
)
"""From the moment at which so many blocks are left the kernel refuses to take one offline."""

FULL = '''
"""Use up all memory but LEFT_MIB and keep it so for SECONDS, then take more than there is: OUT. To be killed for it."""
import sys, time

def meminfo(name):
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) >> 10 for line in file if line.startswith(name))

with open("/proc/self/oom_score_adj", "w") as file:
    file.write("1000")
left, seconds, total, out = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
pieces, begun, least = [], None, 1 << 20
while begun is None or time.monotonic() - begun < seconds:
    free = meminfo("MemAvailable:")
    if meminfo("MemTotal:") >= total:
        least = min(least, free)
        if begun is None and free < 2 * left:
            begun = time.monotonic()
            open(out + "-begun", "w").close()
    keep = left if meminfo("MemTotal:") >= total else 40  # it is not to be killed before it has it all
    if free > keep:
        pieces.append(bytearray(b"Z") * (min(6, free - keep) << 20))
    time.sleep(0.05)
with open(out, "w") as file:
    file.write(f"{least} {meminfo('MemFree:')}")
end = time.monotonic() + 10
while time.monotonic() < end:
    pieces.append(bytearray(b"Z") * (16 << 20))
with open("/proc/sysrq-trigger", "w") as file:
    file.write("f")  # a kernel that has only programs left to give up can take minutes until it gives up one process
time.sleep(1000)
'''


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(guest_image: GuestImage) -> AsyncIterator[Host]:
    """One VM that grows by pages and one that grows by DIMMs."""
    guests = {
        PAGES: GuestSpec(),
        DIMMS: GuestSpec(cid=4, cpu_max=2, memory_max_bytes=2 * GIB, dimm_slots=3),
    }
    async with Host(guest_image, guests, cpus=6, memory_bytes=5 * GIB) as host:
        print("booted in", {name: round(machine.boot_seconds or 0) for name, machine in host.machines.items()})
        for name in guests:
            await host.shell(name, PREPARE)
        yield host


@pytest_asyncio.fixture(loop_scope="module")
async def host(shared: Host) -> AsyncIterator[Host]:
    """The host at rest, and nobody was killed in it."""
    await rests(shared, 60)
    kills = {name: await machine.oom_kills() for name, machine in shared.machines.items()}
    yield shared
    for name, machine in shared.machines.items():
        assert (await shared.shell(name, SERVICE)).split() == ["0", "active"]
        assert await machine.oom_kills() - kills[name] in (0, shared_kills.get(name, 0))
    shared_kills.clear()


shared_kills: dict[str, int] = {}
"""How many kills a test meant to cause."""


async def fail(host: Host, name: str, action: str, error: int) -> None:
    await host.shell(name, f"echo {error} > {ACTIONS}/{action}/error")


async def grown(host: Host, name: str, mib: int, least_bytes: int, rate: int = 150) -> None:
    """Have the VM grow by a load that has ended when this returns."""
    grow = await host.python(name, loads.GROW, mib, rate, 1, "/run/vm-test/grown")
    async with host.load(name, grow):
        await host.wait_path(name, "/run/vm-test/grown", 60)
        await host.until("grown", lambda look: look.held[name].plugged_bytes >= least_bytes)
    await host.shell(name, "rm /run/vm-test/grown")


# ---- a kernel that says no -----------------------------------------------------------------------


async def test_blocks_that_the_kernel_does_not_take_offline(host: Host) -> None:
    before = (await host.look()).views[DIMMS].resource(Kind.MEMORY)
    await grown(host, DIMMS, 1280, 2 * GIB)
    log_before = len(host.broker_log)
    # 16 blocks; when a DIMM or more is offline nothing goes any more.
    async with host.load(DIMMS, FAIL_BELOW.format(blocks=12, error=-16)):
        await host.says("failed (EBUSY)", log_before, 60)
    short = await converges(
        host, "what was achieved is in the book", lambda look: look.memory(DIMMS) in (GIB, GIB + 512 * MIB)
    )
    kept = (await host.look()).memory(DIMMS)
    log_before, begun = len(host.broker_log), time.monotonic()
    await fail(host, DIMMS, "MEM_GOING_OFFLINE", -12)
    await host.says("failed (ENOMEM)", log_before, 60)
    again = time.monotonic() - begun
    look = await host.look()
    after = look.views[DIMMS].resource(Kind.MEMORY)
    assert look.held[DIMMS].plugged_bytes == look.memory(DIMMS) == kept
    assert after.refusals > before.refusals
    await fail(host, DIMMS, "MEM_GOING_OFFLINE", 0)
    back = await rests(host, 100)
    print(
        f"EBUSY in the middle: {kept // MIB} of 2048 MiB are in the book {short:.1f} s later; ENOMEM said after"
        f" {again:.1f} s; all back {back:.1f} s after it could; {after.refusals} refusals, {after.partials} partials"
    )


async def test_blocks_that_the_kernel_does_not_bring_online(host: Host) -> None:
    for error in (-12, -5):
        since = (await host.shell(PAGES, "date +%s")).strip()
        await fail(host, PAGES, "MEM_GOING_ONLINE", error)
        try:
            await host.guestctl("set-limits", PAGES, "--memory-min", str(GIB))
            begun, text = time.monotonic(), ""
            while f"failed ({NAMES[error]})" not in text:
                assert time.monotonic() - begun < 20, text
                text = await host.shell(PAGES, f"journalctl -u guestd --since=@{since} -q -o cat --no-pager")
            await host.shell(PAGES, "sleep 5")
            assert (await host.look(inside=True)).facts[PAGES].online_bytes == 512 * MIB
            await fail(host, PAGES, "MEM_GOING_ONLINE", 0)
            up = await converges(host, "online after all", lambda look: look.memory(PAGES) == GIB)
        finally:
            await fail(host, PAGES, "MEM_GOING_ONLINE", 0)
            await host.guestctl("set-limits", PAGES, "--reset")
        text = await host.shell(PAGES, f"journalctl -u guestd --since=@{since} -q -o cat --no-pager")
        tries = text.count("leaving it alone for")
        back = await rests(host, 60)
        print(
            f"{NAMES[error]}: {tries} blocks left alone for a while, all there {up:.1f} s after it could, {back:.1f} s"
        )
        assert 1 <= tries <= 40


async def test_pages_go_while_their_blocks_cannot(host: Host) -> None:
    await grown(host, PAGES, 1280, 1536 * MIB)
    await fail(host, PAGES, "MEM_GOING_OFFLINE", -16)
    try:
        down = await rests(host, 60)  # virtio-mem takes the pages and leaves the blocks
        blocks = (await host.look(inside=True)).facts[PAGES].online_bytes // BLOCK_BYTES
    finally:
        await fail(host, PAGES, "MEM_GOING_OFFLINE", 0)
    await grown(host, PAGES, 1280, 1536 * MIB)
    back = await rests(host, 60)
    print(
        f"virtio-mem gave all back in {down:.1f} s with {blocks} blocks left online; grown and back again {back:.1f} s"
    )
    assert blocks > 4


# ---- a load that begins in the middle ------------------------------------------------------------


async def test_a_load_begins_while_memory_is_given_back(host: Host) -> None:
    await grown(host, PAGES, 1792, 2 * GIB)
    grow = await host.python(PAGES, loads.GROW, 1536, 100, 2, "/run/vm-test/again")

    def shrinking(look: Look) -> bool:
        memory = look.views[PAGES].resource(Kind.MEMORY)
        return memory.phase is ResizePhase.UNPLUGGING and look.held[PAGES].plugged_bytes < 1792 * MIB

    # Should the guest hang, its kernel is to say where.
    await host.shell(PAGES, "dmesg -n 7; sysctl -qw kernel.hung_task_timeout_secs=15 || true")
    await host.until("memory is going", shrinking)
    start = (await host.look()).held[PAGES].plugged_bytes
    async with host.load(PAGES, grow):
        begun = time.monotonic()
        least, turned = start, 0.0
        while not turned:
            look = await host.look()
            least = min(least, look.held[PAGES].plugged_bytes)
            kernel = host.machines[PAGES].paths.serial_log.read_text(errors="replace")[-4000:]
            assert time.monotonic() - begun < 45, f"{host.words(look)}\n{kernel}"
            if look.held[PAGES].plugged_bytes > least + 256 * MIB:
                turned = time.monotonic() - begun
        await host.wait_path(PAGES, "/run/vm-test/again", 60)
    result = json.loads(await host.shell(PAGES, "cat /run/vm-test/again; rm /run/vm-test/again"))
    assert await host.machines[PAGES].oom_kills() == 0
    assert result["mib"] >= 1530
    said = "journalctl -u guestd -o cat --no-pager | grep -c 'taken offline by something else' || true"
    assert (await host.shell(PAGES, said)).strip() == "0", "what the driver took and brought back is nobody else's"
    back = await rests(host, 60)
    print(
        f"a load began at {start // MIB} MiB and going down: least {least // MIB} MiB, more again after {turned:.1f} s,"
        f" {result}, back after {back:.1f} s"
    )


# ---- full to the brim, last: the load is killed for it -------------------------------------------


async def test_a_vm_that_is_full_at_its_maximum(host: Host) -> None:
    machine = host.machines[PAGES]
    full = await host.python(PAGES, FULL, 24, 45, 2300, "/run/vm-test/full")
    kills = await machine.oom_kills()
    locked = await host.shell(PAGES, "grep -h VmLck $(pgrep -xu guestd guestd | sed 's|.*|/proc/&/status|')")
    assert int(locked.split()[1]) > 8192, locked
    async with host.load(PAGES, full):
        begun = time.monotonic()
        await host.wait_path(PAGES, "/run/vm-test/full-begun", 200)
        there = time.monotonic() - begun
        peak = await host.look()
        await host.wait_path(PAGES, "/run/vm-test/full", 120)
        look = await host.look()
        assert look.views[PAGES].connected
        killed_by = 0
        while killed_by <= kills:
            assert time.monotonic() - begun < 300
            with contextlib.suppress(ConsoleError):  # a VM with nothing left may be slow to say even that
                killed_by = await machine.oom_kills()
    shared_kills[PAGES] = await machine.oom_kills() - kills
    least, free = map(int, (await host.shell(PAGES, "cat /run/vm-test/full")).split())
    protected = (await host.shell(PAGES, "cat /sys/fs/cgroup/guestd.slice/memory.min", check=False)).strip()
    assert peak.memory(PAGES) == host.guests[PAGES].memory_max_bytes
    assert (await host.shell(PAGES, SERVICE)).split() == ["0", "active"]
    pressure = [reason.text for reason in look.views[PAGES].demand_reasons]
    silent = look.views[PAGES].last_seen_ago_seconds
    killed = (await host.shell(PAGES, "dmesg | grep -i 'killed process' || true")).strip()
    assert "guestd" not in killed
    back = await rests(host, 120)
    print(
        f"full after {there:.1f} s, for 45 s: least {least} MiB available, {free} MiB free, memory.min {protected};"
        f" last heard {silent} s ago, {pressure}; {killed}; at rest {back:.1f} s after the load was killed"
    )
