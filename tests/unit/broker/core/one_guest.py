"""A broker's machine with one guest, told what to be told, and what to read off its actions."""

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

from guestd.broker.core.actions import (
    Action,
    Send,
)
from guestd.broker.core.ledger import HostCapacity
from guestd.broker.core.machine import BrokerMachine
from guestd.broker.core.track import Timing, Track
from guestd.model.guest import Capability, Identity
from guestd.model.messages import Ack, AckStatus, Demand, Grant, Heartbeat, Hello, Reclaim, Urgency, Usable
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB, MIB
from guestd.model.vm import VmState, VmStatus

T = TypeVar("T")
BLOCK = 128 * MIB
BOOT = 512 * MIB
LIMITS = Limits(Resources(1000, BOOT), Resources(4000, 2560 * MIB))
USABLE = Usable(1, 1, BOOT, BOOT - 48 * MIB, BLOCK)
ALL = frozenset({Capability.CPU_ONLINE, Capability.MEMORY_ONLINE})
TIMING = Timing()
VM = VmState(VmStatus.RUNNING, 1, 1, 4, BOOT, BOOT, BOOT, BOOT, BOOT + 2 * GIB, 2 * MIB)


def vm(cpus: int = 1, memory: int = BOOT, held: int | None = None, **more: object) -> VmState:
    return replace(VM, vcpus=cpus, memory_plugged_bytes=memory, memory_held_bytes=held or memory, **more)


def hello(generation: int = 1, boot: int = 1, capabilities: Iterable[Capability] = ALL, protocol: int = 1) -> Hello:
    identity = Identity(bytes([boot]) * 16, generation, "", "", "", frozenset(capabilities))
    return Hello(protocol, protocol, identity, USABLE)


class One:
    """A machine with one guest `a` (and more on demand), told what to be told."""

    def __init__(
        self,
        host: HostCapacity | None = None,
        timing: Timing = TIMING,
        connect: bool = True,
        state: VmState = VM,
        epoch: int = 7,
    ) -> None:
        self.now = 1000.0
        self.machine = BrokerMachine(host or HostCapacity(Resources(8000, 8 * GIB)), epoch, 10.0, timing)
        self.machine.add_guest("a", LIMITS)
        self.session, self.sequence = 0, 0
        if connect:
            self.machine.on_vm_state("a", state, self.now)
            self.connect()
            self.step()

    def connect(self, answer: Hello | None = None) -> None:
        self.session, self.welcome = self.machine.on_connected("a", answer or hello(), self.now)
        self.sequence = 0

    def step(self, seconds: float = 0.0) -> list[Action]:
        """What it does now, or after a while in which the guest was heard of."""
        if seconds:
            self.now += seconds
            self.machine.on_heartbeat("a", self.session, Heartbeat(), self.now)
        return self.machine.next_actions(self.now)

    def demand(
        self,
        cpu: int = 1000,
        memory: int = BOOT,
        floor: int = 256 * MIB,
        pressure: bool = False,
        acceptable: int = 1 << 40,
    ) -> list[Action]:
        self.sequence += 1
        reasons = (Reason("test", "test"),)
        demand = Demand(
            self.sequence, Resources(cpu, memory), Resources(1000, floor), acceptable, Urgency.NORMAL, reasons, USABLE
        )
        self.machine.on_demand("a", self.session, replace(demand, under_memory_pressure=pressure), self.now)
        return self.step()

    def is_now(self, state: VmState) -> list[Action]:
        self.machine.on_vm_state("a", state, self.now)
        return self.step()

    def answer(self, order: Grant | Reclaim, status: AckStatus, achieved: int, **more: object) -> list[Action]:
        ack = Ack(order.id, order.kind, status, achieved, USABLE, **more)  # type: ignore[arg-type]
        self.machine.on_ack("a", self.session, ack, self.now)
        return self.step()

    def track(self, kind: Kind = Kind.CPU) -> Track:
        return self.machine.guests["a"].tracks[kind]

    @property
    def reserved(self) -> Resources:
        return self.machine.guests["a"].reserved

    def grown(self, cpus: int = 4, memory: int = BOOT) -> "One":
        """The VM has so much, the cool-down is over, and it is still wanted."""
        self.demand(cpus * 1000, memory)
        self.is_now(vm(cpus, memory))
        self.step(TIMING.cool_down_seconds + 1)
        assert self.reserved == Resources(cpus * 1000, memory)
        return self


def of(kind: type[T], actions: Iterable[Action]) -> list[T]:
    return [action for action in actions if isinstance(action, kind)]


def sent(actions: Iterable[Action]) -> list[Grant | Reclaim]:
    return [action.message for action in of(Send, actions)]


def reclaim(actions: Iterable[Action]) -> Reclaim:
    [message] = [message for message in sent(actions) if isinstance(message, Reclaim)]
    return message
