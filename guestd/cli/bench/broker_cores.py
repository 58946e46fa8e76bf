"""The broker's core alone, without I/O: the allocator, and the machine with guests that answer at once."""

import gc
import random
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from guestd.broker.core.actions import Action, Observe, RequestMemory, RequestVcpus, Send
from guestd.broker.core.allocate import Claim, Pool
from guestd.broker.core.ledger import HostCapacity
from guestd.broker.core.machine import BrokerMachine
from guestd.model.guest import Capability, Identity
from guestd.model.messages import Ack, AckStatus, Demand, Grant, Hello, Reclaim, Urgency, Usable
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import MIB, MILLICORES_PER_VCPU
from guestd.model.vm import VmState, VmStatus
from guestd.sim import swarm
from guestd.sim.instances import random_claims

_TICK_SECONDS = 0.005  # as long as the engine collects what happens together
_PERIOD_SECONDS = 10.0
_CAPABLE = frozenset({Capability.CPU_ONLINE, Capability.MEMORY_ONLINE, Capability.VIRTIO_MEM})
_FLOOR = Resources(1000, 256 * MIB)


def solves(count: int, rounds: int = 40) -> dict[str, Any]:
    """Seconds that a full solve of both kinds takes, bursts and idle tax included, where there is not enough for all.

    `again` is after one claim changed, as in a running broker; `first` is of new pools, without a level to look near.
    """
    claims = {kind: random_claims(count, kind, seed=1) for kind in Kind}
    capacities = {kind: sum(_ceiling(claim) for claim in claims[kind].values()) * 6 // 10 for kind in Kind}
    first, again = [], []
    for _ in range(5):
        pools = {kind: Pool(kind, 0.75 if kind is Kind.MEMORY else 0.0) for kind in Kind}
        for kind in Kind:
            for name, claim in claims[kind].items():
                pools[kind].put(name, claim)
        first.append(_solve(pools, capacities))
    random_ = random.Random(1)  # noqa: S311 - the same changes each time
    names = sorted(claims[Kind.CPU])
    for _ in range(rounds):
        for kind in Kind:
            name = random_.choice(names)
            claim = claims[kind][name]
            pools[kind].put(name, replace(claim, demand=claim.max if claim.demand < claim.max else claim.max // 4))
        again.append(_solve(pools, capacities))
    return {
        "guests": count,
        "first_p50_seconds": statistics.median(first),
        "again_p50_seconds": statistics.median(again),
        "again_max_seconds": max(again),
    }


def _ceiling(claim: Claim) -> int:
    return max(claim.min, min(claim.demand, max(claim.max, claim.burst)))


def _solve(pools: dict[Kind, Pool], capacities: dict[Kind, int]) -> float:
    began = time.perf_counter()
    for kind, pool in pools.items():
        pool.solve(capacities[kind], capacities[kind] + capacities[kind] // 20)
    return time.perf_counter() - began


@dataclass(slots=True)
class _Guest:
    """What answers the machine in place of a VM and its daemon."""

    name: str
    kind: Kind
    vm: VmState
    session: int = 0
    sequence: int = 0
    needed: Resources = swarm.MIN
    waiting: bool = False

    @property
    def usable(self) -> Usable:
        memory = self.vm.memory_plugged_bytes
        return Usable(self.vm.vcpus, self.vm.vcpus, memory, memory, 128 * MIB)

    def demand(self) -> Demand:
        self.sequence += 1
        return Demand(self.sequence, self.needed, _FLOOR, 1 << 40, Urgency.NORMAL, (), self.usable)

    def toggle(self) -> None:
        """Want the other amount."""
        low, high = swarm.MIN, swarm.MIN + swarm.STEP
        up = self.needed.get(self.kind) == low.get(self.kind)
        self.needed = low.with_(self.kind, (high if up else low).get(self.kind))
        self.waiting = True


class Cores:
    """A `BrokerMachine` and its guests; only what the machine itself takes is timed."""

    def __init__(self, count: int) -> None:
        before = _rss_bytes()
        low, high = swarm.MIN, swarm.MAX
        host = HostCapacity(Resources(high.cpu_millicores * count, high.memory_bytes * count), Resources(), Resources())
        self.machine = BrokerMachine(host, 1, heartbeat_seconds=30.0)
        boot = swarm.BOOT
        state = VmState(
            status=VmStatus.RUNNING,
            vcpus=boot.cpu_millicores // MILLICORES_PER_VCPU,
            vcpus_max=high.cpu_millicores // MILLICORES_PER_VCPU,
            boot_memory_bytes=boot.memory_bytes,
            memory_plugged_bytes=boot.memory_bytes,
            memory_held_bytes=boot.memory_bytes,
            memory_min_bytes=boot.memory_bytes,
            memory_max_bytes=high.memory_bytes,
            memory_unit_bytes=2 * MIB,
        )
        kinds = list(Kind)
        self.now, self.seconds = 1000.0, 0.0
        self.batches: list[float] = []
        self.done = 0
        self.guests = {}
        self._actions: list[Action] = []
        for index in range(count):
            guest = _Guest(swarm.guest_name(index), kinds[index % 2], state)
            self.guests[guest.name] = guest
            self.machine.add_guest(guest.name, Limits(low, high))
            self.machine.on_vm_state(guest.name, state, self.now)
            hello = Hello(1, 1, Identity(index.to_bytes(16, "big"), 1, "bench", guest.name, "", _CAPABLE), guest.usable)
            guest.session, _ = self.machine.on_connected(guest.name, hello, self.now)
            self.machine.on_demand(guest.name, guest.session, guest.demand(), self.now)
        while self._tick([]):
            pass
        gc.collect()
        self.bytes_per_guest = (_rss_bytes() - before) / count

    def run(self, seconds: float) -> None:
        """Let every guest change its demand once a period, for so long of virtual time."""
        random_ = random.Random(1)  # noqa: S311 - the same load each time
        order = list(self.guests.values())
        random_.shuffle(order)
        self.seconds, self.done = 0.0, 0
        self.batches.clear()
        owed, at = 0.0, 0
        for _ in range(round(seconds / _TICK_SECONDS)):
            owed += len(order) * _TICK_SECONDS / _PERIOD_SECONDS
            changing = [order[(at + more) % len(order)] for more in range(int(owed))]
            at, owed = at + len(changing), owed - len(changing)
            self._tick(changing)

    def _tick(self, changing: list[_Guest]) -> bool:
        """One round of the engine; whether the machine wanted anything."""
        self.now += _TICK_SECONDS
        answers = [answer for action in self._actions if (answer := self._answer(action)) is not None]
        for guest in changing:
            guest.toggle()
        began = time.perf_counter()
        for guest in changing:
            self.machine.on_demand(guest.name, guest.session, guest.demand(), self.now)
        for guest, told in answers:
            if isinstance(told, Ack):
                self.machine.on_ack(guest.name, guest.session, told, self.now)
            else:
                self.machine.on_vm_state(guest.name, told, self.now)
        self._actions = self.machine.next_actions(self.now)
        took = time.perf_counter() - began
        self.seconds += took
        self.batches.append(took)
        return bool(self._actions)

    def _answer(self, action: Action) -> tuple[_Guest, Ack | VmState] | None:
        guest = self.guests[action.guest]
        match action:
            case RequestVcpus():
                guest.vm = replace(guest.vm, vcpus=action.count)
            case RequestMemory():
                amount = action.amount_bytes
                guest.vm = replace(guest.vm, memory_plugged_bytes=amount, memory_held_bytes=amount)
            case Observe():
                pass
            case Send(message=Grant() | Reclaim() as order):
                covers = isinstance(order, Grant) and order.kind is guest.kind
                if covers and guest.waiting and order.amount == guest.needed.get(order.kind):
                    guest.waiting = False
                    self.done += 1
                return guest, Ack(order.id, order.kind, AckStatus.DONE, order.amount, guest.usable)
            case _:
                return None
        return guest, guest.vm


def machine(count: int, seconds: float = 25.0) -> dict[str, Any]:
    """What the machine takes for `count` guests, each with a change of demand every 10 s."""
    cores = Cores(count)
    cores.run(seconds)
    batches = sorted(cores.batches)
    return {
        "guests": count,
        "bytes_per_guest": cores.bytes_per_guest,
        "grants": cores.done,
        "grants_per_core_second": cores.done / cores.seconds,
        "share_of_a_core": cores.seconds / seconds,
        "batch_p50_seconds": batches[len(batches) // 2],
        "batch_p99_seconds": batches[len(batches) * 99 // 100],
    }


def _rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
