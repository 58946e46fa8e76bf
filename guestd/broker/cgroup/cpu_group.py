"""The CPU bandwidth of one VM: its vCPU threads in a cgroup of their own, below that of its QEMU.

1. Only the threads that are named go in, never the emulator's: a bound emulator answers no QMP until its next
   period (p99 1.6 → 51 ms).
2. What is there is read, not remembered; only the quota that was asked is kept, to set it again in a group that
   had to be made anew.
3. A group outlives the broker and keeps its quota; the next broker finds it. It goes with its VM (`remove`). One
   that is found without threads is a dead VM's, and its quota says nothing.
4. A thread goes in only when it is the process's: a number that was used again elsewhere is left alone.

Weak spots: the group stays behind when the VM ends while no broker runs; the next VM of that name in that place
takes it over. Where something else (libvirt with `cputune`) has put the vCPU threads into groups of its own, they are
taken out of those. A vCPU thread whose quota ends while it holds QEMU's global lock makes QMP wait for the next period
(p99 of 19 ms seen, of 5 unbound, with software emulation, whose vCPUs hold that lock often; a period of 10 ms made it
18, as what two threads may use in it is less than the scheduler's slice of 5 ms).
"""

import errno
import logging
import time
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

from guestd.broker.cgroup.files import CgroupError, Files
from guestd.broker.cgroup.group import Group, group_at, refused
from guestd.broker.cgroup.place import place_of
from guestd.broker.cgroup.quota import ThrottleMeter

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """What the kernel says of a VM's group."""

    threads: frozenset[int]
    quota_millicores: int  # 0: no bound
    throttled_permille: int  # share of the last second's periods in which the bound was hit


class CpuGroup:
    """The group of one QEMU process; the laws are at the top of this file. `settle` may block for milliseconds,
    the rest takes some ten microseconds.

    :param name: The VM's, which the group is called after.
    :param pid: QEMU's.
    """

    def __init__(
        self, name: str, pid: int, files: Files | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name, self.pid = name, pid
        self._files, self._clock = files or Files(), clock
        self._group: Group | None = None
        self._asked = 0  # millicores
        self._meter = ThrottleMeter()

    @property
    def path(self) -> Path | None:
        """Where it is; None before the first `settle`."""
        return self._group.path if self._group is not None else None

    def read(self) -> Bandwidth | None:
        """What there is; None when there is no group (any more), which `settle` mends.

        :raise CgroupError: When it cannot be read for another reason.
        """
        return self._read(self._group) if self._group is not None else None

    def find(self) -> Bandwidth | None:
        """What there is of a group that was made before, by whomever; None when no threads are bound.

        :raise CgroupError: When it cannot be found or read.
        """
        seen = self._read(group_at(self._files, place_of(self._files, self.pid), self.name))
        return seen if seen is not None and seen.threads else None

    def _read(self, group: Group) -> Bandwidth | None:
        try:
            quota = group.quota()  # first: v2 has a cpu.stat even where the controller is off, with less in it
            return Bandwidth(group.threads(), quota, self._throttled(group))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV):
                return None
            raise refused(group.path, "cannot be read", error) from error
        except (ValueError, KeyError) as error:
            raise CgroupError(f"{group.path}: cpu.stat or the quota is not as the kernel writes it: {error}") from error

    def glance(self) -> int | None:
        """Only how much is throttled, in permille, from one file; None when that cannot be told."""
        try:
            return self._throttled(self._group) if self._group is not None else None
        except (OSError, ValueError, KeyError):
            return None

    def settle(self, threads: Set[int]) -> None:
        """Have the group with these threads in it, and with the quota that was asked.

        :raise CgroupError: When that cannot be.
        """
        alive = self._alive(threads)
        known = self._group
        group = group_at(self._files, place_of(self._files, self.pid), self.name)
        made = group.make()
        try:
            inside = group.threads()
            if known is None and not made and inside:
                self._asked = group.quota()
            elif group.quota() != self._asked:
                if known is not None:
                    _log.warning(
                        "%s: %s was gone, or its quota was: %d millicores set again",
                        *(self.name, known.path, self._asked),
                    )
                group.set_quota(self._asked)
            self._group = group
            for thread in sorted(alive - inside):
                group.add(thread)
        except OSError as error:
            raise refused(group.path, "vanished while it was made", error) from error
        except ValueError as error:
            raise CgroupError(f"{group.path}: threads or quota are not as the kernel writes them: {error}") from error
        if known is not None and known.path != group.path:  # somebody moved QEMU
            known.remove()

    def set_quota(self, millicores: int) -> None:
        """Bound the threads that are in the group, all together.

        :raise CgroupError: When the kernel refuses, or there is no group.
        """
        if millicores < 1:
            raise CgroupError(f"{self.name}: {millicores} millicores asked for; a bound is a whole number from 1 up")
        if self._group is None:
            raise CgroupError(f"{self.name}: has no CPU group yet")
        self._group.set_quota(millicores)
        self._asked = millicores

    def remove(self) -> bool:
        """Remove the group of a VM that has ended; whether there is none any more. May be repeated: threads that
        are just ending keep it for some milliseconds.

        :raise CgroupError: When it cannot be removed.
        """
        if self._group is not None and self._group.remove():
            self._group = None
        return self._group is None

    def _throttled(self, group: Group) -> int:
        return self._meter.look(self._clock(), *group.throttling())

    def _alive(self, threads: Set[int]) -> Set[int]:
        alive = {thread for thread in threads if self._files.exists(Path(f"/proc/{self.pid}/task/{thread}"))}
        if threads and not alive:
            raise CgroupError(
                f"{self.name}: none of the vCPU threads {sorted(threads)} is of process {self.pid}, which made the QMP"
                " socket: QEMU must make it itself, and in the broker's pid namespace"
            )
        return alive
