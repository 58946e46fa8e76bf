"""The root helper: all that guestd does as root, and nothing else. Small enough to be read in one go.

It is started first and forks the daemon, which gives up all rights (`drop_privileges`). What it accepts on
the socket between the two is the whole of what the daemon can do to the machine:

    request = ID " " DEADLINE_MS ("\\n" operation)+        one SOCK_SEQPACKET message
    operation = "cpu" N "online"|"offline"
              | "block" N "online"|"online_movable"|"online_kernel"|"offline"
              | "dial" PORT                               a stream to the host (CID 2), from a port below 1024
              | "psi" "cpu"|"memory"|"io"                  a PSI trigger (`psi.TRIGGERS`)
    cancel = ID " cancel"                                 the deadline of that request is now

Answers, each one message of words:

    ID "result" INDEX STATUS ERRNO MICROSECONDS STATE    one operation is over; dial and psi carry the descriptor
    ID "end" "ok"|"timeout"|"stuck"|"died"               the last word: operations without a result share its fate
    ID "refused" "grammar"|"busy"|"duplicate"            nothing was done; ID is 0 when it could not be read

Laws:

1. Numbers are decimal and bounded, words are from this list, no path ever comes from a message. All else is refused
   and counted.
2. A write may never return: each request has a worker process of its own, which is killed at the deadline.
   Results come straight from the worker, "end" only after it has been reaped, so nothing follows "end".
3. A worker that outlives SIGKILL by a second (uninterruptible in the kernel) ends its request as "stuck". What it
   was working on is answered with the status `stuck` until it has been reaped; its late result may then follow
   "end" and is to be ignored.
4. "Already so" is success: the state is read back after each write, and only that decides.
5. CPU 0 is never taken offline, whoever asks.
6. No work, no wakeup: one `poll` without a timeout.
7. The helper lives as long as the daemon and ends with its status. When the helper is killed the daemon sees the
   end of the socket; workers that are still at it are ended by systemd with the unit's control group
   (the death signal of `prctl` is out of reach without ctypes).
"""

import errno
import os
import select
import signal
import socket
import time
from collections.abc import Callable

from guestd.guest import psi

MAX_MESSAGE = 16 << 10
MAX_OPERATIONS = 256
MAX_WORKERS = 8
MAX_STUCK = 16
MAX_DEADLINE_MS = 600_000
STUCK_AFTER_SECONDS = 1.0  # between SIGKILL and calling a worker stuck

_MAX_ID = (1 << 32) - 1
_MAX_CPU = (1 << 16) - 1
_MAX_BLOCK = (1 << 24) - 1
_MAX_PORT = (1 << 32) - 2  # the last one means "any"
_CPU_WRITES = {"online": "1", "offline": "0"}
_BLOCK_STATES = {
    "online": "online",
    "online_movable": "online",
    "online_kernel": "online",
    "offline": "offline",
}
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO)
_HOST_CID = 2
_HUNG_UP = select.POLLHUP | select.POLLERR | select.POLLRDHUP

Operation = tuple[str, str] | tuple[str, str, str]
Dial = Callable[[int, float], socket.socket]
Result = tuple[str, int, str]  # status, errno, state read back


class BadRequest(Exception):
    """A message that is not a request; `request_id` is 0 when not even that could be read."""

    def __init__(self, request_id: int) -> None:
        self.request_id = request_id
        super().__init__(f"request {request_id} breaks the grammar")


def number(word: str, largest: int) -> int | None:
    """A plain decimal number up to `largest`, without sign, leading zeros or anything else; else None."""
    if not word.isascii() or not word.isdigit() or len(word) > 10 or (word[0] == "0" and word != "0"):
        return None
    value = int(word)
    return value if value <= largest else None


def parse_request(message: bytes) -> tuple[int, int, list[Operation]]:
    """Request id, deadline in ms, and operations.

    :raise BadRequest: When the message is anything but a request.
    """
    request_id = 0
    try:
        head, *lines = message.decode("ascii").split("\n")
    except UnicodeDecodeError:
        raise BadRequest(0) from None
    words = head.split(" ")
    request_id = number(words[0], _MAX_ID) or 0
    deadline_ms = number(words[1], MAX_DEADLINE_MS) if len(words) == 2 else None
    operations = [parse_operation(line) for line in lines[: MAX_OPERATIONS + 1]]
    if not request_id or not deadline_ms or not operations or len(operations) > MAX_OPERATIONS:
        raise BadRequest(request_id)
    good = [operation for operation in operations if operation is not None]
    if len(message) > MAX_MESSAGE or len(good) != len(operations):
        raise BadRequest(request_id)
    return request_id, deadline_ms, good


def parse_cancel(message: bytes) -> int | None:
    """The request that is to be cancelled, when the message says so."""
    head, _, rest = message.partition(b" ")
    return number(head.decode("ascii", "replace"), _MAX_ID) if rest == b"cancel" else None


def parse_operation(line: str) -> Operation | None:
    """One line of a request, or None when it is not in the grammar."""
    match line.split(" "):
        case ["cpu", n, "online" | "offline" as target] if number(n, _MAX_CPU) is not None:
            return "cpu", n, target
        case ["block", n, target] if target in _BLOCK_STATES and number(n, _MAX_BLOCK) is not None:
            return "block", n, target
        case ["dial", port] if number(port, _MAX_PORT):
            return "dial", port
        case ["psi", kind] if kind in psi.TRIGGERS:
            return "psi", kind
    return None


# --- what a worker does -----------------------------------------------------------------------------


def set_cpu(root: str, n: str, target: str) -> Result:
    """Online or offline a CPU, and read back what came of it."""
    directory = f"{root}/sys/devices/system/cpu/cpu{n}"
    if n == "0" and target == "offline":
        return "refused", errno.EPERM, ""
    if os.path.isdir(directory) and not os.path.exists(directory + "/online"):  # noqa: PTH112, PTH110
        # Cannot be switched: always on.
        return ("already", 0, "online") if target == "online" else ("refused", errno.EOPNOTSUPP, "online")
    states = {"1": "online", "0": "offline"}
    return _switch(directory + "/online", _CPU_WRITES[target], target, states)


def set_block(root: str, n: str, target: str) -> Result:
    """Set the state of a memory block, and read back what came of it."""
    path = f"{root}/sys/devices/system/memory/memory{n}/state"
    return _switch(path, target, _BLOCK_STATES[target], {})


def _switch(path: str, text: str, wanted: str, states: dict[str, str]) -> Result:
    failed = 0
    try:
        _write(path, text)
    except OSError as error:
        failed = error.errno or errno.EIO
    try:
        state = _read(path)
    except OSError as error:
        return ("gone" if error.errno in _GONE else "failed"), failed or error.errno or errno.EIO, ""
    state = states.get(state, state)
    if state == wanted:
        return ("already" if failed else "ok"), 0, state
    return "failed", failed, state


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _read(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # One word: it goes into a message of words.
        return "".join(os.read(fd, 64).decode("ascii", "replace").split())
    finally:
        os.close(fd)


def dial_host(port: int, timeout_seconds: float) -> socket.socket:
    """A connected stream to the host, from a port that only root can have.

    :raise OSError: When there is no vsock, nobody listens, or the time is over.
    """
    family: int = socket.AF_VSOCK
    return connect_from_reserved(socket.socket(family, socket.SOCK_STREAM), port, timeout_seconds)


def connect_from_reserved(sock: socket.socket, port: int, timeout_seconds: float) -> socket.socket:
    """Bind to the highest free port below 1024, then connect; the socket is closed when that fails."""
    try:
        for source in range(1023, 0, -1):
            try:
                sock.bind((socket.VMADDR_CID_ANY, source))
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or source == 1:
                    raise
        sock.settimeout(timeout_seconds)
        sock.connect((_HOST_CID, port))
        sock.settimeout(None)
    except BaseException:
        sock.close()
        raise
    return sock


def _perform(operation: Operation, root: str, dial: Dial, deadline: float) -> tuple[Result, socket.socket | int | None]:
    """Do one operation; a descriptor that is to be handed over comes along, and stays open here."""
    match operation:
        case ("cpu", n, target):
            return set_cpu(root, n, target), None
        case ("block", n, target):
            return set_block(root, n, target), None
    try:
        if operation[0] == "dial":
            opened: socket.socket | int = dial(int(operation[1]), max(deadline - time.monotonic(), 0.001))
        else:
            kind = operation[1]
            opened = psi.open_trigger(f"{root}/proc/pressure/{kind}", psi.TRIGGERS[kind])
    except TimeoutError as error:
        return ("timeout", error.errno or errno.ETIMEDOUT, ""), None
    except OSError as error:
        return ("failed", error.errno or errno.EIO, ""), None
    return ("ok", 0, ""), opened


def _work(
    sock: socket.socket,
    request_id: int,
    operations: list[Operation],
    quarantined: set[tuple[str, ...]],
    root: str,
    dial: Dial,
    deadline: float,
    progress: int,
) -> None:
    """A worker's life: one operation after the other, each reported at once."""
    for index, operation in enumerate(operations):
        os.write(progress, b".")
        begun = time.monotonic_ns()
        opened: socket.socket | int | None = None
        if operation[:2] in quarantined:
            result: Result = ("stuck", errno.EBUSY, "")
        else:
            result, opened = _perform(operation, root, dial, deadline)
        status, number_, state = result
        elapsed_us = (time.monotonic_ns() - begun) // 1000
        message = f"{request_id} result {index} {status} {number_} {elapsed_us} {state}".encode()
        if opened is None:
            sock.send(message)
        else:
            fd = opened if isinstance(opened, int) else opened.fileno()
            socket.send_fds(sock, [message], [fd])
            if isinstance(opened, int):
                os.close(opened)
            else:
                opened.close()


# --- the helper itself ------------------------------------------------------------------------------


class _Worker:
    __slots__ = ("deadline", "killed_at", "operations", "progress", "request_id", "stuck", "working_on")

    def __init__(self, request_id: int, operations: list[Operation], deadline: float, progress: int) -> None:
        self.request_id, self.operations = request_id, operations
        self.deadline, self.progress = deadline, progress
        self.killed_at: float | None = None
        self.working_on: Operation | None = None  # known once it has been killed
        self.stuck = False

    def wake_at(self) -> float | None:
        if self.stuck:
            return None
        return self.deadline if self.killed_at is None else self.killed_at + STUCK_AFTER_SECONDS


class Helper:
    """The loop; `run` is the usual way in.

    :param dial: How a stream to the host is opened; tests have no vsock.
    :param kill: How workers are killed; a test makes one that survives.
    """

    def __init__(
        self,
        sock: socket.socket,
        child_pid: int,
        root: str = "/",
        dial: Dial = dial_host,
        kill: Callable[[int, int], None] = os.kill,
    ) -> None:
        self._sock, self._child, self._root = sock, child_pid, str(root).rstrip("/")
        self._dial, self._kill = dial, kill
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
            return self._serve(woken)
        finally:
            signal.set_wakeup_fd(fd_before)
            for one, handler in zip(caught, before, strict=True):
                signal.signal(one, handler)
            os.close(woken)
            os.close(wakeup)
            for pid, worker in self._workers.items():
                os.kill(pid, signal.SIGKILL)
                os.close(worker.progress)

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
            os.close(worker.progress)
            if worker.stuck:
                _log(f"<5>{' '.join(worker.working_on or ())}: the worker that was stuck has ended")
            elif worker.killed_at is not None:
                self._answer(worker.request_id, "end timeout")
            else:
                self._answer(worker.request_id, "end ok" if code == 0 else "end died")

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
                _log(f"<3>{' '.join(worker.working_on or ())}: stuck in the kernel, refused from now on")
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
        busy = [worker for worker in self._workers.values() if not worker.stuck]
        if any(worker.request_id == request_id for worker in busy):
            self._refuse(request_id, "duplicate")
        elif len(busy) >= MAX_WORKERS or len(self._workers) - len(busy) >= MAX_STUCK:
            self._refuse(request_id, "busy")
        else:
            self._start(request_id, time.monotonic() + deadline_ms / 1000, operations)

    def _start(self, request_id: int, deadline: float, operations: list[Operation]) -> None:
        quarantined: set[tuple[str, ...]] = {
            worker.working_on[:2] for worker in self._workers.values() if worker.stuck and worker.working_on
        }
        progress, report = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            pid = os.fork()
        except OSError as error:
            os.close(progress)
            os.close(report)
            _log(f"<3>no worker for request {request_id}: {error}")
            self._refuse(request_id, "busy")
            return
        if pid == 0:
            code = 70
            try:
                signal.set_wakeup_fd(-1)
                for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
                    signal.signal(one, signal.SIG_DFL)
                _work(self._sock, request_id, operations, quarantined, self._root, self._dial, deadline, report)
                code = 0
            except BaseException as error:
                _log(f"<3>request {request_id}: {error!r}")
            finally:
                os._exit(code)
        os.close(report)
        self._workers[pid] = _Worker(request_id, operations, deadline, progress)

    def _refuse(self, request_id: int, why: str) -> None:
        self._refused += 1
        if self._refused & (self._refused - 1) == 0:  # the 1st, 2nd, 4th, 8th …: bounded by nature
            _log(f"<4>request {request_id} refused: {why} ({self._refused} so far)")
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


def drop_privileges(user: str) -> None:
    """Become `user` for good, without groups and without capabilities.

    :raise KeyError: When there is no such user.
    :raise RuntimeError: When root could be had back.
    """
    import pwd

    entry = pwd.getpwnam(user)
    if entry.pw_uid == 0 or entry.pw_gid == 0:
        raise RuntimeError(f"{user} is root: no user for the daemon")
    os.setgroups([])
    os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
    os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    try:
        os.setuid(0)
    except PermissionError:
        return
    raise RuntimeError("root could be had back after giving it up")


def _caught(_signal: int, _frame: object) -> None:
    """The number goes through the wakeup descriptor; the handler itself has nothing to do."""


def _count(progress: int) -> int:
    """How many operations a worker has begun."""
    try:
        return len(os.read(progress, MAX_OPERATIONS))
    except BlockingIOError:
        return 0


def _log(line: str) -> None:
    try:
        os.write(2, (line[:3] + "helper: " + line[3:] + "\n").encode())
    except OSError:  # nobody reads: no reason to stop
        return
