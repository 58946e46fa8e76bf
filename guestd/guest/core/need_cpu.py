"""How many CPUs the VM needs, from what it does: a pure estimator, fed with samples.

The law:

1. Utilisation says what is used, but it saturates at what is online. Where all CPUs are busy and tasks
   wait for one (`cpu.some` of PSI, where there is PSI) the need is the number of *runnable* tasks: the
   least of the last samples, so that a burst says nothing (plugging a CPU is one by itself: it wakes a
   handful of kernel threads for an instant). However many they are, that is one jump.
2. What is over within `spike_seconds` (a fork storm, a moment of a boot) buys nothing: tasks must have waited for that
   long in the last second. PSI counts from their first moment on, not from the first sample. A CPU that comes or
   goes is work by itself (udev, kernel threads), and so is the start of this daemon: for `settling_seconds` after it a
   spike may be longer, or a small VM would ask back what it has just given.
3. Where nothing waits, what is used, a tenth of it and a tenth of a CPU is enough, and never more than is online.
4. A VM that the host holds back (`Throttle`; it shows nowhere in the VM, `cpu.some` even falls) asks for what
   its tasks would use of the CPUs that are online, at least a quarter more than its quota, and for no further
   CPU unless more tasks than CPUs want to run. Steal alone is a hint: mentioned, not asked for.
5. Tasks that wait while CPUs idle are kept back in the VM (a cgroup's `cpu.max`, an affinity): no want of CPUs.
6. A lower need is believed only after it has held for `hold_seconds`: growing is cheap, flapping is not.
   So what is there when the estimator begins is needed until then: a restarted daemon takes nothing away.

Weak spots: a cgroup whose limit is just below all CPUs looks like tasks without a limit; a program with more
runnable threads than it has work for names too many CPUs, and gives them back after `hold_seconds`.
"""

from collections import deque
from dataclasses import dataclass

from guestd.guest.core.need import EstimateSettings, Held
from guestd.model.guest import Sample
from guestd.model.messages import Throttle, Urgency
from guestd.model.reason import Reason
from guestd.model.units import MILLICORES_PER_VCPU, format_cpus

_Entry = tuple[float, Sample]


@dataclass(frozen=True, slots=True)
class CpuNeed:
    """CPU needed and used, in millicores. `falls_at`: when a lower need will have lasted long enough."""

    needed_millicores: int
    used_millicores: int
    waiting: bool
    urgency: Urgency
    reason: Reason
    falls_at: float | None = None


@dataclass(frozen=True, slots=True)
class _Rates:
    """CPUs used over the last window and over the last moments; shares of the time in which tasks waited (None
    without PSI), over the last moments and in seconds of the window; share of all CPUs' time taken by the host.
    """

    used: float = 0.0
    used_now: float = 0.0
    some: float | None = 0.0
    waited_seconds: float = 0.0
    steal: float = 0.0


class CpuEstimator:
    """Feed it each sample with its time; it answers with the need."""

    def __init__(self, settings: EstimateSettings | None = None) -> None:
        self._settings = settings or EstimateSettings()
        self._history: deque[_Entry] = deque()
        self._held = Held(self._settings.hold_seconds)
        self._busy_since: float | None = None
        self._online = 0
        self._settled_at = 0.0

    def update(self, sample: Sample, online: int, now: float, throttle: Throttle | None = None) -> CpuNeed:
        """
        :param online: CPUs online now.
        :param now: seconds, monotonic.
        :param throttle: how the host holds the VM back; None: not at all, or not known.
        """
        settings, history = self._settings, self._history
        if not history:
            self._held.update(online * MILLICORES_PER_VCPU, now)
        if online != self._online:
            self._settled_at = now + settings.settling_seconds
        self._online = online
        history.append((now, sample))
        while len(history) > settings.runnable_samples and history[1][0] < now - settings.window_seconds:
            history.popleft()
        rates = self._rates(now)
        runnable = min(entry.runnable for _, entry in list(history)[-settings.runnable_samples :])
        held_back = throttle is not None and throttle.throttled_permille > 0
        waiting = self._waiting(rates, runnable, online, held_back, now)
        if waiting:
            needed = max(float(runnable), rates.used)
        else:
            needed = rates.used * (1 + settings.cpu_spare_share) + settings.cpu_spare_cpus
            if held_back and throttle is not None:
                quota = throttle.quota_millicores / MILLICORES_PER_VCPU
                needed = max(needed, float(runnable), quota * (1 + settings.throttled_more_share))
            needed = min(needed, float(online))
        reason = _reason(rates, runnable, online, waiting, throttle if held_back else None, settings)
        held = self._held.update(round(needed * MILLICORES_PER_VCPU), now)
        urgency = Urgency.NOW if waiting else Urgency.SOON if held_back else Urgency.NORMAL
        used = round(rates.used * MILLICORES_PER_VCPU)
        return CpuNeed(held, used, waiting, urgency, reason, self._held.falls_at)

    def _waiting(self, rates: _Rates, runnable: int, online: int, held_back: bool, now: float) -> bool:
        """Whether more tasks than CPUs want to run, and have wanted to for more than a spike (rules 1, 2, 5)."""
        settings = self._settings
        busy = rates.used_now > settings.busy_share * online and self._history[-1][1].runnable > online
        if not busy:
            self._busy_since = None
            return False
        if self._busy_since is None:
            self._busy_since = now
        if len(self._history) < settings.runnable_samples or runnable <= online:
            return False
        spike_seconds = settings.spike_seconds if now >= self._settled_at else settings.settling_spike_seconds
        if rates.some is None or held_back:
            return now - self._busy_since >= spike_seconds - settings.min_window_seconds
        return rates.some > settings.waiting_share and rates.waited_seconds >= spike_seconds

    def _rates(self, now: float) -> _Rates:
        newest = self._history[-1][1]
        window = now - self._settings.window_seconds
        start = next((entry for entry in reversed(self._history) if entry[0] <= window), self._history[0])
        recent = self._recent(now)
        psi = newest.cpu_some_us is not None
        if recent is None or now - start[0] < self._settings.min_window_seconds:
            return _Rates(some=0.0 if psi else None)
        some, waited = None, 0.0
        if newest.cpu_some_us is not None and recent[1].cpu_some_us is not None and start[1].cpu_some_us is not None:
            some = (newest.cpu_some_us - recent[1].cpu_some_us) / 1e6 / (now - recent[0])
            waited = (newest.cpu_some_us - start[1].cpu_some_us) / 1e6
        return _Rates(
            _cpus_used(start[1], newest),
            _cpus_used(recent[1], newest),
            some,
            waited,
            _steal_share(start, (now, newest)),
        )

    def _recent(self, now: float) -> _Entry | None:
        """The newest sample old enough to take a rate from: waiting is judged on the last moments."""
        oldest = now - self._settings.min_window_seconds
        return next((entry for entry in reversed(self._history) if entry[0] <= oldest), None)


def _reason(
    rates: _Rates, runnable: int, online: int, waiting: bool, throttle: Throttle | None, settings: EstimateSettings
) -> Reason:
    """Why, with numbers."""
    used = f"{rates.used:.2f} of {online} CPUs are used"
    hint = f"; the host took {rates.steal:.0%} of their time (steal)" if rates.steal > settings.steal_share else ""
    if waiting:
        shown = "all CPUs are busy" if rates.some is None else f"tasks wait {rates.some:.0%} of the time"
        return Reason("cpu-waiting", f"{runnable} tasks want to run on {online} CPUs, {shown}{hint}")
    if throttle is not None:
        quota, share = format_cpus(throttle.quota_millicores), throttle.throttled_permille / 1000
        text = f"held back by a quota of {quota} CPUs in {share:.0%} of the time, {runnable} tasks want to run"
        return Reason("cpu-throttled", f"{text} on {online} CPUs{hint}")
    if rates.some is not None and rates.some > settings.waiting_share and online - rates.used_now > 0.5:
        text = f"tasks wait {rates.some:.0%} of the time while CPUs idle (a cgroup's limit, or an affinity)"
        return Reason("cpu-cgroup", f"{text}, {used}{hint}")
    return Reason("cpu-used", f"{used}{hint}")


def _steal_share(before: _Entry, after: _Entry) -> float:
    """Of the time of all CPUs between two samples, what the host says it took."""
    seconds = (after[0] - before[0]) * max(1, len(after[1].cpu_busy_seconds))
    return max(0.0, after[1].cpu_steal_seconds - before[1].cpu_steal_seconds) / seconds if seconds > 0 else 0.0


def _cpus_used(before: Sample, after: Sample) -> float:
    """How many CPUs were in use between two samples: the sum of each one's busy share of the time that the
    kernel accounted for.

    Of the time accounted for, not of the time passed: what the host takes from a running vCPU is neither
    busy nor idle (where there is steal it says so, elsewhere ticks are simply lost), and a CPU that could
    not be idle for a moment is in use however little of it there was. Counted by CPU number: one that
    came or went between counts for nothing, a counter that went back counts as 0. One of which nothing was accounted
    for (it is going offline, or the host gave it no time at all) is as busy as the others.
    """
    shares, unknown = [], 0
    for number, busy_after in after.cpu_busy_seconds.items():
        busy_before = before.cpu_busy_seconds.get(number)
        if busy_before is None:
            continue
        busy = max(0.0, busy_after - busy_before)
        idle = max(0.0, after.cpu_idle_seconds.get(number, 0.0) - before.cpu_idle_seconds.get(number, 0.0))
        if busy + idle > 0:
            shares.append(busy / (busy + idle))
        else:
            unknown += 1
    return sum(shares) + unknown * (sum(shares) / len(shares) if shares else 1.0)
