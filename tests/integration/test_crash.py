"""The real broker killed at every boundary of a grant's life, with resizes of several guests in flight.

The hypervisor lives in another process and keeps its VMs; the guests are production daemons on fake kernels, over real
sockets. After the kill the broker starts again on its journal, and an audit compares what it says with
what the hypervisor and the guests have: nothing lost, nothing doubled. One hypervisor serves all scenarios, several of
which run at once: most of their time is waiting.
"""

import asyncio
import contextlib
import shutil
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest
from broker_rig import short_directory
from process_rig import BrokerProcess, HypervisorProcess, answering

from guestd.broker import config as configuration
from guestd.broker.core.track import Timing
from guestd.broker.failpoint import VARIABLE, Failpoint
from guestd.model.errors import GuestdError
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB, MIB, MILLICORES_PER_VCPU
from guestd.model.view import GuestView, HostView, LimitsChange, ResizePhase
from guestd.model.vm import VmState
from guestd.sim.core_guest import CoreGuest
from guestd.sim.remote import HypervisorLink, VmSpec
from guestd.wire.client import BrokerClient

CAPACITY = Resources(8000, 4608 * MIB)
LOW, HIGH = Resources(1000, 512 * MIB), Resources(4000, 2 * GIB)
LIMITS = Limits(LOW, HIGH)
GUESTS = 3
ADDED = 2  # more, which come by calls
TIMING = Timing(
    plug_progress_seconds=2.0,
    ask_seconds=1.0,
    urge_seconds=1.0,
    overdue_seconds=1.0,
    unplug_progress_seconds=2.0,
    unplug_repeat_seconds=0.3,
    cool_down_seconds=0.3,
    retry_seconds=0.3,
    retry_max_seconds=1.0,
)
AT_ONCE = 8
STIR_SECONDS = 2.5
DEATH_SECONDS = 60.0
RECOVERY_SECONDS = 60.0
HOLD_SECONDS = 1.5  # for so long a lower need must last to be believed
REST_SECONDS = 2.0
BY_CALLS = {Failpoint.ADDING, Failpoint.ADDED, Failpoint.LIMITING, Failpoint.LIMITED}
# Which passages are deadly. The later ones lie well in the middle of grows and shrinks.
PASSAGES = {
    point: (1,) if point is Failpoint.STARTED else (1, 2) if point in BY_CALLS else (1, 20) for point in Failpoint
}


@dataclass
class World:
    """What all scenarios share."""

    hypervisor: HypervisorProcess
    link: HypervisorLink
    most: Counter[tuple[str, Kind]] = field(default_factory=Counter)  # the most that a scenario's VMs held together
    samples: int = 0
    in_flight: Counter[str] = field(default_factory=Counter)  # at the moment of a kill

    async def watch(self) -> None:
        """Sample what VMs hold, for ever."""
        while True:
            held: Counter[tuple[str, Kind]] = Counter()
            for name, state in (await self.link.truth()).items():
                tag, number = name.split("-")
                for kind in Kind:
                    held[tag, kind] += state.held(kind) if int(number) < GUESTS else 0
            for key, amount in held.items():
                self.most[key] = max(self.most[key], amount)
            self.samples += 1
            await asyncio.sleep(0.02)


@dataclass(frozen=True)
class Snapshot:
    """What there is of each guest, when everything has come to rest."""

    has: dict[str, Resources]
    limits: dict[str, Limits]


class Scenario:
    """A broker of its own, with VMs of its own on the shared hypervisor. `tag` begins their names."""

    def __init__(self, world: World, tag: str, root: Path) -> None:
        self.world, self.tag, self.root = world, tag, root
        self.names = [f"{tag}-{number}" for number in range(GUESTS)]
        self.to_add = [f"{tag}-{GUESTS + number}" for number in range(ADDED)]
        self.guests = {
            name: CoreGuest(world.link, name, root / f"{name}_{configuration.DEFAULT_PORT}", HOLD_SECONDS)
            for name in self.names
        }
        self.broker = BrokerProcess(root, world.hypervisor.socket, self._config(), TIMING)
        self.starts = 0

    def _config(self) -> str:
        text = (
            f"[host]\ncpus = {CAPACITY.cpu_millicores // 1000}\nmemory = {CAPACITY.memory_bytes}\n"
            f'[broker]\nstate_dir = "{self.root}/state"\nrun_dir = "{self.root}/run"\nheartbeat_seconds = 1\n'
        )
        for name in self.names:
            text += (
                f'[guests.{name}]\ncpu = {{ min = 1, max = 4 }}\nmemory = {{ min = "512MiB", max = "2GiB" }}\n'
                f'qmp_socket = "{self.root}/{name}.qmp"\nvsock_path = "{self.root}/{name}"\n'
            )
        return text

    async def run(self, point: Failpoint, passage: int) -> None:
        """Die there, come back, and be audited. The recovery is killed too: as early as can be, or when all is at rest
        and another one may change nothing.
        """
        try:
            await self._start({VARIABLE: f"{point}:{passage}"}, serving=False)
            for guest in self.guests.values():
                await guest.start()
            await self._stir_until_dead(point)
            await self._audit_journal()
            self._note_in_flight()
            self._rest()
            if passage == 1:
                await self._start({VARIABLE: Failpoint.STARTED}, serving=False)
                assert await self.broker.ended() == -9
            await self._start()
            first = await self._converged()
            self._audit_calls(point, passage, first)
            if passage == 1:
                return
            asked = await self._requests()
            await self.broker.kill()
            await self._start()
            again = await self._converged()
            assert again == first, f"before {first.has}, after {again.has}\n{self.broker.said[-2500:]}"
            assert await self._requests() == asked, "a broker that comes back to a settled host asks for nothing"
        finally:
            for guest in self.guests.values():
                await guest.stop()
            await self.broker.kill()

    async def _start(self, environment: dict[str, str] | None = None, serving: bool = True) -> None:
        self.starts += 1
        await self.broker.start(environment, serving)

    # ---- load ------------------------------------------------------------------------------------

    async def _stir_until_dead(self, point: Failpoint) -> None:
        """Change what guests need, and make calls, until the broker is dead."""
        stirring = asyncio.create_task(self._stir())
        calling = asyncio.create_task(self._call(point))
        try:
            assert await self.broker.ended(DEATH_SECONDS) == -9, self.broker.said[-2000:]
        except TimeoutError:
            pytest.fail(f"never came to {point}:\n{self.broker.said[-2000:]}")
        finally:
            stirring.cancel()
            calling.cancel()
            await asyncio.gather(stirring, calling, return_exceptions=True)

    async def _stir(self) -> None:
        for turn in count():
            for number, name in enumerate(self.names):
                busy = (number + turn) % GUESTS < 2
                self._load(name, 3.5 if busy else 0.2, (1500 if busy else 200) * MIB)
            await asyncio.sleep(STIR_SECONDS)

    def _load(self, name: str, tasks: float, memory_bytes: int) -> None:
        load = self.guests[name].load
        load.tasks, load.memory_bytes = tasks, memory_bytes

    def _rest(self) -> None:
        """What they need from now on, for good; all of it fits."""
        for number, name in enumerate(self.names):
            self._load(name, *((2.5, 800 * MIB), (0.2, 200 * MIB), (1.7, 1000 * MIB))[number])

    async def _call(self, point: Failpoint) -> None:
        """An operator at work."""
        async with BrokerClient(self.broker.run_dir) as client:
            await answering(client.host, "the broker", self.broker)
            await asyncio.sleep(STIR_SECONDS / 2)  # resizes are under way
            with contextlib.suppress(GuestdError):  # the broker dies of it
                for turn in range(ADDED):
                    if point in (Failpoint.ADDING, Failpoint.ADDED):
                        name = self.to_add[turn]
                        await client.add_guest(name, LIMITS, self.root / f"{name}.qmp", vsock_path=self.root / name)
                    elif point in BY_CALLS:
                        await client.set_limits(self.names[0], LimitsChange(cpu_weight=200 + turn))

    # ---- the audit -------------------------------------------------------------------------------

    async def _converged(self) -> Snapshot:
        """Wait until all is at rest and right, and stays so.

        :raise AssertionError: With what is not right, when it takes too long.
        """
        loop = asyncio.get_running_loop()
        end, rested_since = loop.time() + RECOVERY_SECONDS, loop.time()
        before: Snapshot | None = None
        async with BrokerClient(self.broker.run_dir) as client:
            while before is None or loop.time() - rested_since < REST_SECONDS:
                views = await client.guests()
                wrong, now = await self._wrong(client, views), _snapshot(views)
                if wrong or now != before:
                    before, rested_since = now, loop.time()
                assert loop.time() < end, f"{self.tag}: {wrong or 'no rest'}\n{self.broker.said[-3000:]}"
                await asyncio.sleep(0.1)
        return before

    async def _wrong(self, client: BrokerClient, views: tuple[GuestView, ...]) -> list[str]:
        """The audit: ledger against hypervisor against guests. Everything that is not as it should be."""
        truth = await self.world.link.truth()
        host = await client.host()
        wrong = [] if host.epoch == self.starts else [f"epoch {host.epoch} after {self.starts} starts"]
        for view in views:
            wrong += self._wrong_with(view, truth[view.name])
        return wrong + _wrong_in_sum(host, views)

    def _wrong_with(self, view: GuestView, vm: VmState) -> list[str]:
        name, wrong = view.name, []
        for kind in Kind:
            one, held = view.resource(kind), vm.held(kind)
            if one.reserved != held:
                wrong.append(f"{name} {kind}: {one.reserved} in the book, {held} held")
            # While there is plenty memory goes back by a quarter or more: what is kept of less is no debt.
            kept = one.target < one.reserved and 4 * (one.reserved - one.target) < one.reserved
            there = one.target == one.reserved or (kind is Kind.MEMORY and kept)
            if one.phase is not ResizePhase.IDLE or not there:
                wrong.append(f"{name} {kind}: {one.phase}, target {one.target}, reserved {one.reserved}")
            if name in self.guests and one.reserved < min(one.demand, HIGH.get(kind)):
                wrong.append(f"{name} {kind}: needs {one.demand}, has {one.reserved}")
        if name in self.guests:
            if not view.connected:
                wrong.append(f"{name}: not connected")
            kernel = self.guests[name].kernel
            if len(kernel.online_cpus) != vm.vcpus:
                wrong.append(f"{name}: {vm.vcpus} vCPUs, {len(kernel.online_cpus)} online")
            online = len(kernel.online_blocks) * 128 * MIB
            if online != vm.memory_plugged_bytes:
                wrong.append(f"{name}: {vm.memory_plugged_bytes} bytes plugged, {online} online")
        return wrong

    async def _audit_journal(self) -> None:
        """What the dead broker wrote is an upper bound of what the VMs hold, or are told to take."""
        for file in (self.root / "state").glob("journal.db*"):
            shutil.copy(file, self.root)
        database = sqlite3.connect(self.root / "journal.db")
        query = "SELECT guest, cpu_millicores, memory_bytes FROM reserved"
        rows = {name: Resources(cpu, memory) for name, cpu, memory in database.execute(query)}
        database.close()
        truth = await self.world.link.truth()
        for name in self.names:
            for kind in Kind:
                written = max(rows.get(name, Resources()).get(kind), LOW.get(kind))  # it boots with its minimum
                assert truth[name].held(kind) <= written, f"{name} {kind}: holds {truth[name]}, written {rows}"

    def _audit_calls(self, point: Failpoint, passage: int, found: Snapshot) -> None:
        """A call holds from the moment that the journal has it, and not before."""
        durable = passage if point in (Failpoint.ADDED, Failpoint.LIMITED) else passage - 1
        added = self.to_add[:durable] if point in (Failpoint.ADDING, Failpoint.ADDED) else []
        assert sorted(found.has) == sorted(self.names + added)
        weight = 100
        if point in (Failpoint.LIMITING, Failpoint.LIMITED) and durable:
            weight = 200 + durable - 1
        assert found.limits[self.names[0]].weight.cpu_millicores == weight

    async def _requests(self) -> int:
        """How many requests were made about these VMs."""
        return sum(one.vm.startswith(f"{self.tag}-") for one in await self.world.link.log())

    def _note_in_flight(self) -> None:
        """What was under way, by the last that the dead broker said of each guest and kind."""
        last: dict[tuple[str, str], str] = {}
        for line in self.broker.said.splitlines():
            subject, _, text = line.partition(": ")[2].partition(": ")
            name, _, kind = subject.partition(" ")
            last[name, kind] = text
        for text in last.values():
            self.world.in_flight["grow"] += text.startswith("growing to")
            self.world.in_flight["shrink"] += text.startswith("asking down")


def _snapshot(views: tuple[GuestView, ...]) -> Snapshot:
    has = {view.name: Resources(*(view.resource(kind).reserved for kind in Kind)) for view in views}
    return Snapshot(has, {view.name: view.limits for view in views})


def _wrong_in_sum(host: HostView, views: tuple[GuestView, ...]) -> list[str]:
    wrong = []
    for kind in Kind:
        charged = sum(max(view.resource(kind).reserved, view.limits.min.get(kind)) for view in views)
        if charged > CAPACITY.get(kind):
            wrong.append(f"{kind}: {charged} charged, {CAPACITY.get(kind)} there")
        if host.committed.get(kind) != sum(view.resource(kind).reserved for view in views):
            wrong.append(f"{kind}: committed {host.committed.get(kind)} is not the sum")
    return wrong


@contextlib.asynccontextmanager
async def world(tags: list[str]) -> AsyncIterator[World]:
    """One hypervisor with the VMs of all scenarios, watched."""
    specs = [
        VmSpec(
            name=f"{tag}-{number}",
            vcpus_max=8,
            device_bytes=4 * GIB,
            plug_rate=GIB,
            unplug_rate=GIB // 2,
            cpu_unplug_seconds=0.3,
            command_seconds=0.02,
        )
        for tag in tags
        for number in range(GUESTS + ADDED)
    ]
    with short_directory() as root:
        async with HypervisorProcess(root, specs) as hypervisor:
            made = World(hypervisor, hypervisor.link)
            watching = asyncio.create_task(made.watch())
            try:
                yield made
                assert not watching.done(), watching.exception()
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)


@pytest.mark.timeout(240)
async def test_a_broker_killed_at_every_boundary_loses_and_doubles_nothing() -> None:
    plan = [(point, passage) for point, passages in PASSAGES.items() for passage in passages]
    tags = [f"s{number:02}" for number in range(len(plan))]
    turn = asyncio.Semaphore(AT_ONCE)

    async def play(there: World, tag: str, point: Failpoint, passage: int) -> None:
        async with turn:
            with short_directory() as root:
                await asyncio.wait_for(Scenario(there, tag, root).run(point, passage), 120)

    async with world(tags) as there:
        played = await asyncio.gather(
            *(play(there, tag, *one) for tag, one in zip(tags, plan, strict=True)), return_exceptions=True
        )
        bad = {f"{point}:{passage}": end for (point, passage), end in zip(plan, played, strict=True) if end is not None}
        assert not bad, "\n".join(f"{name}: {type(error).__name__} {error}" for name, error in bad.items())
        for (tag, kind), most in there.most.items():
            assert most <= CAPACITY.get(kind), f"{tag} {kind}: VMs held {most} together"
        for one in await there.link.log():
            assert one.method != "request_vcpus" or one.amount * MILLICORES_PER_VCPU <= HIGH.cpu_millicores, one
            assert one.method != "request_memory" or one.amount <= HIGH.memory_bytes, one
        print(f"{len(plan)} kills, resizes in flight then: {dict(there.in_flight)}; {there.samples} samples of all VMs")
        assert min(there.in_flight["grow"], there.in_flight["shrink"]) >= 5, there.in_flight
