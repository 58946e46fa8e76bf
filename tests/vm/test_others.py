"""Living with others in a real VM: kernels and agents that switch what guestd switches, a person at the keyboard, and
what the sensors say meanwhile. One VM whose kernel onlines memory by itself, one boot for all.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import loads
import pytest
import pytest_asyncio
from host import BLOCK_BYTES, GuestSpec, Host, Look, converges, rests

from guestd.lab.image import GuestImage
from guestd.lab.qemu import MIB
from guestd.model.resources import Kind

pytestmark = [pytest.mark.vm, pytest.mark.timeout(480), pytest.mark.asyncio(loop_scope="module")]

VM = "shared"
POLICY = "/sys/devices/system/memory/auto_online_blocks"
LEFT_ALONE_SECONDS = 12.0  # longer than guestd takes to look at everything again

BLOCKS = (
    "cd /sys/devices/system/memory; for m in memory*; do"
    ' [ "$(cat $m/state)" = online ] && [ ${m#memory} -ge 32 ] && cat $m/valid_zones; done | sort | uniq -c'
)
"""The zones of the blocks that virtio-mem brought, which begin at 4 GiB."""

SENSORS = """\
import json, os, sys
from guestd.guest import psi
from guestd.guest.sensors import Sensors

def look(sensors):
    before, between, after = sensors.quick(), sensors.regular(), sensors.quick()
    cpus = [sorted(one.cpu_busy_seconds) for one in (before, between, after)]
    keep = True
    for cpu in cpus[0]:
        low, middle, high = (one.cpu_busy_seconds[cpu] for one in (before, between, after))
        keep = keep and low - 0.011 <= middle <= high + 0.011
    for name in ("cpu_some_us", "memory_some_us", "io_some_us", "refaults", "swap_in_pages", "oom_kills"):
        low, middle, high = (getattr(one, name) for one in (before, between, after))
        keep = keep and low <= middle <= high
    same = before.memory_total_bytes == between.memory_total_bytes
    near = abs(before.memory_available_bytes - between.memory_available_bytes) < 32 << 20
    return {"cpus": cpus, "counters": keep, "total": same, "available": near}

def trigger(kind):
    try:
        os.close(psi.open_trigger(f"/proc/pressure/{kind}", psi.TRIGGERS[kind]))
    except OSError as error:
        return error.errno
    return 0

sensors = Sensors()
looks = [look(sensors)]
with open("/sys/devices/system/cpu/cpu2/online", "w") as file:
    file.write("0")
looks.append(look(sensors))
with open("/sys/devices/system/cpu/cpu2/online", "w") as file:
    file.write("1")
looks.append(look(sensors))
as_root = [trigger(kind) for kind in psi.TRIGGERS]
os.setresuid(65534, 65534, 65534)
print(json.dumps({"looks": looks, "as_root": as_root, "as_nobody": [trigger(kind) for kind in psi.TRIGGERS]}))
"""

OVERFLOW = """\
import asyncio, json, sys
from guestd.guest.uevents import RESCAN, Uevents, open_monitor

def tiny():
    monitor = open_monitor()
    monitor.set_receive_buffer_size(4096)
    return monitor

def burst(count):
    for number in range(count):
        with open(f"/sys/devices/system/cpu/cpu0/uevent", "w") as file:
            file.write("change")

async def main():
    seen, openers = [], [open_monitor, tiny]
    uevents = Uevents(seen.append, lambda: openers.pop()())
    assert uevents.start(), uevents.reason
    burst(1)
    await asyncio.sleep(0.3)
    before = list(seen)
    burst(500)  # nobody reads meanwhile
    await asyncio.sleep(0.5)
    during = list(seen)
    burst(1)  # the new monitor hears it
    await asyncio.sleep(0.3)
    uevents.close()
    print(json.dumps({"before": before, "during": during[len(before):], "after": seen[len(during):]}))

asyncio.run(main())
"""
"""A monitor with room for a few events, and five hundred of them."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(apps_image: GuestImage) -> AsyncIterator[Host]:
    spec = GuestSpec(kernel_arguments="memhp_default_state=online_movable", guest_agent_port=True)
    async with Host(apps_image, {VM: spec}) as host:
        print(f"booted in {host.machines[VM].boot_seconds:.1f} s")
        await host.shell(VM, "mkdir -p /run/vm-test")
        yield host


@pytest_asyncio.fixture(loop_scope="module")
async def host(shared: Host) -> AsyncIterator[Host]:
    """The host at rest; whatever a test did to the VM, guestd did not complain of it."""
    await rests(shared, 90)
    since = (await shared.shell(VM, "date +%s")).strip()
    yield shared
    assert await shared.machines[VM].oom_kills() == 0
    errors = await shared.shell(VM, f"journalctl -u guestd -p err --since=@{since} -q -o cat --no-pager")
    assert errors == ""


def reasons(look: Look) -> dict[str, str]:
    return {reason.code: reason.text for reason in look.views[VM].demand_reasons}


async def check(host: Host) -> dict[str, Any]:
    """What `guestd check` finds, by name."""
    answer = json.loads(await host.shell(VM, "guestd check --output json", check=False))
    return {finding["name"]: finding for finding in answer["findings"]}


# ---- memory --------------------------------------------------------------------------------------


async def breathe(host: Host) -> dict[str, int]:
    """Grow by half a GiB and shrink again; how many of the blocks that came were in which zones."""
    grow = await host.python(VM, loads.GROW, 640, 100, 1000, "/dev/null")
    async with host.load(VM, grow):
        up = await converges(host, "grown", lambda look: look.memory(VM) >= 896 * MIB, 60)
        peak = await host.look(inside=True)
        zones = await host.shell(VM, BLOCKS)
    failures = peak.views[VM].resource(Kind.MEMORY).failures
    down = await converges(host, "shrunk", lambda look: look.memory(VM) <= peak.memory(VM) - 2 * BLOCK_BYTES, 60)
    print(f"up after {up:.1f} s to {peak.memory(VM) // MIB} MiB in {zones.split()}, down after {down:.1f} s")
    assert failures == 0
    return {zone: int(count) for count, _, zone in (line.strip().partition(" ") for line in zones.splitlines())}


async def test_a_kernel_that_onlines_to_the_movable_zone(host: Host) -> None:
    assert (await host.shell(VM, f"cat {POLICY}")).strip() == "online_movable"
    found = await check(host)
    policy = found["auto_online_blocks"]
    assert policy["verdict"] == "note"
    assert "memhp_default_state=online_movable on the kernel command line" in policy["value"]
    zones = await breathe(host)
    assert list(zones) == ["Movable"] and zones["Movable"] >= 3


# ---- CPUs ----------------------------------------------------------------------------------------


async def test_a_person_takes_a_cpu(host: Host) -> None:
    """guestd leaves it, says so, does not fight for it when more is granted, and counts it when it is back."""
    since = (await host.shell(VM, "date +%s")).strip()
    async with host.busy(VM, 2):
        await converges(host, "2 CPUs online", lambda look: look.cpus(VM) in (2, 3))
        taken = max((await host.look(inside=True)).facts[VM].cpus_online)
        switch = f"/sys/devices/system/cpu/cpu{taken}/online"
        await host.shell(VM, f"echo 0 > {switch}")
        said = await host.until("it says so", lambda look: "others" in reasons(look))
        text = reasons(await host.look())["others"]
        async with host.busy(VM, 3):
            await host.until("4 CPUs are granted", lambda look: look.cpus(VM) == 4)
            await asyncio.sleep(LEFT_ALONE_SECONDS)
            look = await host.look(inside=True)
            assert look.facts[VM].cpus_online == {0, 1, 2, 3} - {taken}
            assert look.views[VM].resource(Kind.CPU).onlined == 3000
            assert f"CPU {taken}" in text and f"CPU {taken}" in reasons(look)["others"]
            await host.shell(VM, f"echo 1 > {switch}")
            back = await host.until("counted again", lambda look: look.views[VM].resource(Kind.CPU).onlined == 4000)
            await host.until("no more to say", lambda look: "others" not in reasons(look))
            await converges(host, "4 CPUs online", lambda look: look.cpus(VM) == 4)
    print(f"said after {said:.1f} s: {text}; counted again after {back:.1f} s")
    journal = await host.shell(VM, f"journalctl -u guestd --since=@{since} -q -o cat --no-pager")
    assert journal.count(f"CPU {taken} taken offline by something else: leaving it alone") == 1


class Agent:
    """qemu-guest-agent's other end."""

    def __init__(self, host: Host) -> None:
        self._path = host.machines[VM].paths.guest_agent

    async def ask(self, command: str, **arguments: object) -> Any:
        reader, writer = await asyncio.open_unix_connection(str(self._path))
        try:
            request = {"execute": command, "arguments": arguments}
            writer.write(json.dumps(request).encode() + b"\n")
            async with asyncio.timeout(30):
                answer = json.loads(await reader.readline())
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        assert "return" in answer, answer
        return answer["return"]

    async def set_cpu(self, number: int, online: bool) -> None:
        """The call that libvirt makes for `virsh setvcpus --guest`."""
        done = await self.ask("guest-set-vcpus", vcpus=[{"logical-id": number, "online": online}])
        assert done == 1


async def test_the_guest_agent_takes_a_cpu(host: Host) -> None:
    await host.shell(VM, "systemctl start qemu-guest-agent")
    try:
        agent = Agent(host)
        found = (await check(host))["qemu-guest-agent"]
        assert (found["verdict"], found["value"]) == ("note", "running")
        async with host.busy(VM, 4):
            await converges(host, "4 CPUs online", lambda look: look.cpus(VM) == 4)
            await agent.set_cpu(2, False)
            await host.until("it says so", lambda look: "CPU 2" in reasons(look).get("others", ""))
            await asyncio.sleep(LEFT_ALONE_SECONDS)
            vcpus = await agent.ask("guest-get-vcpus")
            assert {one["logical-id"] for one in vcpus if one["online"]} == {0, 1, 3}
            await agent.set_cpu(2, True)
            await host.until("counted again", lambda look: look.views[VM].resource(Kind.CPU).onlined == 4000)
            await converges(host, "4 CPUs online", lambda look: look.cpus(VM) == 4)
    finally:
        await host.shell(VM, "systemctl stop qemu-guest-agent")


async def test_check_sees_who_else_is_there(host: Host) -> None:
    await host.shell(VM, "systemctl start systemd-oomd tuned; tuned-adm profile virtual-guest", 120)
    try:
        found = await check(host)
        assert (found["systemd-oomd"]["verdict"], found["systemd-oomd"]["value"]) == ("note", "running")
        assert found["tuned"]["verdict"] == "note"
        assert "profile virtual-guest" in found["tuned"]["value"]
        assert found["qemu-guest-agent"]["value"] == "installed"
        assert found["hooks"]["verdict"] == "ok"
    finally:
        await host.shell(VM, "systemctl stop systemd-oomd.socket systemd-oomd tuned", 60)


OOMD = """
cd /run/systemd && mkdir -p oomd.conf.d system/load.slice.d
printf '[OOM]\\nDefaultMemoryPressureDurationSec=1s\\n' > oomd.conf.d/test.conf
printf '[Slice]\\nManagedOOMMemoryPressure=kill\\nManagedOOMMemoryPressureLimit=5%%\\n' > system/load.slice.d/test.conf
systemctl daemon-reload
systemctl start load.slice systemd-oomd
"""
"""systemd-oomd as eager as it can be set, on a slice for loads."""
OOMD_ENDS = """
systemctl stop load.slice systemd-oomd.socket systemd-oomd
swapoff -a; rm -f /var/tmp/swap
cd /run/systemd && rm -rf oomd.conf.d system/load.slice.d
systemctl daemon-reload; systemctl reset-failed
"""
SWAP = "fallocate -l 256M /var/tmp/swap && chmod 600 /var/tmp/swap && mkswap -q /var/tmp/swap && swapon /var/tmp/swap"
"""systemd-oomd kills only where the kernel looks for pages to free, which without swap it does not find in a heap."""
THRASH = '''
"""Take MIB, and use all of it over and over again, for SECONDS."""
import sys, time

pieces = [bytearray(b"Z") * (1 << 20) for _ in range(int(sys.argv[1]))]
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    for piece in pieces:
        piece[::4096] = piece[::4096]
'''
OOMD_KILLS = "journalctl -u systemd-oomd --since=@{since} -q -o cat --no-pager | grep -c 'Killed /load.slice/' || true"


async def test_memory_comes_before_systemd_oomd_acts(host: Host) -> None:
    """A load grows to three times the VM; first one that is held below its need, to see that systemd-oomd does act."""
    since = (await host.shell(VM, "date +%s")).strip()
    kills = OOMD_KILLS.format(since=since)
    unit = "systemd-run --quiet --slice=load.slice --unit={} --collect --wait {} sh -c '{}'"
    await host.shell(VM, OOMD)
    try:
        held_back = await host.python(VM, THRASH, 200, 40)
        await host.shell(VM, SWAP)
        await host.shell(VM, unit.format("held-back", "-p MemoryHigh=60M", held_back), 60, check=False)
        await host.shell(VM, "swapoff /var/tmp/swap")
        assert int(await host.shell(VM, kills)) == 1, "a load that stalls on its own limit is killed"
        grow = await host.python(VM, loads.GROW, 1536, 100, 5, "/run/vm-test/grown")
        await host.shell(VM, unit.format("grow", "", grow), 90)
        grown = json.loads(await host.shell(VM, "cat /run/vm-test/grown"))
        print(f"beside systemd-oomd: {grown}")
        assert grown["mib"] >= 1530
        assert int(await host.shell(VM, kills)) == 1, "none more"
    finally:
        await host.shell(VM, OOMD_ENDS, 60, check=False)


# ---- sensors -------------------------------------------------------------------------------------


async def test_both_lanes_of_the_sensors_agree_across_hotplug(host: Host) -> None:
    async with host.busy(VM, 4):
        await converges(host, "4 CPUs online", lambda look: look.cpus(VM) == 4)
        found = json.loads(await host.shell(VM, await host.guestd_python(VM, SENSORS)))
        await converges(host, "4 CPUs online", lambda look: look.cpus(VM) == 4)
    every, without = [0, 1, 2, 3], [0, 1, 3]
    assert [look["cpus"] for look in found["looks"]] == [[every] * 3, [without] * 3, [every] * 3]
    assert all(look["counters"] and look["total"] and look["available"] for look in found["looks"]), found
    # Windows of 1 s for root; what others get differs from kernel to kernel, but is no error that guestd does not know.
    assert found["as_root"] == [0, 0, 0]
    assert set(found["as_nobody"]) <= {0, 1, 13}


async def test_kernel_events_that_overflow_are_a_rescan(host: Host) -> None:
    await host.shell(VM, "systemctl stop systemd-udevd-control.socket systemd-udevd-kernel.socket systemd-udevd")
    try:
        found = json.loads(await host.shell(VM, await host.guestd_python(VM, OVERFLOW)))
    finally:
        await host.shell(VM, "systemctl start systemd-udevd-control.socket systemd-udevd-kernel.socket systemd-udevd")
    print(found)
    assert found["before"] == ["cpu"]
    assert "rescan" in found["during"]
    assert found["after"] == ["cpu"]


# ---- memory, once more ------------------------------------------------------------------------------


async def test_a_kernel_that_onlines_to_its_own_zones(host: Host) -> None:
    """The last one: what of it is free again depends on what the kernel put there."""
    await host.shell(VM, f"echo online > {POLICY}")
    try:
        assert (await check(host))["auto_online_blocks"]["value"].startswith("online (the kernel onlines new blocks")
        zones = await breathe(host)
    finally:
        await host.shell(VM, f"echo offline > {POLICY}")
    assert sum(zones.values()) >= 3
