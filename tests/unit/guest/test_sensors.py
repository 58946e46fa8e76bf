"""Sensors: the parsers on odd input, the fast lane on a fake tree, and psutil as the oracle on this machine."""

from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.guest.sensors import (
    SensorError,
    Sensors,
    parse_meminfo,
    parse_pressure,
    parse_refaults,
    parse_stat,
)

STAT = b"""cpu  100 10 50 1000 7 3 2 30 5 0
cpu0 60 10 20 500 4 2 1 10 5 0
cpu3 40 0 30 500 3 1 1 20 0 0
intr 12345 0 9 0 0
ctxt 99
btime 1700000000
processes 4242
procs_running 3
procs_blocked 1
softirq 1 2 3
"""
MEMINFO = b"""MemTotal:         507876 kB
MemFree:           11111 kB
MemAvailable:     300000 kB
SwapCached:           12 kB
SwapTotal:          1000 kB
SwapFree:            400 kB
"""
VMSTAT = b"nr_free_pages 5\nworkingset_nodes 3\nworkingset_refault_anon 7\nworkingset_refault_file 35\npswpin 0\n"
PRESSURE = b"""some avg10=0.00 avg60=1.50 avg300=0.11 total=1234567
full avg10=0.00 avg60=0.00 avg300=0.00 total=89
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc/pressure").mkdir(parents=True)
    files = {"stat": STAT, "meminfo": MEMINFO, "vmstat": VMSTAT, "pressure/cpu": PRESSURE, "pressure/memory": PRESSURE}
    for name, text in files.items():
        (tmp_path / "proc" / name).write_bytes(text)
    return tmp_path


def test_stat_is_keyed_by_cpu_number() -> None:
    busy, idle, steal, running = parse_stat(STAT, 0.01)
    assert busy == pytest.approx({0: 0.93, 3: 0.72})
    assert sorted(idle) == [0, 3]
    assert all(seconds > 0 for seconds in idle.values())
    assert steal == pytest.approx(0.30)
    assert running == 3


def test_stat_without_a_steal_column() -> None:
    assert parse_stat(b"cpu  1\ncpu0 1 2 3 4 5 6 7\nprocs_running 1\n", 1.0) == ({0: 19.0}, {0: 9.0}, 0, 1)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"", "first line"),
        (b"cpu0 1 2 3 4 5 6 7\nprocs_running 1\n", "first line"),
        (b"cpu  1 2\n", "no line of a single CPU"),
        (b"cpu  1 2\nintr 5\nprocs_running 1\n", "no line of a single CPU"),
        (b"cpu  1\ncpu0 1 2 3 4 5 6 7\n", "procs_running"),
        (b"cpu  1\ncpu0 1 2 3 4 5 6 7\nprocs_running \nx", "procs_running"),
        (b"cpu  1\ncpu0 1 2 3 4 5 6 7\nprocs_running -1\n", "procs_running"),
        (b"cpu  1\ncpu0 1 2 3\nprocs_running 1\n", "at least 7"),
        (b"cpu  1\ncpu0 1 2 -3 4 5 6 7\nprocs_running 1\n", "at least 7"),
        (b"cpu  1\ncpu0 1 2 x 4 5 6 7\nprocs_running 1\n", "not numbers"),
        (b"cpu  1\ncpu 1 2 3 4 5 6 7\nprocs_running 1\n", "at least 7"),
        (b"cpu  1\ncpu\nprocs_running 1\n", "not numbers"),
        (b"cpu  1\ncpu0 1 2 3 4", "cut off"),
    ],
)
def test_stat_that_makes_no_sense_is_named(text: bytes, what: str) -> None:
    with pytest.raises(SensorError, match=what):
        parse_stat(text, 0.01)


def test_meminfo() -> None:
    assert parse_meminfo(MEMINFO) == (507876 << 10, 300000 << 10, 600 << 10)


@pytest.mark.parametrize("name", ["MemTotal", "MemAvailable", "SwapTotal", "SwapFree"])
@pytest.mark.parametrize("how", ["missing", "empty", "words"])
def test_meminfo_without_a_line_names_it(name: str, how: str) -> None:
    old = f"{name}:".encode()
    lines = MEMINFO.splitlines(keepends=True)
    new = {"missing": b"", "empty": old + b"\n", "words": old + b" many kB\n"}[how]
    text = b"".join(new if line.startswith(old) else line for line in lines)
    with pytest.raises(SensorError, match=f"meminfo: no line {name}"):
        parse_meminfo(text)


def test_swap_that_shrinks_is_not_negative() -> None:
    assert parse_meminfo(MEMINFO.replace(b"1000 kB", b"300 kB"))[2] == 0


def test_refaults_of_new_old_and_other_kernels() -> None:
    assert parse_refaults(VMSTAT) == 42
    assert parse_refaults(b"workingset_refault 9\npswpin 0\n") == 9
    assert parse_refaults(b"") == 0


def test_pressure() -> None:
    assert parse_pressure(PRESSURE) == (1234567, 89)
    assert parse_pressure(PRESSURE.splitlines(keepends=True)[0]) == (1234567, None)
    assert parse_pressure(b"") == (None, None)
    assert parse_pressure(b"some total=x\nfull avg10=1\nother total=5\nsome") == (None, None)


@given(st.binary(max_size=300))
def test_parsers_survive_anything(text: bytes) -> None:
    for parse in (parse_meminfo, parse_refaults, parse_pressure, lambda text: parse_stat(text, 0.01)):
        for whole in (text, b"cpu  1\n" + text, MEMINFO + text, text + STAT):
            try:
                parse(whole)
            except SensorError as error:
                assert error.source in ("stat", "meminfo")


def test_a_sample_of_the_fast_lane(root: Path) -> None:
    sensors = Sensors(root)
    sample = sensors.sample()
    assert sensors.offers_pressure
    assert sample.runnable == 2  # without ourselves
    assert (sample.cpu_some_us, sample.memory_some_us, sample.memory_full_us) == (1234567, 1234567, 89)
    assert (sample.memory_total_bytes, sample.refaults) == (507876 << 10, 42)
    # The descriptors stay; the contents are read anew.
    with (root / "proc/stat").open("r+b") as file:
        file.write(STAT.replace(b"procs_running 3", b"procs_running 9"))
    assert sensors.sample().runnable == 8
    sensors.close()


def test_a_long_stat_is_read_whole(root: Path) -> None:
    long = STAT.replace(b"intr 12345", b"intr 12345" + b" 0" * 40_000)
    (root / "proc/stat").write_bytes(long)
    sensors = Sensors(root)
    assert sensors.sample().runnable == 2
    sensors.close()


def test_without_pressure_and_vmstat(root: Path) -> None:
    for name in ("pressure/cpu", "pressure/memory", "vmstat"):
        (root / "proc" / name).unlink()
    sensors = Sensors(root)
    sample = sensors.sample()
    assert not sensors.offers_pressure
    assert (sample.cpu_some_us, sample.memory_some_us, sample.memory_full_us, sample.refaults) == (None, None, None, 0)
    sensors.close()


def test_without_proc_psutil_is_used(tmp_path: Path) -> None:
    sample = Sensors(tmp_path).sample()
    assert sample.memory_total_bytes == psutil.virtual_memory().total
    assert sample.cpu_some_us is None
    assert len(sample.cpu_busy_seconds) == psutil.cpu_count()


def test_psutil_takes_the_numbers_from_sysfs(tmp_path: Path) -> None:
    count = len(psutil.cpu_times(percpu=True))
    (tmp_path / "sys/devices/system/cpu").mkdir(parents=True)
    (tmp_path / "sys/devices/system/cpu/online").write_text(f"5-{4 + count}\n")
    assert sorted(Sensors(tmp_path).sample().cpu_busy_seconds) == list(range(5, 5 + count))


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc here")
def test_both_lanes_agree_on_this_machine(tmp_path: Path) -> None:
    fast, slow = Sensors("/"), Sensors(tmp_path)
    one, other = fast.sample(), slow.sample()
    fast.close()
    assert sum(one.cpu_busy_seconds.values()) == pytest.approx(sum(other.cpu_busy_seconds.values()), abs=1.0)
    assert one.cpu_steal_seconds == pytest.approx(other.cpu_steal_seconds, abs=1.0)
    assert one.memory_total_bytes == other.memory_total_bytes
    assert one.memory_available_bytes == pytest.approx(other.memory_available_bytes, rel=0.2)


def test_the_sample_path_opens_nothing(root: Path) -> None:
    sensors = Sensors(root)
    before = sorted(path.name for path in Path("/proc/self/fd").iterdir())
    for _ in range(10):
        sensors.sample()
    assert sorted(path.name for path in Path("/proc/self/fd").iterdir()) == before
    sensors.close()
