"""The bench's program in the guest, on a tree that looks like one."""

import base64
import os
import random
import time
from pathlib import Path

import pytest

from guestd.cli.bench.guest.inside import agent as guest_agent
from guestd.cli.bench.guest.inside import noise


@pytest.fixture
def root(tmp_path: Path) -> Path:
    cpus, memory = tmp_path / "sys/devices/system/cpu", tmp_path / "sys/devices/system/memory"
    for name, text in {
        cpus / "online": "0-1\n",
        cpus / "cpu1/online": "1\n",
        cpus / "cpu2/online": "0\n",
        memory / "memory0/state": "online\n",
        memory / "memory32/state": "offline\n",
        tmp_path / "proc/meminfo": "MemFree: 1 kB\nMemTotal:      1024 kB\n",
    }.items():
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_text(text)
    return tmp_path


def test_amounts(root: Path) -> None:
    assert guest_agent.online_cpus(root) == 2
    assert guest_agent.memory_total_bytes(root) == 1 << 20
    assert guest_agent.count_cpus("0-2,5\n") == 4


def test_only_what_is_offline_is_switched_on(root: Path) -> None:
    assert [switch.parent.name for switch in guest_agent.offline_cpus(root)] == ["cpu2"]
    assert [switch.parent.name for switch in guest_agent.offline_blocks(root)] == ["memory32"]


def test_bare_loop_switches_on_and_sees_it(root: Path) -> None:
    switch = root / "sys/devices/system/cpu/cpu2/online"
    answer = guest_agent.bare_loop(
        lambda: guest_agent.offline_cpus(root), "1", lambda: 2 + int(switch.read_text()), limit_seconds=5.0
    )
    assert (answer["before"], answer["after"]) == (2, 3)
    assert answer["grown_at"] is not None


def test_bare_loop_ends_without_anything(root: Path) -> None:
    assert guest_agent.bare_loop(list, "1", lambda: 1, limit_seconds=0.01)["grown_at"] is None


def test_load_runs_until_the_amount_grew() -> None:
    begun = time.monotonic()
    answer = guest_agent.under_load(2, guest_agent.burn, lambda: 1 + (time.monotonic() > begun + 0.1), 5.0)
    assert isinstance(answer["grown_at"], float)
    assert 0.05 < answer["grown_at"] - begun < 2.0
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_usage_of_this_process(root: Path) -> None:
    group = root / "sys/fs/cgroup/guestd.slice/a.service"
    group.mkdir(parents=True)
    (group / "cgroup.procs").write_text(f"{os.getpid()}\n4194305\n")  # the second one has just ended
    (group / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
    assert guest_agent.cgroup_of("a.service", root) == group
    answer = guest_agent.usage(Path("/proc"), group)
    assert answer["pids"] == [os.getpid()]
    assert answer["cpu_seconds"] == 2.5
    assert int(str(answer["pss_bytes"])) > 1 << 20
    assert int(str(answer["context_switches"])) > 0


def test_a_service_that_does_not_run_has_no_usage(root: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.service is not running"):
        guest_agent.cgroup_of("a.service", root)


def test_unknown_step_is_answered(root: Path) -> None:
    answers: list[guest_agent.Answer] = []
    guest_agent.perform({"do": "dance"}, answers.append, root)
    assert answers == [{"error": "no such step: dance"}]


def test_a_file_comes_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "new/program"
    guest_agent.put(path, base64.b64encode(b"one ").decode(), append=False, mode=0o644)
    assert guest_agent.put(path, base64.b64encode(b"two").decode(), append=True, mode=0o755) == {"bytes": 7}
    assert path.read_bytes() == b"one two"
    assert path.stat().st_mode & 0o777 == 0o755


def test_a_program_is_run_and_what_the_kernel_killed_is_counted(root: Path) -> None:
    (root / "proc/vmstat").write_text("oom_kill 3\npswpout 0\n")
    answer = guest_agent.run(["/bin/sh", "-c", "cat /proc/self/oom_score_adj; exit 3"], 10.0, root)
    assert (answer["exit"], answer["out"]) == (3, "1000\n")
    assert (answer["oom_kills"], answer["swapped_pages"]) == (0, 0)


def test_a_program_that_does_not_end_is_ended(root: Path) -> None:
    (root / "proc/vmstat").write_text("oom_kill 3\npswpout 0\n")
    assert guest_agent.run(["/bin/sleep", "60"], 0.2, root)["exit"] == -1


def test_noise_is_the_same_each_time_and_stays_within_its_spread() -> None:
    spread = 96 << 20
    one, other = random.Random(0), random.Random(0)
    found = [noise.chunks(one, spread) for _ in range(50)]
    assert found == [noise.chunks(other, spread) for _ in range(50)]
    assert 0 <= min(found) < max(found) <= 24
