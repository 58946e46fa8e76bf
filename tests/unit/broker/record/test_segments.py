"""Files of a record: bounded together, private, and never half begun."""

import errno
import os
from pathlib import Path

import pytest
from recorded import files

from guestd.broker.record import segments
from guestd.broker.record.frames import RecordFile, entries_payload
from guestd.broker.record.segments import Segments
from guestd.model.errors import RecordError

HEADER = b'{"guestd":"0","epoch":1,"wall":0.0,"clock":0.0}'
ENTRY = entries_payload(1, b"\x92\xa1x\x90")


def noise(count: int) -> bytes:
    """An entry that cannot be made smaller."""
    return entries_payload(1, b"\x92\xa1x\x91\xc5" + count.to_bytes(2, "big") + os.urandom(count))


def test_the_sum_stays_within_the_bound_and_the_newest_stay(tmp_path: Path) -> None:
    one = Segments(tmp_path, 40_000)
    for number in range(200):
        if one.full or number == 0:
            one.begin(HEADER, b"snapshot")
        one.append(noise(1000))
        assert sum(path.stat().st_size for path in files(tmp_path)) <= 40_000
    names = [path.name for path in files(tmp_path)]
    assert 6 <= len(names) <= 8
    assert names[0] > "0000000010.record"
    assert max(path.stat().st_size for path in files(tmp_path)) < 7_000
    one.close()
    for path in files(tmp_path):
        with RecordFile(path) as file:
            assert len(list(file.entries())) > 1


def test_numbers_go_on_after_a_restart_and_files_are_private(tmp_path: Path) -> None:
    for _ in range(2):
        one = Segments(tmp_path / "record", 40_000)
        one.begin(HEADER, b"snapshot")
        one.close()
    assert [path.name for path in files(tmp_path / "record")] == ["0000000001.record", "0000000002.record"]
    assert {path.stat().st_mode & 0o777 for path in files(tmp_path / "record")} == {0o600}
    assert (tmp_path / "record").stat().st_mode & 0o777 == 0o700


def test_a_snapshot_that_is_too_large_for_the_bound_says_what_would_do(tmp_path: Path) -> None:
    one = Segments(tmp_path, 40_000)
    with pytest.raises(RecordError, match=r"record\.size is .*: set it to .* or more"):
        one.begin(HEADER, os.urandom(30_000))
    assert files(tmp_path) == []


def test_what_never_fits_is_refused_and_nothing_else_is_deleted_for_it(tmp_path: Path) -> None:
    one = Segments(tmp_path, 40_000)
    one.begin(HEADER, b"snapshot")
    one.append(ENTRY)
    one.begin(HEADER, b"snapshot")
    with pytest.raises(RecordError, match="at once do not fit"):
        one.append(noise(50_000))
    one.close()
    assert len(files(tmp_path)) == 2


def test_a_full_disk_leaves_no_file_that_cannot_be_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Segments(tmp_path, 40_000)
    left = 30

    def write(descriptor: int, data: bytes) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(descriptor, data[:left])
        left -= written
        return written

    real = os.write
    monkeypatch.setattr(segments.os, "write", write)
    with pytest.raises(OSError, match="No space left"):
        one.begin(HEADER, b"snapshot")
    assert files(tmp_path) == []
    left = 1 << 20
    one.begin(HEADER, b"snapshot")
    left = 4
    with pytest.raises(OSError, match="No space left"):
        one.append(noise(1000))
    one.close()
    with RecordFile(files(tmp_path)[0]) as file:
        assert list(file.entries()) == []
        assert file.cut
