"""`verify`: a good run passes, and each way of being bad is found, with its numbers, alone."""

from collections.abc import Callable

import demo_worlds
import pytest
from demo_worlds import CPU_END, END, GUEST_CLOCK, MEMORY_ONSET, ONSET, changed, good, without

from guestd.cli.demo.timeline import (
    Broker,
    Guest,
    Hypervisor,
    Load,
    Machine,
    Service,
    Socket,
    Timeline,
)
from guestd.cli.demo.verify import Expected, verify
from guestd.model.units import GIB, MIB

EXPECTED = Expected()


def failures(timeline: Timeline) -> list[str]:
    summary, found = verify(timeline, EXPECTED)
    assert summary["passed"] is (not found)
    assert summary["failures"] == found
    return found


def test_a_good_run_passes() -> None:
    assert failures(good()) == []


def test_the_summary_has_what_the_issue_lists() -> None:
    summary, _ = verify(good(), EXPECTED)
    cpu, memory = summary["cpu"], summary["memory"]
    assert summary["passed"] is True
    assert summary["transport"] == "vsock"
    assert summary["guest_kernel"] == "6.1.0-56-cloud-amd64"
    assert summary["guest_service_state"] == "active"
    assert summary["boot_seconds"] == 14.7
    assert (cpu["min"], cpu["max"]) == (1, 4)
    assert (cpu["peak_online_in_guest"], cpu["peak_plugged_in_hypervisor"]) == (4, 4)
    assert (cpu["end_online_in_guest"], cpu["end_plugged_in_hypervisor"]) == (1, 1)
    assert cpu["onset_to_first_online_seconds"] == pytest.approx(0.6)
    assert cpu["onset_to_peak_seconds"] == pytest.approx(1.85)
    assert (memory["min_bytes"], memory["max_bytes"]) == (512 * MIB, 3 * GIB)
    assert memory["peak_total_in_guest_bytes"] == 2008 * MIB
    assert memory["peak_size_in_hypervisor_bytes"] == 2 * GIB
    assert memory["end_size_in_hypervisor_bytes"] == 512 * MIB
    assert memory["onset_to_first_usable_seconds"] == pytest.approx(1.1)
    assert memory["oom_kills"] == 0


def cap_guest_cpus(one: Guest) -> dict[str, object]:
    return {"cpus_online": min(one.cpus_online, 3)}


def cap_hypervisor_cpus(one: Hypervisor) -> dict[str, object]:
    return {"vcpus": min(one.vcpus, 3)}


BROKEN: dict[str, tuple[Callable[[], Timeline], list[str]]] = {
    "guest never onlines the fourth CPU": (
        lambda: changed(good(), Guest, cap_guest_cpus),
        ["CPUs online in the guest peaked at 3, expected 4"],
    ),
    "hypervisor never plugs the fourth CPU": (
        lambda: changed(good(), Hypervisor, cap_hypervisor_cpus),
        ["CPUs plugged in the hypervisor peaked at 3, expected 4"],
    ),
    "guest keeps a CPU online": (
        lambda: changed(good(), Guest, lambda one: {"cpus_online": max(one.cpus_online, 2 if one.t > CPU_END else 1)}),
        ["at the end the guest has 2 CPUs online, expected 1"],
    ),
    "hypervisor keeps a CPU": (
        lambda: changed(good(), Hypervisor, lambda one: {"vcpus": max(one.vcpus, 2 if one.t > CPU_END else 1)}),
        ["at the end the hypervisor has 2 CPUs plugged, expected 1"],
    ),
    "guest ends with fewer CPUs than the minimum": (
        lambda: changed(good(), Guest, lambda one: {"cpus_online": 0} if one.t > END - 1 else {}),
        ["at the end the guest has 0 CPUs online, expected 1"],
    ),
    "hypervisor started with all CPUs": (
        lambda: changed(good(), Hypervisor, lambda one: {"vcpus": 4} if one.t < ONSET else {}),
        ["before the load the hypervisor had 4 CPUs, expected 1"],
    ),
    "guest started with all CPUs": (
        lambda: changed(good(), Guest, lambda one: {"cpus_online": 4} if one.t < ONSET else {}),
        ["before the load the guest had 4 CPUs online, expected 1"],
    ),
    "CPUs were up only before the onset": (
        lambda: changed(
            good(),
            Guest,
            lambda one: {"cpus_online": 4 if ONSET - 4 < one.t < ONSET - 1 else 1},
        ),
        ["CPUs online in the guest peaked at 1, expected 4"],
    ),
    "hypervisor gave more CPUs than the maximum": (
        lambda: changed(good(), Hypervisor, lambda one: {"vcpus": 5} if one.vcpus == 4 else {}),
        ["the hypervisor had 5 CPUs plugged, the maximum is 4"],
    ),
    "memory grows too little in the guest": (
        lambda: changed(good(), Guest, lambda one: {"memory_total_bytes": min(one.memory_total_bytes, 1440 * MIB)}),
        ["memory in the guest grew by 968 MiB (to 1.4 GiB), expected at least 1 GiB"],
    ),
    "memory grows too little in the hypervisor": (
        lambda: changed(
            good(),
            Hypervisor,
            lambda one: {
                "memory_bytes": min(one.memory_bytes, 1024 * MIB),
                "memory_requested_bytes": min(one.memory_requested_bytes, 1024 * MIB),
            },
        ),
        ["memory in the hypervisor grew by 512 MiB (to 1 GiB), expected at least 1 GiB"],
    ),
    "memory was there before the load": (
        lambda: changed(
            good(),
            Hypervisor,
            lambda one: {"memory_bytes": 2 * GIB, "memory_requested_bytes": 2 * GIB} if one.t < ONSET else {},
        ),
        [
            "before the load the hypervisor gives 2 GiB of memory, expected at most 640 MiB",
            "before the load 2 GiB of memory are requested in the hypervisor, expected at most 640 MiB",
        ],
    ),
    "hypervisor keeps two blocks": (
        lambda: changed(
            good(), Hypervisor, lambda one: {"memory_bytes": max(one.memory_bytes, 768 * MIB)} if one.t > 90 else {}
        ),
        ["at the end the hypervisor gives 768 MiB of memory, expected at most 640 MiB"],
    ),
    "memory is still requested at the end": (
        lambda: changed(good(), Hypervisor, lambda one: {"memory_requested_bytes": 2 * GIB} if one.t > 90 else {}),
        ["at the end 2 GiB of memory are requested in the hypervisor, expected at most 640 MiB"],
    ),
    "guest keeps memory that the hypervisor has not": (
        lambda: changed(good(), Guest, lambda one: {"memory_total_bytes": 728 * MIB} if one.t > 90 else {}),
        ["at the end the guest has 728 MiB of memory, expected at most 128 MiB above the 472 MiB before the load"],
    ),
    "hypervisor gave more memory than the maximum": (
        lambda: changed(good(), Hypervisor, lambda one: {"memory_requested_bytes": 4 * GIB} if 60 < one.t < 61 else {}),
        ["the hypervisor gave or requested 4 GiB of memory, the maximum is 3 GiB"],
    ),
    "OOM kill": (
        lambda: changed(good(), Guest, lambda one: {"oom_kills": 2 if one.t > MEMORY_ONSET else 0}),
        ["the guest's kernel killed 2 processes for want of memory, expected none"],
    ),
    "load killed": (
        lambda: changed(
            good(), Load, lambda one: {"detail": "killed by signal 9"} if one.event == "memory-end" else {}
        ),
        ["the memory load did not end by itself: killed by signal 9"],
    ),
    "load stopped half-way": (
        lambda: without(good(), lambda one: isinstance(one, Load) and one.event == "memory-full"),
        ["the load never came to 'memory-full'"],
    ),
    "service failed at the end": (
        lambda: changed(good(), Service, lambda one: {"state": "failed"} if one.t == END else {}),
        ["guestd.service was 'failed' at 95.0 s, expected 'active'"],
    ),
    "service restarted meanwhile": (
        lambda: changed(
            good(), Service, lambda one: {"restarts": 1, "active_since_us": 50_000_000} if one.t == END else {}
        ),
        ["guestd.service was restarted: 1 restarts and active since 50.0 s of the guest, at first 0 and 9.0 s"],
    ),
    "service restarted by hand": (
        lambda: changed(good(), Service, lambda one: {"active_since_us": 50_000_000} if one.t == END else {}),
        ["guestd.service was restarted: 0 restarts and active since 50.0 s of the guest, at first 0 and 9.0 s"],
    ),
    "service never looked at": (
        lambda: without(good(), lambda one: isinstance(one, Service)),
        ["guestd.service was never seen"],
    ),
    "service not looked at after the load": (
        lambda: without(good(), lambda one: isinstance(one, Service) and one.t == END),
        ["guestd.service was not seen after the load"],
    ),
    "service not looked at before the load": (
        lambda: without(good(), lambda one: isinstance(one, Service) and one.t < ONSET),
        ["guestd.service was not seen before the load"],
    ),
    "machine unknown": (
        lambda: without(good(), lambda one: isinstance(one, Machine)),
        ["no machine was booted"],
    ),
    "guest view ends early": (
        lambda: without(good(), lambda one: isinstance(one, Guest) and one.t > 90),
        ["the guest was last seen 5.2 s before the end, expected within 3 s"],
    ),
    "hypervisor view ends early": (
        lambda: without(good(), lambda one: isinstance(one, Hypervisor) and one.t > 90),
        ["the hypervisor was last seen 5.2 s before the end, expected within 3 s"],
    ),
    "broker view has a hole": (
        lambda: without(good(), lambda one: isinstance(one, Broker) and 50 < one.t < 60),
        ["the broker was not seen for 10.0 s from 50.0 s on, expected at most 5 s"],
    ),
    "hypervisor view has a hole": (
        lambda: without(good(), lambda one: isinstance(one, Hypervisor) and 80 < one.t < 90),
        ["the hypervisor was not seen for 10.2 s from 79.8 s on, expected at most 5 s"],
    ),
    "no broker": (
        lambda: without(good(), lambda one: isinstance(one, Broker)),
        ["the broker was never seen"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_condition_is_found_alone(name: str) -> None:
    make, expected = BROKEN[name]
    assert failures(make()) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"family": "AF_INET"},
        {"state": "connecting"},
        {"peer_cid": 1},  # a loopback inside the guest
        {"peer_port": 22},
    ],
)
def test_only_an_established_vsock_connection_to_the_broker_is_proof(wrong: dict[str, object]) -> None:
    timeline = changed(good(), Socket, lambda one: wrong)
    summary, found = verify(timeline, EXPECTED)
    assert summary["transport"] == "unproven"
    assert len(found) == 1
    assert "an established AF_VSOCK connection of guestd.service to 2:4747" in found[0]
    assert "was never seen" in found[0]


def test_a_connection_that_was_lost_is_no_proof_at_the_end() -> None:
    found = failures(without(good(), lambda one: isinstance(one, Socket) and one.t == END))
    assert len(found) == 1
    assert found[0].endswith("was not seen after the load")


def test_without_load_nothing_grew_and_it_fails_with_the_numbers() -> None:
    timeline = without(good(), lambda one: isinstance(one, Load) or one.t >= ONSET)
    summary, found = verify(timeline, EXPECTED)
    assert found == [
        "no load ran in the guest, so nothing was there to follow",
        "CPUs plugged in the hypervisor peaked at 1, expected 4",
        "CPUs online in the guest peaked at 1, expected 4",
        "memory in the hypervisor grew by 0 B (to 512 MiB), expected at least 1 GiB",
        "memory in the guest grew by 0 B (to 472 MiB), expected at least 1 GiB",
    ]
    assert summary["cpu"]["onset_to_first_online_seconds"] is None
    assert summary["cpu"]["onset_to_peak_seconds"] is None
    assert summary["memory"]["onset_to_first_usable_seconds"] is None


def test_growth_without_load_is_no_pass() -> None:
    found = failures(without(good(), lambda one: isinstance(one, Load)))
    assert found == ["no load ran in the guest, so nothing was there to follow"]


def test_an_empty_timeline_fails_and_has_a_summary() -> None:
    summary, found = verify(Timeline(()), EXPECTED)
    assert "the guest was never seen" in found
    assert "the hypervisor was never seen" in found
    assert "no machine was booted" in found
    assert summary["passed"] is False
    assert summary["transport"] == "unproven"
    assert summary["guest_kernel"] is None
    assert summary["cpu"]["peak_online_in_guest"] is None
    assert summary["memory"]["oom_kills"] is None


def test_one_block_above_the_minimum_is_near_enough() -> None:
    timeline = changed(
        good(), Hypervisor, lambda one: {"memory_bytes": max(one.memory_bytes, 640 * MIB)} if one.t > 90 else {}
    )
    assert failures(timeline) == []


def test_latencies_are_measured_by_the_guest_clock_alone() -> None:
    """The host may see everything late, and nothing that it says of time moves the numbers."""
    late = changed(good(), Guest, lambda one: {"t": one.t + 0.9})
    assert verify(late, EXPECTED)[0]["cpu"] == verify(good(), EXPECTED)[0]["cpu"]


def test_exact_times_of_changes_between_samples_count() -> None:
    at = ONSET + 0.37
    change = demo_worlds.Guest(at, at + GUEST_CLOCK, 2, 472 * MIB, 300 * MIB, 1.0, 4, 0)
    timeline = Timeline((*good().records, change))
    assert verify(timeline, EXPECTED)[0]["cpu"]["onset_to_first_online_seconds"] == pytest.approx(0.37)


def test_the_peak_of_a_vm_that_never_grew_has_no_time() -> None:
    timeline = changed(good(), Guest, lambda one: {"cpus_online": 1})
    assert verify(timeline, EXPECTED)[0]["cpu"]["onset_to_peak_seconds"] is None


def test_the_order_in_which_records_came_in_does_not_matter() -> None:
    assert failures(Timeline(tuple(reversed(good().records)))) == []
