"""What is left to the journal on a disk."""

import errno
import os
from pathlib import Path

import pytest

from guestd.broker.disk import leave_room, way_out

MIB = 1 << 20


@pytest.mark.parametrize(
    ("size", "free", "taking", "left"),
    [
        (1000 * MIB, 17 * MIB, 0, True),
        (1000 * MIB, 15 * MIB, 0, False),
        (1000 * MIB, 17 * MIB, 1 * MIB, True),
        (1000 * MIB, 17 * MIB, 2 * MIB, False),
        (1 * MIB, 600 << 10, 0, True),
        (1 * MIB, 500 << 10, 0, False),
        (1000 * MIB, 0, 0, False),
    ],
)
def test_what_may_be_missed_leaves_the_journal_its_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, free: int, taking: int, left: bool
) -> None:
    answer = os.statvfs_result((4096, 4096, size >> 12, free >> 12, free >> 12, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: answer)
    if left:
        leave_room(tmp_path, taking)
        return
    with pytest.raises(OSError, match="left to the journal") as caught:
        leave_room(tmp_path, taking)
    assert caught.value.errno == errno.ENOSPC


def test_a_directory_that_is_not_there_yet_will_be_on_the_disk_of_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    real = os.statvfs

    def statvfs(path: Path) -> os.statvfs_result:
        asked.append(path)
        return real(path)

    monkeypatch.setattr(os, "statvfs", statvfs)
    leave_room(tmp_path / "state" / "record")
    assert asked == [tmp_path]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full; make room on the file system of /state/record"),
        (errno.EROFS, f"make /state/record and what is in it writable for user {os.geteuid()}"),
        (errno.EIO, "the disk or its file system failed; see the kernel's log"),
        (errno.ENAMETOOLONG, "File name too long"),
    ],
)
def test_what_to_do_about_a_bad_disk(number: int, said: str) -> None:
    text = way_out(Path("/state/record"), OSError(number, os.strerror(number)))
    assert text.startswith(f"/state/record: [Errno {number}] {os.strerror(number)}")
    assert text.endswith(said)
