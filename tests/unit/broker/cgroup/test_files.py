"""What may be written, and how."""

from pathlib import Path

import pytest

from guestd.broker.cgroup.files import Files


def test_a_control_file_is_written_where_the_root_is(tmp_path: Path) -> None:
    (tmp_path / "g").mkdir()
    (tmp_path / "g/cpu.max").write_text("max 100000\n")
    files = Files(tmp_path)
    files.write(Path("/g/cpu.max"), "25000 100000")
    assert files.read(Path("/g/cpu.max")).startswith("25000 100000")
    assert files.exists(Path("/g"))
    assert not files.exists(Path("/g/tasks"))
    assert not files.exists(Path("/" + "x" * 300))


def test_nothing_is_created_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Files(tmp_path).write(Path("/tasks"), "1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["/etc/passwd", "/proc/1/oom_score_adj", "/sys/fs/cgroup/memory.max"])
def test_other_files_are_never_written(tmp_path: Path, path: str) -> None:
    with pytest.raises(ValueError, match="not a control file"):
        Files(tmp_path).write(Path(path), "1")


def test_only_groups_of_guestd_are_made_and_removed(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.make_directory(Path("/guestd-a"))
    assert (tmp_path / "guestd-a").is_dir()
    files.remove_directory(Path("/guestd-a"))
    (tmp_path / "other").mkdir()
    for act in (files.make_directory, files.remove_directory):
        with pytest.raises(ValueError, match="not a group of guestd"):
            act(Path("/other"))
    assert (tmp_path / "other").is_dir()
