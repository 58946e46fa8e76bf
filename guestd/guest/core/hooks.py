"""What the hooks of this guest were told, and what they said. Hooks are programs of the image's builder.

The law:

1. They hear of whole steps: a vCPU, a memory block. `told` is the amount that they heard of last.
2. One run per kind at a time; what comes meanwhile is told afterwards, a burst's end as long as it is to come.
3. Before a shrink they may say no (veto) or not yet (wait). A veto holds for a while, "not yet" for as long as it says;
   then they are asked again. Failing is no veto, and neither is a run that came to nothing (its worker hung, was
   killed or was not to be had): both are counted and said, and the resize goes on. Agreeing holds until it was of
   use, in case the broker's time was over before they answered.
4. What they do themselves is no load of the guest: while they run, for `_OWN_LOAD_SECONDS` at most, tasks that wait
   for a CPU are not taken to need one. Else a shrink would be undone by asking about it.
5. A shrink that did not come to what they were told is told as a grow. At the start they are told once what there
   is, with 0 before: an application may have been set up for another size.
"""

from dataclasses import dataclass
from enum import StrEnum

from guestd.guest.core.actions import Settings
from guestd.guest.core.ops import HandResult, HandStatus, HookEvent, HookOp
from guestd.model.reason import Reason
from guestd.model.resources import Kind
from guestd.model.units import MILLICORES_PER_VCPU

_VETO_SECONDS = 10.0
_AGREED_SECONDS = 90.0  # longer than a broker waits before it asks again
_OWN_LOAD_SECONDS = 5.0
_SETTLE_SECONDS = 1.0  # what they started is over a little later
_LONGEST_WAIT_SECONDS = 600.0


class Verdict(StrEnum):
    """What hooks say to a shrink."""

    GO = "go"
    VETO = "veto"
    WAIT = "wait"
    ASKED = "asked"  # they have not answered yet


@dataclass(frozen=True, slots=True)
class Said:
    """Their last word on a shrink: from whom, and until when it holds; from which amount to which."""

    verdict: Verdict
    name: str = ""
    until: float = 0.0
    before: int = 0
    after: int = 0


@dataclass(frozen=True, slots=True)
class _Ending:
    """A burst that ends then: from which amount to which."""

    before: int
    after: int
    at: float


class Hooks:
    """The hooks of one guest."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.told: dict[Kind, int] = {}
        self._running: dict[Kind, HookOp] = {}
        self._ending: dict[Kind, _Ending] = {}  # still to be told
        self._said: dict[Kind, Said] = {}
        self._failed: dict[Kind, str] = {}
        self._exist = False
        self._busy_until = 0.0
        self.failures = 0
        """How often one failed, hung or was not to be trusted."""

    def say(self, kind: Kind, before: int, after: int, step: int, now: float) -> Said:
        """What they say to a shrink, as far as they have.

        :param step: a vCPU in millicores, or a memory block in bytes.
        """
        said = self._said.get(kind)
        if kind in self._running:
            return Said(Verdict.ASKED)
        if said is not None and now < said.until and (said.verdict is not Verdict.GO or after >= said.after):
            return said
        return Said(Verdict.ASKED if _steps(after, self.told.get(kind, before), step) < 0 else Verdict.GO)

    def ask(self, kind: Kind, before: int, after: int, step: int, now: float) -> HookOp | None:
        """How to ask them about a shrink, where what they say is not known and they are not at it."""
        if kind in self._running or self.say(kind, before, after, step, now).verdict is not Verdict.ASKED:
            return None
        return self._run(HookOp(HookEvent.BEFORE_SHRINK, kind, before, after, self._settings.shrink_hook_seconds), now)

    def after_grow(self, kind: Kind, amount: int, step: int, now: float) -> HookOp | None:
        """How to tell them that there is more than they know of, if there is."""
        if kind in self._running or _steps(amount, self.told.get(kind, 0), step) <= 0:
            return None
        said = self._said.get(kind)
        if said is not None and said.verdict is Verdict.GO and now < said.until and amount <= said.before:
            return None  # what they agreed to is still to come
        before, self.told[kind] = self.told.get(kind, 0), amount
        return self._run(HookOp(HookEvent.AFTER_GROW, kind, before, amount, self._settings.grow_hook_seconds), now)

    def burst_ending(self, kind: Kind, amount: int, burst: int, seconds: float, now: float) -> HookOp | None:
        """How to tell them that what is above `amount - burst` goes within so many seconds."""
        running = self._running.get(kind)
        if running is not None and (running.event, running.after) == (HookEvent.BURST_ENDING, amount - burst):
            return None  # the same order again
        self._ending[kind] = _Ending(amount, amount - burst, now + seconds)
        return self.waiting(kind, now)

    def waiting(self, kind: Kind, now: float) -> HookOp | None:
        """How to tell them of a burst's end, where they were not told yet and are not at something else."""
        if kind in self._running or kind not in self._ending:
            return None
        ending = self._ending.pop(kind)
        if now > ending.at:  # what goes is asked for now
            return None
        left = max(1, min(600, int(ending.at - now)))
        return self._run(HookOp(HookEvent.BURST_ENDING, kind, ending.before, ending.after, left), now)

    def forget_ending(self, kind: Kind) -> None:
        """A newer order knows of no burst."""
        self._ending.pop(kind, None)

    def _run(self, op: HookOp, now: float) -> HookOp:
        self._running[op.kind] = op
        if self._exist:
            self._busy_until = now + _OWN_LOAD_SECONDS
        return op

    def are_at_work(self, now: float) -> bool:
        """Whether the load may be theirs (rule 4)."""
        return now < self._busy_until

    def on_result(self, op: HookOp, result: HandResult, now: float) -> None:
        """They have answered, or failed to."""
        self._running.pop(op.kind, None)
        if result.state:
            self._exist = result.state != "none"
        self._busy_until = min(self._busy_until, now + _SETTLE_SECONDS)
        self._said.pop(op.kind, None)
        word, _, rest = result.state.partition(":")
        if word == "failed" or (not word and result.status is not HandStatus.DRY_RUN):
            self.failures += 1
            self._failed[op.kind] = rest or str(result.status)
        else:
            self._failed.pop(op.kind, None)
        if op.event is not HookEvent.BEFORE_SHRINK:
            return
        if word == "veto":
            self._said[op.kind] = Said(Verdict.VETO, rest, now + _VETO_SECONDS)
        elif word == "wait":
            seconds, _, name = rest.partition(":")
            wait = min(float(seconds), _LONGEST_WAIT_SECONDS) if seconds.isdecimal() else _VETO_SECONDS
            self._said[op.kind] = Said(Verdict.WAIT, name, now + wait)
        else:
            self.told[op.kind] = op.after
            self._said[op.kind] = Said(Verdict.GO, "", now + _AGREED_SECONDS, op.before, op.after)

    def agreed_in_time(self, kind: Kind) -> None:
        """What they agreed to is being done, or cannot be: their word was of use."""
        self._said.pop(kind, None)

    def reasons(self) -> list[Reason]:
        """What went wrong with them, in words."""
        return [Reason("hook-failed", f"hook for {kind} failed: {name}") for kind, name in self._failed.items()]


def _steps(amount: int, known: int, step: int) -> int:
    """Whole steps from what is known to the amount; CPUs are counted rounded up."""
    if step == MILLICORES_PER_VCPU:
        return -(-amount // step) - -(-known // step)
    return (amount - known) // step if amount >= known else -((known - amount) // step)
