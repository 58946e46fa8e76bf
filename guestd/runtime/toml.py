"""Read TOML configuration with drop-ins into msgspec structs; every mistake names file, key, value and way out."""

import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from guestd.model.errors import ConfigError

T = TypeVar("T")


def read_files(path: Path, required: bool) -> list[tuple[Path, dict[str, Any]]]:
    """The file and its drop-ins ``FILE.d/*.toml`` in the order in which they apply.

    :raise ConfigError: When a file cannot be read or is not TOML, or `path` is missing and `required`.
    """
    found = []
    if required or path.exists():
        found.append((path, _read(path)))
    drop_ins = path.with_name(path.name + ".d")
    if drop_ins.is_dir():
        found += [(drop_in, _read(drop_in)) for drop_in in sorted(drop_ins.glob("*.toml"))]
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), "", None, f"cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(str(path), "", None, f"is not TOML: {error}") from error


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, table by table."""
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = merge(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged


def convert(source: Path, data: dict[str, Any], kind: type[T]) -> T:
    """Check the data against a struct.

    :raise ConfigError: When a key is unknown, missing, or has a value that was not expected.
    """
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `")
        keys = re.findall(r"\.([^.\[\]`]+)|\[([^\]]*)\]", path)
        names = [plain or indexed for plain, indexed in keys]
        raise ConfigError(str(source), _where(data, names), _value(data, names), _expected(text)) from error


def _expected(text: str) -> str:
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", text)
    if unknown:
        return f"has no key {unknown[1]!r}; take it out or correct its spelling"
    missing = re.fullmatch(r"Object missing required field `(.*)`", text)
    if missing:
        return f"needs a key {missing[1]!r}"
    return text[0].lower() + text[1:]


def _where(data: Any, names: list[str]) -> str:
    """The path in words; msgspec writes `[...]` for any key of a map, so the table at fault is looked for."""
    return ".".join(name for name in names if name != "...") or "the file"


def _value(data: Any, names: list[str]) -> object:
    for name in names:
        if not isinstance(data, dict) or name not in data:
            return None
        data = data[name]
    return None if isinstance(data, dict) else data
