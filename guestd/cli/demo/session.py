"""The demo's course once the VM runs: settle, load, watch, wait until all is given back.

Three loops sample the three views side by side, while the course goes from step to step by what they
see. The guest's own view is sampled by a program in it, a few times a second and at every change, and
fetched once a second: under emulation a command over the console is the dearest thing that happens in an
idle guest, and watching it must not be its load. Nothing here tells the broker or the hypervisor anything;
both are only asked, and the guest gets its load. What was seen is in the recorder, also when a step fails half-way.
"""

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from guestd.cli.demo.record import (
    GuestLines,
    Recorder,
    broker_record,
    hypervisor_record,
    probe_records,
)
from guestd.cli.demo.timeline import Guest, Hypervisor, Load, Service
from guestd.cli.demo.verify import Expected
from guestd.model.errors import GuestdError
from guestd.model.view import GuestRemoved, GuestView

GUEST_DIR: Final = "/run/guestd-demo"
_LINES = f"{GUEST_DIR}/lines.jsonl"
_GO = f"{GUEST_DIR}/go"
_SCRIPTS = ("guest_watch", "guest_load", "guest_probe")
_TICK_ANSWER_SECONDS = 4.0
_STEP_ANSWER_SECONDS = 30.0


class NoAnswer(Exception):
    """A view did not answer in time. Asking again is all there is to do; the gap shows in the timeline."""


class DemoError(GuestdError):
    """The demo cannot go on."""


class Vm(Protocol):
    """The VM as the demo needs it."""

    async def shell(self, command: str, timeout_seconds: float) -> str:
        """Runs a command in the guest over the console; its stdout.

        :raise NoAnswer: When none came in time.
        """

    async def spawn(self, command: str) -> None:
        """Starts a command in the guest and leaves it running."""

    async def query(self, command: str) -> Any:
        """Asks QEMU on the observer's socket. None: the command is not for this VM.

        :raise NoAnswer: When none came in time.
        """


class Broker(Protocol):
    """The broker as the demo needs it: only to look at."""

    def watch_guests(self, min_interval_seconds: float | None = None) -> AsyncIterator[GuestView | GuestRemoved]:
        """All guests now, then each one as it changes."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How long each step may take, in seconds, and what the load is."""

    load: bool = True
    connect_limit_seconds: float = 45.0
    settle_limit_seconds: float = 60.0
    steady_seconds: float = 2.5  # so long must all be at the minimum
    near_seconds: float = 8.0  # or so long unchanged within a memory block of it
    no_load_seconds: float = 10.0
    cpu_seconds: float = 20.0
    pause_seconds: float = 2.0
    mib_per_second: int = 100
    hold_seconds: float = 5.0
    load_slack_seconds: float = 30.0
    shrink_limit_seconds: float = 60.0
    tick_seconds: float = 0.2
    console_tick_seconds: float = 1.0  # each costs an emulated guest 0.1 s of CPU; its own samples come in bulk

    def load_limit_seconds(self, expected: Expected) -> float:
        """When the load must be over, however slow the guest."""
        growing = expected.load_bytes / (self.mib_per_second << 20)
        return self.cpu_seconds + self.pause_seconds + growing + self.hold_seconds + self.load_slack_seconds


@dataclass(slots=True)
class Session:
    """One run of the demo on a VM that is up."""

    vm: Vm
    broker: Broker
    recorder: Recorder
    expected: Expected
    guest_name: str
    boot_memory_bytes: int
    say: Callable[[str], None] = lambda text: None
    plan: Plan = field(default_factory=Plan)
    _over: bool = False
    _view: GuestView | None = None
    _lines: GuestLines = field(default_factory=GuestLines)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """The whole course.

        :raise DemoError: When the guest never came to the broker, or the load never ended.
        :raise UnreachableError: When the broker went away.
        """
        await self._install()
        loops = [
            asyncio.create_task(loop)
            for loop in (
                self._follow_broker(),
                self._repeat(self._sample_broker, self.plan.tick_seconds),
                self._repeat(self._sample_hypervisor, self.plan.tick_seconds),
                self._repeat(self._sample_guest, self.plan.console_tick_seconds),
            )
        ]
        course = asyncio.create_task(self._course())
        try:
            done, _ = await asyncio.wait({course, *loops}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (course, *loops):
                task.cancel()
            await asyncio.gather(course, *loops, return_exceptions=True)

    async def _course(self) -> None:
        plan, expected = self.plan, self.expected
        await self._until(self._connected, plan.connect_limit_seconds)
        if not self._connected():
            raise DemoError(
                f"the guest did not come to the broker within {plan.connect_limit_seconds:g} s; "
                f"{await self._service_in_words()}"
            )
        self.say("guestd in the guest is connected; waiting until all is at its minimum")
        await self._probe()  # a load by itself, in an emulated guest: first this, then wait for quiet
        if plan.load:
            await self.vm.spawn(self._load_command())  # it waits, once it has started
        await self._until_steady(plan.settle_limit_seconds)
        if plan.load:
            await self.vm.shell(f"echo go > {_GO}", _STEP_ANSWER_SECONDS)
            await self._until(lambda: self._load_event("end"), plan.load_limit_seconds(expected))
            if not self._load_event("end"):
                raise DemoError("the load in the guest did not end")
            self.say("the load is over; waiting until all is given back")
            await self._until_steady(plan.shrink_limit_seconds)
        else:
            self.say("no load: looking on while nothing happens")
            await asyncio.sleep(plan.no_load_seconds)
        # one more round of every loop, so that each view has seen the end
        await asyncio.sleep(2 * plan.console_tick_seconds)
        self._over = True
        await self._probe()

    async def _install(self) -> None:
        """Brings the programs into the guest and starts the watcher."""
        commands = [f"mkdir -p {GUEST_DIR}", f": > {_LINES}", f"mkfifo {_GO}"]
        for name in _SCRIPTS:
            text = (Path(__file__).parent / f"{name}.py").read_bytes()
            commands.append(f"echo {base64.b64encode(text).decode()} | base64 -d > {GUEST_DIR}/{name}.py")
        await self.vm.shell(" && ".join(commands), _STEP_ANSWER_SECONDS)
        await self.vm.spawn(f"exec nice -n -10 python3 -S {GUEST_DIR}/guest_watch.py >> {_LINES}")

    def _load_command(self) -> str:
        plan, expected = self.plan, self.expected
        return (
            f"exec python3 -S {GUEST_DIR}/guest_load.py --go {_GO} --processes {expected.cpu_max} "
            f"--cpu-seconds {plan.cpu_seconds:g} --pause-seconds {plan.pause_seconds:g} "
            f"--memory-mib {expected.load_bytes >> 20} --mib-per-second {plan.mib_per_second} "
            f"--hold-seconds {plan.hold_seconds:g} >> {_LINES}"
        )

    async def _probe(self) -> None:
        """Asks the guest's systemd and kernel about the service and its sockets."""
        command = f"python3 -S {GUEST_DIR}/guest_probe.py guestd.service"
        output = await self.vm.shell(command, _STEP_ANSWER_SECONDS)
        for record in probe_records(self.recorder.now(), output):
            self.recorder.add(record)

    async def _service_in_words(self) -> str:
        """What the guest's systemd has to say, for an error."""
        try:
            await self._probe()
            log = await self.vm.shell("journalctl -u guestd -n 8 -o cat --no-pager", _STEP_ANSWER_SECONDS)
        except NoAnswer as error:
            return f"and does not answer on its console ({error})"
        states = [record.state for record in self.recorder.records if isinstance(record, Service)]
        return f"guestd.service is {states[-1] if states else 'unknown'}. Its log:\n{log.strip()}"

    async def _follow_broker(self) -> None:
        async for change in self.broker.watch_guests(self.plan.tick_seconds / 2):
            if isinstance(change, GuestView) and change.name == self.guest_name:
                self._view = change

    async def _sample_broker(self) -> None:
        if self._view is not None:
            self.recorder.add(broker_record(self.recorder.now(), self._view))

    async def _sample_hypervisor(self) -> None:
        cpus = await self.vm.query("query-cpus-fast")
        devices = await self.vm.query("query-memory-devices")
        balloon = await self.vm.query("query-balloon")
        now = self.recorder.now()
        self.recorder.add(hypervisor_record(now, self.boot_memory_bytes, cpus, devices, balloon))

    async def _sample_guest(self) -> None:
        command = f"exec tail -c +{self._lines.offset + 1} {_LINES}"
        output = await self.vm.shell(command, _TICK_ANSWER_SECONDS)
        for values in self._lines.feed(output.encode()):
            self.recorder.add_guest(values)

    async def _repeat(self, sample: Callable[[], Awaitable[None]], seconds: float) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + seconds
            if not self._over:
                with contextlib.suppress(NoAnswer):
                    await sample()
            self._news.set()
            await asyncio.sleep(max(due - loop.time(), 0.01))

    async def _until(self, reached: Callable[[], bool], limit_seconds: float) -> None:
        """Waits until something is so, or the time is over; the caller looks which."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_seconds):
                while not reached():
                    self._news.clear()
                    await self._news.wait()

    async def _until_steady(self, limit_seconds: float) -> None:
        """Waits until both views have been at the minimum for a while, or near it without a change for longer.

        Whether it came to that is found by `verify`, from the records.
        """
        at = near = self.recorder.now()
        amounts: tuple[int, ...] = ()

        def steady() -> bool:
            nonlocal at, near, amounts
            now, seen = self.recorder.now(), self._amounts()
            if not self._within(self.expected.memory_block_bytes) or seen != amounts:
                near = now
            if not self._within(0):
                at = now
            amounts = seen
            return now - at >= self.plan.steady_seconds or now - near >= self.plan.near_seconds

        await self._until(steady, limit_seconds)

    def _connected(self) -> bool:
        return self._view is not None and self._view.connected

    def _load_event(self, event: str) -> bool:
        return any(isinstance(one, Load) and one.event == event for one in self.recorder.records)

    def _amounts(self) -> tuple[int, ...]:
        """The newest amounts of both views; empty until both were seen."""
        newest = list(reversed(self.recorder.records))
        hypervisor = next((one for one in newest if isinstance(one, Hypervisor)), None)
        guest = next((one for one in newest if isinstance(one, Guest)), None)
        if hypervisor is None or guest is None:
            return ()
        memory = max(hypervisor.memory_bytes, hypervisor.memory_requested_bytes)
        return hypervisor.vcpus, guest.cpus_online, memory

    def _within(self, more_bytes: int) -> bool:
        """Whether both views are at the minimum, with so much memory more at most."""
        match self._amounts():
            case (vcpus, online, memory):
                return (
                    vcpus == online == self.expected.cpu_min and memory <= self.expected.memory_min_bytes + more_bytes
                )
            case _:
                return False
