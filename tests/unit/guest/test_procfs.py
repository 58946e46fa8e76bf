"""The parsers, on what kernels say and on what they should not; descriptors on a fake tree."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.guest.procfs import (
    Memory,
    OpenFile,
    Pages,
    SensorError,
    open_if_offered,
    parse_meminfo,
    parse_pressure,
    parse_stat,
    parse_vmstat,
    read_if_offered,
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
Buffers:            2000 kB
Cached:           250000 kB
SwapCached:           12 kB
Active:           100000 kB
Inactive:         150000 kB
SwapTotal:          1000 kB
SwapFree:            400 kB
Shmem:               100 kB
"""
VMSTAT = b"""nr_free_pages 5
workingset_nodes 3
workingset_refault_anon 7
workingset_refault_file 35
pswpin 11
pswpout 12
oom_kill 2
"""
PRESSURE = b"""some avg10=0.00 avg60=1.50 avg300=0.11 total=1234567
full avg10=0.00 avg60=0.00 avg300=0.00 total=89
"""


def test_stat_is_keyed_by_cpu_number() -> None:
    busy, idle, steal, running = parse_stat(STAT, 0.01)
    assert busy == pytest.approx({0: 0.93, 3: 0.72})
    assert sorted(idle) == [0, 3]
    assert all(seconds > 0 for seconds in idle.values())
    assert steal == pytest.approx(0.30)
    assert running == 3


def test_steal_does_not_jump_when_a_cpu_comes_or_goes() -> None:
    """The kernel's sum is over all CPUs that may ever be there."""
    lines = STAT.splitlines(keepends=True)
    without_one = b"".join(line for line in lines if not line.startswith(b"cpu3"))
    assert parse_stat(without_one, 0.01)[2] == parse_stat(STAT, 0.01)[2] == pytest.approx(0.30)


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
        (b"cpu  1 2 3 4 5 6 7 x\ncpu0 1 2 3 4 5 6 7\nprocs_running 1\n", "not numbers"),
    ],
)
def test_stat_that_makes_no_sense_is_named(text: bytes, what: str) -> None:
    with pytest.raises(SensorError, match=f"^stat: .*{what}"):
        parse_stat(text, 0.01)


def test_meminfo() -> None:
    assert parse_meminfo(MEMINFO) == Memory(507876 << 10, 11111 << 10, 300000 << 10, 600 << 10)


@pytest.mark.parametrize("name", ["MemTotal", "MemFree", "MemAvailable", "SwapTotal", "SwapFree"])
@pytest.mark.parametrize("how", ["missing", "empty", "words"])
def test_meminfo_without_a_line_names_it(name: str, how: str) -> None:
    old = f"{name}:".encode()
    lines = MEMINFO.splitlines(keepends=True)
    new = {"missing": b"", "empty": old + b"\n", "words": old + b" many kB\n"}[how]
    text = b"".join(new if line.startswith(old) else line for line in lines)
    with pytest.raises(SensorError, match=f"meminfo: no line {name}"):
        parse_meminfo(text)


def test_swap_that_shrinks_is_not_negative() -> None:
    assert parse_meminfo(MEMINFO.replace(b"1000 kB", b"300 kB")).swap_used == 0


def test_vmstat_of_new_old_and_other_kernels() -> None:
    assert parse_vmstat(VMSTAT) == Pages(refaults=42, swapped_in=11, oom_kills=2)
    assert parse_vmstat(b"nr_free_pages 5\nworkingset_refault 9\npswpin 0\n") == Pages(refaults=9)
    assert parse_vmstat(b"nr_free_pages 5\n") == Pages()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"", "no line nr_free_pages"),
        (b"pswpin 11\n", "no line nr_free_pages"),
        (VMSTAT.replace(b"pswpin 11", b"pswpin x"), "line pswpin is not a number"),
        (VMSTAT.replace(b"oom_kill 2", b"oom_kill "), "line oom_kill is not a number"),
        (VMSTAT.replace(b"anon 7", b"anon -7"), "line workingset_refault_anon is not a number"),
    ],
)
def test_vmstat_that_makes_no_sense_is_named(text: bytes, what: str) -> None:
    with pytest.raises(SensorError, match=f"vmstat: {what}"):
        parse_vmstat(text)


def test_pressure() -> None:
    assert parse_pressure(PRESSURE) == (1234567, 89)
    assert parse_pressure(PRESSURE.splitlines(keepends=True)[0]) == (1234567, None)
    assert parse_pressure(b"") == (None, None)
    assert parse_pressure(b"some total=x\nfull avg10=1\nother total=5\nsome") == (None, None)


@given(st.binary(max_size=300))
def test_parsers_survive_anything(text: bytes) -> None:
    for parse in (parse_meminfo, parse_vmstat, parse_pressure, lambda text: parse_stat(text, 0.01)):
        for whole in (text, b"cpu  1\n" + text, MEMINFO + text, text + STAT, VMSTAT + text):
            try:
                parse(whole)
            except SensorError as error:
                assert error.source in ("stat", "meminfo", "vmstat")


def test_a_long_file_is_read_whole_and_anew(tmp_path: Path) -> None:
    path = tmp_path / "stat"
    path.write_bytes(b"x" * 100_000)
    file = OpenFile(path)
    assert len(file.read()) == 100_000
    path.write_bytes(b"short")
    assert file.read() == b"short"
    file.close()


@pytest.mark.parametrize(("name", "reads"), [("vmstat", 4), ("stat", 1), ("meminfo", 1)])
def test_what_the_kernel_hands_out_in_parts_is_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reads: int
) -> None:
    """A page at a time, whatever room there is; what comes as a whole is read once."""
    text, pread, sizes = VMSTAT + b"nr_more 1\n" * 1000, os.pread, []

    def a_page(fd: int, size: int, offset: int) -> bytes:
        sizes.append(size)
        return pread(fd, min(size, 4096) if name == "vmstat" else size, offset)

    (tmp_path / name).write_bytes(text)
    monkeypatch.setattr(os, "pread", a_page)
    file = OpenFile(tmp_path / name)
    assert file.read() == text
    assert len(sizes) == reads
    file.close()


def test_what_is_not_offered_is_none(tmp_path: Path) -> None:
    assert open_if_offered(tmp_path / "pressure/cpu") is None
    assert read_if_offered(tmp_path / "pressure/cpu") is None
    with pytest.raises(IsADirectoryError):
        open_if_offered(tmp_path)
