"""What a worker does: one request after the other, one operation after the other, each reported as soon as it is over.

A reclaim of the kernel's can take seconds; like a write to a block's state it ends at
the latest when the worker is killed.
"""

import errno
import os
import socket
import time
from collections.abc import Callable

from guestd.guest import psi
from guestd.guest.helper import hooks
from guestd.guest.helper.grammar import MAX_MESSAGE, OPENING, Operation, Result, parse_request, subject

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO)
_HOST_CID = 2
_MAX_ORDER = 2 * MAX_MESSAGE
DONE = b"done"

Dial = Callable[[int, float], socket.socket]


class Tools:
    """What a worker works with; `root` is without a slash at its end, and empty for this machine.

    :param dial: How a stream to the host is opened; tests have no vsock.
    :param hook_owner: The user id that hooks belong to.
    """

    __slots__ = ("dial", "hook_owner", "root")

    def __init__(self, root: str, dial: Dial, hook_owner: int) -> None:
        self.root, self.dial, self.hook_owner = root, dial, hook_owner


def order(deadline: float, quarantined: set[Operation], request: bytes) -> bytes:
    """A request for a worker, as `serve` reads it.

    :param deadline: When it will be killed, on the monotonic clock.
    :param quarantined: Subjects that another worker is stuck with.
    """
    stuck = ";".join(" ".join(one) for one in sorted(quarantined))
    return f"{deadline!r}\n{stuck}\n".encode() + request


def serve(channel: socket.socket, sock: socket.socket, tools: Tools, progress: int) -> None:
    """A worker's life: orders come through `channel`, `DONE` answers each, until the helper closes it.

    :param sock: Where results go: the daemon's.
    :param progress: A pipe that gets one byte for each operation that is begun.
    """
    while message := channel.recv(_MAX_ORDER):
        deadline, stuck, request = message.split(b"\n", 2)
        quarantined = {tuple(one.split(" ")) for one in stuck.decode().split(";") if one}
        request_id, _, operations = parse_request(request)
        work(sock, request_id, operations, quarantined, tools, float(deadline), progress)
        channel.send(DONE)


def work(
    sock: socket.socket,
    request_id: int,
    operations: list[Operation],
    quarantined: set[Operation],
    tools: Tools,
    deadline: float,
    progress: int,
) -> None:
    """Do the operations of one request.

    :param quarantined: Subjects that another worker is stuck with.
    :param deadline: When it will be killed, on the monotonic clock.
    :param progress: A pipe that gets one byte for each operation that is begun.
    """
    for index, operation in enumerate(operations):
        os.write(progress, b".")
        begun = time.monotonic_ns()
        opened: socket.socket | int | None = None
        if subject(operation) in quarantined:
            result: Result = ("stuck", errno.EBUSY, "")
        elif operation[0] in OPENING:
            result, opened = _open(operation, tools, deadline)
        else:
            result = perform(operation, tools, deadline)
        status, number, state = result
        elapsed_us = (time.monotonic_ns() - begun) // 1000
        message = f"{request_id} result {index} {status} {number} {elapsed_us} {state}".encode()
        if opened is None:
            sock.send(message)
        else:
            fd = opened if isinstance(opened, int) else opened.fileno()
            socket.send_fds(sock, [message], [fd])
            if isinstance(opened, int):
                os.close(opened)
            else:
                opened.close()


def perform(operation: Operation, tools: Tools, deadline: float) -> Result:
    """Do one operation that opens nothing."""
    match operation:
        case ("cpu", n, target):
            return set_cpu(tools.root, n, target)
        case ("block", n, target):
            return set_block(tools.root, n, target)
        case ("reclaim", size):
            return reclaim(tools.root, size)
        case ("hook", event, kind, before, after, seconds):
            occasion = hooks.Occasion(event, kind, int(before), int(after))
            ends_at = min(time.monotonic() + int(seconds), deadline - hooks.ENDING_SECONDS)
            return hooks.run(tools.root, tools.hook_owner, occasion, ends_at)
    return "refused", errno.EOPNOTSUPP, ""


def set_cpu(root: str, n: str, target: str) -> Result:
    """Online or offline a CPU, and read back what came of it."""
    directory = f"{root}/sys/devices/system/cpu/cpu{n}"
    if n == "0" and target == "offline":
        return "refused", errno.EPERM, ""
    if os.path.isdir(directory) and not os.path.exists(directory + "/online"):  # noqa: PTH112, PTH110
        # Cannot be switched: always on.
        return ("already", 0, "online") if target == "online" else ("refused", errno.EOPNOTSUPP, "online")
    states = {"1": "online", "0": "offline"}
    return _switch(directory + "/online", "1" if target == "online" else "0", target, states)


def set_block(root: str, n: str, target: str) -> Result:
    """Set the state of a memory block, and read back what came of it."""
    path = f"{root}/sys/devices/system/memory/memory{n}/state"
    return _switch(path, target, "offline" if target == "offline" else "online", {})


def reclaim(root: str, size: str) -> Result:
    """Have the kernel give up `size` bytes of memory that nobody used of late; the state is what came free.

    EAGAIN of the kernel means that it found less: that is no failure. What came free is the difference of
    MemFree, so what others took or freed meanwhile is in it.
    """
    before = _free_bytes(root)
    try:
        _write(f"{root}/sys/fs/cgroup/memory.reclaim", size)
    except OSError as error:
        if error.errno != errno.EAGAIN:
            return _failure(error)
    after = _free_bytes(root)
    return "ok", 0, "" if before is None or after is None else str(max(after - before, 0))


def _failure(error: OSError) -> Result:
    return ("gone" if error.errno in _GONE else "failed"), error.errno or errno.EIO, ""


def _free_bytes(root: str) -> int | None:
    try:
        fd = os.open(f"{root}/proc/meminfo", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        _, found, rest = os.read(fd, 4096).partition(b"MemFree:")
    finally:
        os.close(fd)
    word = rest.split(None, 1)[0] if found and rest.strip() else b""
    return int(word) * 1024 if word.isdigit() else None


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


def _open(operation: Operation, tools: Tools, deadline: float) -> tuple[Result, socket.socket | int | None]:
    """Open what is to be handed over; it stays open here."""
    try:
        if operation[0] == "dial":
            opened: socket.socket | int = tools.dial(int(operation[1]), max(deadline - time.monotonic(), 0.001))
        else:
            kind = operation[1]
            opened = psi.open_trigger(f"{tools.root}/proc/pressure/{kind}", psi.TRIGGERS[kind])
    except TimeoutError as error:
        return ("timeout", error.errno or errno.ETIMEDOUT, ""), None
    except OSError as error:
        return ("failed", error.errno or errno.EIO, ""), None
    return ("ok", 0, ""), opened
