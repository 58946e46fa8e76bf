"""Root is given up for good."""

import contextlib
import os
import pwd
from pathlib import Path

import pytest

from guestd.guest.helper import drop_privileges


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give root up")
def test_privileges_are_dropped_for_good() -> None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            drop_privileges("nobody")
            status = Path("/proc/self/status").read_text()
            os.write(writing, status.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        lines = dict(line.split(":\t", 1) for line in pipe.read().splitlines() if ":\t" in line)
    os.waitpid(pid, 0)
    entry = pwd.getpwnam("nobody")
    assert lines["Uid"].split() == [str(entry.pw_uid)] * 4
    assert lines["Gid"].split() == [str(entry.pw_gid)] * 4
    assert lines["Groups"].split() == []
    assert int(lines["CapEff"], 16) == int(lines["CapPrm"], 16) == int(lines["CapAmb"], 16) == 0


def test_root_is_no_user_for_the_daemon() -> None:
    with pytest.raises(RuntimeError, match="root is root"):
        drop_privileges("root")
    with pytest.raises(KeyError):
        drop_privileges("no-such-user-here")
