"""What the broker promises beyond plugging, in one VM: fractions of a CPU, parked vCPUs, bursts that end."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import loads
import pytest
import pytest_asyncio
from host import GuestSpec, Host, Look, converges, rests

from guestd.lab.image import GuestImage
from guestd.lab.qemu import MIB
from guestd.model.resources import Kind

pytestmark = [pytest.mark.vm, pytest.mark.timeout(480), pytest.mark.asyncio(loop_scope="module")]

VM = "arb"
MAX_BYTES = 1024 * MIB
BURST_BYTES = 1792 * MIB
# 20 s of the whole burst, and most of it back within a minute.
SPEC = GuestSpec(
    cpu_max=2,
    memory_max_bytes=MAX_BYTES,
    vm_max_bytes=BURST_BYTES,
    memory=f"burst = {BURST_BYTES}, burst_credit = {20 * 768 * MIB}, burst_refill = {256 * MIB}",
    park_cpus=True,
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host(guest_image: GuestImage) -> AsyncIterator[Host]:
    async with Host(guest_image, {VM: SPEC}) as host:
        await rests(host, 60)
        yield host
    left = list(Path("/sys/fs/cgroup").glob(f"**/guestd-{VM}"))
    assert left == [], "the broker clears up behind a VM that has ended"


async def cpu_seconds(host: Host) -> float:
    """CPU time that the VM's vCPU threads have had on the host."""
    machine = host.machines[VM]
    threads: Any = await machine.query("query-cpus-fast")
    ticks = 0
    for thread in threads:
        stat = Path(f"/proc/{machine.pid}/task/{thread['thread-id']}/stat").read_text()
        fields = stat.rpartition(") ")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def share_of_a_cpu(host: Host, seconds: float) -> float:
    before, begun = await cpu_seconds(host), time.monotonic()
    await asyncio.sleep(seconds)
    return (await cpu_seconds(host) - before) / (time.monotonic() - begun)


async def test_parked_vcpus_stay_plugged_and_come_back_at_once(host: Host) -> None:
    async with host.busy(VM, 2):
        plugged = await host.until("2 CPUs", lambda look: look.views[VM].resource(Kind.CPU).onlined == 2000)
        await asyncio.sleep(2)  # all of them are there to be ended

    def parked_one(look: Look) -> bool:
        """Plugged, offline in the guest, and its time is others'."""
        offline = VM not in look.facts or look.facts[VM].cpus_online == {0}
        cpu = look.views[VM].resource(Kind.CPU)
        return look.held[VM].vcpus == 2 and offline and (cpu.quota, cpu.reserved) == (1000, 1000)

    await converges(host, "one is parked", parked_one, 60)
    async with host.busy(VM, 2):
        parked = await host.until("2 CPUs again", lambda look: look.views[VM].resource(Kind.CPU).onlined == 2000)
        await asyncio.sleep(2)
        look = await host.look()
        assert look.held[VM].vcpus == 2
        assert look.views[VM].resource(Kind.CPU).reserved == 2000
    await rests(host, 60)
    print(f"second CPU online after {plugged:.2f} s by plugging, after {parked:.2f} s from parking")


async def test_a_quarter_of_a_cpu_is_a_quarter_and_the_guest_hears_of_it(host: Host) -> None:
    async with host.busy(VM, 1):
        await host.guestctl("set-limits", VM, "--cpu-min", "250m", "--cpu-max", "250m")
        await host.until("a quarter", lambda look: look.views[VM].resource(Kind.CPU).quota == 250)
        await host.until("held back", lambda look: look.views[VM].resource(Kind.CPU).throttled_permille > 0)
        share = await share_of_a_cpu(host, 6)
        said = await host.until(
            "the guest is told",
            lambda look: any(reason.code == "cpu-throttled" for reason in look.views[VM].demand_reasons),
        )
        look = await host.look()
        assert look.views[VM].resource(Kind.CPU).reserved == 250
    print(f"250 millicores: {share * 1000:.0f} used on the host; the guest said so {said:.1f} s later")
    await host.guestctl("set-limits", VM, "--reset")
    assert share == pytest.approx(0.25, rel=0.1)
    await rests(host, 60)


HOOK = "/etc/guestd/hooks.d/10-ending"
ENDING = """#!/bin/sh
[ "$GUESTD_EVENT" = burst-ending ] || exit 0
echo "$GUESTD_KIND $GUESTD_BEFORE $GUESTD_AFTER $GUESTD_DEADLINE_SECONDS" >> /run/vm-test/ending
"""
"""What hooks are told of a burst's end."""


async def test_a_burst_is_lent_announced_ended_and_overdue_while_it_is_kept(host: Host) -> None:
    def memory(look: Look) -> tuple[int, bool]:
        one = look.views[VM].resource(Kind.MEMORY)
        return one.reserved, one.overdue

    await host.put(VM, HOOK, ENDING)
    await host.shell(VM, f"chmod 755 {HOOK}; rm -f /run/vm-test/ending")
    grow = await host.python(VM, loads.GROW, 1000, 60, 60, "/run/vm-test/burst")
    async with host.load(VM, grow):
        lent = await host.until("more than max", lambda look: memory(look)[0] > MAX_BYTES)
        look = await host.look()
        assert look.views[VM].resource(Kind.MEMORY).burst > 0
        over = await host.until("overdue", lambda look: memory(look)[1], 60)
        assert memory(await host.look())[0] <= BURST_BYTES
        log = host.broker_log
        assert "its burst ends in" in log
        assert log.index("its burst ends in") < log.index("its burst credit is used up: overdue")
    back = await converges(host, "given back", lambda look: memory(look)[0] <= MAX_BYTES and not memory(look)[1], 90)
    assert await host.machines[VM].oom_kills() == 0
    told = (await host.shell(VM, f"cat /run/vm-test/ending; rm {HOOK}")).splitlines()
    kind, before, after, seconds = told[0].split()
    assert (kind, int(after)) == ("memory", MAX_BYTES)
    assert MAX_BYTES < int(before) <= BURST_BYTES
    assert 1 <= int(seconds) <= 10
    print(f"burst lent after {lent:.1f} s, overdue {over:.1f} s later, back {back:.1f} s after the load ended")
    await rests(host, 60)
