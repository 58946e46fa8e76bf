"""Where the CPU controller is, and which of its groups a process is in."""

from pathlib import Path

import pytest
from fake_cgroups import V1_LINE, V2_LINE, FakeCgroups

from guestd.broker.cgroup.files import CgroupError
from guestd.broker.cgroup.place import Place, place_of

MOUNTS = Path("/proc/self/mountinfo")
GROUP = Path("/proc/100/cgroup")
OTHER_V1 = "32 20 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"


def kernel(version: int, *mounts: str, group: str = "") -> FakeCgroups:
    fake = FakeCgroups(version)
    if mounts:
        fake.files[MOUNTS] = "\n".join(mounts) + "\n"
    if group:
        fake.files[GROUP] = group
    return fake


@pytest.mark.parametrize(
    ("fake", "place"),
    [
        (kernel(1), Place(1, Path("/sys/fs/cgroup/cpu/vm"))),
        (kernel(2), Place(2, Path("/sys/fs/cgroup/vm"))),
        (kernel(1, group="9:memory:/m\n3:cpu:/\n0::/u\n"), Place(1, Path("/sys/fs/cgroup/cpu"))),
        (kernel(2, group="9:name=systemd:/s\n0::/\n"), Place(2, Path("/sys/fs/cgroup"))),
        (kernel(2, group="0::/a b/c\n"), Place(2, Path("/sys/fs/cgroup/a b/c"))),
    ],
)
def test_the_group_of_a_process(fake: FakeCgroups, place: Place) -> None:
    assert place_of(fake, 100) == place


def test_on_a_hybrid_host_v1_has_the_controller() -> None:
    fake = kernel(1, OTHER_V1, V2_LINE, V1_LINE, group="0::/u\n3:cpu,cpuacct:/vm\n")
    assert place_of(fake, 100) == Place(1, Path("/sys/fs/cgroup/cpu/vm"))


def test_a_part_of_a_hierarchy_that_is_mounted_elsewhere() -> None:
    line = r"30 20 0:25 /box /run/c\040group rw - cgroup2 cgroup2 rw"
    fake = kernel(2, line, group="0::/box/vm\n")
    fake.files[Path("/run/c group/cgroup.controllers")] = "cpu"
    assert place_of(fake, 100) == Place(2, Path("/run/c group/vm"))
    for outside in ("/boxes/vm", "/vm", "/../vm", "/box/../vm"):
        fake.files[GROUP] = f"0::{outside}\n"
        with pytest.raises(CgroupError, match="run the broker in the host's cgroup namespace"):
            place_of(fake, 100)


def test_the_mount_that_shows_most_is_taken() -> None:
    fake = kernel(2, V2_LINE.replace(" / /sys/fs/cgroup ", " /vm /run/vm "), V2_LINE)
    assert place_of(fake, 100) == Place(2, Path("/sys/fs/cgroup/vm"))


@pytest.mark.parametrize("mounts", ["", OTHER_V1, "nonsense", "1 2 3 - cgroup2"])
def test_without_any_cpu_controller_it_says_what_to_mount(mounts: str) -> None:
    with pytest.raises(CgroupError, match="mount cgroup2 at /sys/fs/cgroup"):
        place_of(kernel(2, mounts), 100)


def test_a_v2_hierarchy_without_the_controller_names_the_file() -> None:
    fake = kernel(2)
    fake.files[Path("/sys/fs/cgroup/cgroup.controllers")] = "memory pids\n"
    with pytest.raises(CgroupError, match=r"/sys/fs/cgroup/cgroup\.controllers has no cpu controller"):
        place_of(fake, 100)


@pytest.mark.parametrize(
    ("group", "says"),
    [("0::/vm (deleted)\n", "was removed: /vm"), ("9:memory:/\n", "does not tell"), ("", "does not tell")],
)
def test_a_group_that_cannot_be_told(group: str, says: str) -> None:
    fake = kernel(2)
    fake.files[GROUP] = group
    with pytest.raises(CgroupError, match=says):
        place_of(fake, 100)


def test_a_process_that_has_ended() -> None:
    with pytest.raises(CgroupError, match="/proc/7/cgroup cannot be read: No such file"):
        place_of(kernel(2), 7)
