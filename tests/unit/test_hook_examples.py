"""The shipped hooks as shell scripts, with other programs' answers made up; the VM tests run them on the real ones."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HOOKS = Path(__file__).parents[2] / "systemd" / "hooks"
MIB = 1 << 20

SETPRIV = """#!/bin/sh
# what the hooks ask PostgreSQL and JVMs through: $ASKED is what was asked, $SAYS a directory with answers
for last; do :; done
text="$last"
case $* in *psql*) text=$(cat) ;; esac
printf '%s\\n' "$text" >> "$ASKED"
case $text in
*pg_stat_activity*) cat "$SAYS/postgresql" 2>/dev/null ;;
*GC.heap_info*) cat "$SAYS/heap" 2>/dev/null ;;
esac
status=$?
case $text in *set_flag*) [ ! -e "$SAYS/refuses" ] || status=1 ;; esac
exit $status
"""


class Guest:
    """Programs for the hooks to find."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._asked = directory, directory / "asked"
        self.says = directory / "says"
        self.says.mkdir()
        self._program("setpriv", SETPRIV)
        self.runs()

    def _program(self, name: str, text: str) -> None:
        (self._directory / name).write_text(text)
        (self._directory / name).chmod(0o755)

    def runs(self, **pids: int) -> None:
        """Have these programs run, and no others."""
        cases = "".join(f"{name}) echo {pid} ;;\n" for name, pid in pids.items())
        self._program("pgrep", f"#!/bin/sh\ncase $2 in\n{cases}*) exit 1 ;;\nesac\n")

    def run(self, hook: str, event: str, kind: str, after: int) -> tuple[int, str]:
        """Run a hook: its exit code, and what it printed."""
        environment = {
            "PATH": f"{self._directory}:{os.environ['PATH']}",
            "ASKED": str(self._asked),
            "SAYS": str(self.says),
            "GUESTD_EVENT": event,
            "GUESTD_KIND": kind,
            "GUESTD_BEFORE": "0",
            "GUESTD_AFTER": str(after),
            "GUESTD_VCPUS_AFTER": str(-(-after // 1000)),
            "GUESTD_DEADLINE_SECONDS": "20",
        }
        ended = subprocess.run([HOOKS / hook, event], env=environment, capture_output=True, text=True, check=False)
        assert ended.stderr == ""
        return ended.returncode, ended.stdout

    @property
    def asked(self) -> str:
        """What was asked until now; forgotten then."""
        text = self._asked.read_text() if self._asked.exists() else ""
        self._asked.unlink(missing_ok=True)
        return text


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path)


@pytest.fixture
def java(tmp_path: Path) -> Iterator[int]:
    """A process that looks like a JVM with ZGC and catches SIGQUIT."""
    program = "import signal, time; signal.signal(signal.SIGQUIT, print); print('up', flush=True); time.sleep(60)"
    command = ["java", "-c", program, "-XX:+UseZGC"]
    with subprocess.Popen(command, executable=sys.executable, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


@pytest.mark.parametrize("hook", ["50-postgresql", "50-jvm-zgc"])
@pytest.mark.parametrize("event", ["before-shrink", "after-grow", "burst-ending"])
@pytest.mark.parametrize("kind", ["cpu", "memory"])
def test_without_the_application_nothing_is_asked(guest: Guest, hook: str, event: str, kind: str) -> None:
    assert guest.run(hook, event, kind, 1024 * MIB) == (0, "")
    assert guest.asked == ""


def test_postgresql_gets_shares_of_the_memory(guest: Guest) -> None:
    guest.runs(postgres=1)
    (guest.says / "postgresql").write_text("131072 100 3\n")
    assert guest.run("50-postgresql", "after-grow", "memory", 2048 * MIB)[0] == 0
    settings = dict(re.findall(r"ALTER SYSTEM SET (\w+) = '(\w+)'", asked := guest.asked))
    assert settings == {"effective_cache_size": "1572864kB", "maintenance_work_mem": "131072kB", "work_mem": "6553kB"}
    assert asked.rstrip().endswith("SELECT pg_reload_conf();")
    guest.run("50-postgresql", "after-grow", "memory", 256 << 30)
    assert "maintenance_work_mem = '2097151kB'" in guest.asked
    guest.run("50-postgresql", "before-shrink", "memory", 384 * MIB)
    assert "work_mem = '1024kB'" in guest.asked


def test_postgresql_vetoes_a_shrink_below_what_it_needs(guest: Guest) -> None:
    guest.runs(postgres=1)
    (guest.says / "postgresql").write_text("131072 100 40\n")  # 128 MiB, 40 connections of 10, 128 for the system
    code, words = guest.run("50-postgresql", "before-shrink", "memory", 655 * MIB)
    assert (code, words.split(":")[0]) == (77, "no")
    assert "656 MiB are needed" in words
    assert "ALTER" not in guest.asked
    assert guest.run("50-postgresql", "before-shrink", "memory", 656 * MIB)[0] == 0
    assert guest.run("50-postgresql", "after-grow", "memory", 512 * MIB)[0] == 0


@pytest.mark.parametrize(
    ("millicores", "workers", "per_gather"), [(250, 1, 0), (1000, 1, 0), (2500, 3, 1), (8000, 8, 4)]
)
def test_postgresql_gets_as_many_workers_as_cpus(guest: Guest, millicores: int, workers: int, per_gather: int) -> None:
    guest.runs(postgres=1)
    assert guest.run("50-postgresql", "before-shrink", "cpu", millicores)[0] == 0
    assert re.findall(r"ALTER SYSTEM SET (\w+) = (\d+)", guest.asked) == [
        ("max_parallel_workers", str(workers)),
        ("max_parallel_workers_per_gather", str(per_gather)),
    ]


def test_a_server_that_cannot_be_asked_is_a_failure(guest: Guest) -> None:
    guest.runs(postgres=1)
    assert guest.run("50-postgresql", "before-shrink", "memory", 1024 * MIB) == (1, "")
    (guest.says / "postgresql").write_text("")
    code, words = guest.run("50-postgresql", "before-shrink", "memory", 1024 * MIB)
    assert (code, words) == (1, "psql does not say what the server has\n")
    assert "ALTER" not in guest.asked


def test_a_heap_gets_its_share_up_to_its_maximum(guest: Guest, java: int) -> None:
    guest.runs(java=java)
    (guest.says / "heap").write_text(" ZHeap           used 38M, capacity 60M, max capacity 1024M\n")
    code, words = guest.run("50-jvm-zgc", "after-grow", "memory", 1024 * MIB)
    assert (code, words) == (0, f"java {java}: SoftMaxHeapSize 614 MiB\n")
    assert guest.asked == f"VM.set_flag SoftMaxHeapSize {614 * MIB}\nGC.heap_info\n"
    code, words = guest.run("50-jvm-zgc", "after-grow", "memory", 4096 * MIB)
    assert (code, words) == (0, f"java {java}: SoftMaxHeapSize 1024 MiB\n")
    assert guest.asked.endswith(f"VM.set_flag SoftMaxHeapSize {1024 * MIB}\n")
    assert guest.run("50-jvm-zgc", "before-shrink", "memory", 1024 * MIB) == (
        0,
        f"java {java}: SoftMaxHeapSize 614 MiB\n",
    )
    assert guest.asked == f"GC.run\nGC.heap_info\nVM.set_flag SoftMaxHeapSize {614 * MIB}\n"


def test_a_setting_that_the_jvm_refuses_is_a_failure(guest: Guest, java: int) -> None:
    guest.runs(java=java)
    (guest.says / "heap").write_text(" ZHeap           used 38M, capacity 60M, max capacity 1024M\n")
    (guest.says / "refuses").touch()
    assert guest.run("50-jvm-zgc", "after-grow", "memory", 1024 * MIB) == (1, "")
    assert guest.run("50-jvm-zgc", "before-shrink", "memory", 1024 * MIB) == (1, "")


def test_a_heap_whose_live_data_does_not_fit_asks_for_time(guest: Guest, java: int) -> None:
    guest.runs(java=java)
    (guest.says / "heap").write_text(" ZHeap           used 308M, capacity 600M, max capacity 1024M\n")
    code, words = guest.run("50-jvm-zgc", "before-shrink", "memory", 512 * MIB)
    assert code == 75
    assert words.splitlines()[-1] == "retry-after 60"
    assert guest.asked == "GC.run\nGC.heap_info\n"
    assert guest.run("50-jvm-zgc", "before-shrink", "memory", 513 * MIB)[0] == 75
    assert guest.run("50-jvm-zgc", "before-shrink", "memory", 514 * MIB)[0] == 0


def test_a_jvm_that_sigquit_would_end_is_left_alone(guest: Guest) -> None:
    command = ["java", "-c", "print('up', flush=True); import time; time.sleep(60)", "-XX:+UseZGC"]
    with subprocess.Popen(command, executable=sys.executable, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        guest.runs(java=process.pid)
        assert guest.run("50-jvm-zgc", "after-grow", "memory", 1024 * MIB) == (0, "")
        process.send_signal(signal.SIGKILL)
    assert guest.asked == ""


def test_a_jvm_that_jcmd_does_not_reach_is_a_failure(guest: Guest, java: int) -> None:
    guest.runs(java=java)
    (guest.says / "heap").write_text("AttachNotSupportedException\n")
    code, words = guest.run("50-jvm-zgc", "before-shrink", "memory", 512 * MIB)
    assert (code, words) == (1, f"java {java}: jcmd does not get through: AttachNotSupportedException, exit code 0\n")


def test_the_examples_in_the_documentation_are_shell_scripts() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (HOOKS / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        checked = subprocess.run(["sh", "-n"], input=block, text=True, capture_output=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, "")
