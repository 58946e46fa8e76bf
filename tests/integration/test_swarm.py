"""Guests that are simulated by the dozen, against the real broker in a process of its own."""

import asyncio
import signal

import pytest

from guestd.cli.bench.broker_rig import BenchError, BrokerRig, pss_bytes
from guestd.model.units import MILLICORES_PER_VCPU
from guestd.sim import swarm
from guestd.sim.bound import BoundTo
from guestd.sim.core_guest import CoreGuest

_GUESTS = 30


async def test_a_swarm_is_served_measured_and_served_again_after_a_kill() -> None:
    async with BrokerRig(_GUESTS) as rig:
        await rig.start_broker()
        await rig.start_load()
        await rig.settled()
        truth = await rig.link.truth()
        for index in range(_GUESTS):
            state = truth[swarm.guest_name(index)]
            assert state.vcpus * MILLICORES_PER_VCPU == swarm.MIN.cpu_millicores
            assert state.memory_held_bytes == swarm.MIN.memory_bytes
        await rig.link.lows_from_now()

        waits = await rig.load(do="steady", seconds=2.0, period_seconds=2.0, seed=1)
        assert len(waits["up_seconds"]) == _GUESTS
        assert waits["missed"] == 0
        grown = [request for request in await rig.link.log() if request.method == "request_memory"]
        assert {request.amount for request in grown} == {
            swarm.MIN.memory_bytes,
            swarm.MIN.memory_bytes + swarm.STEP.memory_bytes,
        }

        before = rig.broker.pid
        killed_at = await rig.kill_broker()
        assert rig.broker.returncode == -signal.SIGKILL
        await rig.start_broker()
        assert await rig.settled() > killed_at
        assert rig.broker.pid != before
        assert pss_bytes(rig.broker.pid) > 0
        held = {name: state.memory_held_bytes for name, state in (await rig.link.truth()).items()}
        assert held[swarm.guest_name(1)] == swarm.MIN.memory_bytes + swarm.STEP.memory_bytes
        lows = await rig.link.lows()
        for name in map(swarm.guest_name, range(_GUESTS)):
            vcpus, memory = lows[name]
            assert (vcpus * MILLICORES_PER_VCPU, memory) >= (swarm.MIN.cpu_millicores, swarm.MIN.memory_bytes), name
            assert memory >= swarm.MIN.memory_bytes, name


async def test_a_flood_is_cut_off_and_the_others_are_served() -> None:
    async with BrokerRig(_GUESTS) as rig:
        await rig.start_broker()
        await rig.start_load()
        await rig.settled()
        waits, flood = await asyncio.gather(
            rig.load(do="steady", seconds=2.0, period_seconds=2.0, seed=1), rig.flood(_GUESTS, 2.0)
        )
        assert flood["messages"] > 200
        assert flood["streams"] > 1, "nobody ended its stream"
        assert len(waits["up_seconds"]) == _GUESTS
        assert waits["missed"] == 0


async def test_without_a_broker_nobody_is_served() -> None:
    async with BrokerRig(3) as rig:
        await rig.start_load()
        with pytest.raises(BenchError, match="3 of 3 guests were not served"):
            await rig.settled(seconds=0.5)


async def test_a_guest_with_the_production_daemon_follows_its_load() -> None:
    async with BrokerRig(1) as rig:
        config = (rig.root / "broker.toml").read_text()
        config = config.replace(f"cid = {swarm.FIRST_CID}\n", f'vsock_path = "{rig.root}/vsock"\n')
        (rig.root / "broker.toml").write_text(config)
        await rig.start_broker()
        await rig.ready()
        guest = CoreGuest(rig.link, swarm.guest_name(0), rig.root / "vsock_4747", hold_seconds=1.5)
        await guest.start()
        guest.load.tasks = 3.0
        async with asyncio.timeout(30):
            while len(guest.kernel.online_cpus) < 3:  # noqa: ASYNC110 - a kernel tells nobody
                await asyncio.sleep(0.05)
        assert (await rig.link.truth())[guest.name].vcpus == 3
        await guest.stop()


def test_a_channel_is_bound_where_it_is_told() -> None:
    assert int(BoundTo("x")) != int(BoundTo("x"))
