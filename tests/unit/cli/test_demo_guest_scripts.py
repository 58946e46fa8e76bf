"""The programs that run in the guest: alone, on a made-up tree, without any VM."""

import ast
import json
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from guestd.cli.demo import guest_load, guest_probe, guest_watch

SCRIPTS = [Path(module.__file__ or "") for module in (guest_load, guest_probe, guest_watch)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_need_nothing_but_python(script: Path) -> None:
    """They run alone in the guest; and the load can touch neither broker nor hypervisor."""
    names = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    assert names <= sys.stdlib_module_names
    if script.stem == "guest_load":
        assert not names & {"socket", "subprocess", "asyncio", "http", "urllib", "ctypes"}


def test_the_load_reports_each_event_in_order(tmp_path: Path) -> None:
    (tmp_path / "go").write_text("go")
    options = "--processes 2 --cpu-seconds 0.2 --pause-seconds 0.05 --memory-mib 8 --mib-per-second 80"
    command = [
        sys.executable,
        "-S",
        str(SCRIPTS[0]),
        "--go",
        str(tmp_path / "go"),
        *options.split(),
        "--hold-seconds",
        "0.05",
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout
    events = [json.loads(line) for line in output.splitlines()]
    at = {event["event"]: event["guest_t"] for event in events}
    assert list(at) == ["cpu-onset", "cpu-end", "memory-onset", "memory-full", "memory-end", "end"]
    assert sorted(at.values()) == list(at.values())
    assert at["cpu-end"] - at["cpu-onset"] >= 0.2
    assert at["memory-full"] - at["memory-onset"] >= 0.09  # 8 MiB at 80 MiB/s
    assert events[0]["detail"] == "2 busy processes"
    assert events[4]["detail"] == "ok"


def test_how_a_process_ended_in_words() -> None:
    assert guest_load.outcome(0) == "ok"
    assert guest_load.outcome(9) == "killed by signal 9"
    assert guest_load.outcome(3 << 8) == "exit 3"


@pytest.mark.parametrize(("text", "count"), [("0\n", 1), ("0-3\n", 4), ("0,2-3\n", 3), ("\n", 0), ("0,5,7-8", 4)])
def test_cpu_lists_are_counted(text: str, count: int) -> None:
    assert guest_watch.count_cpus(text) == count


def make_root(root: Path) -> Path:
    (root / "sys/devices/system/cpu").mkdir(parents=True)
    (root / "proc").mkdir()
    (root / "sys/devices/system/cpu/online").write_text("0-1\n")
    (root / "proc/meminfo").write_text("MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 400 kB\nHugePages_Total: 0\n")
    (root / "proc/stat").write_text(
        "cpu  100 20 30 4000 500 6 7 8 50 0\ncpu0 1 2 3 4 5 6 7 8 9 0\nintr 1\nprocs_running 5\n"
    )
    (root / "proc/vmstat").write_text("nr_free_pages 5\noom_kill 3\n")
    return root


def test_the_watcher_reads_everything(tmp_path: Path) -> None:
    files = guest_watch.Files(make_root(tmp_path))
    seen = files.all()
    assert seen == {
        "cpus_online": 2,
        "memory_total_bytes": 1000 * 1024,
        "memory_available_bytes": 400 * 1024,
        "busy_seconds": 0.0,
        "runnable": 4,
        "oom_kills": 3,
    }
    assert files.quick()[0] == 2


def test_the_watcher_counts_busy_shares_of_accounted_time(tmp_path: Path) -> None:
    files = guest_watch.Files(make_root(tmp_path))
    first = ["cpu 0", "cpu0 10 0 0 100 0 0 0 9", "cpu1 10 0 0 100 0 0 0 9", "procs_running 1"]
    half_busy = ["cpu 0", "cpu0 20 0 0 110 0 0 0 99", "cpu1 40 0 0 100 0 0 0 99", "procs_running 1"]
    assert files._busy(first, 100.0) == 0.0
    assert files._busy(half_busy, 102.0) == pytest.approx(
        2 * 0.5 + 2 * 1.0
    )  # one half busy, one busy; steal is neither


def test_the_watcher_writes_at_a_change_and_after_a_silence(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    command = [sys.executable, "-S", str(SCRIPTS[2]), "--root", str(root), "--silence-seconds", "30"]
    with subprocess.Popen([*command, "--for-seconds", "20"], stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        first = json.loads(watcher.stdout.readline())
        (root / "sys/devices/system/cpu/online").write_text("0-3\n")
        second = json.loads(watcher.stdout.readline())
        watcher.terminate()
    assert (first["source"], first["cpus_online"], second["cpus_online"]) == ("guest", 2, 4)
    assert second["guest_t"] - first["guest_t"] < 10


def vsock_message(state: int, inode: int) -> bytes:
    body = struct.pack("=BBBBLLLLL2L", 40, 1, state, 0, 3, 1023, 2, 4747, inode, 0, 0)
    return struct.pack("=LHHLL", 16 + len(body), 20, 2, 1, 0) + body


def test_the_kernels_list_of_vsock_sockets_is_understood() -> None:
    found, last = guest_probe.parse_dump(vsock_message(1, 77) + vsock_message(10, 78))
    assert not last
    assert vars(found[77]) == {
        "state": "established",
        "local_cid": 3,
        "local_port": 1023,
        "peer_cid": 2,
        "peer_port": 4747,
    }
    assert found[78].state == "listening"
    done = struct.pack("=LHHLLl", 20, 3, 2, 1, 0, 0)
    assert guest_probe.parse_dump(vsock_message(1, 79) + done) == ({79: found[77]}, True)


def test_a_kernel_that_refuses_is_an_error() -> None:
    refused = struct.pack("=LHHLLl", 36, 2, 0, 1, 0, -2) + bytes(16)
    with pytest.raises(FileNotFoundError):
        guest_probe.parse_dump(refused)


def test_a_cut_off_list_does_not_loop() -> None:
    assert guest_probe.parse_dump(bytes(40)) == ({}, False)
    assert guest_probe.parse_dump(vsock_message(1, 1)[:20]) == ({}, False)


def test_the_family_of_a_socket_is_what_the_kernel_names_it() -> None:
    left, right = socket.socketpair()
    with left, right:
        inode = Path(f"/proc/self/fd/{left.fileno()}").stat().st_ino
        pid = int(Path("/proc/self").readlink().name)
        held = list(guest_probe.held_sockets(Path("/proc"), [pid, 2**22 + 1]))
    assert (pid, inode, "UNIX-STREAM") in held or (pid, inode, "UNIX") in held


def test_properties_of_systemctl() -> None:
    assert guest_probe.parse_properties("A=1\nB=x=y\n\nnonsense\n") == {"A": "1", "B": "x=y"}
    assert guest_probe.service_processes("") == []
