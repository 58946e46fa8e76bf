"""The guest's decisions: events in, actions out, no clock and no I/O.

The law:

1. What the guest does to itself follows only from the broker's newest orders and from what is there:
   no broker, no change. A lost message or event only delays (a timer looks again).
2. An order of an older epoch or revision is answered STALE and changes nothing; the same request
   again gets the stored answer again (`orders`).
3. Every order is answered: in whole, in part, or refused, with what was achieved, before its deadline (`answers`).
   While CPUs and blocks cannot be read nothing is switched, and what is due is answered with that.
4. A CPU or block that fails is left alone for a while, longer each time (`setbacks`); what somebody else took
   offline is left alone for good (`others`).
5. Before anything is given back the hooks are asked, and memory is made free for what must move (`hooks`, `give`).
6. Samples come often while something moves (`quick_seconds`), seldom while nothing does (`calm_seconds`), and
   hardly ever (`rest_seconds`) once nothing has moved for long and the shell says at once when something does. That
   memory moves because a driver takes it away is no exception: sampled seldom then, a load that began meanwhile was
   killed before more was asked for.

Weak spot: what virtio-mem can really take is known only when its driver has tried.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

from guestd.guest.core import speak, take
from guestd.guest.core.actions import Action, Do, Log, Rescan, Say, Settings
from guestd.guest.core.giving import Giving, vcpus
from guestd.guest.core.hooks import Hooks
from guestd.guest.core.need_cpu import CpuEstimator
from guestd.guest.core.need_memory import MemoryEstimator
from guestd.guest.core.ops import BlockOp, BlockTarget, CpuOp, HandResult, HandStatus, HookOp, TrimOp
from guestd.guest.core.orders import Order
from guestd.guest.core.others import describe
from guestd.guest.core.pace import Pace
from guestd.guest.core.setbacks import Key, Setbacks, key_of
from guestd.guest.core.state import State
from guestd.model.guest import Capability, Identity, Inventory, Sample
from guestd.model.messages import (
    Ack,
    AckStatus,
    Grant,
    GrantStage,
    GuestMessage,
    Heartbeat,
    Hello,
    Reclaim,
    RefusalReason,
    Throttle,
    Usable,
    Welcome,
)
from guestd.model.reason import Reason
from guestd.model.resources import Kind

PROTOCOL = 1
_JUST_AFTER_SECONDS = 0.01


class GuestMachine:
    """One VM seen from inside. Times are seconds of one monotonic clock."""

    def __init__(self, identity: Identity, now: float, settings: Settings | None = None) -> None:
        self.identity = identity
        self.settings = settings or Settings()
        self.cpu_estimator = CpuEstimator()
        self.memory_estimator = MemoryEstimator()
        self.counters: Counter[str] = Counter()
        """How often what went wrong: for people."""
        setbacks = Setbacks(self.settings.backoff_seconds, self.settings.backoff_max_seconds)
        self._state = State(identity.capabilities, self.settings, setbacks, Hooks(self.settings))
        self._giving = Giving(self._state)
        self._pace = Pace(self.settings, now)
        self._link: speak.Link | None = None
        self._next_scan = now
        self._scanning = False  # a look was asked for: what is known of CPUs and blocks is out of date
        self._out: list[Action] = []
        self._news = True  # something to say may have come up since `_speak` last looked
        self._throttle: Throttle | None = None
        self._throttle_heard_at = now

    # ---- what happened ---------------------------------------------------------------------------

    def hello(self) -> Hello:
        """What to say first on a new stream."""
        return Hello(PROTOCOL, PROTOCOL, self.identity, self.usable, self._state.orders.last_revision)

    @property
    def held(self) -> frozenset[Key]:
        """What others took offline: left alone, also after a restart (`on_held`)."""
        return frozenset(self._state.others.held)

    def on_held(self, held: Collection[Key]) -> None:
        """What was held before this daemon began, said before the first look."""
        self._state.others.held = set(held)

    def on_identity(self, identity: Identity) -> None:
        """A driver came or went since the start. The broker hears of it by the next `hello`."""
        before, after = self.identity.capabilities, identity.capabilities
        self.identity = identity
        self._state.capabilities = after
        came, gone = (", ".join(sorted(one)) or "nothing" for one in (after - before, before - after))
        self._out.append(Log(f"offered here from now on: {came}; no longer: {gone}"))

    def on_welcome(self, welcome: Welcome, now: float) -> None:
        """The broker accepted. Another epoch starts counting orders anew (a lower one: it lost its journal)."""
        self._link = speak.Link(welcome)
        self._throttle = None
        self._state.see_memory_go(now)
        self._state.orders.begin_epoch(welcome.epoch)
        self._out.append(Log(f"served as {welcome.guest!r} by broker epoch {welcome.epoch}"))
        self._look_soon(now)

    def on_disconnected(self) -> None:
        """The stream is gone: everything stays as it is, and what was to be given back is kept."""
        self._link = None
        self._state.orders.drop_reclaims()

    def on_order(self, order: Grant | Reclaim, now: float) -> None:
        """A grant or a reclaim (rule 2)."""
        orders, answers = self._state.orders, self._state.answers(now)
        stored = orders.stored_answer(order)
        if stored is not None:
            self._say(stored)
            return
        if orders.is_stale(order):
            self._say(answers.stale(order))
            self._count(RefusalReason.STALE)
            return
        grants = isinstance(order, Grant)
        if not isinstance(order, Grant) or not order.burst:
            self._state.hooks.forget_ending(order.kind)
        seconds = self.settings.grant_answer_seconds if isinstance(order, Grant) else order.remaining_seconds
        self._state.see_memory_go(now)
        margin = min(self.settings.answer_margin_seconds, self.settings.answer_margin_share * seconds)
        orders.take(order, answers.online(order.kind), now + seconds, now + seconds - margin)
        if grants and order.stage is GrantStage.ENDING:
            left = order.remaining_seconds or 0.0
            self._tell(self._state.hooks.burst_ending(order.kind, order.amount, order.burst, left, now))
        self._pace.moved(now)
        self._pace.alarm(now)
        self._look_soon(now)

    def on_throttle(self, throttle: Throttle, now: float) -> None:
        """The host says whether its CPU quota holds this VM back, which shows nowhere in here: what that asks for is
        asked for now, at rest too.
        """
        before, self._throttle = self._throttle, throttle if throttle.throttled_permille else None
        self._throttle_heard_at = now
        if (self._throttle is None) is not (before is None):
            self._pace.alarm(now)
        if self._throttle is not None and before is None:
            quota = Kind.CPU.show(throttle.quota_millicores)
            share = throttle.throttled_permille / 10
            self._out.append(Log(f"held back by a quota of {quota} in {share:g} % of the time"))
        self._news = True

    def on_sample(self, sample: Sample, now: float) -> None:
        """The load now."""
        state = self._state
        if state.sample is not None and sample.oom_kills > state.sample.oom_kills:
            self.counters["oom-kills"] += sample.oom_kills - state.sample.oom_kills
            self._out.append(Log("the kernel killed a process for want of memory"))
        state.sample, state.sample_is_old = sample, False
        state.learn_kernel_bytes(sample)
        online = max(1, len(state.inventory.cpus_online) or len(sample.cpu_busy_seconds))
        self._forget_throttle(now)
        load = replace(sample, runnable=min(sample.runnable, online)) if state.hooks.are_at_work(now) else sample
        state.cpu = self.cpu_estimator.update(load, online, now, self._throttle)
        isolated = state.inventory.block_bytes if state.isolating else 0
        before = state.memory
        need = self.memory_estimator.update(sample, state.kernel_bytes or 0, isolated, now)
        unknown = state.unknown_bytes(sample)
        state.memory = replace(need, floor_bytes=need.floor_bytes + unknown) if unknown else need
        state.refresh_usable()
        self._news = True
        stirred = before is not None and abs(state.memory.used_bytes - before.used_bytes) > self.settings.stir_bytes
        if state.cpu.waiting or state.memory.moving or state.memory.pressure or stirred:
            self._pace.moved(now)
        if state.cpu.falls_at is not None and state.cpu.falls_at > now:
            self._pace.soon(state.cpu.falls_at + _JUST_AFTER_SECONDS)

    def _forget_throttle(self, now: float) -> None:
        """The broker says it again with each heartbeat: that it is over may have been lost."""
        if self._link is None or now - self._throttle_heard_at > 2.5 * self._link.welcome.heartbeat_seconds:
            self._throttle = None

    def on_failed_sample(self, now: float, blind: bool) -> None:
        """The load cannot be read: tried again soon, also at rest.

        :param blind: It has been so for long: what was known is too old to be said, or to give anything back for.
        """
        self._pace.soon(now + self.settings.retry_sample_seconds)
        if blind:
            self._state.cpu = self._state.memory = None

    def on_watched(self, watched: bool) -> None:
        """Whether `on_pressure` comes at once when tasks begin to wait or memory is being used up (rule 6)."""
        self._pace.watched = watched

    def on_pressure(self, now: float) -> None:
        """A PSI trigger fired, or free memory fell: look closely for a moment."""
        self._pace.alarm(now)

    def on_hotplug(self, now: float) -> None:
        """Something came or went (a hint): look. While a driver takes memory away, block after block, not at each: the
        CPU time is the application's and the driver's.
        """
        expected = self._state.shrinking_memory and self._state.settled
        self._look_soon(now + self.settings.reconcile_moving_seconds if expected else now)

    def on_inventory(self, inventory: Inventory, now: float) -> None:
        """CPUs and blocks as they are."""
        state = self._state
        taken = state.others.look(inventory, state.ours(now), state.see_memory_go(now))
        if taken:
            self.counters["taken-by-others"] += len(taken)
            self._out.append(Log(f"{describe(taken)} taken offline by something else: leaving it alone"))
        state.touched.clear()
        state.setbacks.look(inventory)
        state.inventory, self._scanning = inventory, False
        blocks = frozenset(block.index for block in inventory.blocks)
        state.first_blocks = blocks if state.first_blocks is None else state.first_blocks & blocks
        state.refresh_usable()
        self._news = True
        self._next_scan = now + self._scan_pause

    def on_result(self, result: HandResult, now: float) -> None:
        """What became of an operation."""
        op = result.op
        self._state.doing.discard(op)
        if isinstance(op, HookOp):
            self._on_hooks(op, result, now)
        elif isinstance(op, TrimOp):
            if not result.ok:
                self.counters["failed-trims"] += 1
            self._giving.on_trim(result)
            self._sample_soon(now)
        else:
            self._state.touched.add(key_of(op))
            if isinstance(op, BlockOp) and op.target is BlockTarget.OFFLINE:
                self._sample_soon(now)
            if result.ok or result.status is HandStatus.GONE:
                self._state.setbacks.forget(key_of(op))
            else:
                self.counters["failed-operations"] += 1
                pause = self._state.setbacks.failed(key_of(op), result, now)
                self._out.append(Log(f"{result}; leaving it alone for {pause:g} s"))
        self._look_soon(now)

    def _on_hooks(self, op: HookOp, result: HandResult, now: float) -> None:
        failures = self._state.hooks.failures
        self._state.hooks.on_result(op, result, now)
        self._tell(self._state.hooks.waiting(op.kind, now))
        if self._state.hooks.failures > failures:
            self.counters["failed-hooks"] += 1
            self._out.append(Log(f"{op.event}: {result.state or result.status}; going on without it"))
        elif result.state not in ("", "none"):
            self._out.append(Log(f"hooks, {op.event}, {op.kind} {op.kind.show(op.after)}: {result.state}"))
        self._news = True
        self._sample_soon(now)

    # ---- what to do ------------------------------------------------------------------------------

    @property
    def usable(self) -> Usable:
        """What programs can use now."""
        return self._state.usable

    @property
    def settled(self) -> bool:
        """No order is open and nothing is being done."""
        return self._state.settled

    def next_actions(self, now: float) -> list[Action]:
        """What to do now, in this order. Calling again at once returns nothing new."""
        cannot_be_read = self._scanning  # what was asked for before has come to nothing
        if now >= self._next_scan:
            self._next_scan = now + self._scan_pause
            self._scanning = True
            self._out.append(Rescan())
        link = self._link
        beat = link is not None and self._can_speak and (link.said is None or link.heartbeat_due(now))
        if beat:
            self._pace.refresh(now)
        sample = self._pace.due(now, self.settled, self.usable.vcpus_online <= 1)
        if sample is not None:
            self._out.append(sample)
        if not self._scanning:
            for kind in Kind:
                self._work(kind, now)
            for order in self._state.orders.all():
                self._answer(order, now)
            self._tell_of_more(now)
        elif cannot_be_read:
            for order in self._state.orders.open:
                self._answer_unread(order, now)
        if not (beat and sample):  # else it is said with what the sample shows
            self._speak(now)
        actions, self._out = self._out, []
        return actions

    def wake_at(self, now: float) -> float:
        """When to call `next_actions` again if nothing happens before."""
        due = [at for order in self._state.orders.open for at in (order.late_at, order.deadline) if at > now]
        if self._link is not None and self._can_speak:
            due.append(max(self._link.heartbeat_at, now + _JUST_AFTER_SECONDS))
        return min([self._pace.next_at, self._next_scan, *due, *self._state.setbacks.ends(now)])

    @property
    def _can_speak(self) -> bool:
        """Whether it is known what is needed."""
        return self._state.cpu is not None and self._state.memory is not None

    @property
    def _scan_pause(self) -> float:
        return self.settings.reconcile_moving_seconds if self._state.orders.open else self.settings.reconcile_seconds

    def _work(self, kind: Kind, now: float) -> None:
        """Begin what the orders call for and is not under way."""
        capability = Capability.CPU_ONLINE if kind is Kind.CPU else Capability.MEMORY_ONLINE
        current, seconds = self._state.orders.of(kind), self.settings.op_deadline_seconds
        if current is not None and isinstance(current.order, Reclaim):
            if Capability.DRY_RUN not in self.identity.capabilities:
                self._give(current, current.order, now)
        elif kind in self._state.orders.granted and capability in self.identity.capabilities:
            self._begin(self._cpus_to_take(now) if kind is Kind.CPU else self._blocks_to_take(now), seconds)

    def _give(self, current: Order, order: Reclaim, now: float) -> None:
        giving, settings = self._giving, self.settings
        self._tell(giving.next_hook(current, order, now))
        if order.kind is Kind.CPU:
            if self._begin(giving.next_cpus(current, order, now), settings.op_deadline_seconds):
                current.tries += 1
            return
        trim = giving.next_trim(current, order, now)
        if trim is not None:
            left = current.late_at - now
            self._begin([trim], max(0.1, min(settings.trim_seconds, left)))
        self._begin(giving.next_block(current, order, now), settings.op_deadline_seconds)

    def _begin(self, ops: Sequence[CpuOp | BlockOp | TrimOp], seconds: float) -> bool:
        """Begin as many of them as may be under way at once, of one sort; whether that was any."""
        under_way = sum(1 for op in self._state.doing if ops and type(op) is type(ops[0]))
        ops = ops[: max(0, self.settings.ops_at_once - under_way)]
        if ops:
            self._state.doing.update(ops)
            self._out.append(Do(tuple(ops), seconds))
        return bool(ops)

    def _cpus_to_take(self, now: float) -> list[CpuOp]:
        state = self._state
        return take.cpus_to_online(state.inventory, vcpus(state.orders.granted[Kind.CPU]), state.busy(CpuOp, now))

    def _blocks_to_take(self, now: float) -> list[BlockOp]:
        state = self._state
        under_way = [op for op in state.doing if isinstance(op, BlockOp)]
        granted = state.orders.granted[Kind.MEMORY]
        return take.blocks_to_online(state.inventory, granted, state.busy(BlockOp, now), under_way)

    def _tell(self, op: HookOp | None) -> None:
        if op is not None:
            self._state.doing.add(op)
            self._out.append(Do((op,), op.seconds + 3.0))

    def _tell_of_more(self, now: float) -> None:
        """The hooks hear of what came, when it is there."""
        for current in self._state.orders.all():
            order, answer = current.order, current.answer
            if isinstance(order, Grant) and answer is not None and answer.status is not AckStatus.REFUSED:
                amount, step = min(order.amount, answer.achieved), self._state.step(order.kind)
                self._tell(self._state.hooks.after_grow(order.kind, amount, step, now))

    def _answer(self, current: Order, now: float) -> None:
        if current.answer is not None:
            return
        order, answers = current.order, self._state.answers(now)
        if Capability.DRY_RUN in self.identity.capabilities:
            answer: Ack | None = answers.dry_run(order)
        elif isinstance(order, Grant):
            answer = answers.grant(order, now >= current.deadline)
        elif order.kind is Kind.CPU:
            answer = self._giving.cpu_answer(order, current, now)
        else:
            answer = self._giving.memory_answer(order, current, now)
        if answer is not None:
            self._close(current, answer)

    def _answer_unread(self, current: Order, now: float) -> None:
        """Its time is nearly over, and there is no telling what is online."""
        if now >= (current.deadline if isinstance(current.order, Grant) else current.late_at):
            self._close(current, self._state.answers(now).unread(current.order))

    def _close(self, current: Order, answer: Ack) -> None:
        order, current.answer = current.order, answer
        if answer.refusal is not None:
            self._count(answer.refusal)
        if isinstance(order, Reclaim) and answer.refusal is not RefusalReason.VETO:
            self._state.hooks.agreed_in_time(order.kind)
        if isinstance(order, Reclaim) and answer.status is not AckStatus.REFUSED:
            self._state.orders.granted[order.kind] = answer.achieved
        self._say(answer)

    def _count(self, refusal: RefusalReason) -> None:
        self.counters[f"refused-{refusal}"] += 1

    # ---- what to say -----------------------------------------------------------------------------

    def _speak(self, now: float) -> None:
        """Say what is needed when it differs from what was said, and again with each heartbeat: what was lost only
        delays.
        """
        link, cpu, memory = self._link, self._state.cpu, self._state.memory
        if link is None or cpu is None or memory is None:
            return
        due = link.heartbeat_due(now)
        if due:
            self._say(Heartbeat(self.usable))
        elif link.said is not None and not self._news:
            return
        self._news = False
        inventory = self._state.inventory
        demand = speak.demand(link.sequence + 1, cpu, memory, self.usable, inventory, self._other_reasons())
        if due or link.is_news(demand, inventory.block_bytes):
            link.note(demand, now)
            self._say(demand)

    def _other_reasons(self) -> list[Reason]:
        state = self._state
        stuck = [str(result.op) for result in state.setbacks.stuck().values()]
        others, reasons = state.others.reason(), state.hooks.reasons()
        if others is not None:
            reasons.append(others)
        if stuck:
            reasons.append(Reason("quarantined", f"stuck in the kernel: {', '.join(stuck[:4])}"))
        return reasons

    def _say(self, message: GuestMessage) -> None:
        if self._link is not None:
            self._out.append(Say(message))

    def _look_soon(self, now: float) -> None:
        self._next_scan = min(self._next_scan, now)

    def _sample_soon(self, now: float) -> None:
        """What the last sample says is no longer so."""
        self._state.sample_is_old = True
        self._pace.soon(now)
