"""Nothing but the root helper writes under /sys, and the tests themselves cannot."""

import ast
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HELPER = ROOT / "guestd" / "guest" / "helper" / "work.py"
PSI = ROOT / "guestd" / "guest" / "psi.py"
HELD = ROOT / "guestd/guest/held_file.py"
"""Opens PSI triggers, files in /proc/pressure that are written to be told of something."""
CGROUP_FILES = ROOT / "guestd" / "broker" / "cgroup" / "files.py"
"""Writes the control files of cgroups, and only those (tests/unit/broker/cgroup/test_files.py)."""
RECORD = ROOT / "guestd" / "broker" / "record" / "segments.py"
"""Writes new files of its own, named by itself, in record/ below the broker's state_dir."""
IN_THE_VM = (ROOT / "guestd" / "lab", ROOT / "guestd" / "cli")
"""What runs in a lab's VM or on the developer's machine: allowed to write, but never to name /sys in it."""
_WRITES = frozenset({"write_text", "write_bytes", "touch"})
_FLAGS = frozenset({"O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC", "O_APPEND"})


def sources() -> list[Path]:
    return sorted(path for path in (ROOT / "guestd").rglob("*.py") if path != HELPER and "v1" not in path.parts)


def writes(tree: ast.AST) -> Iterator[ast.AST]:
    """Calls that open a file for writing, or write one as a whole."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            values = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            values += [word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)]
            modes = [value for value in values if isinstance(value, str) and re.fullmatch(r"[rwaxbt+]{1,4}", value)]
            if name in _WRITES or (name in ("open", "fdopen") and any(set(mode) & set("wax+") for mode in modes)):
                yield node
        elif isinstance(node, ast.Attribute) and node.attr in _FLAGS:
            yield node


def test_the_scan_sees_every_way_of_writing() -> None:
    found = [
        "open('/sys/x', 'w')",
        "open('/sys/x', mode='r+')",
        "path.open('ab')",
        "path.write_text('1')",
        "path.write_bytes(b'1')",
        "os.open('/sys/x', os.O_WRONLY)",
        "os.open('/sys/x', os.O_RDWR | os.O_CLOEXEC)",
    ]
    assert all(list(writes(ast.parse(line))) for line in found)
    assert not list(
        writes(ast.parse("open('/sys/x'); path.open('rb'); os.open('/sys/x', os.O_RDONLY); path.read_text()"))
    )
    assert list(writes(ast.parse(HELPER.read_text())))  # it does, and is the only one that may


@pytest.mark.parametrize("package", ["model", "runtime", "wire", "guest", "broker", "sim"])
def test_the_daemons_write_no_files_at_all(package: str) -> None:
    """Simpler than to tell where to: the daemons keep next to nothing in files (journal and events are SQLite's)."""
    for path in sources():
        if path.is_relative_to(ROOT / "guestd" / package) and path not in (PSI, HELD, CGROUP_FILES, RECORD):
            found = [f"{path}:{getattr(node, 'lineno', 0)}" for node in writes(ast.parse(path.read_text()))]
            assert found == []


def test_what_others_hold_is_kept_in_the_runtime_directory() -> None:
    """The one file of the guest daemon's: its name is fixed, its directory is systemd's to say."""
    assert "/sys" not in HELD.read_text()
    assert 'held_file.open_in(os.environ.get("RUNTIME_DIRECTORY"))' in (ROOT / "guestd/guest/app.py").read_text()


def test_psi_triggers_are_in_proc() -> None:
    text = PSI.read_text()
    assert "/proc/pressure" in text
    assert "/sys" not in text


def test_the_record_only_makes_new_files() -> None:
    text = RECORD.read_text()
    assert "/sys" not in text
    (opening,) = [line for line in text.splitlines() if "os.open(" in line]
    assert "os.O_EXCL" in opening


def test_who_writes_files_elsewhere_does_not_know_sys() -> None:
    """Programs that the lab puts into a VM are texts of their own: they run there, as root, and not here."""
    for path in sources():
        if any(path.is_relative_to(place) for place in IN_THE_VM) and not path.name.startswith("guest_"):
            for node in writes(ast.parse(path.read_text())):
                strings = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                assert not any("/sys" in str(value) for value in strings), f"{path}:{getattr(node, 'lineno', 0)}"


def test_a_test_cannot_write_to_sys(request: pytest.FixtureRequest) -> None:
    forbidden = _forbidden(request)
    target = "/sys/devices/system/cpu/cpu0/no-such-file"  # nothing could come of it even without the guard
    for attempt in (
        lambda: Path(target).open("w"),  # noqa: SIM115 - never opened
        lambda: Path(target).write_text("0"),
        lambda: os.open(target, os.O_WRONLY),
        lambda: Path("/tmp/../sys/devices/system/cpu/cpu0/no-such-file").open("r+"),  # noqa: SIM115
        lambda: os.open("/sys/fs/cgroup/cpu/guestd-one/tasks", os.O_WRONLY),
        lambda: os.open("/sys/fs/cgroup/cpu/guestd-test-x/../tasks", os.O_WRONLY),
        lambda: os.open("/sys/fs/cgroup/cpu/guestd-test-x/cgroup.procs", os.O_WRONLY),
    ):
        with pytest.raises(BaseException, match="for writing") as caught:
            attempt()
        assert not isinstance(caught.value, Exception)
    assert len(forbidden) == 7
    forbidden.clear()


def test_a_cpu_group_of_the_tests_own_may_be_written() -> None:
    with pytest.raises(FileNotFoundError):
        os.open("/sys/fs/cgroup/cpu/guestd-test-of-nothing/tasks", os.O_WRONLY)


def test_a_test_cannot_use_vsock(request: pytest.FixtureRequest) -> None:
    forbidden = _forbidden(request)
    with pytest.raises(BaseException, match="AF_VSOCK"):
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    assert len(forbidden) == 1
    forbidden.clear()


def test_reading_is_allowed() -> None:
    assert Path("/sys/devices/system/cpu/possible").read_text()


def _forbidden(request: pytest.FixtureRequest) -> list[str]:
    """What the guard of tests/conftest.py has caught in this test."""
    caught = request.getfixturevalue("_hands_off_this_machine")
    assert isinstance(caught, list)
    return caught
