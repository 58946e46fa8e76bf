"""A kernel's cgroups in memory, for tests: both versions, with the rules that matter and refusals on demand."""

import errno
import os
from pathlib import Path

from guestd.broker.cgroup.files import Files

V1_MOUNT = Path("/sys/fs/cgroup/cpu")
V2_MOUNT = Path("/sys/fs/cgroup")
V1_LINE = "30 20 0:25 / /sys/fs/cgroup/cpu rw,relatime shared:5 - cgroup cgroup rw,cpu,cpuacct"
V2_LINE = "31 20 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"


class FakeCgroups(Files):
    """Files that a kernel would have. QEMU has threads 100 (the emulator's) and 101, 102.

    :param version: Of the hierarchy with the CPU controller.
    :param group: Of QEMU's process; "": the root.
    :param pid: QEMU's.
    """

    def __init__(self, version: int, group: str = "/vm", pid: int = 100) -> None:
        super().__init__()
        self.version, self.pid = version, pid
        self.mount = V1_MOUNT if version == 1 else V2_MOUNT
        self.parent = Path(f"{self.mount}{group}")
        self.files: dict[Path, str] = {
            Path("/proc/self/mountinfo"): (V1_LINE if version == 1 else V2_LINE) + "\n",
            Path(f"/proc/{pid}/cgroup"): f"3:cpu,cpuacct:{group or '/'}\n" if version == 1 else f"0::{group or '/'}\n",
        }
        self.directories = {self.mount, self.parent}
        for thread in (100, 101, 102):
            self.spawn(thread)
        for group_path in self.directories:
            self.files[group_path / "cgroup.controllers"] = "cpu memory pids\n"
            self.files[group_path / "cgroup.subtree_control"] = ""
        #: What happens instead of a write or a mkdir, by the name of the file or group.
        self.refusals: dict[str, int] = {}
        #: All that was written, as (path below the parent, text).
        self.writes: list[tuple[str, str]] = []

    # The world's side.

    def spawn(self, thread: int) -> None:
        self.directories.add(Path(f"/proc/{self.pid}/task/{thread}"))

    def end(self, thread: int) -> None:
        self.directories.discard(Path(f"/proc/{self.pid}/task/{thread}"))
        for path in [path for path in self.files if path.name in ("tasks", "cgroup.threads")]:
            self._set_members(path, self._members(path) - {thread})

    def count(self, group: Path, periods: int, throttled: int) -> None:
        self.files[group / "cpu.stat"] = f"nr_periods {periods}\nnr_throttled {throttled}\nthrottled_time 0\n"

    def vanish(self, group: Path) -> None:
        """Somebody moves the threads out and removes the group."""
        self.directories.discard(group)
        self.files = {path: text for path, text in self.files.items() if group not in path.parents}

    def members(self, group: Path) -> set[int]:
        return self._members(group / ("tasks" if self.version == 1 else "cgroup.threads"))

    # The kernel's.

    def read(self, path: Path) -> str:
        if path not in self.files:
            raise _error(errno.ENOENT, path)
        return self.files[path]

    def exists(self, path: Path) -> bool:
        return path in self.files or path in self.directories

    def make_directory(self, path: Path) -> None:
        self._refuse("mkdir", path)
        if path in self.directories:
            raise _error(errno.EEXIST, path)
        if path.parent not in self.directories:
            raise _error(errno.ENOENT, path)
        self.directories.add(path)
        if self.version == 1:
            self.files |= {path / "tasks": "", path / "cpu.shares": "1024\n"}
            self.files |= {path / "cpu.cfs_quota_us": "-1\n", path / "cpu.cfs_period_us": "100000\n"}
            self.count(path, 0, 0)
        else:
            self.files |= {path / "cgroup.threads": "", path / "cgroup.type": "domain\n"}
            self._hand_down(path.parent)

    def remove_directory(self, path: Path) -> None:
        self._refuse("rmdir", path)
        if path not in self.directories:
            raise _error(errno.ENOENT, path)
        if self.members(path):
            raise _error(errno.EBUSY, path)
        self.vanish(path)

    def write(self, path: Path, text: str) -> None:
        self._refuse(path.name, path)
        if path not in self.files:
            raise _error(errno.ENOENT, path)
        self.writes.append((str(path.relative_to(self.parent)), text))
        match path.name:
            case "tasks" | "cgroup.threads":
                self._move(path, int(text))
            case "cgroup.subtree_control":
                self.files[path] = text.removeprefix("+")
                self._hand_down(path.parent)
            case "cpu.cfs_quota_us" | "cpu.cfs_period_us" if int(text) != -1 and int(text) < 1000:
                raise _error(errno.EINVAL, path)
            case _:
                self.files[path] = f"{text} 100000\n" if text == "max" else f"{text}\n"

    def _move(self, path: Path, thread: int) -> None:
        if Path(f"/proc/{self.pid}/task/{thread}") not in self.directories:
            raise _error(errno.ESRCH, path)
        if self.version == 2 and self.files[path.parent / "cgroup.type"] != "threaded\n":
            raise _error(errno.EOPNOTSUPP, path)
        self._set_members(path, self._members(path) | {thread})

    def _hand_down(self, parent: Path) -> None:
        """The controller's files appear in the children of a group that has it switched on."""
        if "cpu" in self.files[parent / "cgroup.subtree_control"]:
            for child in [one for one in self.directories if one.parent == parent and one.name.startswith("guestd-")]:
                self.files |= {child / "cpu.max": "max 100000\n", child / "cpu.weight": "100\n"}
                self.count(child, 0, 0)

    def _refuse(self, what: str, path: Path) -> None:
        if what in self.refusals:
            raise _error(self.refusals[what], path)

    def _members(self, path: Path) -> set[int]:
        return {int(line) for line in self.files.get(path, "").split()}

    def _set_members(self, path: Path, members: set[int]) -> None:
        self.files[path] = "".join(f"{one}\n" for one in sorted(members))


def _error(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))
