"""Load traces: what is read, and how each sort of damage is named."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from guestd.model.errors import TraceError
from guestd.sim import traces

GOOD = "\n".join(",".join(str(vm + sample % 3) for sample in range(30)) for vm in range(4)) + "\n"
HEADER = "time_s,used_bytes,cached_bytes,host_rss_bytes,total_bytes\n"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()))
    return path


def changed(line: int, column: int, value: str) -> str:
    rows = [row.split(",") for row in GOOD.splitlines()]
    rows[line - 1][column - 1] = value
    return "\n".join(",".join(row) for row in rows) + "\n"


def test_days_are_read_under_their_own_names(tmp_path: Path) -> None:
    write(tmp_path / "planetlab" / "20990101.csv.gz", GOOD)
    write(tmp_path / "planetlab" / "any-name.csv.gz", GOOD)
    days = traces.planetlab(tmp_path)
    assert list(days) == ["20990101", "any-name"]
    assert days["any-name"].shape == (4, 30)
    assert days["any-name"][2, 4] == 3.0


def test_memory_is_read_by_column(tmp_path: Path) -> None:
    write(tmp_path / "three-vms" / "vm-0.csv.gz", HEADER + "0.5,10,20,30,40\n1.5,11,21,31,41\n")
    (trace,) = traces.three_vms(tmp_path)
    assert trace.name == "vm-0"
    assert trace.time_seconds.tolist() == [0.5, 1.5]
    assert trace.used_bytes.tolist() == [10, 11]
    assert trace.total_bytes.tolist() == [40, 41]


def test_parts_that_are_not_there_are_empty(tmp_path: Path) -> None:
    assert traces.planetlab(tmp_path) == {}
    assert traces.google(tmp_path) == {}
    assert traces.build_memory(tmp_path) == []
    assert traces.three_vms(tmp_path) == []


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"nowhere: no such folder; expected a folder of load traces"):
        traces.planetlab(tmp_path / "nowhere")


def test_an_empty_part_is_no_part(tmp_path: Path) -> None:
    (tmp_path / "planetlab").mkdir()
    with pytest.raises(TraceError, match=r"planetlab: no file in it; expected files named \*\.csv\.gz"):
        traces.planetlab(tmp_path)


def test_half_of_google_is_missing(tmp_path: Path) -> None:
    write(tmp_path / "google2011" / "cpu.csv.gz", GOOD)
    with pytest.raises(TraceError, match=r"mem\.csv\.gz: missing"):
        traces.google(tmp_path)


def test_the_two_files_of_google_must_have_the_same_vms(tmp_path: Path) -> None:
    write(tmp_path / "google2011" / "cpu.csv.gz", GOOD)
    write(tmp_path / "google2011" / "mem.csv.gz", "".join(GOOD.splitlines(keepends=True)[:3]))
    with pytest.raises(TraceError, match=r"3 VMs of 30 samples; expected 4 of 30"):
        traces.google(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"day\.csv\.gz: empty; expected a line for each VM"),
        ("1,2,3\n", r"line 1: 3 samples; expected at least 25"),
        (GOOD + "1,2\n", r"line 5: 2 samples; expected at least 25"),
        (GOOD + ",".join(["1"] * 31) + "\n", r"line 5: 31 samples; expected 30, as in line 1"),
        (GOOD + "\n", r"line 5: column 1 is ''; expected a number"),
        (changed(2, 7, "much"), r"line 2: column 7 is 'much'; expected a number"),
        (changed(3, 30, "-1"), r"line 3: column 30 is -1; expected a finite number from 0 up"),
        (changed(4, 1, "nan"), r"line 4: column 1 is nan"),
        (changed(1, 2, "inf"), r"line 1: column 2 is inf"),
    ],
)
def test_damage_is_named_by_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "day.csv.gz", text)
    with pytest.raises(TraceError, match=message) as caught:
        traces.matrix(path)
    assert caught.value.path == str(path)


def test_a_broken_gzip_file(tmp_path: Path) -> None:
    path = write(tmp_path / "day.csv.gz", GOOD * 50)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(TraceError, match=r"cannot be read .*; expected a whole gzip file"):
        traces.matrix(path)


def test_no_gzip_file_at_all(tmp_path: Path) -> None:
    path = tmp_path / "day.csv.gz"
    path.write_text(GOOD)
    with pytest.raises(TraceError, match=r"line 1: cannot be read"):
        traces.matrix(path)


def test_garbage_inside_a_gzip_file(tmp_path: Path) -> None:
    path = tmp_path / "day.csv.gz"
    path.write_bytes(gzip.compress(np.arange(256, dtype=np.uint8).tobytes()))
    with pytest.raises(TraceError):
        traces.matrix(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 samples; expected a header line and at least two samples"),
        (HEADER + "0,1,1,1,1\n", "1 samples; expected"),
        ("time,used\n0,1\n", "line 1: header 'time,used'; expected 'time_s,"),
        (HEADER + "0,1,1,1,1\n1,1,1,1\n", "line 3: 4 columns; expected 5"),
        (HEADER + "1,1,1,1,1\n1,1,1,1,1\n", "line 3: time 1 s after 1 s; expected rising times"),
        (HEADER + "1,1,x,1,1\n", "line 2: column 3 is 'x'"),
    ],
)
def test_damage_in_memory_traces(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        traces.memory(write(tmp_path / "vm.csv.gz", text))
