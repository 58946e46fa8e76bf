"""Where the cgroup of a process is that the CPU controller looks at.

Hosts have the controller in the v1 hierarchy, in the v2 one, or (hybrid) a v2 mount beside a v1 one that has the
controller: where it is mounted as v1, v2 cannot have it. Sources: /proc/self/mountinfo (proc(5)) and
/proc/PID/cgroup (cgroups(7)). Both name paths as the reader's own namespaces show them; what they don't show is
an error and no guess.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from guestd.broker.cgroup.files import CgroupError, Files

_MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class Place:
    """A cgroup: which version's, and where."""

    version: int
    path: Path


@dataclass(frozen=True, slots=True)
class _Mount:
    version: int
    root: str  # which part of the hierarchy is mounted
    point: str


def place_of(files: Files, pid: int) -> Place:
    """The cgroup of a process in the hierarchy that has the CPU controller.

    :raise CgroupError: When there is no such hierarchy, or the process or its group cannot be seen from here.
    """
    mount = _cpu_mount(files)
    group = _group_of(files, pid, mount.version)
    root = "" if mount.root == "/" else mount.root
    below = group.removeprefix(root)
    inside = group.startswith(root) and (not below or below.startswith("/"))
    if not inside or ".." in Path(group).parts:
        raise CgroupError(
            f"process {pid} is in cgroup {group}, which {mount.point} does not show: run the broker in the host's"
            " cgroup namespace"
        )
    return Place(mount.version, Path(mount.point + below))


def _cpu_mount(files: Files) -> _Mount:
    try:
        lines = files.read(_MOUNTS).splitlines()
    except OSError as error:
        raise CgroupError(f"{_MOUNTS} cannot be read: {error.strerror}") from error
    mounts = [mount for line in lines if (mount := _parsed(line)) is not None]
    if not mounts:
        raise CgroupError(
            "no cgroup file system with the cpu controller is mounted: mount cgroup2 at /sys/fs/cgroup, or cgroup"
            " with option cpu at /sys/fs/cgroup/cpu"
        )
    # v1 wins; of several mounts of one hierarchy the one that shows most of it.
    mount = min(mounts, key=lambda each: (each.version, len(each.root)))
    if mount.version == 2:
        controllers = Path(mount.point) / "cgroup.controllers"
        try:
            known = files.read(controllers).split()
        except OSError as error:
            raise CgroupError(f"{controllers} cannot be read: {error.strerror}") from error
        if "cpu" not in known:
            raise CgroupError(
                f"{controllers} has no cpu controller: the kernel needs CONFIG_CFS_BANDWIDTH, and must not run with"
                " cgroup_disable=cpu"
            )
    return mount


def _parsed(line: str) -> _Mount | None:
    """A line of mountinfo, if it is a hierarchy that has, or may have, the CPU controller."""
    before, separator, after = line.partition(" - ")
    fields, kind = before.split(" "), after.split(" ")
    if not separator or len(fields) < 5 or len(kind) < 3:
        return None
    if kind[0] == "cgroup2":
        version = 2
    elif kind[0] == "cgroup" and "cpu" in kind[2].split(","):
        version = 1
    else:
        return None
    return _Mount(version, _unescaped(fields[3]), _unescaped(fields[4]))


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _group_of(files: Files, pid: int, version: int) -> str:
    path = Path(f"/proc/{pid}/cgroup")
    try:
        lines = files.read(path).splitlines()
    except OSError as error:
        raise CgroupError(f"{path} cannot be read: {error.strerror}; has the process ended?") from error
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if (number == "0" and not controllers) if version == 2 else "cpu" in controllers.split(","):
            if group.endswith(" (deleted)"):
                raise CgroupError(f"the cgroup of process {pid} was removed: {group}")
            return group if group != "/" else ""
    raise CgroupError(f"{path} does not tell the cgroup of the cpu controller")
