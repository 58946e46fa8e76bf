"""Keeps the highest values of the steps that are not over yet, and says which rows to write when one is.

Only guests that changed are looked at: what a quiet one costs is a row per `REPEAT_STEPS` steps. Clocks are the
caller's, in seconds of the epoch.
"""

from zlib import crc32

from guestd.broker.core.guest import GuestState
from guestd.broker.history.steps import GONE, REPEAT_STEPS, TIERS, Values, highest
from guestd.model.resources import Kind
from guestd.model.units import MILLICORES_PER_VCPU

Row = tuple[int, int, str, Values]
"""Tier, step, guest and values."""

_TWICE: Values = ()
"""Was written once. The first row of a guest may meet an older one of the same step, so the next one is written too."""


def sample(guest: GuestState) -> Values:
    """What is kept of a guest."""
    demand, vm, usable = guest.demand, guest.vm, guest.usable
    return (
        demand.needed.cpu_millicores if demand else 0,
        guest.tracks[Kind.CPU].reserved,
        vm.plugged(Kind.CPU) if vm else 0,
        usable.vcpus_online * MILLICORES_PER_VCPU,
        demand.cpu_used_millicores if demand else 0,
        demand.needed.memory_bytes if demand else 0,
        guest.tracks[Kind.MEMORY].reserved,
        vm.plugged(Kind.MEMORY) if vm else 0,
        usable.memory_total_bytes,
        demand.memory_used_bytes if demand else 0,
    )


class _OpenStep:
    """The step of one tier that is not over."""

    def __init__(self) -> None:
        self.highs: dict[str, Values] = {}  # of guests that have to be looked at when it is over
        self.written: dict[str, Values] = {}  # the last row of each

    def note(self, name: str, values: Values) -> None:
        known = self.highs.get(name)
        self.highs[name] = values if known is None else highest(known, values)

    def close(self, now: dict[str, Values], due: set[str]) -> tuple[dict[str, Values], dict[str, Values]]:
        """What is to be written of it, and the highest values of all that were looked at; begins the next one."""
        highs, self.highs = self.highs, {}
        for name in due:
            highs.setdefault(name, now[name])
        rows = {}
        for name, values in highs.items():
            before = self.written.get(name)
            if values != before or name in due:
                rows[name] = values
            if before is None:
                self.written[name], self.highs[name] = _TWICE, now[name]
                continue
            self.written[name] = values
            if values != now[name]:
                self.highs[name] = now[name]
        return rows, highs


class Sampler:
    """All guests' open steps. `rows` collects what is to be written; who writes takes it away."""

    def __init__(self, now: float) -> None:
        self.rows: list[Row] = []
        self._now: dict[str, Values] = {}
        self._due: list[set[str]] = [set() for _ in range(REPEAT_STEPS)]
        self.restart(now)

    def restart(self, now: float) -> None:
        """What was written before does not count any more: all is written anew."""
        self._step = int(now // TIERS[0].step_seconds)
        self._tiers = [_OpenStep() for _ in TIERS]
        for name, values in self._now.items():
            self._tiers[0].highs[name] = values

    def note(self, name: str, values: Values) -> None:
        """A guest's values from now on."""
        before = self._now.get(name)
        if values == before:
            return
        self._now[name] = values
        if before is None:
            self._due[crc32(name.encode()) % REPEAT_STEPS].add(name)
        highs = self._tiers[0].highs
        known = highs.get(name, before)
        highs[name] = values if known is None else highest(known, values)

    def tick(self, now: float) -> bool:
        """Close the steps that are over. False: the clock was set, or this machine slept; what was open is
        dropped and all begins anew.
        """
        step = int(now // TIERS[0].step_seconds)
        if not 0 <= step - self._step <= REPEAT_STEPS:
            self.restart(now)
            return False
        while self._step < step:
            self._close()
            self._step += 1
        return True

    def finish(self) -> None:
        """Close the step of the first tier though it is not over; the others' are made up of it (`roll_up`)."""
        self._close()

    def forget(self, name: str) -> None:
        """The guest is no more."""
        if name not in self._now:
            return
        for number, (step, values) in enumerate(self.open_steps(name)):
            self.rows += [(number, step, name, values), (number, step + 1, name, GONE)]
        for tier in self._tiers:
            tier.highs.pop(name, None)
            tier.written.pop(name, None)
        self._due[crc32(name.encode()) % REPEAT_STEPS].discard(name)
        del self._now[name]

    def open_steps(self, name: str) -> list[tuple[int, Values]]:
        """Number and highest values so far of each tier's open step; empty for a guest that nothing is known of."""
        found: list[tuple[int, Values]] = []
        values = self._now.get(name)
        if values is None:
            return found
        for tier, one in zip(TIERS, self._tiers, strict=True):
            values = highest(values, one.highs.get(name, values))
            found.append((self._step * TIERS[0].step_seconds // tier.step_seconds, values))
        return found

    def _close(self) -> None:
        end = (self._step + 1) * TIERS[0].step_seconds
        for number, (tier, one) in enumerate(zip(TIERS, self._tiers, strict=True)):
            if end % tier.step_seconds:
                return
            step = end // tier.step_seconds - 1
            rows, highs = one.close(self._now, self._due[step % REPEAT_STEPS])
            self.rows += [(number, step, name, values) for name, values in rows.items()]
            for above in self._tiers[number + 1 : number + 2]:
                for name, values in highs.items():
                    above.note(name, values)
