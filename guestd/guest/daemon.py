"""The guest daemon around its core: samples, watches, dials, and carries out what the machine decides."""

import asyncio
import logging
import random
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial

from guestd.guest.core.actions import Action, Do, Log, Rescan, Say, TakeSample
from guestd.guest.core.machine import GuestMachine
from guestd.guest.core.setbacks import Key
from guestd.guest.hands import Hands, HelperGone
from guestd.guest.procfs import SensorError
from guestd.guest.sensors import is_worth_saying
from guestd.model.errors import ProtocolError, UnreachableError
from guestd.model.guest import Identity, Inventory, Sample
from guestd.model.messages import BrokerMessage, Grant, Hello, Reclaim, Throttle, Welcome
from guestd.wire.link import Stream, converse

_log = logging.getLogger(__name__)
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 5.0
_BLIND_SECONDS = 15.0  # when samples have failed for so long, one after the other, nothing is known of the load


class Daemon:
    """One guest, alive.

    :param sense: reads the load, by the fast lane when it is told so.
    :param scan: reads CPUs and memory blocks.
    :param dial: opens a connection to the broker.
    """

    def __init__(
        self,
        machine: GuestMachine,
        sense: Callable[[bool], Sample],
        scan: Callable[[], Inventory],
        hands: Hands,
        dial: Callable[[], Awaitable[socket.socket]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._machine, self._sense, self._scan, self._hands = machine, sense, scan, hands
        self._dial = dial
        self._clock = clock
        self._failing_since: float | None = None  # when the first sample failed since the last good one
        self._stream: Stream | None = None
        self._doing, self._counted = "looking for the broker", 0
        self._wake = asyncio.Event()
        self._working: set[asyncio.Task[None]] = set()
        self.on_status: Callable[[str], object] = lambda text: None
        """Told what the daemon is at, in words, for the service manager."""
        self._held = machine.held
        self.on_held: Callable[[frozenset[Key]], object] = lambda held: None
        """Told what others took offline, whenever that changed."""

    async def run(self) -> None:
        """Until cancelled. Ending changes nothing in the VM."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._decide())
                group.create_task(self._talk())
        finally:
            for task in self._working:
                task.cancel()

    @property
    def counters(self) -> Counter[str]:
        """How often what went wrong."""
        return self._machine.counters

    def on_hotplug(self) -> None:
        """An event said that something came or went."""
        self._machine.on_hotplug(self._clock())
        self._wake.set()

    def on_identity(self, identity: Identity) -> None:
        """What this guest is now: where it can do other things than before the broker hears so, by another hello."""
        if identity.capabilities == self._machine.identity.capabilities:
            return
        self._machine.on_identity(identity)
        if self._stream is not None:
            self._stream.close()
        self._wake.set()

    def on_pressure(self) -> None:
        """A PSI trigger fired."""
        self._machine.on_pressure(self._clock())
        self._wake.set()

    # ---- decisions -------------------------------------------------------------------------------

    async def _decide(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            now = self._clock()
            for action in self._machine.next_actions(now):
                self._perform(action)
            # What was performed may have led to more (a sample to a demand): ask until nothing is left.
            for action in self._machine.next_actions(self._clock()):
                self._perform(action)
            if self.counters.total() != self._counted:
                self._be(self._doing)
            # An alarm that rings the same bell costs a fifth of a timeout, which ends by an exception each time.
            alarm = loop.call_later(self._machine.wake_at(self._clock()) - self._clock(), self._wake.set)
            try:
                await self._wake.wait()
            finally:
                alarm.cancel()

    def _perform(self, action: Action) -> None:
        match action:
            case TakeSample():
                self._sample(action.quick)
            case Rescan():
                self._rescan()
            case Do():
                task = asyncio.create_task(self._do(action))
                self._working.add(task)
                task.add_done_callback(self._working.discard)
            case Say():
                self._say(action)
            case Log():
                _log.info("%s", action.text)

    def _be(self, doing: str) -> None:
        """Tell the service manager what the daemon is at, and what went wrong so far."""
        self._doing, self._counted = doing, self.counters.total()
        self.on_status("; ".join([doing, *(f"{name}: {count}" for name, count in sorted(self.counters.items()))]))

    def _sample(self, quick: bool) -> None:
        """A load that cannot be read is no news. After a while nothing is said of it any more, so that the broker finds
        the guest silent and takes nothing from it.
        """
        try:
            sample = self._sense(quick)
        except (SensorError, OSError) as error:
            self._failed("failed-samples", error)
            now = self._clock()
            self._failing_since = now if self._failing_since is None else self._failing_since
            self._machine.on_failed_sample(now, blind=now - self._failing_since > _BLIND_SECONDS)
            return
        self._failing_since = None
        self._machine.on_sample(sample, self._clock())

    def _rescan(self) -> None:
        """Until CPUs and blocks can be read nothing is switched; the timer tries again."""
        try:
            inventory = self._scan()
        except (ValueError, OSError) as error:
            self._failed("failed-looks", error)
            return
        self._machine.on_inventory(inventory, self._clock())
        if self._machine.held != self._held:
            self._held = self._machine.held
            self.on_held(self._held)

    def _failed(self, what: str, error: Exception) -> None:
        """Count it, and say it now and then."""
        self.counters[what] += 1
        count = self.counters[what]
        if is_worth_saying(count):
            _log.error("%s; %s so far: %d; everything stays as it is", error, what, count)

    async def _do(self, action: Do) -> None:
        try:
            results = await self._hands.batch(action.ops, action.deadline_seconds)
        except HelperGone:  # the daemon ends for that: whoever started it watches the helper
            return
        for result in results:
            _log.info("%s", result)
            self._machine.on_result(result, self._clock())
        self._wake.set()

    def _say(self, action: Say) -> None:
        if self._stream is not None:
            try:
                self._stream.say(action.message)
            except UnreachableError as error:
                _log.warning("%s", error)

    # ---- the broker ------------------------------------------------------------------------------

    async def _talk(self) -> None:
        """Keep one stream open; between tries wait longer each time, with jitter, so that a thousand
        guests don't come back in the same instant. Who was served for longer than it had waited begins anew.
        """
        pause = _FIRST_PAUSE_SECONDS
        while True:
            began, hello = self._clock(), self._machine.hello()
            try:
                await converse(self._dial, hello, partial(self._on_open, hello), self._on_message)
            except (UnreachableError, ProtocolError) as error:
                if isinstance(error, ProtocolError):
                    self.counters["protocol-errors"] += 1
                if self._stream is not None or pause == _FIRST_PAUSE_SECONDS:
                    _log.warning("no broker: %s; everything stays as it is, trying again", error)
            finally:
                served, self._stream = self._stream is not None, None
                self._machine.on_disconnected()
            self._be("waiting for the broker; everything stays as it is")
            if served and self._clock() - began > pause:
                pause = _FIRST_PAUSE_SECONDS
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - jitter, not a secret
            pause = min(_LONGEST_PAUSE_SECONDS, pause * 1.6)

    def _on_open(self, hello: Hello, stream: Stream, welcome: Welcome) -> None:
        self._stream = stream
        if hello.identity is not self._machine.identity:  # it changed meanwhile
            stream.close()
        self._be(f"served as {welcome.guest}")
        self._machine.on_welcome(welcome, self._clock())
        self._wake.set()

    def _on_message(self, message: BrokerMessage) -> None:
        if isinstance(message, Grant | Reclaim):
            self._machine.on_order(message, self._clock())
            self._wake.set()
        elif isinstance(message, Throttle):
            self._machine.on_throttle(message, self._clock())
            self._wake.set()
        elif isinstance(message, Welcome):
            raise ProtocolError("the broker said welcome twice")


async def dial_unix(path: str) -> socket.socket:
    """A connection to a broker's unix socket.

    :raise OSError: When nobody listens there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, path)
    except OSError:
        sock.close()
        raise
    return sock
