"""A guest's machine with a kernel around it, of 4 CPUs and 8 memory blocks."""

from collections.abc import Iterable
from typing import TypeVar

from guestd.guest.core.actions import Action, Do, Rescan, Say, Settings, TakeSample
from guestd.guest.core.machine import GuestMachine
from guestd.guest.core.ops import BlockOp, BlockTarget, CpuOp, HandResult, HandStatus, HookOp, Op, TrimOp
from guestd.guest.core.setbacks import Key
from guestd.model.guest import BlockState, Capability, Identity, Inventory, MemoryBlock, NodeZones, Sample
from guestd.model.messages import Demand, Grant, OrderId, Reclaim, ReclaimStage, Welcome
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Resources
from guestd.model.units import GIB, MIB

T = TypeVar("T")
BLOCK = 128 * MIB
ALL = frozenset({Capability.CPU_ONLINE, Capability.MEMORY_ONLINE, Capability.VIRTIO_MEM, Capability.PSI})
SETTINGS = Settings()
HEARTBEAT_SECONDS = 10.0


def of(kind: type[T], actions: Iterable[Action]) -> list[T]:
    return [action for action in actions if isinstance(action, kind)]


def said(kind: type[T], actions: Iterable[Action]) -> list[T]:
    return [action.message for action in actions if isinstance(action, Say) and isinstance(action.message, kind)]


def ops(actions: Iterable[Action]) -> list[Op]:
    """What is done to CPUs and blocks."""
    return [op for action in of(Do, actions) for op in action.ops if isinstance(op, CpuOp | BlockOp)]


def hooks(actions: Iterable[Action]) -> list[HookOp]:
    return [op for action in of(Do, actions) for op in action.ops if isinstance(op, HookOp)]


def trims(actions: Iterable[Action]) -> list[TrimOp]:
    return [op for action in of(Do, actions) for op in action.ops if isinstance(op, TrimOp)]


class One:
    """A guest of 4 present CPUs and so many present blocks, of which some are online."""

    def __init__(
        self,
        cpus: int = 1,
        blocks: int = 4,
        capabilities: Iterable[Capability] = ALL,
        present: int = 8,
        held: Iterable[Key] = (),
        ballooned_bytes: int = 0,
    ) -> None:
        self.now, self.ballooned_bytes = 100.0, ballooned_bytes
        self.cpus, self.blocks, self.pinned = set(range(cpus)), set(range(blocks)), frozenset[int]()
        self.kernel_free = GIB  # bytes
        self.present = set(range(present))  # blocks, online or not
        self.movable = set[int]()  # blocks in ZONE_MOVABLE
        self.used_bytes, self.memory_some_us, self.refaults, self.epoch = 100 * MIB, 0, 0, 3
        self.free_bytes, self.runnable = 8 * BLOCK, 0
        self.demand: Demand | None = None  # said last
        self.hooks_say: str | None = "none"  # None: nothing, for now
        self.machine = GuestMachine(Identity(bytes(16), 1, capabilities=frozenset(capabilities)), self.now)
        self.machine.on_held(frozenset(held))
        self.look()

    def look(self) -> list[Action]:
        """Feed it what is there."""
        blocks = tuple(
            MemoryBlock(index, BlockState.ONLINE if index in self.blocks else BlockState.OFFLINE, index in self.movable)
            for index in sorted(self.present)
        )
        numbers = frozenset(range(4))
        zones = (NodeZones(0, GIB, self.kernel_free, 0),)
        inventory = Inventory(numbers, numbers, frozenset(self.cpus), self.pinned, BLOCK, blocks, zones)
        self.machine.on_inventory(inventory, self.now)
        self.sample()
        return self.machine.next_actions(self.now)

    def sample(self) -> None:
        total = len(self.blocks) * BLOCK - 48 * MIB - self.ballooned_bytes
        busy = dict.fromkeys(self.cpus, 1.0)
        fields = {"cpu_busy_seconds": busy, "memory_total_bytes": total, "refaults": self.refaults}
        fields |= {"memory_available_bytes": total - self.used_bytes, "memory_some_us": self.memory_some_us}
        fields |= {"runnable": self.runnable, "cpu_some_us": round(self.now * 1e6) if self.runnable else 0}
        sample = sample_of(**fields, memory_free_bytes=min(self.free_bytes, total - self.used_bytes))
        self.machine.on_sample(sample, self.now)

    def welcome(self, epoch: int = 3) -> list[Action]:
        self.epoch = epoch
        limits = Resources(1000, 512 * MIB), Resources(4000, 2 * GIB)
        self.machine.on_welcome(Welcome(1, "a", epoch, HEARTBEAT_SECONDS, *limits), self.now)
        return self.step()

    def step(self, seconds: float = 0.0) -> list[Action]:
        """What it does, now or a while later, with samples and scans as it asks for them."""
        self.now += seconds
        done: list[Action] = []
        for _ in range(6):
            actions = self.machine.next_actions(self.now)
            done += actions
            if of(Rescan, actions):
                more = self.look()
                actions = [*actions, *more]
                done += more
            elif of(TakeSample, actions):
                self.sample()
            for message in said(Demand, actions):
                self.demand = message
            for op in hooks(actions) if self.hooks_say is not None else []:
                self.machine.on_result(HandResult(op, HandStatus.OK, state=self.hooks_say), self.now)
        return done

    def order(self, order: Grant | Reclaim) -> list[Action]:
        self.machine.on_order(order, self.now)
        return self.step()

    def result(self, op: Op, status: HandStatus = HandStatus.OK, number: int = 0) -> list[Action]:
        """The helper says what became of an operation, and the kernel shows it."""
        if status is HandStatus.OK:
            if isinstance(op, CpuOp):
                (self.cpus.add if op.online else self.cpus.discard)(op.number)
            elif isinstance(op, BlockOp):
                (self.blocks.discard if op.target is BlockTarget.OFFLINE else self.blocks.add)(op.index)
        self.machine.on_result(HandResult(op, status, number, 0.01), self.now)
        return self.step()

    def needed_millicores(self) -> int:
        assert self.demand is not None
        return self.demand.needed.cpu_millicores

    def hooked(self, op: HookOp, word: str, status: HandStatus = HandStatus.OK) -> list[Action]:
        """The hooks answer."""
        self.machine.on_result(HandResult(op, status, 0, 0.01, word), self.now)
        return self.step()


def sample_of(**fields: object) -> Sample:
    busy = fields["cpu_busy_seconds"]
    assert isinstance(busy, dict)
    base = {
        "cpu_idle_seconds": dict.fromkeys(busy, 0.0),
        "cpu_steal_seconds": 0.0,
        "runnable": 0,
        "cpu_some_us": 0,
        "memory_some_us": 0,
        "memory_full_us": 0,
        "memory_total_bytes": GIB,
        "memory_available_bytes": GIB,
        "swap_used_bytes": 0,
        "refaults": 0,
    }
    return Sample(**{**base, **fields})  # type: ignore[arg-type]


def grant(kind: Kind, amount: int, request: int = 1, revision: int = 1, epoch: int = 3) -> Grant:
    return Grant(OrderId(epoch, request, revision), kind, amount)


def reclaim(kind: Kind, amount: int, request: int = 1, revision: int = 1, seconds: float = 5.0) -> Reclaim:
    return Reclaim(OrderId(3, request, revision), kind, amount, ReclaimStage.ASK, seconds, Reason("t", "t"))


# ---- grants --------------------------------------------------------------------------------------
