"""Whether there are two processes, and what they import: most of what they weigh."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from guestd.guest import app, main

HEAVY = {"grpc", "_ssl", "_hashlib", "msgspec", "tomllib", "decimal", "json", "sqlite3", "numpy"}
FOR_THE_DAEMON_ONLY = {
    "asyncio",
    "argparse",
    "logging",
    "google.protobuf",
    "h2",
    "psutil",
    "pyudev",
    "ctypes",
    "typing",
}


def modules_after(program: str) -> set[str]:
    command = [sys.executable, "-c", f"{program}\nimport sys\nprint(*sys.modules)"]
    words = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    return set(words)


def test_the_daemon_does_without_what_is_heavy() -> None:
    found = modules_after(
        "from guestd.guest import main\n"
        "try:\n"
        "    main._be_the_daemon(['--version'], None)\n"
        "except SystemExit:\n"
        "    pass\n"
        "from guestd.guest import app, config\n"
        "assert config.load(config.DEFAULT_PATH) == config.GuestConfig(), 'this machine has a guestd.toml'\n"
        "import psutil, pyudev"
    )
    assert {"asyncio", "h2.connection", "psutil", "pyudev", "guestd.guest.daemon"} <= found
    assert found & HEAVY == set()


def test_the_root_helper_is_forked_before_anything_large() -> None:
    found = modules_after("import guestd.guest.main")
    assert "guestd.guest.helper" in found
    assert found & (HEAVY | FOR_THE_DAEMON_ONLY) == set()


@pytest.mark.parametrize(
    ("uid", "writable", "forks"),
    [
        (0, {"cpu", "memory"}, True),
        (0, {"memory"}, True),
        (0, set(), False),  # a container
        (1000, {"cpu", "memory"}, False),
    ],
)
def test_a_helper_is_forked_where_root_has_something_to_switch(
    uid: int, writable: set[str], forks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    forked: list[int] = []
    became: list[socket.socket | None] = []
    places = {f"/sys/devices/system/{one}" for one in writable}
    monkeypatch.setattr(sys, "argv", ["guestd", "run"])
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(os, "access", lambda path, mode: path in places and mode == os.W_OK)
    monkeypatch.setattr(os, "fork", lambda: forked.append(0) or 0)
    monkeypatch.setattr(main, "_be_the_daemon", lambda arguments, sock: became.append(sock))
    main.main()
    [sock] = became
    assert (bool(forked), sock is not None) == (forks, forks)
    if sock is not None:
        sock.close()


def test_half_a_word_is_no_dry_run() -> None:
    """It would be one to the daemon only, with a helper whose hands work."""
    with pytest.raises(SystemExit) as end:
        app.main(["run", "--dry"], None)
    assert end.value.code == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to be given up")
@pytest.mark.parametrize(("user", "why"), [("nobody-of-that-name", "no such user here"), ("root", "root is root")])
def test_a_user_of_no_use_is_named_and_not_tried_again(
    user: str, why: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "guestd.toml").write_text(f'user = "{user}"')
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, pytest.raises(SystemExit) as end:
        app.main(["run", "--config", str(tmp_path / "guestd.toml")], ours)
    assert end.value.code == 2, "which systemd takes for: do not start it again"
    assert re.search(f"guestd.toml: user = '{user}': {why}", capfd.readouterr().err)
