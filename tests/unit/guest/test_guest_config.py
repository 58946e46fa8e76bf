"""The guest daemon's file: everything may be missing, nothing may be wrong."""

from pathlib import Path

import pytest

from guestd.guest import config
from guestd.guest.config import GuestConfig
from guestd.model.errors import ConfigError


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "guestd.toml"
    path.write_text("")
    assert config.load(path) == GuestConfig() == GuestConfig(4747, "guestd", "", False)


def test_without_the_usual_file_the_defaults_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "DEFAULT_PATH", tmp_path / "guestd.toml")
    assert config.load(tmp_path / "guestd.toml") == GuestConfig()
    with pytest.raises(ConfigError, match=r"other.toml: cannot be read"):
        config.load(tmp_path / "other.toml")


def test_drop_ins_win(tmp_path: Path) -> None:
    path = tmp_path / "guestd.toml"
    path.write_text('port = 1\nuser = "me"')
    (tmp_path / "guestd.toml.d").mkdir()
    (tmp_path / "guestd.toml.d" / "a.toml").write_text("port = 2")
    assert config.load(path) == GuestConfig(port=2, user="me")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("port = 0", r"guestd.toml: port = 0: must be within 1..4294967294"),
        ("grow_hook_seconds = 0", r"guestd.toml: grow_hook_seconds = 0: must be within 1..600"),
        ("shrink_hook_seconds = 601", r"shrink_hook_seconds = 601: must be within 1..600"),
        ("port = -1", r"port = -1: must be within"),
        ("port = 4294967295", r"port = 4294967295: must be within"),
        ("port = 1.5", r"port = 1.5: expected `int`, got `float`"),
        ("port = true", r"port = True: expected `int`, got `bool`"),
        ("user = 5", r"user = 5: expected `str`"),
        ('log_verbose = "yes"', r"log_verbose = 'yes': expected `bool`"),
        ('name = "web"', r"the file: has no key 'name'"),
        ("[port]", r"port: expected `int`"),
    ],
)
def test_mistakes_name_file_key_value_and_what_was_expected(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "guestd.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        config.load(path)


def test_a_mistake_in_a_drop_in_names_the_drop_in(tmp_path: Path) -> None:
    path = tmp_path / "guestd.toml"
    path.write_text("")
    (tmp_path / "guestd.toml.d").mkdir()
    (tmp_path / "guestd.toml.d" / "a.toml").write_text("prot = 2")
    with pytest.raises(ConfigError, match=r"a.toml: the file: has no key 'prot'"):
        config.load(path)
