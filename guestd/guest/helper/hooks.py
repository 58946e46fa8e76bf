"""The administrator's hooks: programs that hear of a resize, and may hold a shrink back.

1. Hooks are the executable regular files in /etc/guestd/hooks.d with a name of letters, digits and ``._-``, run in
   the order of their names, one after the other. All share one deadline.
2. Trust: every directory down to them, and each hook, belongs to root, and nobody else may write to it (an ACL that
   lets somebody shows in the group's bits). None of them is a symbolic link. Only root can then change what
   a path means, so looking first and running later by path is safe; an open descriptor would say no more, and
   systemd takes a path. What is not to be trusted is never run, but said in the log and reported.
3. A hook runs in a transient unit of its own: as root, outside guestd's sandbox and control group. systemd ends it
   at the deadline with SIGTERM and a second later with SIGKILL, even if the helper is dead by then.
4. Before a shrink exit code 77 says no, and 75 "later" (a line ``retry-after SECONDS`` says when). The first such
   answer decides: the hooks after it are not asked, for nothing is taken now. Whatever else goes wrong is a
   failure, and no reason to stop: the other hooks run, and so does the resize.

Weak spots: systemd-run waits over D-Bus, so without a system bus every hook fails. A hook that ends by SIGTERM or
SIGPIPE counts as done, because systemd sees a clean end in that. Hooks that gave something up before a
later one said no are not told. The hook of a request that was cancelled runs on to its end, or its deadline.
"""

import errno
import os
import stat
import time
from collections.abc import Callable

from guestd.guest.helper.grammar import Result
from guestd.guest.helper.log import log
from guestd.guest.helper.transient import Output, run_unit

DIRECTORY = "etc/guestd/hooks.d"
ENDING_SECONDS = 2.5
"""What a worker needs after the hooks' deadline to see the last one end, and to say so."""

EXIT_LATER = 75  # EX_TEMPFAIL
EXIT_VETO = 77  # EX_NOPERM

_NAME_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
_MAX_NAME = 64
_LEAST_SECONDS = 0.2  # nothing is started for less
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Occasion:
    """What the hooks are told; amounts are whole ones, in millicores or bytes."""

    __slots__ = ("after", "before", "event", "kind")

    def __init__(self, event: str, kind: str, before: int, after: int) -> None:
        self.event, self.kind, self.before, self.after = event, kind, before, after

    def environment(self, seconds: float) -> dict[str, str]:
        """The variables for a hook that has so many seconds."""
        variables = {
            "GUESTD_EVENT": self.event,
            "GUESTD_KIND": self.kind,
            "GUESTD_BEFORE": str(self.before),
            "GUESTD_AFTER": str(self.after),
        }
        if self.kind == "cpu":
            variables["GUESTD_VCPUS_BEFORE"] = str(-(-self.before // 1000))
            variables["GUESTD_VCPUS_AFTER"] = str(-(-self.after // 1000))
        variables["GUESTD_DEADLINE_SECONDS"] = str(max(int(seconds), 1))
        return variables


def run(root: str, owner: int, occasion: Occasion, ends_at: float) -> Result:
    """Run all hooks. The state is none, done, veto:NAME, wait:SECONDS:NAME, or failed:NAME (the first that failed).

    :param root: Where the machine's files are; empty for this machine.
    :param owner: The user id that hooks must belong to.
    :param ends_at: When the last of them is ended, on the monotonic clock.
    """
    names, refused = find(root, owner)
    for name, why in refused:
        log(f"<3>hook {name} is not run: {why}")
    failures = [(name, errno.EPERM) for name, _ in refused]
    for name in names:
        code, output = _run_one(root, name, occasion, ends_at)
        if occasion.event == "before-shrink" and code == EXIT_VETO:
            log(f"<5>hook {name} says no to a shrink of {occasion.kind}")
            return "ok", 0, f"veto:{name}"
        if occasion.event == "before-shrink" and code == EXIT_LATER:
            log(f"<5>hook {name} says a shrink of {occasion.kind} must wait {output.retry_seconds} s")
            return "ok", 0, f"wait:{output.retry_seconds}:{name}"
        if code != 0:
            failures.append((name, -code if code < 0 else 0))
    if failures:
        name, number = failures[0]
        return "failed", number, f"failed:{name}"
    return "ok", 0, "done" if names else "none"


def _run_one(root: str, name: str, occasion: Occasion, ends_at: float) -> tuple[int, Output]:
    """Run a hook to its end: its exit code (1 for whatever systemd ended), or -errno when it was not to be had."""
    output = Output(f"hook {name}")
    seconds = ends_at - time.monotonic()
    if seconds < _LEAST_SECONDS:
        log(f"<3>hook {name} is not run: no time is left for it")
        return -errno.ETIMEDOUT, output
    # A unit of its own each time: an earlier one of this name may still be ending.
    unit = f"guestd-hook-{occasion.event}-{name}-{time.monotonic_ns()}.service"
    command = [f"{root}/{DIRECTORY}/{name}", occasion.event]
    try:
        code = run_unit(f"{root}/usr/bin/systemd-run", unit, command, occasion.environment(seconds), seconds, output)
    except OSError as error:
        log(f"<3>hook {name} is not run: {root}/usr/bin/systemd-run: {error.strerror}")
        return -(error.errno or errno.EIO), output
    if code != 0 and time.monotonic() >= ends_at:
        log(f"<3>hook {name} did not end within {seconds:.1f} s and was killed")
        return -errno.ETIMEDOUT, output
    if code != 0 and (occasion.event != "before-shrink" or code not in (EXIT_LATER, EXIT_VETO)):
        log(f"<3>hook {name} failed at {occasion.event} with exit code {code}")
    return code, output


# --- which hooks there are --------------------------------------------------------------------------


def find(root: str, owner: int) -> tuple[list[str], list[tuple[str, str]]]:
    """The names of the hooks in their order, and those that are not to be trusted, each with the reason.

    A directory that is not to be trusted is named as such, and then no hook is.
    """
    directory = f"{root}/{DIRECTORY}"
    try:
        found = sorted(os.listdir(directory))  # noqa: PTH208
    except FileNotFoundError:
        return [], []
    except OSError as error:
        return [], [("hooks.d", f"{directory}: {error.strerror}")]
    if not found:
        return [], []
    path = root
    for part in ("", *DIRECTORY.split("/")):
        path = f"{path}/{part}" if part else path
        why = _distrust(path or "/", owner, stat.S_ISDIR, "directory")
        if why:
            return [], [("hooks.d", why)]
    names, refused = [], []
    for name in found:
        if len(name) > _MAX_NAME or not _NAME_CHARACTERS.issuperset(name):
            continue
        path = f"{directory}/{name}"
        try:
            mode = os.stat(path).st_mode  # noqa: PTH116
        except OSError:  # just removed, or a link that leads nowhere
            continue
        if not stat.S_ISREG(mode) or not mode & stat.S_IXUSR:
            continue
        why = _distrust(path, owner, stat.S_ISREG, "regular file")
        if why:
            refused.append((name, why))
        else:
            names.append(name)
    return names, refused


def _distrust(path: str, owner: int, is_kind: Callable[[int], bool], kind: str) -> str:
    """Why something is not to be trusted; empty when it is."""
    try:
        found = os.lstat(path)
    except OSError as error:
        return f"{path}: {error.strerror}"
    if stat.S_ISLNK(found.st_mode):
        return f"{path} is a symbolic link, put the {kind} itself there"
    if not is_kind(found.st_mode):
        return f"{path} is no {kind}"
    if found.st_uid != owner:
        return f"{path} belongs to user {found.st_uid}, not to {owner}: chown it"
    if found.st_mode & _OTHERS_MAY_WRITE:
        return f"{path} may be written by others than its owner: chmod go-w it"
    return ""
