"""The control files of cgroups. All that the broker ever writes outside its journal is written here.

1. Only the files of `_CONTROL_FILES` are written, only directories called ``guestd-...`` are made or removed,
   and no file is created: one that is not there is an error.
2. Nothing is cached; every call is one or two system calls. They may block: moving a thread waits for an RCU
   grace period now and then (6 ms were seen).
3. All paths are the kernel's own, below a root that is another one only in tests.
"""

import os
from pathlib import Path

from guestd.model.errors import HypervisorError

GROUP_PREFIX = "guestd-"
_CONTROL_FILES = frozenset(
    {
        "tasks",
        "cgroup.threads",
        "cgroup.type",
        "cgroup.subtree_control",
        "cpu.cfs_period_us",
        "cpu.cfs_quota_us",
        "cpu.shares",
        "cpu.max",
        "cpu.weight",
    }
)


class CgroupError(HypervisorError):
    """A cgroup cannot be had or refused something; the text names its path and the way out."""


class Files:
    """The file system, as far as cgroups need it. What fails raises the `OSError` of the system call.

    :param root: What all paths are below.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def read(self, path: Path) -> str:
        """The whole text of a file."""
        descriptor = os.open(self._at(path), os.O_RDONLY | os.O_CLOEXEC)  # half of what `read_text` costs
        try:
            parts = []
            while part := os.read(descriptor, 65536):
                parts.append(part)
        finally:
            os.close(descriptor)
        return b"".join(parts).decode(errors="surrogateescape")  # mount points have any bytes in their names

    def write(self, path: Path, text: str) -> None:
        """Write into a control file that exists, in one call; the kernel's refusal is the `OSError`.

        :raise ValueError: When it is no control file of ours.
        """
        if path.name not in _CONTROL_FILES:
            raise ValueError(f"{path} is not a control file of a CPU group")
        descriptor = os.open(self._at(path), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)

    def exists(self, path: Path) -> bool:
        """Whether there is such a file or directory, as far as this process may know. Never raises."""
        try:
            return self._at(path).exists()
        except OSError:
            return False

    def make_directory(self, path: Path) -> None:
        """Make a group; the kernel fills it with files.

        :raise ValueError: When it is not called as groups of guestd are.
        """
        self._at(_ours(path)).mkdir(mode=0o755)

    def remove_directory(self, path: Path) -> None:
        """Remove a group that has no threads in it.

        :raise ValueError: When it is not called as groups of guestd are.
        """
        self._at(_ours(path)).rmdir()

    def _at(self, path: Path) -> Path:
        return self._root / path.relative_to("/")


def _ours(path: Path) -> Path:
    if not path.name.startswith(GROUP_PREFIX):
        raise ValueError(f"{path} is not a group of guestd's")
    return path
