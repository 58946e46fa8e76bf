"""What `make install-broker` and `make install-guest` put into a root file system, and what is in `systemd/`."""

from pathlib import Path

from guestd.broker import config as broker_config
from guestd.guest.helper import hooks
from guestd.runtime.toml import read_files

ROOT = Path(__file__).parents[2]


def made_by_tmpfiles(root: Path, name: str) -> list[str]:
    """Make the directories that systemd-tmpfiles would."""
    lines = (ROOT / "systemd" / f"{name}.tmpfiles").read_text().splitlines()
    made = [line.split() for line in lines if not line.startswith("#")]
    for kind, path, mode, *_ in made:
        assert (kind, mode) == ("d", "0755")
        (root / path.lstrip("/")).mkdir()
    return [path for _, path, *_ in made]


def test_the_directory_for_drop_ins_is_the_one_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    *_, drop_ins = made_by_tmpfiles(tmp_path, "guestd-broker")
    one = tmp_path / drop_ins.lstrip("/") / "10-web.toml"
    one.write_text("[host]\ncpus = 8\n")
    file = tmp_path / str(broker_config.DEFAULT_PATH).lstrip("/")
    assert read_files(file, required=False) == [(one, {"host": {"cpus": 8}})]


def test_the_directory_for_hooks_is_the_one_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    assert f"/{hooks.DIRECTORY}" in made_by_tmpfiles(tmp_path, "guestd")
