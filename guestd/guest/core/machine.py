"""The guest's decisions: events in, actions out, no clock and no I/O.

The law:

1. What the guest does to itself follows only from the broker's newest orders and from what is there:
   no broker, no change. A lost message or event only delays (a timer looks again).
2. An order of an older epoch or revision is answered STALE and changes nothing; the same request
   again gets the stored answer again.
3. Every order is answered: in whole, in part, or refused, with what was achieved, before its deadline.
4. A CPU or block that fails is left alone for a while, longer each time.
5. Samples come often while something moves (`quick_seconds`), seldom while nothing does (`calm_seconds`), and
   hardly ever (`rest_seconds`) once nothing has moved for long and the shell says at once when something does.

Weak spot: memory is not given back block by block here, the virtio-mem driver does that; the guest
only says how low it can go.
"""

from dataclasses import dataclass, field

from guestd.guest.core import plan
from guestd.guest.core.estimate import CpuEstimator, CpuNeed, MemoryEstimator, MemoryNeed
from guestd.guest.core.ops import BlockOp, CpuOp, HandResult, HandStatus, Op
from guestd.model.guest import Capability, Identity, Inventory, Sample
from guestd.model.messages import (
    Ack,
    AckStatus,
    Demand,
    Grant,
    GuestMessage,
    Heartbeat,
    Hello,
    Reason,
    Reclaim,
    RefusalReason,
    Throttle,
    Urgency,
    Usable,
    Welcome,
)
from guestd.model.resources import Kind, Resources
from guestd.model.units import MIB, MILLICORES_PER_VCPU, format_size, round_up

PROTOCOL = 1


@dataclass(frozen=True, slots=True)
class Settings:
    """Times in seconds."""

    quick_seconds: float = 0.05
    calm_seconds: float = 0.25
    rest_seconds: float = 5.0
    quick_for_seconds: float = 0.5  # after something moved
    calm_for_seconds: float = 8.0  # likewise; longer than a lower need must hold to be believed
    stir_bytes: int = 4 * MIB  # so much more memory in use than at the sample before: something moves
    reconcile_seconds: float = 10.0  # look at CPUs and blocks even if no event came
    reconcile_moving_seconds: float = 0.5  # the same while an order is open
    grant_answer_seconds: float = 20.0
    reclaim_tries: int = 3
    backoff_seconds: float = 2.0  # for a CPU or block that failed; doubled each time
    backoff_max_seconds: float = 300.0
    op_deadline_seconds: float = 10.0


@dataclass(frozen=True, slots=True)
class TakeSample:
    """Read the load now."""


@dataclass(frozen=True, slots=True)
class Rescan:
    """Read CPUs and blocks now."""


@dataclass(frozen=True, slots=True)
class Do:
    """Have the helper do these, in order."""

    ops: tuple[Op, ...]
    deadline_seconds: float


@dataclass(frozen=True, slots=True)
class Say:
    """Send to the broker."""

    message: GuestMessage


@dataclass(frozen=True, slots=True)
class Log:
    """One decision in words."""

    text: str


Action = TakeSample | Rescan | Do | Say | Log


@dataclass(slots=True)
class _Order:
    """The newest order of one kind."""

    order: Grant | Reclaim
    deadline: float
    answer: Ack | None = None
    tries: int = 0


@dataclass(slots=True)
class _Setback:
    """A CPU or block that failed."""

    until: float
    count: int
    result: HandResult


@dataclass(slots=True)
class _Link:
    """What was said on the present stream."""

    welcome: Welcome
    sequence: int = 0
    said: Demand | None = None
    said_at: float = 0.0


@dataclass(slots=True)
class _State:
    inventory: Inventory = field(default_factory=Inventory)
    sample: Sample | None = None
    cpu: CpuNeed | None = None
    memory: MemoryNeed | None = None
    kernel_bytes: int | None = None


class GuestMachine:
    """One VM seen from inside. Times are seconds of one monotonic clock."""

    def __init__(self, identity: Identity, now: float, settings: Settings | None = None) -> None:
        self.identity = identity
        self.settings = settings or Settings()
        self.cpu_estimator = CpuEstimator()
        self.memory_estimator = MemoryEstimator()
        self._state = _State()
        self._link: _Link | None = None
        self._granted: dict[Kind, int] = {}
        self._orders: dict[Kind, _Order] = {}
        self._epoch = 0
        self._revision: dict[Kind, int] = {}
        self._doing: set[Op] = set()
        self._setbacks: dict[tuple[type, int], _Setback] = {}
        self._next_sample = now
        self._quick_until = 0.0
        self._calm_until = now + self.settings.calm_for_seconds
        self._watched = False
        self._next_scan = now
        self._scanning = False  # a look was asked for: what is known of CPUs and blocks is out of date
        self._out: list[Action] = []
        self._usable = Usable()
        self._news = True  # something to say may have come up since `_speak` last looked
        self._throttled: Reason | None = None

    # ---- what happened ---------------------------------------------------------------------------

    def hello(self) -> Hello:
        """What to say first on a new stream."""
        last = max(self._revision.values(), default=0)
        return Hello(PROTOCOL, PROTOCOL, self.identity, self.usable, last)

    def on_welcome(self, welcome: Welcome, now: float) -> None:
        """The broker accepted. Another epoch starts counting orders anew (a lower one: it lost its journal)."""
        self._link = _Link(welcome)
        if welcome.epoch != self._epoch:
            self._epoch = welcome.epoch
            self._revision.clear()
            self._orders.clear()
        self._out.append(Log(f"served as {welcome.guest!r} by broker epoch {welcome.epoch}"))
        self._look_soon(now)

    def on_disconnected(self) -> None:
        """The stream is gone: everything stays as it is."""
        self._link = None

    def on_order(self, order: Grant | Reclaim, now: float) -> None:
        """A grant or a reclaim (rule 2)."""
        known = self._orders.get(order.kind)
        if known is not None and known.order.id == order.id and known.answer is not None:
            self._say(known.answer)
            return
        if order.id.epoch != self._epoch or order.id.revision < self._revision.get(order.kind, 0):
            self._say(self._ack(order, AckStatus.REFUSED, RefusalReason.STALE, "an older epoch or revision"))
            return
        self._revision[order.kind] = order.id.revision
        if isinstance(order, Grant):
            self._granted[order.kind] = order.amount
            self._orders[order.kind] = _Order(order, now + self.settings.grant_answer_seconds)
        else:
            tries = known.tries if known is not None and known.order.id == order.id else 0
            self._orders[order.kind] = _Order(order, now + order.remaining_seconds, tries=tries)
        self._moved(now)
        self._look_soon(now)

    def on_throttle(self, throttle: Throttle) -> None:
        """The host says whether its CPU quota holds this VM back, which shows nowhere in here."""
        if throttle.throttled_permille:
            quota = Kind.CPU.show(throttle.quota_millicores)
            text = f"held back by a quota of {quota} in {throttle.throttled_permille / 10:g} % of the time"
            self._throttled = Reason("cpu-throttled", text)
            self._out.append(Log(text))
        else:
            self._throttled = None
        self._news = True

    def on_sample(self, sample: Sample, now: float) -> None:
        """The load now."""
        state = self._state
        state.sample = sample
        self._learn_kernel_bytes(sample)
        online = max(1, len(state.inventory.cpus_online) or len(sample.cpu_busy_seconds))
        state.cpu = self.cpu_estimator.update(sample, online, now)
        isolated = state.inventory.block_bytes if self._shrinking_memory else 0
        before = state.memory
        state.memory = self.memory_estimator.update(sample, state.kernel_bytes or 0, isolated, now)
        self._refresh_usable()
        stirred = before is not None and state.memory.used_bytes - before.used_bytes > self.settings.stir_bytes
        if state.cpu.waiting or state.memory.moving or state.memory.pressure or stirred:
            self._moved(now)

    def on_watched(self, watched: bool) -> None:
        """Whether `on_pressure` comes at once when tasks begin to wait or memory is being used up (rule 5)."""
        self._watched = watched

    def on_pressure(self, now: float) -> None:
        """A PSI trigger fired, or free memory fell: look closely for a moment."""
        self._quick_until = max(self._quick_until, now + self.settings.quick_for_seconds)
        self._next_sample = min(self._next_sample, now)

    def on_hotplug(self, now: float) -> None:
        """Something came or went (a hint): look."""
        self._look_soon(now)

    def on_inventory(self, inventory: Inventory, now: float) -> None:
        """CPUs and blocks as they are."""
        self._state.inventory, self._scanning = inventory, False
        self._refresh_usable()
        open_orders = any(order.answer is None for order in self._orders.values())
        pause = self.settings.reconcile_moving_seconds if open_orders else self.settings.reconcile_seconds
        self._next_scan = now + pause

    def on_result(self, result: HandResult, now: float) -> None:
        """What became of an operation."""
        self._doing.discard(result.op)
        key = _key(result.op)
        if result.ok or result.status is HandStatus.GONE:
            self._setbacks.pop(key, None)
        else:
            count = self._setbacks[key].count + 1 if key in self._setbacks else 1
            pause = min(self.settings.backoff_max_seconds, self.settings.backoff_seconds * 2 ** min(count - 1, 20))
            self._setbacks[key] = _Setback(now + pause, count, result)
            self._out.append(Log(f"{result}; leaving it alone for {pause:g} s"))
        self._look_soon(now)

    # ---- what to do ------------------------------------------------------------------------------

    @property
    def usable(self) -> Usable:
        """What programs can use now."""
        return self._usable

    def _refresh_usable(self) -> None:
        inventory, sample = self._state.inventory, self._state.sample
        self._news = True
        self._usable = Usable(
            len(inventory.cpus_online) or (len(sample.cpu_busy_seconds) if sample else 0),
            len(inventory.cpus_present),
            inventory.memory_online_bytes,
            sample.memory_total_bytes if sample else 0,
            inventory.block_bytes,
        )

    @property
    def _shrinking_memory(self) -> bool:
        """The broker was told how low it can go, and has not said yet that it is done."""
        current = self._orders.get(Kind.MEMORY)
        if current is None or not isinstance(current.order, Reclaim) or current.answer is None:
            return False
        return current.answer.status is not AckStatus.REFUSED

    @property
    def settled(self) -> bool:
        """No order is open and nothing is being done."""
        return not self._doing and all(order.answer is not None for order in self._orders.values())

    def next_actions(self, now: float) -> list[Action]:
        """What to do now, in this order. Calling again at once returns nothing new."""
        if now >= self._next_scan:
            self._next_scan = now + self.settings.reconcile_seconds
            self._scanning = True
            self._out.append(Rescan())
        if now >= self._next_sample:
            self._next_sample = now + self._pace(now)
            self._out.append(TakeSample())
        if not self._scanning:
            self._work(now)
            for order in self._orders.values():
                self._answer(order, now)
        self._speak(now)
        actions, self._out = self._out, []
        return actions

    def _moved(self, now: float) -> None:
        self._quick_until = now + self.settings.quick_for_seconds
        self._calm_until = now + self.settings.calm_for_seconds

    def _pace(self, now: float) -> float:
        """Seconds from one sample to the next."""
        if now < self._quick_until:
            return self.settings.quick_seconds
        at_rest = self._watched and self.settled and now >= self._calm_until
        return self.settings.rest_seconds if at_rest else self.settings.calm_seconds

    def wake_at(self, now: float) -> float:
        """When to call `next_actions` again if nothing happens before."""
        deadlines = [order.deadline for order in self._orders.values() if order.answer is None]
        pauses = [setback.until for setback in self._setbacks.values() if setback.until > now]
        return min([self._next_sample, self._next_scan, *deadlines, *pauses])

    def _work(self, now: float) -> None:
        """Begin what the orders call for and is not under way."""
        if Capability.CPU_ONLINE in self.identity.capabilities:
            self._begin(self._cpu_ops(now))
        if Capability.MEMORY_ONLINE in self.identity.capabilities:
            self._begin(self._block_ops(now))

    def _begin(self, ops: list[CpuOp] | list[BlockOp]) -> None:
        if ops:
            self._doing.update(ops)
            self._out.append(Do(tuple(ops), self.settings.op_deadline_seconds))

    def _cpu_ops(self, now: float) -> list[CpuOp]:
        inventory, current = self._state.inventory, self._orders.get(Kind.CPU)
        busy = self._busy(CpuOp, now)
        if current is not None and isinstance(current.order, Reclaim):
            if current.answer is not None or current.tries >= self.settings.reclaim_tries:
                return []
            ops = plan.cpus_to_offline(inventory, -(-current.order.amount // MILLICORES_PER_VCPU), busy)
            current.tries += 1 if ops else 0
            return ops
        granted = self._granted.get(Kind.CPU)
        return [] if granted is None else plan.cpus_to_online(inventory, -(-granted // MILLICORES_PER_VCPU), busy)

    def _block_ops(self, now: float) -> list[BlockOp]:
        current, granted = self._orders.get(Kind.MEMORY), self._granted.get(Kind.MEMORY)
        if granted is None or (current is not None and isinstance(current.order, Reclaim)):
            return []
        return plan.blocks_to_online(self._state.inventory, granted, self._busy(BlockOp, now))

    def _busy(self, kind: type, now: float) -> set[int]:
        """Numbers of CPUs or blocks being worked on, or left alone after a failure."""
        doing = {_key(op) for op in self._doing}
        resting = {key for key, setback in self._setbacks.items() if setback.until > now}
        return {number for op_type, number in doing | resting if op_type is kind}

    def _answer(self, current: _Order, now: float) -> None:
        if current.answer is not None:
            return
        order = current.order
        if Capability.DRY_RUN in self.identity.capabilities:
            answer: Ack | None = self._ack(order, AckStatus.REFUSED, RefusalReason.DRY_RUN, "started with --dry-run")
        elif isinstance(order, Grant):
            answer = self._grant_answer(order, now >= current.deadline)
        elif order.kind is Kind.CPU:
            answer = self._cpu_reclaim_answer(order, current, now)
        else:
            answer = self._memory_reclaim_answer(order)
        if answer is not None:
            current.answer = answer
            if isinstance(order, Reclaim) and answer.status is not AckStatus.REFUSED:
                self._granted[order.kind] = answer.achieved
            self._say(answer)

    def _grant_answer(self, order: Grant, late: bool) -> Ack | None:
        missing = order.amount - self._online(order.kind)
        slack = 0 if order.kind is Kind.CPU else max(0, self._state.inventory.block_bytes - 1)
        capability = Capability.CPU_ONLINE if order.kind is Kind.CPU else Capability.MEMORY_ONLINE
        if missing <= slack:
            return self._ack(order, AckStatus.DONE)
        if capability not in self.identity.capabilities:
            return self._ack(order, AckStatus.PARTIAL, RefusalReason.UNSUPPORTED, "no way to bring it online here")
        if not late:
            return None
        failed = self._last_failure(order.kind)
        if failed is None:
            return self._ack(
                order, AckStatus.PARTIAL, RefusalReason.TIMEOUT, f"{order.kind.show(missing)} did not come"
            )
        return self._ack(order, AckStatus.PARTIAL, RefusalReason.FAILED, str(failed))

    def _cpu_reclaim_answer(self, order: Reclaim, current: _Order, now: float) -> Ack | None:
        left = self._online(Kind.CPU)
        if left <= order.amount:
            return self._ack(order, AckStatus.DONE)
        if Capability.CPU_ONLINE not in self.identity.capabilities:
            return self._ack(order, AckStatus.REFUSED, RefusalReason.UNSUPPORTED, "CPUs cannot be taken offline here")
        if any(isinstance(op, CpuOp) for op in self._doing):
            return None if now < current.deadline else self._partial(order, left, RefusalReason.TIMEOUT)
        stuck = not plan.cpus_to_offline(self._state.inventory, -(-order.amount // MILLICORES_PER_VCPU), set())
        if stuck:
            return self._partial(order, left, RefusalReason.PINNED)
        out_of_tries = current.tries >= self.settings.reclaim_tries
        if out_of_tries or now >= current.deadline or self._last_failure(Kind.CPU) is not None:
            return self._partial(order, left, RefusalReason.BUSY)
        return None

    def _partial(self, order: Reclaim, left: int, reason: RefusalReason) -> Ack:
        before = self._granted.get(order.kind, left)
        status = AckStatus.PARTIAL if left < before else AckStatus.REFUSED
        failed = self._last_failure(order.kind)
        return self._ack(order, status, reason, str(failed) if failed else f"{order.kind.show(left)} must stay")

    def _memory_reclaim_answer(self, order: Reclaim) -> Ack | None:
        need = self._state.memory
        if need is None:
            return None
        if need.pressure:
            return self._ack(order, AckStatus.REFUSED, RefusalReason.PRESSURE, need.reason.text, retry=5.0)
        lowest = max(order.amount, need.floor_bytes)
        if lowest <= order.amount:
            return self._ack(order, AckStatus.DONE, achieved=order.amount)
        had = self._granted.get(Kind.MEMORY, self._state.inventory.memory_online_bytes)
        text = f"{need.reason.text}; cannot go below {format_size(need.floor_bytes)}"
        if lowest >= had:
            return self._ack(order, AckStatus.REFUSED, RefusalReason.IN_USE, text, retry=5.0)
        return self._ack(order, AckStatus.PARTIAL, RefusalReason.IN_USE, text, achieved=lowest)

    def _ack(
        self,
        order: Grant | Reclaim,
        status: AckStatus,
        refusal: RefusalReason | None = None,
        text: str = "",
        achieved: int | None = None,
        retry: float = 0.0,
    ) -> Ack:
        done = self._online(order.kind) if achieved is None else achieved
        return Ack(order.id, order.kind, status, done, self.usable, refusal, text, retry)

    def _online(self, kind: Kind) -> int:
        if kind is Kind.CPU:
            return self.usable.vcpus_online * MILLICORES_PER_VCPU
        return self._state.inventory.memory_online_bytes

    def _last_failure(self, kind: Kind) -> HandResult | None:
        op_type = CpuOp if kind is Kind.CPU else BlockOp
        failed = [entry for (entry_type, _), entry in self._setbacks.items() if entry_type is op_type]
        return max(failed, key=lambda entry: entry.until).result if failed else None

    # ---- what to say -----------------------------------------------------------------------------

    def _speak(self, now: float) -> None:
        """Say what is needed when it differs from what was said, and again with each heartbeat: what was lost only
        delays.
        """
        link, cpu, memory = self._link, self._state.cpu, self._state.memory
        if link is None or cpu is None or memory is None:
            return
        due = link.said is not None and now - link.said_at >= link.welcome.heartbeat_seconds
        if due:
            self._say(Heartbeat(self.usable))
        elif link.said is not None and not self._news:
            return
        self._news = False
        inventory = self._state.inventory
        acceptable = plan.acceptable_bytes(inventory) if inventory.block_bytes else 1 << 50
        demand = Demand(
            sequence=link.sequence + 1,
            needed=Resources(cpu.needed_millicores, memory.needed_bytes),
            floor=Resources(MILLICORES_PER_VCPU, memory.floor_bytes),
            acceptable_memory_bytes=acceptable,
            urgency=_worse(cpu.urgency, memory.urgency),
            reasons=tuple(reason for reason in (cpu.reason, memory.reason, self._throttled) if reason),
            usable=self.usable,
            memory_used_bytes=memory.used_bytes,
            cpu_used_millicores=cpu.used_millicores,
            under_memory_pressure=memory.pressure,
        )
        if due or link.said is None or _differs(link.said, demand, inventory.block_bytes or 128 * MIB):
            link.sequence, link.said, link.said_at = demand.sequence, demand, now
            self._say(demand)

    def _say(self, message: GuestMessage) -> None:
        if self._link is not None:
            self._out.append(Say(message))

    def _look_soon(self, now: float) -> None:
        self._next_scan = min(self._next_scan, now)

    def _learn_kernel_bytes(self, sample: Sample) -> None:
        """What the kernel took at boot: the least of (memory held - MemTotal) seen at rest.

        At rest, because blocks and MemTotal do not change in the same instant, and a virtio-mem block
        or the balloon holds pages back while it is being emptied.
        """
        inventory = self._state.inventory
        if not self.settled or self._shrinking_memory or not inventory.block_bytes:
            return
        held = min(inventory.memory_online_bytes, self._granted.get(Kind.MEMORY, inventory.memory_online_bytes))
        taken = max(0, held - sample.memory_total_bytes)
        known = self._state.kernel_bytes
        self._state.kernel_bytes = taken if known is None else min(known, taken)


def _key(op: Op) -> tuple[type, int]:
    return (type(op), op.number if isinstance(op, CpuOp) else op.index)


def _worse(one: Urgency, other: Urgency) -> Urgency:
    order = list(Urgency)
    return max(one, other, key=order.index)


def _differs(said: Demand, now: Demand, block_bytes: int) -> bool:
    """Whether the broker could decide otherwise: other whole units, other urgency, another inventory."""

    def units(demand: Demand) -> tuple[int, ...]:
        return (
            round_up(demand.needed.cpu_millicores, MILLICORES_PER_VCPU),
            round_up(demand.needed.memory_bytes, block_bytes),
            round_up(demand.floor.memory_bytes, block_bytes),
        )

    if units(said) != units(now) or said.under_memory_pressure != now.under_memory_pressure:
        return True
    if len(said.reasons) != len(now.reasons):
        return True
    scarce = now.acceptable_memory_bytes < now.needed.memory_bytes + block_bytes
    return said.usable != now.usable and (scarce or said.usable.vcpus_online != now.usable.vcpus_online)
