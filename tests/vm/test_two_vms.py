"""Two VMs that share a pool too small for both, with weights 3:1."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator

import loads
import pytest
import pytest_asyncio
from host import BLOCK_BYTES, GuestSpec, Host, Look, converges, rests

from guestd.lab.image import GuestImage
from guestd.lab.qemu import MIB
from guestd.model.resources import Kind

pytestmark = [pytest.mark.vm, pytest.mark.timeout(480), pytest.mark.asyncio(loop_scope="module")]

BIG, SMALL = "big", "small"
POOL_CPUS = 4
POOL_BYTES = 2560 * MIB


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(guest_image: GuestImage) -> AsyncIterator[Host]:
    guests = {
        BIG: GuestSpec(weight=300, cid=3, memory_max_bytes=2048 * MIB),
        SMALL: GuestSpec(weight=100, cid=4, memory_max_bytes=2048 * MIB),
    }
    async with Host(guest_image, guests, cpus=POOL_CPUS, memory_bytes=POOL_BYTES) as host:
        print("booted in", *(f"{machine.boot_seconds:.1f} s" for machine in host.machines.values()))
        yield host
        counts = {text: host.broker_log.count(text) for text in ("ended short", "must not shrink now", "overdue")}
        print(f"in all: {counts}")


@pytest_asyncio.fixture(loop_scope="module")
async def host(shared: Host) -> Host:
    """The host at rest."""
    print(f"at rest after {await rests(shared, 60):.1f} s")
    return shared


def demands(look: Look, kind: Kind, name: str) -> int:
    return look.views[name].resource(kind).demand


async def test_cpus_of_a_small_pool_are_split_by_weight(host: Host) -> None:
    async with host.busy(SMALL, 4):
        async with host.busy(BIG, 4):
            split = await converges(
                host,
                "3 CPUs for the one, 1 for the other, while both want 4",
                lambda look: (
                    (look.cpus(BIG), look.cpus(SMALL)) == (3, 1)
                    and all(demands(look, Kind.CPU, name) >= 2000 for name in (BIG, SMALL))
                ),
            )
        freed = await converges(
            host, "what the one gave back is the other's", lambda look: (look.cpus(BIG), look.cpus(SMALL)) == (1, 3)
        )
    back = await rests(host)
    print(f"CPUs: split 3:1 after {split:.1f} s, freed for the other after {freed:.1f} s, back after {back:.1f} s")


async def test_memory_of_a_small_pool_is_split_by_weight(host: Host) -> None:
    # Memory in use cannot be had back, so the one takes all there is first, and keeps less than that in use: with
    # headroom and what its kernel has for itself 1560 MiB need 1983 MiB, more than its share and less than all.
    fill_big = await host.python(BIG, loads.FILL, 0.93, 1560)
    fill_small = await host.python(SMALL, loads.FILL, 0.88, 1100)
    shares = POOL_BYTES * 3 // 4, POOL_BYTES // 4

    def split_by_weight(look: Look) -> bool:
        amounts = look.memory(BIG), look.memory(SMALL)
        wanted = demands(look, Kind.MEMORY, BIG), demands(look, Kind.MEMORY, SMALL)
        return amounts == shares and wanted[0] > shares[0] and wanted[1] > shares[1]

    async with host.load(BIG, fill_big) as session:
        all_free = POOL_BYTES - 512 * MIB
        await converges(host, "all that is free for the one", lambda look: look.memory(BIG) == all_free, 60)
        async with host.load(SMALL, fill_small):
            split = await converges(host, "1920 MiB for the one, 640 MiB for the other", split_by_weight, 60)
            begun = time.monotonic()
            await host.shell(BIG, f"pkill -9 -s {session}")
            freed = await host.until("the other gets more", lambda look: look.memory(SMALL) > shares[1])
            more = await converges(
                host,
                "what the one gave back is the other's as far as it needs it",
                lambda look: look.memory(BIG) < 512 * MIB + BLOCK_BYTES and look.memory(SMALL) >= 1280 * MIB,
            )
            took = time.monotonic() - begun
    back = await rests(host, 120)  # 1.4 GiB to give back, with two guests on the cores of one
    for name in (BIG, SMALL):
        assert await host.machines[name].oom_kills() == 0
    print(
        f"memory: split 3:1 after {split:.1f} s; the one idle, first block for the other after {freed:.1f} s,"
        f" settled {more:.1f} s later ({took:.1f} s), back after {back:.1f} s"
    )


async def test_a_guest_that_claims_anothers_name_gets_only_its_own(host: Host) -> None:
    before = await host.look()
    command = await host.guestd_python(SMALL, loads.LIAR, BIG, 777, 8)
    honest = host.broker_log.count("big: guest daemon")

    async with host.load(SMALL, f"{command} > /run/vm-test/lie"):
        claimed = await host.until("the claim is heard", lambda look: look.views[SMALL].hostname == BIG)
        grown = await host.until("the liar's own VM grows", lambda look: look.memory(SMALL) > 512 * MIB)
        look = await host.look()
        await host.machines[SMALL].console.run("while [ ! -s /run/vm-test/lie ]; do sleep 0.2; done", 30)
        result = json.loads(await host.shell(SMALL, "cat /run/vm-test/lie"))
    assert result["served as"] == SMALL
    big, small = look.views[BIG], look.views[SMALL]
    assert big.connected
    assert big.hostname == before.views[BIG].hostname != BIG
    assert big.revision == before.views[BIG].revision
    assert host.broker_log.count("big: guest daemon") == honest
    assert [big.resource(kind).reserved for kind in Kind] == [1000, 512 * MIB]
    for kind in Kind:
        assert small.resource(kind).reserved <= small.limits.max.get(kind)
    back = await rests(host, 60)
    print(f"a lie: heard after {claimed:.1f} s, believed for its own VM {grown:.1f} s later, undone after {back:.1f} s")
