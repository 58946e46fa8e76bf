"""The schema that is shipped describes what is printed: all of it, and nothing that is not. What it promises stays."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from fake_client import EVENTS, FakeClient
from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for

from guestd.cli.main import main
from guestd.model.errors import UnreachableError
from guestd.model.event import EventCode, SeenEvent
from guestd.model.view import LimitsOrigin, ResizePhase
from guestd.model.vm import VmStatus

SCHEMA = json.loads((files("guestd.cli") / "schema" / "v1.json").read_text())
PROMISED: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("schema_v1_promised.json").read_text())
"""Fields of version 1 that are always there, and of which type, by what they are part of."""


def strict(schema: Any) -> Any:
    """The schema without room for fields that it does not name."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    return closed | {"additionalProperties": False} if schema.get("type") == "object" else closed


VALIDATOR = Draft202012Validator(strict(SCHEMA), format_checker=Draft202012Validator.FORMAT_CHECKER)
KINDS = {one["properties"]["schema"]["const"] for one in SCHEMA["oneOf"]}


def test_it_is_a_schema() -> None:
    validator_for(SCHEMA).check_schema(SCHEMA)


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("status", "status"),
        ("get demo", "guest"),
        ("events", "events"),
        ("events --follow", "event"),
        ("explain demo", "explanation"),
        ("explain demo --at 14:02", "explanation"),
        ("history demo", "history"),
        ("set-limits demo --reset", "guest"),
        ("pause demo", "guest"),
        ("resume demo", "guest"),
        ("reclaim demo --dry-run", "reclaim"),
        ("config check broker.toml", "config-check"),
        ("config show broker.toml", "config"),
    ],
)
def test_what_is_printed_is_what_is_described(
    client: type[FakeClient],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    kind: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broker.toml").write_text("[host]\ncpus = 8\n")
    client.stream = [SeenEvent(EVENTS[0]), UnreachableError("gone")]
    assert main([*command.split(), "--output", "json"]) in (0, 5)
    lines = capsys.readouterr().out.splitlines()
    assert lines
    for line in lines:
        printed = json.loads(line)
        assert printed["schema"] == f"guestd/v1/{kind}"
        assert printed["schema"] in KINDS
        errors = [
            f"{error.json_path}: {error.message}" for error in VALIDATOR.descend(printed, _part(printed["schema"]))
        ]
        assert errors == []


def test_every_word_of_an_enumeration_is_described() -> None:
    described = SCHEMA["$defs"]
    assert set(described["event"]["properties"]["code"]["enum"]) == set(EventCode)
    assert set(described["cpu"]["properties"]["phase"]["enum"]) == set(ResizePhase)
    assert set(described["guest"]["properties"]["limits_origin"]["enum"]) == set(LimitsOrigin)
    assert set(described["guest"]["properties"]["vm_status"]["enum"]) == {*VmStatus, None}


def test_no_field_of_version_1_is_ever_removed_or_becomes_another_type() -> None:
    now = promised()
    for part, fields in PROMISED.items():
        assert fields.items() <= now[part].items(), f"{part}: that would be guestd/v2"
    assert now == PROMISED, "what is new is promised from now on: write it into schema_v1_promised.json"


def promised() -> dict[str, dict[str, str]]:
    """What is promised now."""
    parts = {part["properties"]["schema"]["const"]: part for part in SCHEMA["oneOf"]} | SCHEMA["$defs"]
    return {
        name: {field: _type(part["properties"][field]) for field in part["required"]}
        for name, part in parts.items()
        if "properties" in part
    }


def _type(field: Any) -> str:
    if "anyOf" in field:
        return " or ".join(_type(one) for one in field["anyOf"])
    if "enum" in field:
        return "word" + (" or null" if None in field["enum"] else "")
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if field.get("type") == "array":
        return f"list of {_type(field['items'])}"
    kind = field.get("type", "constant")
    return kind if isinstance(kind, str) else " or ".join(kind)


def _part(kind: str) -> Any:
    return next(one for one in VALIDATOR.schema["oneOf"] if one["properties"]["schema"]["const"] == kind)
