"""The daemon's side of the root helper: asks, waits, and says what became of it.

`RootHands` talks to the helper over its socket, `DryHands` only logs. What an operation came to is a
`HandResult`, whatever it came to; `HelperGone` is raised when nobody will answer any more, and then
the daemon ends (systemd starts it again, and nothing in the VM has changed).
"""

import array
import asyncio
import errno
import logging
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from guestd.guest.core.ops import BlockOp, BlockTarget, CpuOp, HandResult, HandStatus, Op
from guestd.guest.helper import MAX_OPERATIONS, MAX_WORKERS
from guestd.model.errors import GuestdError

_log = logging.getLogger(__name__)
_GRACE_SECONDS = 5.0  # beyond the deadline: the helper itself is late


class HelperGone(GuestdError):
    """The root helper has ended or no longer answers."""


class Hands(ABC):
    """What can be done to this machine."""

    @abstractmethod
    async def batch(self, ops: Sequence[Op], deadline_seconds: float = 10.0) -> list[HandResult]:
        """Do all in this order, in one process, within one deadline; a failure does not stop the rest.

        The deadline counts from when the helper has a worker to spare. A cancelled call kills its worker.
        Hooks have the seconds that their operation says, or 2.5 s less than the deadline if that comes first
        (`hooks.ENDING_SECONDS`): the last of them must be ended, and reported, before the worker is.

        :raise HelperGone: When the helper has ended.
        """

    @abstractmethod
    async def dial(self, port: int, deadline_seconds: float = 5.0) -> socket.socket:
        """A non-blocking stream to the host's vsock port; the caller owns it.

        :raise OSError: When the connection does not come about.
        :raise HelperGone: When the helper has ended.
        """

    @abstractmethod
    async def psi_trigger(self, kind: str, deadline_seconds: float = 5.0) -> int:
        """A PSI trigger on cpu, memory or io for `psi.Watcher`; the caller owns the descriptor.

        :raise OSError: When the kernel does not give one.
        :raise HelperGone: When the helper has ended.
        """

    async def online_cpu(self, number: int, deadline_seconds: float = 10.0) -> HandResult:
        """Bring one CPU online."""
        return (await self.batch((CpuOp(number, True),), deadline_seconds))[0]

    async def offline_cpu(self, number: int, deadline_seconds: float = 10.0) -> HandResult:
        """Take one CPU offline; CPU 0 is refused."""
        return (await self.batch((CpuOp(number, False),), deadline_seconds))[0]

    async def set_block(self, index: int, target: BlockTarget, deadline_seconds: float = 10.0) -> HandResult:
        """Set the state of one memory block."""
        return (await self.batch((BlockOp(index, target),), deadline_seconds))[0]


class DryHands(Hands):
    """Logs what would be done and touches nothing."""

    async def batch(self, ops: Sequence[Op], deadline_seconds: float = 10.0) -> list[HandResult]:
        for op in ops:
            _log.info("dry run: would do: %s", op)
        return [HandResult(op, HandStatus.DRY_RUN) for op in ops]

    async def dial(self, port: int, deadline_seconds: float = 5.0) -> socket.socket:
        """Dry runs reach the host from an ordinary port; that is the caller's to do."""
        raise PermissionError(errno.EPERM, "no root helper to dial from a port below 1024")

    async def psi_trigger(self, kind: str, deadline_seconds: float = 5.0) -> int:
        raise PermissionError(errno.EPERM, "no root helper to open a PSI trigger")


@dataclass(slots=True)
class _Raw:
    """One result message."""

    status: HandStatus
    errno: int
    elapsed_seconds: float
    state: str
    fd: int = -1


class _Pending:
    """A request under way."""

    __slots__ = ("count", "done", "ended", "results", "sent")

    def __init__(self, count: int, done: "asyncio.Future[HandStatus]", ended: "asyncio.Future[None]") -> None:
        self.count = count
        self.done = done  # all results are in, or none will follow: the fate of those without a result
        self.ended = ended  # the helper has a worker to spare again
        self.results: dict[int, _Raw] = {}
        self.sent = False


_FATES = {
    "end ok": HandStatus.FAILED,  # a result that never came although all went well
    "end died": HandStatus.FAILED,
    "end timeout": HandStatus.TIMEOUT,
    "end stuck": HandStatus.STUCK,
}


class RootHands(Hands):
    """The helper's client, to be made inside the running loop. Owns the socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._slots = asyncio.Semaphore(MAX_WORKERS)
        self._pending: dict[int, _Pending] = {}
        self._last_id = 0
        self._sending = asyncio.Lock()
        self.gone = self._loop.create_future()
        """Done when the helper has ended: nothing can be done any more, the daemon should end."""
        self._loop.add_reader(sock.fileno(), self._readable)

    async def batch(self, ops: Sequence[Op], deadline_seconds: float = 10.0) -> list[HandResult]:
        if not ops:
            return []
        if len(ops) > MAX_OPERATIONS:
            raise ValueError(f"{len(ops)} operations in one batch, at most {MAX_OPERATIONS} are allowed")
        raws = await self._request([str(op) for op in ops], deadline_seconds)
        return [
            HandResult(op, raw.status, raw.errno, raw.elapsed_seconds, raw.state)
            for op, raw in zip(ops, raws, strict=True)
        ]

    async def dial(self, port: int, deadline_seconds: float = 5.0) -> socket.socket:
        fd = await self._open(f"dial {port}", deadline_seconds)
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        return sock

    async def psi_trigger(self, kind: str, deadline_seconds: float = 5.0) -> int:
        return await self._open(f"psi {kind}", deadline_seconds)

    def close(self) -> None:
        """Let go of the helper; requests under way end with `HelperGone`."""
        self._lost("closed")

    async def _open(self, line: str, deadline_seconds: float) -> int:
        [raw] = await self._request([line], deadline_seconds)
        if raw.status is HandStatus.OK and raw.fd >= 0:
            return raw.fd
        number = raw.errno or (errno.ETIMEDOUT if raw.status is HandStatus.TIMEOUT else errno.EIO)
        raise OSError(number, f"{line}: {raw.status} ({os.strerror(number)})")

    async def _request(self, lines: list[str], deadline_seconds: float) -> list[_Raw]:
        await self._slots.acquire()
        if self.gone.done():
            self._slots.release()
            raise HelperGone("the root helper has ended")
        self._last_id = self._last_id % ((1 << 32) - 1) + 1
        request_id = self._last_id
        pending = _Pending(len(lines), self._loop.create_future(), self._loop.create_future())
        pending.ended.add_done_callback(lambda _: self._slots.release())
        self._pending[request_id] = pending
        head = f"{request_id} {max(round(deadline_seconds * 1000), 1)}"
        message = "\n".join([head, *lines]).encode("ascii")
        try:
            async with asyncio.timeout(deadline_seconds + _GRACE_SECONDS):
                await self._send(message)
                pending.sent = True
                fate = await pending.done
        except TimeoutError:
            self._lost("no answer long after the deadline")
            raise HelperGone("the root helper no longer answers") from None
        except asyncio.CancelledError:
            self._abandon(request_id, pending)
            raise
        done = [pending.results[index] for index in range(len(lines)) if index in pending.results]
        # They are done one by one: only the first one without a result can be stuck, those after it were not begun.
        others = HandStatus.TIMEOUT if fate is HandStatus.STUCK else fate
        return [*done, *(_Raw(one, 0, 0.0, "") for one in [fate, *[others] * len(lines)][: len(lines) - len(done)])]

    async def _send(self, message: bytes) -> None:
        async with self._sending:
            while not self.gone.done():  # `_lost` fails the request: whoever waits for it is told there
                try:
                    self._sock.send(message, socket.MSG_NOSIGNAL)
                    return
                except BlockingIOError:
                    await self._writable()
                except OSError as error:
                    self._lost(str(error))

    async def _writable(self) -> None:
        writable = asyncio.Event()
        self._loop.add_writer(self._sock.fileno(), writable.set)
        self.gone.add_done_callback(lambda _: writable.set())
        try:
            await writable.wait()
        finally:
            if not self.gone.done():
                self._loop.remove_writer(self._sock.fileno())

    def _abandon(self, request_id: int, pending: _Pending) -> None:
        """Nobody waits any more: stop the worker (what it did stays done) and throw away what it opened."""
        pending.done.cancel()
        for raw in pending.results.values():
            _close(raw.fd)
        if self.gone.done():
            return
        if not pending.sent:
            del self._pending[request_id]
            pending.ended.set_result(None)
            return
        try:
            self._sock.send(f"{request_id} cancel".encode(), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            _log.info("helper: request %d could not be cancelled, it runs to its deadline", request_id)
        except OSError as error:
            self._lost(str(error))

    def _readable(self) -> None:
        space = socket.CMSG_SPACE(4)
        for _ in range(64):  # let others have the loop in between
            try:
                message, ancillary, _flags, _ = self._sock.recvmsg(512, space, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except OSError as error:
                self._lost(str(error))
                return
            if not message:
                self._lost("the socket was closed")
                return
            fds = array.array("i")
            for level, kind, data in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds.frombytes(data[: len(data) - len(data) % 4])
            self._take(message.decode("ascii", "replace"), fds[0] if fds else -1)

    def _take(self, message: str, fd: int) -> None:
        head, _, rest = message.partition(" ")
        pending = self._pending.get(int(head)) if head.isdecimal() else None
        if pending is None:
            # Late: the worker was stuck and the request is over.
            _log.info("helper: %r belongs to no request, ignoring", message)
            _close(fd)
            return
        words = rest.split(" ")
        if words[0] == "result":
            index, status, number, elapsed_us, state = words[1:6]
            raw = _Raw(HandStatus(status), int(number), int(elapsed_us) / 1e6, state, fd)
            pending.results[int(index)] = raw
            if pending.done.done():
                _close(fd)
            elif len(pending.results) == pending.count:
                pending.done.set_result(HandStatus.OK)
            return
        _close(fd)
        del self._pending[int(head)]
        if not pending.ended.done():
            pending.ended.set_result(None)
        if not pending.done.done():
            pending.done.set_result(_FATES.get(rest, HandStatus.REFUSED))

    def _lost(self, why: str) -> None:
        if self.gone.done():
            return
        self.gone.set_result(why)
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for pending in self._pending.values():
            if not pending.done.done():
                pending.done.set_exception(HelperGone(f"the root helper is gone: {why}"))
            if not pending.ended.done():
                pending.ended.set_result(None)
        self._pending.clear()


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)
