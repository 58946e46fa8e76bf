"""Room on the disk that the journal needs: what may be missed leaves it alone."""

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
