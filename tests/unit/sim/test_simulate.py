"""Simulation runs: the load, the behaviour of hypervisor and guests, the bookkeeping, and what comes out."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from guestd.broker.core.ledger import HostCapacity
from guestd.model.errors import AdmissionError, TraceError
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB, MIB
from guestd.sim import pictures, result, sources
from guestd.sim.load import LoadKind, Profile, from_memory, from_percent, generated
from guestd.sim.run import Account, Behaviour, Run
from guestd.sim.traces import MemoryTrace

LIMITS = Limits(Resources(1000, 512 * MIB), Resources(4000, 4 * GIB))
HOST = HostCapacity(Resources(8000, 8 * GIB))


def profile(*points: tuple[float, float, int], name: str = "a") -> Profile:
    """From (second, tasks, MiB)."""
    times, tasks, memory = zip(*points, strict=True)
    return Profile(name, np.array(times, float), np.array(tasks, float), np.array(memory, float) * MIB)


def run_of(behaviour: Behaviour | None = None, seed: int = 3, seconds: float = 90.0) -> Run:
    vms = [(generated(LoadKind.STEPS, f"vm-{i}", i, seed, seconds, 4, 4 * GIB), LIMITS) for i in range(2)]
    run = Run(HostCapacity(Resources(6000, 6 * GIB)), vms, behaviour, seed)
    run.record(seconds, 5.0)
    return run


# ---- load ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(LoadKind))
def test_made_up_loads_follow_from_the_seed_and_stay_within_the_vm(kind: LoadKind) -> None:
    one, again = (generated(kind, "a", 1, 7, 43_200.0, 4, 4 * GIB) for _ in range(2))
    other = generated(kind, "a", 2, 7, 43_200.0, 4, 4 * GIB)
    assert (one.memory_bytes == again.memory_bytes).all()
    assert one.memory_bytes.shape != other.memory_bytes.shape or (one.memory_bytes != other.memory_bytes).any()
    assert one.time_seconds[0] == 0
    assert (np.diff(one.time_seconds) > 0).all()
    assert one.memory_bytes.min() > 0
    assert one.memory_bytes.max() <= 4 * GIB
    assert one.tasks.min() > 0
    assert np.ptp(one.memory_bytes) > 64 * MIB, "a load that does something"
    assert len(one.time_seconds) == len(one.tasks) == len(one.memory_bytes)


def test_a_measured_vm_begins_elsewhere_and_runs_round() -> None:
    times = np.array([5.0, 15.0, 25.0, 35.0])
    used = np.array([1.0, 2.0, 3.0, 4.0]) * GIB
    trace = MemoryTrace("t", times, used, used, used, used)
    assert from_memory(trace, "x").time_seconds.tolist() == [0, 10, 20, 30, 40]
    turned = from_memory(trace, "x", 25.0)
    assert turned.time_seconds.tolist() == [0, 5, 15, 25, 35, 40]
    assert (turned.memory_bytes / GIB).tolist() == [3.5, 4, 1, 2, 3, 3.5]


def test_percent_of_a_vm() -> None:
    found = from_percent("x", np.array([50.0, 100.0]), None, 4, 8 * GIB)
    assert found.tasks.tolist() == [2.0, 4.0]
    assert found.time_seconds.tolist() == [0.0, 300.0]
    assert len(set(found.memory_bytes.tolist())) == 1
    assert from_percent("x", None, np.array([25.0, 50.0]), 4, 8 * GIB).memory_bytes.tolist() == [2 * GIB, 4 * GIB]


# ---- sources ---------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()))
    return path


MEMORY = "time_s,used_bytes,cached_bytes,host_rss_bytes,total_bytes\n" + "".join(
    f"{second},{(second % 7) * 100000000 + 500000000},1,1,4294967296\n" for second in range(0, 60, 2)
)


def rows(count: int, width: int = 30) -> str:
    return "".join(",".join(str((row + column) % 90) for column in range(width)) + "\n" for row in range(count))


def test_vms_of_memory_traces_serve_again_from_another_place(tmp_path: Path) -> None:
    write(tmp_path / "a.csv.gz", MEMORY)
    write(tmp_path / "b.csv.gz", MEMORY)
    assert [source.name for source in sources.read([tmp_path])] == ["a", "b"]
    found = sources.read([tmp_path], 5)
    assert [source.name for source in found] == ["a", "b", "a.2", "b.2", "a.3"]
    assert found[0].total_bytes == 4 * GIB
    first, third = found[0].make(LIMITS), found[2].make(LIMITS)
    assert first.memory_bytes[0] != third.memory_bytes[0]


def test_cpu_and_memory_of_one_folder_are_the_same_vms(tmp_path: Path) -> None:
    write(tmp_path / "g" / "cpu.csv.gz", rows(6))
    write(tmp_path / "g" / "mem.csv.gz", rows(6))
    found = sources.read([tmp_path / "g"])
    assert [source.name for source in found] == ["g-000", "g-001", "g-002", "g-003"]
    one = found[1].make(LIMITS)
    assert one.tasks[4] == pytest.approx(5 / 100 * 4)
    assert one.memory_bytes[4] == pytest.approx(5 / 100 * 4 * GIB)


@pytest.mark.parametrize(
    ("files", "ask", "vms", "words"),
    [
        ({}, "gone", None, "no such file"),
        ({}, "", None, "no trace in this folder"),
        ({"below/a.csv.gz": MEMORY}, "", None, "below: name one of these"),
        ({"a.csv.gz": ""}, "", None, "empty"),
        ({"a.csv.gz": "1,2,x\n"}, "", None, "column 3 is 'x'"),
        ({"a.csv.gz": MEMORY, "b.csv.gz": rows(3)}, "", None, "beside traces in bytes"),
        ({"a.csv.gz": rows(3)}, "", 9, "as many as --vms says"),
        ({"cpu.csv.gz": rows(3), "mem.csv.gz": rows(4)}, "", None, "4 VMs of 30 samples"),
    ],
)
def test_traces_that_cannot_be_used(
    tmp_path: Path, files: dict[str, str], ask: str, vms: int | None, words: str
) -> None:
    for name, text in files.items():
        write(tmp_path / name, text)
    with pytest.raises(TraceError, match=words):
        sources.read([tmp_path / ask], vms)


# ---- bookkeeping -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "level"), [(1, 3, 2), (3, 1, 2), (5, 3, 2), (0, 1, 2), (2, 2, 2), (4, 4, 1), (0, 4, 4)]
)
def test_an_account_is_what_many_small_steps_come_to(before: float, after: float, level: float) -> None:
    account = Account()
    account.add(10.0, before, after, level)
    wish = before + (after - before) * (np.arange(20_000) + 0.5) / 20_000
    lacking = np.maximum(wish - level, 0)
    assert account.unmet == pytest.approx(lacking.mean() * 10, abs=1e-3)
    assert account.short_seconds == pytest.approx((lacking > 1e-9).mean() * 10, abs=2e-3)
    assert account.worst_short == pytest.approx(max(0.0, before - level, after - level))
    assert account.wanted == pytest.approx(10 * (before + after) / 2)


def test_load_that_is_known_gives_sums_that_are_known() -> None:
    run = Run(HOST, [(profile((0, 0.5, 300), (40, 1.0, 300), (60, 0.5, 300)), LIMITS)])
    run.advance(80)
    cpu, memory = (run.vms[0].kernel.accounts[kind] for kind in Kind)
    assert cpu.seconds == memory.seconds == pytest.approx(80)
    assert cpu.wanted == pytest.approx(0.5 * 60 + 1.0 * 20)
    assert memory.wanted == pytest.approx(300 * MIB * 80)
    assert cpu.unmet == memory.unmet == 0


def test_a_vm_at_its_maximum_lacks_what_is_above_it() -> None:
    small = Limits(Resources(1000, 512 * MIB), Resources(1000, GIB))
    run = Run(HOST, [(profile((0, 3.0, 300), (10, 3.0, 300), (20, 3.0, 1500)), small)])
    run.advance(60)
    cpu, memory = (run.vms[0].kernel.accounts[kind] for kind in Kind)
    assert cpu.unmet == pytest.approx(2.0 * 60)
    assert memory.worst_short == pytest.approx(1500 * MIB - (GIB - 48 * MIB))
    assert run.vms[0].kernel.sample().swap_used_bytes == round(memory.worst_short)


# ---- runs ------------------------------------------------------------------------------------------


def test_a_program_that_begins_to_take_memory_has_more_of_it_about_as_soon_as_in_a_real_vm() -> None:
    def onset(late: float) -> float:
        run = Run(HOST, [(profile((0, 0.1, 200), (30 + late, 0.1, 200), (35 + late, 0.1, 1450)), LIMITS)])
        run.advance(29)
        before = run.vms[0].kernel.memory_total
        while run.vms[0].kernel.memory_total == before and run.seconds < 40:
            run.advance(0.05)
        return run.seconds - 30 - late

    seconds = sorted(onset(late) for late in (0.0, 0.06, 0.13, 0.21, 0.38))
    assert 0.3 <= seconds[2] <= 0.6, seconds  # a real VM under emulation took 0.40 s; 0.6 s is the aim


def test_the_same_arguments_give_the_same_run_and_another_seed_another() -> None:
    behaviour = Behaviour(refusals=0.2, failures=0.1, lost_answers=0.1)
    texts = [json.dumps(result.as_json(run_of(behaviour, seed), behaviour, seed, "steps")) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_refusals_failures_and_lost_answers_happen_and_nothing_breaks() -> None:
    behaviour = Behaviour(refusals=0.3, failures=0.2, lost_answers=0.2)
    shown = result.as_json(run_of(behaviour), behaviour, 3, "steps")
    ends = [shown["vms"][name][kind]["ends"] for name in shown["vms"] for kind in ("cpu", "memory")]
    assert sum(one["failures"] for one in ends) > 0
    assert sum(one["grows"] for one in ends) > 0
    calm = result.as_json(run_of(), Behaviour(), 3, "steps")
    assert sum(calm["vms"][name][kind]["ends"]["failures"] for name in calm["vms"] for kind in ("cpu", "memory")) == 0
    assert shown["total"]["memory"]["unmet_share"] > calm["total"]["memory"]["unmet_share"]


def test_slower_hypervisors_leave_more_unmet() -> None:
    quick = result.total(run_of(Behaviour(plug_seconds=0.0)), Kind.MEMORY)
    slow = result.total(run_of(Behaviour(plug_seconds=3.0, plug_rate=256 * MIB)), Kind.MEMORY)
    assert slow["unmet_share"] > quick["unmet_share"]


def test_minimums_that_do_not_fit() -> None:
    with pytest.raises(AdmissionError, match="lower a min"):
        Run(HostCapacity(Resources(1000, GIB)), [(profile((0, 1, 300), name=name), LIMITS) for name in "ab"])


def test_rows_are_what_the_broker_knows() -> None:
    run = run_of()
    shown = result.as_json(run, Behaviour(), 3, "steps")
    series = shown["series"]["vms"]["vm-0"]
    assert len(series["memory_held"]) == len(shown["series"]["times_seconds"]) == 19
    assert max(series["memory_held"]) > 512 * MIB
    pairs = list(zip(series["memory_held"], series["memory_usable"], strict=True))[1:]
    assert all(held > usable for held, usable in pairs)
    held = [sum(shown["series"]["vms"][name]["memory_held"][index] for name in shown["vms"]) for index in range(19)]
    assert max(held) <= 6 * GIB
    assert series["resizes"][-1] == sum(shown["vms"]["vm-0"][kind]["resizes"] for kind in ("cpu", "memory"))


def test_pictures_are_the_same_each_time(tmp_path: Path) -> None:
    document = result.as_json(run_of(seconds=30.0), Behaviour(), 3, "steps")
    for name in ("one", "two"):
        pictures.draw_pool(document, "memory", tmp_path / f"{name}-host.svg")
        pictures.draw_vms(document, "cpu", tmp_path / f"{name}-vms.svg")
    for part in ("host", "vms"):
        text = (tmp_path / f"one-{part}.svg").read_text()
        assert text == (tmp_path / f"two-{part}.svg").read_text()
        assert "virtual time (s)" in text
        assert ("Free pool" if part == "host" else "vm-0") in text
