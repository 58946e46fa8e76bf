"""What the views say becomes records."""

import json
from typing import Any

from guestd.cli.demo.record import (
    GuestLines,
    Recorder,
    broker_record,
    hypervisor_record,
    probe_records,
)
from guestd.cli.demo.timeline import Guest, Load, Record, Service, Socket
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB, MIB
from guestd.model.view import GuestView, ResourceView


def guest_line(guest_t: float, **more: Any) -> dict[str, Any]:
    values = {
        "source": "guest",
        "guest_t": guest_t,
        "cpus_online": 1,
        "memory_total_bytes": 1,
        "memory_available_bytes": 1,
        "busy_seconds": 0.0,
        "runnable": 0,
        "oom_kills": 0,
    }
    return {**values, **more}


def load_line(guest_t: float, event: str) -> dict[str, Any]:
    return {"source": "load", "guest_t": guest_t, "event": event, "detail": ""}


def test_hypervisor_adds_boot_memory_and_virtio_mem() -> None:
    devices = [
        {"type": "virtio-mem", "data": {"size": 1 * GIB, "requested-size": 2 * GIB}},
        {"type": "dimm", "data": {"size": 5 * GIB}},
    ]
    seen = hypervisor_record(1.0, 512 * MIB, [{}, {}], devices, {"actual": 512 * MIB})
    assert (seen.vcpus, seen.memory_bytes) == (2, 1536 * MIB)
    assert seen.memory_requested_bytes == 2560 * MIB


def test_hypervisor_takes_off_what_the_balloon_took() -> None:
    assert hypervisor_record(1.0, 512 * MIB, [{}], [], {"actual": 300 * MIB}).memory_bytes == 300 * MIB
    assert hypervisor_record(1.0, 512 * MIB, [{}], [], None).memory_bytes == 512 * MIB


def test_broker_record_copies_what_the_broker_said() -> None:
    view = GuestView(
        "demo",
        Limits(Resources(1, 1), Resources(2, 2)),
        connected=True,
        channel="unix",
        resources=(
            ResourceView(Kind.MEMORY, demand=7, target=8, plugged=9),
            ResourceView(Kind.CPU, demand=1, target=2, plugged=3, reason=Reason("a", "why")),
        ),
    )
    seen = broker_record(4.0, view)
    assert (seen.cpu_demand_millicores, seen.cpu_target_millicores, seen.cpu_plugged_millicores) == (1, 2, 3)
    assert (seen.memory_demand_bytes, seen.memory_target_bytes, seen.memory_plugged_bytes) == (7, 8, 9)
    assert (seen.connected, seen.channel, seen.cpu_reason) == (True, "unix", "why")


def test_lines_that_come_in_pieces_are_put_together() -> None:
    text = "".join(f"{json.dumps(guest_line(number))}\n" for number in range(3)).encode()
    lines = GuestLines()
    found = [values for cut in range(0, len(text), 7) for values in lines.feed(text[cut : cut + 7])]
    assert [values["guest_t"] for values in found] == [0, 1, 2]
    assert lines.offset == len(text)


def test_lines_that_are_no_records_are_passed_over() -> None:
    assert GuestLines().feed(b'oops\n{"a": 1}\n[1]\n\xff\n') == []


def test_probe_lines_become_records() -> None:
    service = {"source": "service", "state": "active", "active_since_us": 5, "restarts": 0, "main_pid": 7}
    held = {"source": "socket", "pid": 7, "family": "AF_VSOCK", "state": "established"}
    held |= {"local_cid": 3, "local_port": 1023, "peer_cid": 2, "peer_port": 4747}
    output = f"a warning\n{json.dumps(service)}\n{json.dumps(held)}\n"
    assert probe_records(3.0, output) == [
        Service(3.0, "active", 5, 0, 7),
        Socket(3.0, 7, "AF_VSOCK", "established", 3, 1023, 2, 4747),
    ]


def test_guest_times_become_host_times_by_the_shortest_delay() -> None:
    now = [100.0]
    shown: list[Record] = []
    recorder = Recorder(lambda: now[0], shown.append)
    for host, guest_t in ((105.0, 1004.0), (106.0, 1005.8), (109.0, 1008.0)):
        now[0] = host
        recorder.add_guest(guest_line(guest_t))
    recorder.add_guest(load_line(1008.5, "end"))
    times = {record.guest_t: record.t for record in recorder.timeline().records if isinstance(record, Guest | Load)}
    # the second one came with the least delay: 6.0 - 1005.8
    assert {guest_t: round(t, 3) for guest_t, t in times.items()} == {
        1004.0: 4.2,
        1005.8: 6.0,
        1008.0: 8.2,
        1008.5: 8.7,
    }
    assert len(shown) == 4


def test_a_timeline_is_in_order_of_time() -> None:
    recorder = Recorder(lambda: 0.0)
    for t in (3.0, 1.0, 2.0):
        recorder.add(Service(t, "active", 0, 0, 0))
    assert [record.t for record in recorder.timeline().records] == [1.0, 2.0, 3.0]
