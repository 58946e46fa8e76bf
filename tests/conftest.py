"""What holds for every test: this machine's /sys is never written, and its AF_VSOCK never used.

One exception: a CPU group of the tests' own, `guestd-test-...`, where this machine has cgroups of version 1.

Tests in VMs do both, but inside the VM. An audit hook sees every `open` and every socket that Python code makes in
this process, whoever asks for it; what is not allowed is stopped there and then, and the test fails even if the code
under test swallows the error.
"""

import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Helpers of one test directory that others use too.
sys.path.append(str(Path(__file__).parent / "unit" / "broker" / "hypervisor"))
sys.path.append(str(Path(__file__).parent / "integration"))

# How long an example takes says how busy the machine is.
settings.register_profile("guestd", deadline=None)
settings.load_profile("guestd")

_TESTS = Path(__file__).parent
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_TESTS_OWN = re.compile(r"/sys/fs/cgroup/cpu/guestd-test-[a-z0-9-]+/(tasks|cpu\.shares|cpu\.cfs_(quota|period)_us)")
_forbidden: list[str] = []


class Forbidden(BaseException):
    """A test did what no test may do to the machine that it runs on. No `Exception`, so that nothing swallows it."""


def _problem(event: str, arguments: tuple[object, ...]) -> str | None:
    if event == "open":
        path, mode, flags = arguments
        writing = isinstance(flags, int) and flags & _WRITING
        if isinstance(path, bytes | str) and writing:
            absolute = os.path.normpath(os.fsdecode(path))
            if absolute == "/sys" or (absolute.startswith("/sys/") and not _TESTS_OWN.fullmatch(absolute)):
                return f"open {absolute} for writing (mode {mode!r})"
    elif event == "socket.__new__" and arguments[1] == socket.AF_VSOCK:
        return "open an AF_VSOCK socket"
    return None


def _guard(event: str, arguments: tuple[object, ...]) -> None:
    if event in ("open", "socket.__new__"):
        problem = _problem(event, arguments)
        if problem is not None:
            _forbidden.append(problem)
            raise Forbidden(problem)


sys.addaudithook(_guard)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What talks to real processes, or runs for minutes under fire, is slow by its place."""
    for item in items:
        if item.path.relative_to(_TESTS).parts[0] in ("integration", "properties"):
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def _hands_off_this_machine() -> Iterator[list[str]]:
    _forbidden.clear()
    yield _forbidden
    assert not _forbidden, f"a test did what none may do here: {'; '.join(_forbidden)}"
