"""Sensors: both lanes on the same fake tree, on this machine, and on files that make no sense."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from test_procfs import MEMINFO, PRESSURE, STAT, VMSTAT

from guestd.guest.procfs import SensorError
from guestd.guest.sensors import Sensors, is_worth_saying
from guestd.model.guest import Sample

FILES = {
    "stat": STAT,
    "meminfo": MEMINFO,
    "vmstat": VMSTAT,
    "pressure/cpu": PRESSURE,
    "pressure/memory": PRESSURE.replace(b"1234567", b"7654321"),
    "pressure/io": PRESSURE.replace(b"1234567", b"555"),
}


def write(root: Path, name: str, text: bytes) -> None:
    """In place, as a file of the kernel changes: whoever has it open sees it."""
    path = root / "proc" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of CPUs 0 and 3, for psutil too."""
    for name, text in FILES.items():
        write(tmp_path, name, text)
    online(tmp_path, "0,3")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "proc"))
    return tmp_path


def online(root: Path, cpus: str) -> None:
    (root / "sys/devices/system/cpu").mkdir(parents=True, exist_ok=True)
    (root / "sys/devices/system/cpu/online").write_text(cpus + "\n")


def agree(one: Sample, other: Sample) -> None:
    """Equal but for how floats are rounded."""
    for field in dataclasses.fields(Sample):
        assert getattr(one, field.name) == pytest.approx(getattr(other, field.name)), field.name


def test_a_quick_sample(root: Path) -> None:
    sensors = Sensors(root)
    sample = sensors.quick()
    assert sample.cpu_busy_seconds == pytest.approx({0: 0.93, 3: 0.72})
    assert sample.runnable == 2  # without ourselves
    assert (sample.cpu_some_us, sample.memory_some_us, sample.memory_full_us) == (1234567, 7654321, 89)
    assert sample.io_some_us == 555
    assert (sample.memory_total_bytes, sample.memory_free_bytes) == (507876 << 10, 11111 << 10)
    assert (sample.refaults, sample.swap_in_pages, sample.oom_kills) == (42, 11, 2)
    # The descriptors stay; the contents are read anew.
    write(root, "stat", STAT.replace(b"procs_running 3", b"procs_running 9"))
    assert sensors.quick().runnable == 8
    sensors.close()


def test_what_is_read_seldom_is_as_old_as_it_may_be(root: Path) -> None:
    lazy, eager = Sensors(root, slow_seconds=1000.0), Sensors(root, slow_seconds=0.0)
    for sensors in (lazy, eager):
        assert (sensors.quick().oom_kills, sensors.quick().io_some_us) == (2, 555)
    write(root, "vmstat", VMSTAT.replace(b"oom_kill 2", b"oom_kill 3"))
    write(root, "pressure/io", PRESSURE.replace(b"1234567", b"999"))
    write(root, "pressure/memory", PRESSURE.replace(b"1234567", b"8000000"))
    assert (lazy.quick().oom_kills, lazy.quick().io_some_us, lazy.quick().memory_some_us) == (2, 555, 8000000)
    assert (eager.quick().oom_kills, eager.quick().io_some_us) == (3, 999)
    assert lazy.regular().oom_kills == 3, "the regular sample reads all"
    for sensors in (lazy, eager):
        sensors.close()


def test_both_lanes_say_the_same_of_the_same_files(root: Path) -> None:
    sensors = Sensors(root)
    agree(sensors.regular(), sensors.quick())
    for name in ("vmstat", "pressure/cpu", "pressure/memory", "pressure/io"):
        (root / "proc" / name).unlink()
    sensors.close()
    agree(sensors.regular(), sensors.quick())
    assert sensors.quick().cpu_some_us is None
    sensors.close()


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc here")
def test_both_lanes_agree_on_this_machine() -> None:
    sensors = Sensors()
    before, between, after = sensors.quick(), sensors.regular(), sensors.quick()
    sensors.close()
    assert before.cpu_busy_seconds.keys() == between.cpu_busy_seconds.keys() == after.cpu_busy_seconds.keys()
    for cpu in between.cpu_busy_seconds:
        assert (
            before.cpu_busy_seconds[cpu] - 0.02 <= between.cpu_busy_seconds[cpu] <= after.cpu_busy_seconds[cpu] + 0.02
        )
    for name in (
        "cpu_some_us",
        "memory_some_us",
        "memory_full_us",
        "io_some_us",
        "refaults",
        "swap_in_pages",
        "oom_kills",
    ):
        low, middle, high = (getattr(one, name) for one in (before, between, after))
        assert low == middle == high is None or low <= middle <= high, name
    assert before.memory_total_bytes == between.memory_total_bytes
    assert between.memory_available_bytes == pytest.approx(before.memory_available_bytes, rel=0.2)
    assert between.memory_free_bytes == pytest.approx(before.memory_free_bytes, rel=0.2)


def test_a_quick_sample_opens_nothing_but_the_first_time(root: Path) -> None:
    def descriptors() -> list[str]:
        return sorted(path.name for path in Path("/proc/self/fd").iterdir())

    sensors = Sensors(root)
    none = descriptors()
    sensors.regular()
    assert descriptors() == none
    sensors.quick()
    some = descriptors()
    assert len(some) == len(none) + len(FILES)
    for _ in range(10):
        sensors.quick()
        sensors.regular()
    assert descriptors() == some
    sensors.close()
    assert descriptors() == none
    assert sensors.quick().runnable == 2  # they are opened again
    sensors.close()


def test_without_proc_both_are_psutil(tmp_path: Path) -> None:
    for sample in (Sensors(tmp_path).quick(), Sensors(tmp_path).regular()):
        assert sample.memory_total_bytes == psutil.virtual_memory().total
        assert (sample.cpu_some_us, sample.memory_some_us, sample.io_some_us) == (None, None, None)
        assert (sample.refaults, sample.oom_kills) == (0, 0)
        assert sorted(sample.cpu_busy_seconds) == list(range(psutil.cpu_count() or 0))


class Hotplug:
    """sysfs and psutil while CPUs come and go: each look at either moves to the next moment."""

    def __init__(self, root: Path, moments: list[tuple[str, int]]) -> None:
        self.root, self.moments, self.looks = root, moments, 0

    def times(self, percpu: bool = False) -> object:
        if not percpu:
            return _Times(0.0, 7.0)
        _, count = self.moments[min(self.looks, len(self.moments) - 1)]
        self.looks += 1
        now = self.moments[min(self.looks, len(self.moments) - 1)]
        online(self.root, now[0])
        return [_Times(float(place)) for place in range(count)]


class _Times:
    def __init__(self, user: float, steal: float = 99.0) -> None:
        self.user, self.idle, self.steal = user, 1.0, steal


@pytest.mark.parametrize(
    ("moments", "keys"),
    [
        ([("0,3", 2)], [0, 3]),
        ([("0,3", 2), ("0,2-3", 3)], [0, 2, 3]),  # one comes in between: read again
        ([("0-3", 3), ("0,2-3", 3)], [0, 2, 3]),  # one goes before psutil looks
        ([("0,3", 2), ("0,2", 2)], [0, 2]),  # one goes and one comes: the count is the same
        ([("0-7", 4)], [0, 1, 2, 3]),  # a container's share of the host's CPUs
    ],
)
def test_psutils_list_gets_the_numbers_of_the_moment(
    root: Path, moments: list[tuple[str, int]], keys: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    hotplug = Hotplug(root, moments)
    online(root, moments[0][0])
    monkeypatch.setattr(psutil, "cpu_times", hotplug.times)
    sample = Sensors(root).regular()
    assert sorted(sample.cpu_busy_seconds) == keys
    assert [sample.cpu_busy_seconds[key] for key in keys] == [float(place) for place in range(len(keys))]
    assert hotplug.looks <= 3
    assert sample.cpu_steal_seconds == 7.0, "all that was stolen, also from CPUs that are offline now"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("stat", STAT.replace(b"cpu3 40 0 30", b"cpu3 40 0 x"), "stat: line b'cpu3"),
        ("stat", b"", "stat: its first line"),
        ("stat", b"\xff\xfe\n" * 9, "stat: its first line"),
        (
            "meminfo",
            MEMINFO.replace(b"MemAvailable:     300000", b"MemAvailable:     ??????"),
            "meminfo: no line MemAvailable",
        ),
        ("meminfo", b"", "meminfo: no line MemTotal"),
        ("meminfo", b"\n\n\n", "meminfo: no line MemTotal"),
        ("vmstat", b"what?\n", "vmstat: no line nr_free_pages"),
        ("pressure/memory", b"", "pressure/memory: no line some"),
        ("pressure/io", b"full total=5\n", "pressure/io: no line some"),
    ],
)
def test_what_makes_no_sense_is_named_and_gives_no_sample(root: Path, name: str, text: bytes, said: str) -> None:
    """The files are psutil's too, so there is no way round here."""
    sensors = Sensors(root)
    write(root, name, text)
    with pytest.raises(SensorError, match=said.replace("?", r"\?")):
        sensors.quick()
    for quick in (True, False):
        with pytest.raises(SensorError):
            sensors.sample(quick)
    write(root, name, FILES[name])
    assert sensors.sample(True).runnable == 2
    sensors.close()


@pytest.mark.parametrize("quick", [True, False])
def test_psutil_stands_in_for_a_kernel_without_a_line(root: Path, quick: bool) -> None:
    """MemAvailable came with Linux 3.14; psutil has its estimate."""
    write(root, "meminfo", MEMINFO.replace(b"MemAvailable:     300000 kB\n", b""))
    sensors = Sensors(root)
    sample = sensors.sample(quick)
    assert 0 < sample.memory_available_bytes <= sample.memory_total_bytes == 507876 << 10
    assert sensors.failures == quick
    sensors.close()


def test_it_is_not_said_each_time(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(root, "meminfo", MEMINFO.replace(b"MemAvailable:     300000 kB\n", b""))
    sensors = Sensors(root)
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            sensors.sample(True)
    assert sensors.failures == 100
    assert len(caplog.records) == 7
    assert "meminfo: no line MemAvailable with a number; asking psutil instead (1 so far)" in caplog.text
    assert [count for count in range(1, 100) if is_worth_saying(count)] == [1, 2, 4, 8, 16, 32, 64]


def _broken(kind: type[Exception]) -> Callable[..., object]:
    def call(*_: object, **__: object) -> object:
        raise kind("broken")

    return call


@pytest.mark.parametrize("kind", [KeyError, ValueError, IndexError, OSError, psutil.AccessDenied])
@pytest.mark.parametrize("name", ["cpu_times", "virtual_memory", "swap_memory"])
def test_whatever_psutil_raises_is_a_sensor_error(
    root: Path, name: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, name, _broken(kind))
    with pytest.raises(SensorError, match=f"psutil: {kind.__name__}"):
        Sensors(root).regular()
