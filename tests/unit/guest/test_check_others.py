"""What else switches CPUs and memory here, on fake machines."""

import os
from pathlib import Path

import pytest

from guestd.guest.check_others import examine, running_programs
from guestd.guest.findings import Finding, Verdict


def write(path: Path, text: str = "", mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def run(root: Path, program: str, pid: int = 77) -> None:
    write(root / f"proc/{pid}/comm", program + "\n")


def find(root: Path, name: str, **parameters: str) -> Finding:
    return next(one for one in examine(root, parameters, os.geteuid()) if one.name == name)


def test_nothing_else_is_there(tmp_path: Path) -> None:
    findings = examine(tmp_path, {}, os.geteuid())
    names = [one.name for one in findings]
    assert len(names) == len(set(names)) == 8
    assert {one.name for one in findings if one.verdict is not Verdict.OK} == {"auto_online_blocks"}


def test_programs(tmp_path: Path) -> None:
    run(tmp_path, "systemd-oomd", 1)
    run(tmp_path, "qemu-ga", 20)
    write(tmp_path / "proc/meminfo", "x")
    (tmp_path / "proc/99").mkdir()  # it has just ended
    assert running_programs(tmp_path) == {"systemd-oomd", "qemu-ga"}


@pytest.mark.parametrize(
    ("policy", "verdict", "said"),
    [
        ("offline", Verdict.OK, "guestd onlines"),
        ("online", Verdict.NOTE, "online (the kernel onlines new blocks)"),
        ("online_movable", Verdict.NOTE, "online_movable (the kernel onlines"),
    ],
)
def test_auto_online(tmp_path: Path, policy: str, verdict: Verdict, said: str) -> None:
    write(tmp_path / "sys/devices/system/memory/auto_online_blocks", policy + "\n")
    finding = find(tmp_path, "auto_online_blocks")
    assert finding.verdict is verdict and said in finding.value


def test_the_kernels_command_line_is_why(tmp_path: Path) -> None:
    write(tmp_path / "sys/devices/system/memory/auto_online_blocks", "online_movable\n")
    finding = find(tmp_path, "auto_online_blocks", memhp_default_state="online_movable")
    assert "memhp_default_state=online_movable on the kernel command line" in finding.value
    assert "memhp_default_state=offline" in finding.advice


def test_tuned(tmp_path: Path) -> None:
    write(tmp_path / "usr/sbin/tuned", mode=0o755)
    assert find(tmp_path, "tuned") == Finding("tuned", Verdict.OK, "installed")  # it has no profile and does nothing
    write(tmp_path / "etc/tuned/active_profile", "virtual-guest\n")
    finding = find(tmp_path, "tuned")
    assert (finding.verdict, finding.value) == (Verdict.NOTE, "installed, profile virtual-guest")
    run(tmp_path, "tuned")
    write(tmp_path / "etc/tuned/active_profile", "cpu-partitioning\n")
    variables = "# isolated_cores=1\nisolated_cores=2-3\nno_balance_cores = 3 \n"
    write(tmp_path / "etc/tuned/cpu-partitioning-variables.conf", variables)
    write(tmp_path / "etc/tuned/realtime-variables.conf", "isolated_cores=1\n")
    finding = find(tmp_path, "tuned")
    assert finding.value == "running, profile cpu-partitioning, isolated_cores=2-3, no_balance_cores=3"
    assert "isolcpus" in finding.advice


def test_the_guest_agent(tmp_path: Path) -> None:
    write(tmp_path / "usr/sbin/qemu-ga", mode=0o755)
    assert find(tmp_path, "qemu-guest-agent").value == "installed"
    run(tmp_path, "qemu-ga")
    finding = find(tmp_path, "qemu-guest-agent")
    assert (finding.verdict, finding.value) == (Verdict.NOTE, "running")
    assert "guest-set-vcpus or guest-set-memory-blocks" in finding.advice
    config = tmp_path / "etc/qemu/qemu-ga.conf"
    write(config, "[general]\nblock-rpcs=guest-set-vcpus,guest-exec\n")
    finding = find(tmp_path, "qemu-guest-agent")
    assert finding.verdict is Verdict.NOTE and "calls guest-set-memory-blocks on" in finding.advice
    write(config, "[general]\nblacklist = guest-set-vcpus,guest-set-memory-blocks\n")
    assert find(tmp_path, "qemu-guest-agent").verdict is Verdict.OK
    write(config, "[general]\n#block-rpcs=guest-set-vcpus,guest-set-memory-blocks\n")
    assert find(tmp_path, "qemu-guest-agent").verdict is Verdict.NOTE


def test_oomd(tmp_path: Path) -> None:
    run(tmp_path, "systemd-oomd")
    finding = find(tmp_path, "systemd-oomd")
    assert (finding.verdict, finding.value) == (Verdict.NOTE, "running") and finding.advice


def test_isolated_cpus(tmp_path: Path) -> None:
    write(tmp_path / "sys/devices/system/cpu/isolated", "\n")
    assert find(tmp_path, "isolated CPUs").verdict is Verdict.OK
    assert find(tmp_path, "isolated CPUs", nohz_full="1").value == "none; nohz_full=1"
    write(tmp_path / "sys/devices/system/cpu/isolated", "2-3\n")
    finding = find(tmp_path, "isolated CPUs", isolcpus="2-3")
    assert (finding.verdict, finding.value) == (Verdict.NOTE, "CPUs 2-3 (isolcpus=2-3)")
    assert find(tmp_path, "isolated CPUs").value == "CPUs 2-3 (a cpuset partition)"


def test_cpusets_of_version_2(tmp_path: Path) -> None:
    tree = tmp_path / "sys/fs/cgroup"
    write(tree / "cgroup.controllers", "cpuset cpu\n")
    write(tree / "system.slice/cpuset.cpus", "\n")
    write(tree / "system.slice/db.service/cpuset.cpus", "2-3\n")
    write(tree / "rt.slice/cpuset.cpus", "1\n")
    write(tree / "rt.slice/cpuset.cpus.partition", "isolated\n")
    write(tree / "cpuset/cpuset.cpus", "\n")
    finding = find(tmp_path, "cpusets")
    assert finding.verdict is Verdict.NOTE
    assert finding.value == "rt.slice: CPUs 1 (isolated), system.slice/db.service: CPUs 2-3"
    for number in range(9):
        write(tree / f"s{number}/cpuset.cpus", "0\n")
    assert find(tmp_path, "cpusets").value.endswith("and 7 more")


def test_cpusets_of_version_1(tmp_path: Path) -> None:
    tree = tmp_path / "sys/fs/cgroup/cpuset"
    write(tree / "cpuset.cpus", "0-3\n")
    write(tree / "machine/cpuset.cpus", "0-3\n")
    assert find(tmp_path, "cpusets").verdict is Verdict.OK
    write(tree / "machine/cpuset.cpus", "0,2\n")
    assert find(tmp_path, "cpusets").value == "machine: CPUs 0,2"


def test_hooks(tmp_path: Path) -> None:
    directory = tmp_path / "etc/guestd/hooks.d"
    for path in (tmp_path, tmp_path / "etc", tmp_path / "etc/guestd", directory):
        path.mkdir(exist_ok=True)
        path.chmod(0o755)
    write(directory / "10-db", mode=0o755)
    write(directory / "README", mode=0o644)
    assert find(tmp_path, "hooks") == Finding("hooks", Verdict.OK, "10-db")
    write(directory / "20-open", mode=0o777)
    finding = find(tmp_path, "hooks")
    assert finding.verdict is Verdict.MISSING
    assert finding.value.startswith("1 run, never run: ") and "20-open may be written by others" in finding.value
    directory.chmod(0o777)
    assert find(tmp_path, "hooks").value.startswith("0 run, never run: ")
