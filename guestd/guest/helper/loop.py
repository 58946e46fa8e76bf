"""The helper's loop: takes requests in, has a worker of its own for each, ends it in time, and says how it ended.

A worker that has done its request waits for the next one, so that none has to be forked while somebody waits for a
CPU; one at most waits, the others end.
"""

import os
import select
import signal
import socket
import time
from collections.abc import Callable

from guestd.guest.helper.grammar import (
    MAX_MESSAGE,
    MAX_OPERATIONS,
    OPENING,
    BadRequest,
    Operation,
    parse_cancel,
    parse_request,
    subject,
)
from guestd.guest.helper.log import log
from guestd.guest.helper.work import DONE, Dial, Tools, dial_host, order, serve

MAX_WORKERS = 8
MAX_STUCK = 16  # then nothing more is switched; the host can still be reached, and told
STUCK_AFTER_SECONDS = 1.0  # between SIGKILL and calling a worker stuck

_HUNG_UP = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)


class _Worker:
    """One process; `request_id` is 0 while it waits. Its orders go through `channel`, closed when it is to end."""

    __slots__ = ("channel", "deadline", "killed_at", "operations", "progress", "request_id", "stuck", "working_on")

    def __init__(self, channel: socket.socket, progress: int) -> None:
        self.channel, self.progress = channel, progress
        self.request_id, self.deadline = 0, 0.0
        self.operations: list[Operation] = []
        self.killed_at: float | None = None
        self.working_on: Operation | None = None  # known once it has been killed
        self.stuck = False

    @property
    def waits(self) -> bool:
        return not self.request_id and self.channel.fileno() >= 0

    def wake_at(self) -> float | None:
        if self.stuck or not self.request_id:
            return None
        return self.deadline if self.killed_at is None else self.killed_at + STUCK_AFTER_SECONDS

    def close(self) -> None:
        self.channel.close()
        os.close(self.progress)


class Helper:
    """The loop; `run` is the usual way in.

    :param root: Where the machine's files are.
    :param dial: How a stream to the host is opened; tests have no vsock.
    :param kill: How workers are killed; a test makes one that survives.
    :param hook_owner: The user id that hooks and their directories belong to.
    """

    def __init__(
        self,
        sock: socket.socket,
        child_pid: int,
        root: str = "/",
        dial: Dial = dial_host,
        kill: Callable[[int, int], None] = os.kill,
        hook_owner: int = 0,
    ) -> None:
        self._sock, self._child, self._kill = sock, child_pid, kill
        self._tools = Tools(root.rstrip("/"), dial, hook_owner)
        self._workers: dict[int, _Worker] = {}
        self._unsent: list[bytes] = []
        self._refused = 0
        self._open = True
        self._poll = select.poll()

    def run(self) -> int:
        """Serve until the daemon has ended; its exit status (128 + signal number when a signal ended it)."""
        woken, wakeup = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        caught = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
        before = [signal.signal(one, _caught) for one in caught]
        fd_before = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        self._poll.register(woken, select.POLLIN)
        try:
            self._fork()
            return self._serve(woken)
        finally:
            signal.set_wakeup_fd(fd_before)
            for one, handler in zip(caught, before, strict=True):
                signal.signal(one, handler)
            os.close(woken)
            os.close(wakeup)
            for pid, worker in self._workers.items():
                os.kill(pid, signal.SIGKILL)
                worker.close()

    def _serve(self, woken: int) -> int:
        while True:
            status = self._reap()
            if status is not None:
                return status
            self._enforce(time.monotonic())
            self._flush()
            self._watch()
            for fd, events in self._poll.poll(self._timeout_ms()):
                if fd == woken:
                    self._pass_on(os.read(woken, 64))
                elif fd != self._sock.fileno():
                    self._finish(fd)
                elif events & (select.POLLIN | _HUNG_UP):
                    self._receive(hung_up=bool(events & _HUNG_UP))

    def _watch(self) -> None:
        """Requests are taken only while the answers to the earlier ones could be sent."""
        if self._open:
            self._poll.register(self._sock, _HUNG_UP | (select.POLLOUT if self._unsent else select.POLLIN))

    def _timeout_ms(self) -> int | None:
        times = [at for worker in self._workers.values() if (at := worker.wake_at()) is not None]
        return max(int((min(times) - time.monotonic()) * 1000) + 1, 0) if times else None

    def _pass_on(self, numbers: bytes) -> None:
        for one in set(numbers):
            if one in (signal.SIGTERM, signal.SIGINT):
                os.kill(self._child, signal.SIGTERM)
            elif one == signal.SIGHUP:
                os.kill(self._child, signal.SIGHUP)

    def _reap(self) -> int | None:
        """Take note of all processes that ended; the daemon's exit status when it is among them."""
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return None
            code = os.waitstatus_to_exitcode(status)
            if pid == self._child:
                return code if code >= 0 else 128 - code
            worker = self._workers.pop(pid, None)
            if worker is None:
                continue
            self._let_go(worker)
            os.close(worker.progress)
            if not worker.request_id:
                continue
            if worker.stuck:
                log(f"<5>{' '.join(worker.working_on or ())}: the worker that was stuck has ended")
            elif worker.killed_at is not None:
                self._answer(worker.request_id, "end timeout")
            else:
                self._answer(worker.request_id, "end died")

    def _finish(self, fd: int) -> None:
        """A worker has done its request, or its process has ended and will be reaped."""
        worker = next((one for one in self._workers.values() if one.channel.fileno() == fd), None)
        if worker is None:  # a request that was found beside this had it let go of
            return
        try:
            word = worker.channel.recv(len(DONE), socket.MSG_DONTWAIT)
        except BlockingIOError:  # the same, and a new one has got the number
            return
        except OSError:
            word = b""
        if word == DONE and worker.killed_at is None:
            another = any(one.waits for one in self._workers.values())
            request_id, worker.request_id = worker.request_id, 0
            self._answer(request_id, "end ok")
            if not another:
                return
        self._let_go(worker)

    def _let_go(self, worker: _Worker) -> None:
        if worker.channel.fileno() >= 0:
            self._poll.unregister(worker.channel)
            worker.channel.close()

    def _enforce(self, now: float) -> None:
        for pid, worker in self._workers.items():
            wake_at = worker.wake_at()
            if wake_at is None or now < wake_at:
                continue
            if worker.killed_at is None:
                self._kill(pid, signal.SIGKILL)
                worker.killed_at = now
                worker.working_on = worker.operations[max(_count(worker.progress) - 1, 0)]
            else:
                worker.stuck = True
                log(f"<3>{' '.join(worker.working_on or ())}: stuck in the kernel, refused from now on")
                self._answer(worker.request_id, "end stuck")

    def _receive(self, hung_up: bool) -> None:
        try:
            message = self._sock.recv(MAX_MESSAGE + 1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:  # reset: the daemon is going or gone
            message, hung_up = b"", True
        if not message and hung_up:
            self._poll.unregister(self._sock)
            self._open = False
            return
        cancelled = parse_cancel(message)
        if cancelled is not None:  # silence when it is over already: that race is ordinary
            for worker in self._workers.values():
                if worker.request_id == cancelled:
                    worker.deadline = 0.0
            return
        try:
            request_id, deadline_ms, operations = parse_request(message)
        except BadRequest as error:
            self._refuse(error.request_id, "grammar")
            return
        stuck = sum(worker.stuck for worker in self._workers.values())
        busy = [worker for worker in self._workers.values() if worker.request_id and not worker.stuck]
        if any(worker.request_id == request_id for worker in busy):
            self._refuse(request_id, "duplicate")
        elif len(busy) >= MAX_WORKERS or (stuck >= MAX_STUCK and not all(one[0] in OPENING for one in operations)):
            self._refuse(request_id, "busy")
        else:
            self._start(request_id, time.monotonic() + deadline_ms / 1000, operations, message)

    def _start(self, request_id: int, deadline: float, operations: list[Operation], message: bytes) -> None:
        quarantined = {
            subject(worker.working_on) for worker in self._workers.values() if worker.stuck and worker.working_on
        }
        for worker in [one for one in self._workers.values() if one.waits]:
            _count(worker.progress)  # of its last request
            try:
                worker.channel.send(order(deadline, quarantined, message), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except OSError:  # it has just died
                self._let_go(worker)
                continue
            worker.request_id, worker.operations, worker.deadline = request_id, operations, deadline
            return
        if self._fork():
            self._start(request_id, deadline, operations, message)
        else:
            self._refuse(request_id, "busy")

    def _fork(self) -> bool:
        """One more worker, that waits."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        progress, report = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            pid = os.fork()
        except OSError as error:
            for one in (ours, theirs):
                one.close()
            os.close(progress)
            os.close(report)
            log(f"<3>no worker: {error}")
            return False
        if pid == 0:
            code = 70
            try:
                signal.set_wakeup_fd(-1)
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
                    signal.signal(number, signal.SIG_DFL)
                ours.close()  # else a worker would not hear that the helper has let go of another, or of itself
                for other in self._workers.values():
                    other.channel.close()
                serve(theirs, self._sock, self._tools, report)
                code = 0
            except BaseException as error:
                log(f"<3>worker: {error!r}")
            finally:
                os._exit(code)
        theirs.close()
        os.close(report)
        self._workers[pid] = _Worker(ours, progress)
        self._poll.register(ours, select.POLLIN)
        return True

    def _refuse(self, request_id: int, why: str) -> None:
        self._refused += 1
        if self._refused & (self._refused - 1) == 0:  # the 1st, 2nd, 4th, 8th …: bounded by nature
            log(f"<4>request {request_id} refused: {why} ({self._refused} so far)")
        self._answer(request_id, f"refused {why}")

    def _answer(self, request_id: int, words: str) -> None:
        self._unsent.append(f"{request_id} {words}".encode())
        self._flush()

    def _flush(self) -> None:
        while self._unsent:
            try:
                self._sock.send(self._unsent[0], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError:  # the daemon is going or gone: nobody is left to be told
                self._unsent.clear()
                return
            del self._unsent[0]


def run(sock: socket.socket, child_pid: int, root: str = "/") -> int:
    """Be the root helper of the daemon `child_pid` until that ends.

    :return: The daemon's exit status, for the helper to end with as well.
    """
    return Helper(sock, child_pid, root).run()


def _caught(_signal: int, _frame: object) -> None:
    """The number goes through the wakeup descriptor; the handler itself has nothing to do."""


def _count(progress: int) -> int:
    """How many operations a worker has begun."""
    try:
        return len(os.read(progress, MAX_OPERATIONS))
    except BlockingIOError:
        return 0
