"""A QMP connection that comes back by itself, and what its absence means.

The laws:

1. CONNECTED: greeted, and no command has been left unanswered since.
2. GONE: no connection, and either the process that was connected has exited (its pidfd says so) and
   nobody answers at the path, or no process is known and the socket refuses (nobody listens).
   A process that is known and runs outranks a refusal.
3. UNREACHABLE: everything else: no socket file, no permission, another client holds the socket (QMP
   serves one, the others get no greeting), or QEMU hangs.
4. A command without an answer in time costs the connection: its answer could otherwise come any time.
5. Each change of state is logged once; the attempts between two changes are not.

How it works: one task dials, talks, and dials again after a growing, jittered wait. The dialling is
done here and not by `qemu.qmp`, since asyncio takes the EAGAIN of a full backlog for a connection. The
library keeps every event it ever saw for its listeners; a filter that swallows all of them prevents it.

Weak spot: a socket file that is deleted while QEMU runs in a pid namespace that cannot be seen leaves
the VM UNREACHABLE after QEMU's end, which is safe and needs an operator.
"""

import asyncio
import contextlib
import logging
import random
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from qemu.qmp import ExecInterruptedError, ExecuteError, Message, QMPClient, QMPError, Runstate, StateError

from guestd.broker.hypervisor.process import ProcessWatch
from guestd.model.errors import HypervisorError, HypervisorGone, HypervisorUnreachable, OutcomeUnknown

_log = logging.getLogger(__name__)

# The library logs an error for each attempt that fails; what matters is logged here, once.
_library_log = logging.getLogger(f"{__name__}.library")
_library_log.setLevel(logging.CRITICAL + 1)

_MESSAGE_LIMIT_BYTES = 4 << 20  # 4096 CPU slots take about 1 MiB


class LinkState(Enum):
    """See the laws above."""

    CONNECTED = auto()
    UNREACHABLE = auto()
    GONE = auto()


class _Door(Enum):
    """What the last attempt met at the socket's path."""

    UNTRIED = auto()  # since the connection was lost, or ever
    ABSENT = auto()
    REFUSED = auto()
    OTHER = auto()  # somebody is there, or it cannot be known


@dataclass(frozen=True, slots=True)
class LinkTiming:
    """All waits of a link, in seconds."""

    greeting_seconds: float = 5.0
    answer_seconds: float = 10.0
    retry_min_seconds: float = 0.1
    retry_max_seconds: float = 2.0
    first_attempt_seconds: float = 1.0  # how long `open` waits for the first attempt


class QmpRefused(HypervisorError):
    """QEMU answered with an error; `error_class` is the machine-readable part of it."""

    def __init__(self, command: str, error_class: str, text: str) -> None:
        self.error_class = error_class
        super().__init__(f"QEMU refused {command}: {text}")


class QmpLink:
    """One VM's QMP connection, for ever; the laws are at the top of this file.

    :param on_event: Called for each event of QEMU's, in its order. Must not raise.
    :param on_change: Called for each change of state.
    :param jitter: Gives numbers in 0..1; the waits between attempts are multiplied by 0.5..1.
    """

    def __init__(
        self,
        path: Path,
        on_event: Callable[[Message], None],
        on_change: Callable[[], None],
        timing: LinkTiming | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.path = path
        self._on_event = on_event
        self._on_change = on_change
        self._timing = timing or LinkTiming()
        self._jitter = jitter
        self._client: QMPClient | None = None
        self._socket: socket.socket | None = None
        self._process: ProcessWatch | None = None
        self._door = _Door.UNTRIED
        self._task: asyncio.Task[None] | None = None
        self._attempted = asyncio.Event()
        self._logged: LinkState | None = None

    @property
    def state(self) -> LinkState:
        if self._client is not None:
            return LinkState.CONNECTED
        if self._process is None:
            return LinkState.GONE if self._door is _Door.REFUSED else LinkState.UNREACHABLE
        if self._process.exited and self._door is not _Door.OTHER:
            return LinkState.GONE
        return LinkState.UNREACHABLE

    @property
    def pid(self) -> int | None:
        """Of the process that was greeted last; None where it cannot be known."""
        return self._process.pid if self._process is not None else None

    async def open(self) -> None:
        """Start; returns after the first attempt, or a second if that takes longer."""
        if self._task is not None:
            raise RuntimeError(f"{self.path}: opened twice")
        self._task = asyncio.create_task(self._run(), name=f"qmp {self.path}")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timing.first_attempt_seconds):
                await self._attempted.wait()

    async def close(self) -> None:
        """Stop; may be repeated, and is final."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._process is not None:
            self._process.close()

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Run one command and return what QEMU answered, unchecked.

        :raise HypervisorGone: When the VM's process is gone; nothing was sent.
        :raise HypervisorUnreachable: When there is no connection; nothing was sent.
        :raise QmpRefused: When QEMU answered with an error.
        :raise OutcomeUnknown: When the connection broke or nothing sensible came in time.
        """
        client = self._client
        if client is None:
            raise self._not_connected()
        proves_other_process = self._process is not None and self._process.exited
        try:
            async with asyncio.timeout(self._timing.answer_seconds):
                answer = await client.execute(command, arguments)
        except ExecuteError as error:
            raise QmpRefused(command, error.error_class, str(error)) from error
        except StateError as error:  # the connection is being taken down; nothing was sent
            raise HypervisorUnreachable(f"{self.path}: connection lost before {command}") from error
        except TimeoutError as error:
            self._drop(client, f"no answer to {command} in {self._timing.answer_seconds:g} s")
            raise OutcomeUnknown(f"{self.path}: no answer to {command} in time") from error
        except ExecInterruptedError as error:
            raise OutcomeUnknown(f"{self.path}: connection lost during {command}") from error
        except QMPError as error:
            raise OutcomeUnknown(f"{self.path}: unexpected answer to {command}: {error}") from error
        if proves_other_process and self._process is not None and self._process.exited:
            _log.warning("%s: its listener has ended but QEMU answers; watching the socket only", self.path)
            self._process = None
        return answer

    def _not_connected(self) -> HypervisorError:
        if self.state is LinkState.GONE:
            return HypervisorGone(f"{self.path}: the VM's process is gone")
        return HypervisorUnreachable(f"{self.path}: no connection to QEMU")

    async def _run(self) -> None:
        wait = self._timing.retry_min_seconds
        while True:
            sock = self._dial()
            if sock is not None and await self._talk(sock):
                wait = self._timing.retry_min_seconds
            self._attempted.set()
            await asyncio.sleep(wait * (0.5 + self._jitter() / 2))
            wait = min(wait * 2, self._timing.retry_max_seconds)

    def _dial(self) -> socket.socket | None:
        """A connected socket, or None with `_door` telling why not. Unix sockets connect at once or fail."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            sock.connect(str(self.path))
        except OSError as error:
            sock.close()
            self._door = self._what_is_there(error)
            self._tell(str(error) or type(error).__name__)
            return None
        self._door = _Door.OTHER  # somebody listens; who, and whether a VM, the greeting will tell
        return sock

    def _what_is_there(self, error: OSError) -> _Door:
        if isinstance(error, FileNotFoundError):
            return _Door.ABSENT
        # A plain file refuses too, but says nothing of a VM.
        if isinstance(error, ConnectionRefusedError) and self.path.is_socket():
            return _Door.REFUSED
        return _Door.OTHER

    async def _talk(self, sock: socket.socket) -> bool:
        """Hold one connection until it ends; true if it was ever greeted."""
        client = QMPClient(readbuflen=_MESSAGE_LIMIT_BYTES)
        client.logger = _library_log
        client.events.event_filter = self._take_event
        watch = ProcessWatch.of_peer(sock, self._process_exited)
        try:
            if not await self._greet(client, sock):
                return False
            # The greeted process answered after its pidfd was opened: the pid was not reused.
            self._adopt(client, sock, watch)
            watch = None
            self._attempted.set()
            while client.runstate is Runstate.RUNNING:
                await client.runstate_changed()
            self._drop(client, "connection lost")
            return True
        finally:
            if watch is not None:
                watch.close()
            self._drop(client, reason=None)
            await self._hang_up(client, sock)

    async def _greet(self, client: QMPClient, sock: socket.socket) -> bool:
        try:
            async with asyncio.timeout(self._timing.greeting_seconds):
                await client.connect(sock)
        except (QMPError, OSError) as error:
            waited = f"no greeting in {self._timing.greeting_seconds:g} s: another client has it, or QEMU hangs"
            self._tell(str(error) or waited)
            return False
        return True

    def _adopt(self, client: QMPClient, sock: socket.socket, watch: ProcessWatch | None) -> None:
        if self._process is not None:
            self._process.close()
        self._process = watch
        self._client, self._socket, self._door = client, sock, _Door.UNTRIED
        self._tell(f"connected, pid {watch.pid if watch else 'unknown'}")

    def _drop(self, client: QMPClient, reason: str | None) -> None:
        """End this connection, if it is still the current one; `_talk` cleans up after it."""
        if self._client is not client or self._socket is None:
            return
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._client = self._socket = None
        if reason is not None:
            self._tell(reason)

    async def _hang_up(self, client: QMPClient, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # so that the library has nothing to flush and to wait for
        if client.runstate is not Runstate.IDLE:
            # "Arbitrary exception re-raised on behalf of the reader/writer": how it ended is known already.
            with contextlib.suppress(Exception):
                await client.disconnect()
        sock.close()

    def _process_exited(self) -> None:
        self._tell("its process has ended")

    def _take_event(self, event: Message) -> bool:
        self._on_event(event)
        return False  # nothing is to be queued or remembered by the library

    def _tell(self, reason: str) -> None:
        """Log and report the state if it is another than the last one told."""
        state = self.state
        if state is self._logged:
            return
        self._logged = state
        level = logging.INFO if state is LinkState.CONNECTED else logging.WARNING
        _log.log(level, "%s: %s (%s)", self.path, state.name.lower(), reason)
        self._on_change()
