"""Files and their drop-ins, and mistakes in them with file, key, value and way out."""

from pathlib import Path

import msgspec
import pytest

from guestd.model.errors import ConfigError
from guestd.runtime import toml


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    size: int
    name: str = ""


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    inner: Inner
    many: dict[str, Inner] = msgspec.field(default_factory=dict)
    listed: list[int] = msgspec.field(default_factory=list)


def test_drop_ins_come_after_the_file_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("a = 1")
    drop_ins = tmp_path / "x.toml.d"
    drop_ins.mkdir()
    (drop_ins / "20-b.toml").write_text("a = 3")
    (drop_ins / "10-a.toml").write_text("a = 2")
    (drop_ins / "README").write_text("not TOML")
    assert [data["a"] for _, data in toml.read_files(path, required=True)] == [1, 2, 3]


def test_a_missing_file_matters_only_where_it_is_required(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    assert toml.read_files(path, required=False) == []
    with pytest.raises(ConfigError, match=r"x.toml: cannot be read"):
        toml.read_files(path, required=True)
    (tmp_path / "x.toml.d").mkdir()
    (tmp_path / "x.toml.d" / "a.toml").write_text("a = 1")
    assert len(toml.read_files(path, required=False)) == 1


@pytest.mark.parametrize(("content", "said"), [(b"a = ", "is not TOML"), (b"\xff\xfe", "cannot be read")])
def test_what_is_no_toml_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"x.toml: {said}") as caught:
        toml.read_files(path, required=True)
    assert caught.value.source == str(path)


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        toml.read_files(tmp_path, required=True)


def test_tables_are_merged_key_by_key_and_neither_side_changes() -> None:
    base, over = {"a": {"x": 1, "y": 2}, "b": 1, "c": {"z": 1}}, {"a": {"y": 3}, "b": {"n": 1}, "c": 5}
    assert toml.merge(base, over) == {"a": {"x": 1, "y": 3}, "b": {"n": 1}, "c": 5}
    assert base == {"a": {"x": 1, "y": 2}, "b": 1, "c": {"z": 1}}
    assert over == {"a": {"y": 3}, "b": {"n": 1}, "c": 5}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"inner": {"size": "big"}}, r"f.toml: inner.size = 'big': expected `int`, got `str`"),
        ({"inner": {"size": 1, "nmae": "x"}}, r"f.toml: inner: has no key 'nmae'; take it out"),
        ({"inner": {}}, r"f.toml: inner: needs a key 'size'"),
        ({}, r"f.toml: the file: needs a key 'inner'"),
        ({"inner": {"size": 1}, "extra": 1}, r"f.toml: the file: has no key 'extra'"),
        ({"inner": {"size": 1}, "many": {"one": {"size": None}}}, r"f.toml: many.size: expected `int`"),
        ({"inner": {"size": 1}, "listed": [1, "two"]}, r"f.toml: listed.*expected `int`, got `str`"),
        ({"inner": 5}, r"f.toml: inner = 5: expected `object`, got `int`"),
    ],
)
def test_mistakes_name_the_key_the_value_and_what_was_expected(data: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        toml.convert(Path("f.toml"), data, Outer)


def test_what_is_right_is_converted() -> None:
    made = toml.convert(Path("f.toml"), {"inner": {"size": 1}, "many": {"b": {"size": 2, "name": "n"}}}, Outer)
    assert made == Outer(Inner(1), {"b": Inner(2, "n")})
