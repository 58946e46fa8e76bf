"""A VM's group on both versions: who is in it, what bounds it, what mends it, and what it says when it cannot."""

import errno
import logging
from pathlib import Path

import pytest
from fake_cgroups import FakeCgroups

from guestd.broker.cgroup.cpu_group import Bandwidth, CpuGroup
from guestd.broker.cgroup.files import CgroupError

VCPUS = {101, 102}
both = pytest.mark.parametrize("version", [1, 2])


class Rig:
    """A kernel and a group on it, at a time of its own."""

    def __init__(self, version: int, group: str = "/vm") -> None:
        self.kernel = FakeCgroups(version, group)
        self.path = self.kernel.parent / "guestd-one"
        self.now = 0.0
        self.group = self.another()

    def another(self, pid: int = 100) -> CpuGroup:
        return CpuGroup("one", pid, self.kernel, lambda: self.now)

    def written(self, name: str) -> list[str]:
        return [text for path, text in self.kernel.writes if path.endswith(name)]


@pytest.mark.parametrize(("version", "group"), [(1, "/vm"), (1, ""), (2, "/vm"), (2, ""), (2, "/a.slice/vm.scope")])
def test_the_vcpu_threads_are_bound_and_the_emulator_is_not(version: int, group: str) -> None:
    rig = Rig(version, group)
    assert rig.group.read() is None
    rig.group.settle(VCPUS)
    assert rig.group.path == rig.path
    assert rig.group.read() == Bandwidth(frozenset(VCPUS), 0, 0)
    rig.group.set_quota(250)
    assert rig.group.read() == Bandwidth(frozenset(VCPUS), 250, 0)
    assert rig.kernel.members(rig.path) == VCPUS


def test_what_is_written_for_v1() -> None:
    rig = Rig(1)
    rig.group.settle({101})
    rig.group.set_quota(2500)
    rig.group.set_quota(5)  # the period grows: it goes first
    rig.group.set_quota(100)  # it falls: the quota goes first
    assert rig.kernel.writes == [
        ("guestd-one/tasks", "101"),
        ("guestd-one/cpu.cfs_quota_us", "50000"),  # the period falls: the quota goes first
        ("guestd-one/cpu.cfs_period_us", "20000"),
        ("guestd-one/cpu.shares", "2560"),
        ("guestd-one/cpu.cfs_period_us", "1000000"),
        ("guestd-one/cpu.cfs_quota_us", "5000"),
        ("guestd-one/cpu.shares", "1024"),
        ("guestd-one/cpu.cfs_quota_us", "2000"),
        ("guestd-one/cpu.cfs_period_us", "20000"),
        ("guestd-one/cpu.shares", "1024"),
    ]


def test_what_is_written_for_v2() -> None:
    rig = Rig(2)
    rig.group.settle({101})
    rig.group.set_quota(2500)
    assert rig.kernel.writes == [
        ("guestd-one/cgroup.type", "threaded"),
        ("cgroup.subtree_control", "+cpu"),
        ("guestd-one/cgroup.threads", "101"),
        ("guestd-one/cpu.max", "50000 20000"),
        ("guestd-one/cpu.weight", "250"),
    ]


@both
def test_threads_that_came_are_put_in_and_those_inside_are_left(version: int) -> None:
    rig = Rig(version)
    rig.group.settle(VCPUS)
    rig.kernel.spawn(103)
    rig.kernel.writes.clear()
    rig.group.settle({101, 102, 103})
    assert [text for _, text in rig.kernel.writes] == ["103"]
    assert rig.kernel.members(rig.path) == {101, 102, 103}


@both
def test_a_thread_that_ended_is_no_error(version: int) -> None:
    rig = Rig(version)
    rig.kernel.end(102)
    rig.group.settle(VCPUS)
    assert rig.kernel.members(rig.path) == {101}
    rig.kernel.directories.add(Path("/proc/100/task/102"))  # seen, and ended before it is written
    rig.kernel.refusals["tasks" if version == 1 else "cgroup.threads"] = errno.ESRCH
    rig.group.settle(VCPUS)
    assert rig.kernel.members(rig.path) == {101}


@both
def test_threads_of_another_process_are_left_alone(version: int) -> None:
    rig = Rig(version)
    with pytest.raises(CgroupError, match=r"none of the vCPU threads \[7, 8\] is of process 100"):
        rig.group.settle({7, 8})
    assert not rig.kernel.exists(rig.path)


@both
def test_a_group_that_vanished_is_made_again_with_its_quota(version: int, caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(version)
    rig.group.settle(VCPUS)
    rig.group.set_quota(250)
    rig.kernel.vanish(rig.path)
    assert rig.group.read() is None
    with caplog.at_level(logging.WARNING):
        rig.group.settle(VCPUS)
    assert rig.group.read() == Bandwidth(frozenset(VCPUS), 250, 0)
    (message,) = caplog.messages
    assert message == f"one: {rig.path} was gone, or its quota was: 250 millicores set again"


def test_a_controller_that_was_switched_off_is_switched_on_again(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(2)
    rig.group.settle(VCPUS)
    rig.group.set_quota(250)
    rig.kernel.files[rig.kernel.parent / "cgroup.subtree_control"] = ""
    for name in ("cpu.max", "cpu.weight"):
        del rig.kernel.files[rig.path / name]
    rig.kernel.files[rig.path / "cpu.stat"] = "usage_usec 7\n"  # as a real kernel has it then
    assert rig.group.read() is None
    rig.group.settle(VCPUS)
    assert rig.group.read() == Bandwidth(frozenset(VCPUS), 250, 0)
    assert "250 millicores set again" in caplog.text


@both
def test_a_new_broker_finds_group_threads_and_quota(version: int, caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(version)
    rig.group.settle(VCPUS)
    rig.group.set_quota(750)
    new = rig.another()
    rig.kernel.writes.clear()
    new.settle(VCPUS)
    assert rig.kernel.writes == []
    assert new.read() == Bandwidth(frozenset(VCPUS), 750, 0)
    rig.kernel.vanish(rig.path)  # what it found is what it sets again
    new.settle(VCPUS)
    assert new.read() == Bandwidth(frozenset(VCPUS), 750, 0)
    assert len(caplog.messages) == 1


@both
def test_a_dead_vms_quota_does_not_bind_the_next_one(version: int) -> None:
    rig = Rig(version)
    rig.group.settle(VCPUS)
    rig.group.set_quota(20)
    rig.kernel.end(101)
    rig.kernel.end(102)
    for thread in (101, 102):
        rig.kernel.spawn(thread)
    new = rig.another()
    new.settle(VCPUS)
    assert new.read() == Bandwidth(frozenset(VCPUS), 0, 0)


@both
def test_the_group_goes_with_its_vm_and_not_before(version: int) -> None:
    rig = Rig(version)
    rig.group.settle(VCPUS)
    assert not rig.group.remove()
    assert rig.kernel.exists(rig.path)
    for thread in VCPUS:
        rig.kernel.end(thread)
    assert rig.group.remove()
    assert not rig.kernel.exists(rig.path)
    assert rig.group.remove()


@both
def test_qemu_that_was_moved_takes_its_group_along(version: int) -> None:
    rig = Rig(version)
    rig.group.settle(VCPUS)
    rig.group.set_quota(250)
    new = rig.kernel.mount / "new"
    rig.kernel.directories.add(new)
    rig.kernel.files |= {new / "cgroup.controllers": "cpu", new / "cgroup.subtree_control": ""}
    rig.kernel.files[Path("/proc/100/cgroup")] = "3:cpu:/new\n" if version == 1 else "0::/new\n"
    rig.kernel.parent = rig.kernel.mount
    rig.kernel._set_members(rig.path / ("tasks" if version == 1 else "cgroup.threads"), set())
    rig.group.settle(VCPUS)
    assert rig.group.path == new / "guestd-one"
    assert rig.group.read() == Bandwidth(frozenset(VCPUS), 250, 0)
    assert not rig.kernel.exists(rig.path)


@both
def test_throttling_is_read(version: int) -> None:
    rig = Rig(version)
    rig.group.settle(VCPUS)
    rig.group.read()
    rig.now = 1.0
    rig.kernel.count(rig.path, 10, 9)
    seen = rig.group.read()
    assert seen is not None
    assert seen.throttled_permille == 900


@both
@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EROFS, "mounted read-only: mount it writable"),
        (errno.EACCES, "permission denied: run the broker as root"),
        (errno.ENOSPC, "No space left"),
    ],
)
def test_a_group_that_cannot_be_made_is_named_with_the_way_out(version: int, number: int, says: str) -> None:
    rig = Rig(version)
    rig.kernel.refusals["mkdir"] = number
    with pytest.raises(CgroupError, match=f"{rig.path}: cannot be made: .*{says}"):
        rig.group.settle(VCPUS)
    assert rig.group.read() is None


@both
def test_a_quota_that_is_refused_leaves_the_old_one(version: int) -> None:
    rig = Rig(version)
    rig.group.settle(VCPUS)
    rig.group.set_quota(250)
    rig.kernel.refusals["cpu.cfs_quota_us" if version == 1 else "cpu.max"] = errno.EINVAL
    with pytest.raises(CgroupError, match=r"4000 millicores cannot be set: .*a group above has a smaller quota"):
        rig.group.set_quota(4000)
    seen = rig.group.read()
    assert seen is not None
    assert seen.quota_millicores == 250
    rig.kernel.refusals.clear()
    rig.kernel.vanish(rig.path)
    rig.group.settle(VCPUS)
    seen = rig.group.read()
    assert seen is not None
    assert seen.quota_millicores == 250


@both
def test_a_thread_that_the_kernel_refuses_is_told(version: int) -> None:
    rig = Rig(version)
    rig.kernel.refusals["tasks" if version == 1 else "cgroup.threads"] = errno.EPERM
    with pytest.raises(CgroupError, match="does not take thread 101: not permitted"):
        rig.group.settle(VCPUS)


@both
@pytest.mark.parametrize("millicores", [0, -250])
def test_a_quota_is_above_nothing(version: int, millicores: int) -> None:
    rig = Rig(version)
    rig.group.settle(VCPUS)
    with pytest.raises(CgroupError, match="from 1 up"):
        rig.group.set_quota(millicores)


def test_a_quota_needs_a_group() -> None:
    with pytest.raises(CgroupError, match="has no CPU group yet"):
        Rig(1).group.set_quota(250)


def test_v2_a_controller_that_is_not_handed_down_is_told_and_nothing_stays_behind() -> None:
    rig = Rig(2)
    rig.kernel.files[rig.kernel.parent / "cgroup.controllers"] = "memory pids\n"
    with pytest.raises(CgroupError, match=r"/vm/cgroup\.controllers has no cpu, .*Delegate=yes, or any CPUWeight="):
        rig.group.settle(VCPUS)
    assert not rig.kernel.exists(rig.path)


def test_v2_a_parent_that_cannot_be_a_threaded_domain_is_told() -> None:
    rig = Rig(2)
    rig.kernel.refusals["cgroup.type"] = errno.EOPNOTSUPP
    with pytest.raises(CgroupError, match=r"cannot be threaded: /sys/fs/cgroup/vm .*a systemd scope"):
        rig.group.settle(VCPUS)
    assert not rig.kernel.exists(rig.path)


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EACCES])
def test_v2_cpu_that_cannot_be_switched_on_is_told(number: int) -> None:
    rig = Rig(2)
    rig.kernel.refusals["cgroup.subtree_control"] = number
    with pytest.raises(CgroupError, match=r"/vm/cgroup\.subtree_control: \+cpu: "):
        rig.group.settle(VCPUS)
    assert not rig.kernel.exists(rig.path)


def test_v1_without_bandwidth_control_it_says_so() -> None:
    rig = Rig(1)
    rig.kernel.directories.add(rig.path)
    with pytest.raises(CgroupError, match="CONFIG_CFS_BANDWIDTH"):
        rig.group.settle(VCPUS)


@both
def test_a_group_that_cannot_be_removed_is_told(version: int) -> None:
    rig = Rig(version)
    rig.group.settle(set())
    rig.kernel.refusals["rmdir"] = errno.EROFS
    with pytest.raises(CgroupError, match="cannot be removed: it is mounted read-only"):
        rig.group.remove()


@both
def test_nonsense_in_the_kernels_files_is_an_error_of_ours(version: int) -> None:
    rig = Rig(version)
    rig.group.settle(VCPUS)
    rig.kernel.files[rig.path / "cpu.stat"] = "nr_periods many\n"
    with pytest.raises(CgroupError, match="not as the kernel writes it"):
        rig.group.read()
    assert rig.group.glance() is None
    rig.kernel.files[rig.path / ("cpu.cfs_quota_us" if version == 1 else "cpu.max")] = "plenty of it\n"
    with pytest.raises(CgroupError, match="not as the kernel writes them"):
        rig.group.settle(VCPUS)
