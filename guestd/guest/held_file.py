"""What others took offline, kept over a restart of guestd: else a CPU that a person took offline would be brought back.

1. The file lies in systemd's runtime directory. Root opens it before it gives up its rights, and only the descriptor is
   used from then on: no path that somebody else could change.
2. It says which boot it is of, what is held, and where it ends. Anything else than that counts as nothing held.

Weak spot: what was unplugged and plugged again while guestd was stopped is still taken for held. It is said, and over
when it is online.
"""

import logging
import os
from collections.abc import Collection
from pathlib import Path

from guestd.guest.core.ops import BlockOp, CpuOp
from guestd.guest.core.setbacks import Key

_log = logging.getLogger(__name__)
_NAME = "held"
_END = "end"
_SORTS: dict[str, type] = {"cpu": CpuOp, "block": BlockOp}
_MOST = 4096  # of either sort together: the first ones are kept
_MOST_BYTES = 64 << 10
_MOST_DIGITS = 8


def open_in(directory: str | None) -> int | None:
    """The file's descriptor; None without a directory for it, or where it cannot be had."""
    if not directory:
        return None
    try:
        return os.open(Path(directory) / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        _log.warning("what others took offline is not kept over a restart: %s", error)
        return None


def read(fd: int, boot_id: bytes) -> set[Key]:
    """What was held when it was last written, in this boot."""
    try:
        first, *lines = os.pread(fd, _MOST_BYTES, 0).decode("ascii").splitlines() or [""]
        if first != boot_id.hex() or not lines or lines.pop() != _END:
            return set()
        return {_key(line) for line in lines}
    except (OSError, ValueError, KeyError) as error:
        _log.warning("what others took offline before the restart cannot be read: %s", error)
        return set()


def write(fd: int, boot_id: bytes, held: Collection[Key]) -> None:
    """Replace what it says."""
    names = {sort: name for name, sort in _SORTS.items()}
    lines = sorted(f"{names[sort]} {number}" for sort, number in held)[:_MOST]
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, "\n".join([boot_id.hex(), *lines, _END, ""]).encode(), 0)
    except OSError as error:
        _log.warning("what others took offline is not kept over a restart: %s", error)


def _key(line: str) -> Key:
    name, number = line.split(" ")
    if not number.isdecimal() or len(number) > _MOST_DIGITS:
        raise ValueError(f"{line!r} is no CPU and no block")
    return _SORTS[name], int(number)
