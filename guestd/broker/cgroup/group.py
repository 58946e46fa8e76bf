"""One cgroup with a CPU quota, as its version has it. Stateless: every answer is read from the kernel.

v1: threads go into `tasks`, the bound is `cpu.cfs_quota_us` (-1: none) in each `cpu.cfs_period_us`. A group cannot
be given a greater share than a group above it has (EINVAL).

v2 (kernel: admin-guide/cgroup-v2, "Threads"): only a *threaded* group takes single threads of a process, and only of
a process in the same threaded domain. So the group is made below the process's own, which thereby becomes a threaded
domain; that the kernel does where the process's own group has no domain controller (memory, io) switched on for its
children, and no populated children that are not threaded. The rule against processes beside child groups does not
hold there, since cpu is a threaded controller. The root group may be all of this at any time. cpu must be available
to the process's own group, which is its parents' business: on hosts with systemd the unit's.

Weak spot: systemd may switch cpu off again below a unit that it was not asked to delegate, at its next change of
that unit. The files are then gone, which looks like a vanished group and is mended like one.
"""

import errno
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from guestd.broker.cgroup.files import GROUP_PREFIX, CgroupError, Files
from guestd.broker.cgroup.place import Place
from guestd.broker.cgroup.quota import Quota, quota_of, weight_of

_DELEGATE = "give the VM's unit Delegate=yes, or any CPUWeight="
_REASONS = {
    errno.EROFS: "it is mounted read-only: mount it writable, or take ProtectControlGroups= out of the broker's unit",
    errno.EACCES: "permission denied: run the broker as root, or give its user this group",
    errno.EPERM: "not permitted: run the broker as root, or give its user this group",
}


class Group(ABC):
    """The group `guestd-NAME` in another one."""

    _threads: ClassVar[str]

    def __init__(self, files: Files, parent: Path, name: str) -> None:
        self.path = parent / f"{GROUP_PREFIX}{name}"
        self._files, self._parent = files, parent
        self._thread_list, self._stat = self.path / self._threads, self.path / "cpu.stat"

    def make(self) -> bool:
        """Have the group, ready for threads; whether it was not there before.

        :raise CgroupError: When it cannot be had; what was begun is taken back.
        """
        made = True
        try:
            self._files.make_directory(self.path)
        except FileExistsError:
            made = False
        except OSError as error:
            raise refused(self.path, "cannot be made", error) from error
        try:
            self._prepare()
        except CgroupError:
            if made:
                self.remove()
            raise
        return made

    def threads(self) -> frozenset[int]:
        """The threads that are in it."""
        return frozenset(int(line) for line in self._files.read(self._thread_list).split())

    def add(self, thread: int) -> None:
        """Put a thread in. One that ended meanwhile is no error.

        :raise CgroupError: When the kernel refuses.
        """
        try:
            self._files.write(self._thread_list, str(thread))
        except ProcessLookupError:
            pass
        except OSError as error:
            raise refused(self._thread_list, f"does not take thread {thread}", error) from error

    def throttling(self) -> tuple[int, int]:
        """Periods so far in which anything wanted to run, and those of them in which the bound was hit."""
        counts = dict(line.split(" ", 1) for line in self._files.read(self._stat).splitlines())
        return int(counts["nr_periods"]), int(counts["nr_throttled"])

    def remove(self) -> bool:
        """Remove the group; whether it is gone now. The kernel keeps one that has threads.

        :raise CgroupError: When it cannot be removed for another reason.
        """
        try:
            self._files.remove_directory(self.path)
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            raise refused(self.path, "cannot be removed", error) from error
        return True

    def set_quota(self, millicores: int) -> None:
        """Bound all threads in it together; 0: no bound.

        :raise CgroupError: When the kernel refuses.
        """
        try:
            self._write_quota(quota_of(millicores) if millicores else None, max(millicores, 1000))
        except OSError as error:
            raise self._quota_refused(millicores, error) from error

    @abstractmethod
    def quota(self) -> int:
        """The bound in millicores; 0: none."""

    @abstractmethod
    def _prepare(self) -> None: ...

    @abstractmethod
    def _write_quota(self, quota: Quota | None, weight_millicores: int) -> None: ...

    def _quota_refused(self, millicores: int, error: OSError) -> CgroupError:
        if error.errno == errno.EINVAL:
            hint = "the kernel does not take it: a group above has a smaller quota, which must be raised"
            return CgroupError(f"{self.path}: {millicores} millicores cannot be set: {hint}")
        return refused(self.path, f"{millicores} millicores cannot be set", error)


class GroupV1(Group):
    """In the hierarchy of the v1 controller cpu."""

    _threads = "tasks"

    def _prepare(self) -> None:
        if not self._files.exists(self.path / "cpu.cfs_quota_us"):
            raise CgroupError(f"{self.path} has no cpu.cfs_quota_us: the kernel needs CONFIG_CFS_BANDWIDTH")

    def quota(self) -> int:
        quota = int(self._files.read(self.path / "cpu.cfs_quota_us"))
        return Quota(quota, int(self._files.read(self.path / "cpu.cfs_period_us"))).millicores if quota > 0 else 0

    def _write_quota(self, quota: Quota | None, weight_millicores: int) -> None:
        if quota is None:
            self._files.write(self.path / "cpu.cfs_quota_us", "-1")
        else:
            period = ("cpu.cfs_period_us", quota.period_us)
            steps = [("cpu.cfs_quota_us", quota.quota_us)]
            # Two files: in between there may be less than both bounds allow, never more.
            before = int(self._files.read(self.path / period[0]))
            if period[1] != before:
                steps.insert(0 if period[1] > before else 1, period)
            for name, value in steps:
                self._files.write(self.path / name, str(value))
        self._files.write(self.path / "cpu.shares", str(weight_of(weight_millicores, 1024, 262_144)))


class GroupV2(Group):
    """In the v2 hierarchy: a threaded group."""

    _threads = "cgroup.threads"

    def _prepare(self) -> None:
        try:
            available = self._files.read(self._parent / "cgroup.controllers").split()
        except OSError as error:
            raise refused(self._parent / "cgroup.controllers", "cannot be read", error) from error
        if "cpu" not in available:
            raise CgroupError(
                f"{self._parent}/cgroup.controllers has no cpu, the groups above do not hand it down: {_DELEGATE}"
            )
        self._become_threaded()
        self._switch_cpu_on()

    def _become_threaded(self) -> None:
        kind = self.path / "cgroup.type"
        try:
            if self._files.read(kind).strip() != "threaded":
                self._files.write(kind, "threaded")
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                hint = "has domain controllers on for its children, or other groups with processes in it"
                raise CgroupError(
                    f"{kind}: cannot be threaded: {self._parent} {hint}: give QEMU a group of its own (a systemd scope"
                    " or service for each VM)"
                ) from error
            raise refused(kind, "cannot be threaded", error) from error

    def _switch_cpu_on(self) -> None:
        if self._files.exists(self.path / "cpu.max"):
            return
        control = self._parent / "cgroup.subtree_control"
        try:
            self._files.write(control, "+cpu")
        except OSError as error:
            raise refused(control, "+cpu", error) from error
        if not self._files.exists(self.path / "cpu.max"):
            raise CgroupError(f"{self.path} has no cpu.max: the kernel needs CONFIG_CFS_BANDWIDTH")

    def quota(self) -> int:
        quota, period = self._files.read(self.path / "cpu.max").split()
        return Quota(int(quota), int(period)).millicores if quota != "max" else 0

    def _write_quota(self, quota: Quota | None, weight_millicores: int) -> None:
        text = "max" if quota is None else f"{quota.quota_us} {quota.period_us}"
        self._files.write(self.path / "cpu.max", text)
        self._files.write(self.path / "cpu.weight", str(weight_of(weight_millicores, 100, 10_000)))


def group_at(files: Files, place: Place, name: str) -> Group:
    """The group of a VM whose QEMU is at that place; nothing is made yet."""
    return (GroupV1 if place.version == 1 else GroupV2)(files, place.path, name)


def refused(path: Path, what: str, error: OSError) -> CgroupError:
    """The error for a refusal of the kernel's: path, what was wanted, why, and the way out if one is known."""
    return CgroupError(f"{path}: {what}: {_REASONS.get(error.errno or 0, error.strerror or str(error))}")
