"""The file that says what others took offline."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestd.guest import held_file
from guestd.guest.core.ops import BlockOp, CpuOp
from guestd.guest.core.setbacks import Key

BOOT = bytes(range(16))
HELD: set[Key] = {(CpuOp, 3), (CpuOp, 12), (BlockOp, 40)}


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    found = held_file.open_in(str(tmp_path))
    assert found is not None
    yield found
    os.close(found)


def test_what_is_written_is_read_again_in_the_same_boot(fd: int, tmp_path: Path) -> None:
    assert held_file.read(fd, BOOT) == set()
    held_file.write(fd, BOOT, HELD)
    again = held_file.open_in(str(tmp_path))
    assert again is not None
    assert held_file.read(again, BOOT) == HELD
    os.close(again)
    assert held_file.read(fd, bytes(16)) == set(), "another boot"
    held_file.write(fd, BOOT, {(CpuOp, 1)})
    assert held_file.read(fd, BOOT) == {(CpuOp, 1)}
    held_file.write(fd, BOOT, ())
    assert held_file.read(fd, BOOT) == set()
    assert (tmp_path / "held").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "rest",
    [
        "",
        "cpu 1",
        "cpu 1\ncp",
        "cpu -1\nend",
        "cpu x\nend",
        "cpu\nend",
        "disk 1\nend",
        "cpu 123456789\nend",
        "cpu é\nend",
    ],
)
def test_anything_else_is_nothing(fd: int, rest: str) -> None:
    os.pwrite(fd, f"{BOOT.hex()}\n{rest}".encode(), 0)
    assert held_file.read(fd, BOOT) == set()


def test_it_is_bounded(fd: int) -> None:
    held_file.write(fd, BOOT, [(BlockOp, index) for index in range(20_000)])
    assert os.fstat(fd).st_size < 64 << 10
    assert len(held_file.read(fd, BOOT)) == 4096


def test_without_a_place_for_it_nothing_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert held_file.open_in(None) is None
    assert caplog.text == ""
    (tmp_path / "held").symlink_to("elsewhere")
    assert held_file.open_in(str(tmp_path)) is None
    assert "not kept" in caplog.text


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "held").touch()
    fd = os.open(tmp_path / "held", os.O_RDONLY)
    held_file.write(fd, BOOT, HELD)
    os.close(fd)
    assert "not kept" in caplog.text
    assert held_file.read(fd, BOOT) == set()
