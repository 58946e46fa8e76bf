"""Locked in memory, each time in a process of its own."""

import subprocess
import sys

import pytest

_LOCK = "from guestd.guest.resident import stay_resident; stay_resident()"
_SHOW = "print(next(line for line in open('/proc/self/status') if line.startswith('VmLck:')).split()[1])"
_POOR = "import os, resource; resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0)); os.setuid(65534)"


def _python(*lines: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)


def test_what_is_in_use_is_locked() -> None:
    done = _python(_LOCK, _SHOW)
    if "EPERM" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip("this process may not lock memory")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 4096  # KiB: the interpreter alone is more


def test_without_a_limit_it_says_so() -> None:
    done = _python(f"import guestd.guest.resident\n{_POOR}\n{_LOCK}")
    assert done.returncode == 1
    assert "OSError" in done.stderr.splitlines()[-1] or "PermissionError" in done.stderr.splitlines()[-1]
