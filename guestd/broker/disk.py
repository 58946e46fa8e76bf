"""Room on the disk that the journal needs, which what may be missed leaves alone; and what to do about a bad disk."""

import errno
import os
from pathlib import Path

_LEFT_BYTES = 16 << 20
_LEFT_SHARE = 2  # of a small disk so much, at most: a half


def leave_room(directory: Path, taking_bytes: int = 0) -> None:
    """Nothing, where so much (0: a little) may be written to the disk of that directory without the journal ever
    missing it. What there is not yet will be on the disk of its parent.

    :raise OSError: ENOSPC where so little is free that it is left to the journal.
    """
    while not directory.exists():
        directory = directory.parent
    disk = os.statvfs(directory)
    left = min(_LEFT_BYTES, disk.f_blocks * disk.f_frsize // _LEFT_SHARE)
    if disk.f_bavail * disk.f_frsize - taking_bytes < left:
        raise OSError(
            errno.ENOSPC, f"less than {left >> 10} KiB would stay free, which are left to the journal", str(directory)
        )


def way_out(directory: Path, error: OSError) -> str:
    """What is wrong with a file there, and what to do about it."""
    said = f"{directory}: {error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{said}: the disk is full; make room on the file system of {directory}"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{said}: make {directory} and what is in it writable for user {os.geteuid()}"
    if error.errno == errno.EIO:
        return f"{said}: the disk or its file system failed; see the kernel's log"
    return said
