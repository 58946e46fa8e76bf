"""PSI triggers: the kernel wakes us when work stalls, instead of us looking often.

1. The root helper opens a trigger (`open_trigger`): before Linux 6.5 that needs CAP_SYS_RESOURCE, and later kernels
   let others have windows of whole 2 s only. What may be had is found out by asking: a window that is refused (EINVAL)
   is asked for again as one that anybody may have. The open descriptor *is* the trigger; it is passed to
   the daemon and lives until it is closed.
2. A trigger signals POLLPRI. asyncio watches POLLIN, so each trigger gets an epoll descriptor of its own and
   the loop watches that one (`Watcher`). The loop's poll consumes the trigger's event: hence one
   epoll per trigger, and no second look at which one it was.

The root helper imports this file: nothing heavy here.
"""

import errno
import os
import select
from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

# What a trigger stands for: `some` work stalled for the first number of µs within the second.
# Half a second is the shortest window that the kernel takes.
TRIGGERS = {
    "cpu": "some 100000 1000000",
    "memory": "some 50000 1000000",
    "io": "some 200000 1000000",
}
_WINDOW_US = range(500_000, 10_000_001)
_COMMON_WINDOW_US = 2_000_000  # whole ones of these are for everybody (kernel/sched/psi.c, psi_trigger_create)


def check_trigger(spec: str) -> None:
    """Accept ``some|full STALL_US WINDOW_US`` with sane numbers only.

    :raise ValueError: When it is anything else; the text says what.
    """
    words = spec.split(" ")
    if len(words) != 3 or words[0] not in ("some", "full") or not all(_is_decimal(word) for word in words[1:]):
        raise ValueError(f"{spec!r} is not a PSI trigger such as 'some 100000 1000000'")
    stall, window = int(words[1]), int(words[2])
    if window not in _WINDOW_US:
        raise ValueError(f"window is {window} us, must be within {_WINDOW_US[0]}..{_WINDOW_US[-1]}")
    if not 0 < stall <= window:
        raise ValueError(f"stall is {stall} us, must be within 1..{window} (its window)")


def _is_decimal(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) <= 9


def widened(spec: str) -> str | None:
    """The same trigger with a window that needs no privilege: the same share of a longer time. None when it has one.

    :raise ValueError: When `spec` is not a trigger.
    """
    check_trigger(spec)
    kind, stall, window = spec.split(" ")
    wide = -(-int(window) // _COMMON_WINDOW_US) * _COMMON_WINDOW_US
    return None if wide == int(window) else f"{kind} {int(stall) * wide // int(window)} {wide}"


def open_trigger(path: str, spec: str) -> int:
    """Open `path` (a file of `/proc/pressure`) with a trigger, or a wider one; the caller owns the descriptor.

    :raise ValueError: When `spec` is not a trigger.
    :raise OSError: When the kernel refuses: no PSI (ENOENT, EOPNOTSUPP), no right to it (EPERM, EACCES), or no
        such window, not even the wider one (EINVAL).
    """
    wide = widened(spec)
    try:
        return _open(path, spec)
    except OSError as error:
        if error.errno != errno.EINVAL or wide is None:
            raise
    return _open(path, wide)


def _open(path: str, spec: str) -> int:
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.write(fd, spec.encode() + b"\0")
    except BaseException:
        os.close(fd)
        raise
    return fd


class Watcher:
    """Calls `callback` each time that the trigger fires (at most once per window). Owns the descriptor.

    :param on_lost: Called once, with the watcher closed already, when the trigger has become useless.
    """

    def __init__(
        self,
        fd: int,
        callback: Callable[[], object],
        loop: "AbstractEventLoop",
        on_lost: Callable[[], object] | None = None,
    ) -> None:
        self._fd, self._callback, self._loop, self._on_lost = fd, callback, loop, on_lost
        self._epoll = select.epoll()
        self._epoll.register(fd, select.EPOLLPRI)
        loop.add_reader(self._epoll.fileno(), self._readable)

    def _readable(self) -> None:
        # The event itself was consumed by the loop's own poll; an error stays and is seen here.
        if any(events & (select.EPOLLERR | select.EPOLLHUP) for _, events in self._epoll.poll(0)):
            # The kernel reports a trigger whose pressure is gone as EPOLLERR together with EPOLLPRI.
            self.close()
            if self._on_lost is not None:
                self._on_lost()
            return
        self._callback()

    def close(self) -> None:
        """Stop watching and close the trigger; a second call does nothing."""
        if self._epoll.closed:
            return
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        os.close(self._fd)
