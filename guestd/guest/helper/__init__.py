"""The root helper: all that guestd does as root, and nothing else. Small enough to be read in one go.

It is started first and forks the daemon, which gives up all rights (`privileges`). What it accepts on the
socket between the two (`grammar`) is the whole of what the daemon can do to the machine; `loop` takes it in,
`work` does it, `hooks` runs what the administrator has put in its directory.

Laws:

1. Numbers are decimal and bounded, words are from a list, no path ever comes from a message. All else is refused
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
8. The helper stays small: nothing heavy is imported here, and nothing later either.
"""

from guestd.guest.helper.grammar import MAX_MESSAGE, MAX_OPERATIONS, BadRequest
from guestd.guest.helper.loop import MAX_STUCK, MAX_WORKERS, Helper, run
from guestd.guest.helper.privileges import drop_privileges
from guestd.guest.helper.work import dial_host

__all__ = [
    "MAX_MESSAGE",
    "MAX_OPERATIONS",
    "MAX_STUCK",
    "MAX_WORKERS",
    "BadRequest",
    "Helper",
    "dial_host",
    "drop_privileges",
    "run",
]
