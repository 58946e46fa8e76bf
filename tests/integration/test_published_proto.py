"""A monitoring system of somebody else's: it has the published .proto files, gRPC, and nothing of guestd."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from broker_rig import BrokerRig, eventually, guest_table, host_table, short_directory

from guestd.model.units import MIB

PROTO = Path(__file__).parents[2] / "proto"
LIBRARIES = ("grpc", "grpc_health", "google", "typing_extensions.py")

MONITOR = """
import json, sys
sys.path[:0] = sys.argv[1:3]

import grpc
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from guestd.v1 import monitor_pb2 as pb, monitor_pb2_grpc

import guestd
try:
    import guestd.wire
except ImportError:
    pass
else:
    sys.exit("this is no outsider: it has guestd's own code")

def told(message):
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)

with grpc.insecure_channel("unix:" + sys.argv[3]) as channel:
    monitor, wait = monitor_pb2_grpc.MonitorServiceStub(channel), {"timeout": 10}
    health = health_pb2_grpc.HealthStub(channel)
    guests, token = [], ""
    while True:
        page = monitor.ListGuests(pb.ListGuestsRequest(page_size=1, page_token=token), **wait)
        guests += [told(guest) for guest in page.guests]
        token = page.next_page_token
        if not token:
            break
    watch = monitor.WatchGuests(pb.WatchGuestsRequest(), **wait)
    watched = sorted(next(watch).guest.name for _ in guests)
    watch.cancel()
    events, token = [], ""
    while True:
        page = monitor.ListEvents(pb.ListEventsRequest(page_size=2, page_token=token), **wait)
        events += [told(event) for event in page.events]
        token = page.next_page_token
        if not token:
            break
    following = monitor.WatchEvents(pb.WatchEventsRequest(after_id=int(events[0]["id"])), **wait)
    followed = told(next(following))
    following.cancel()
    try:
        monitor.GetGuest(pb.GetGuestRequest(name="nobody"), **wait)
    except grpc.RpcError as error:
        unknown = error.code().name
    print(json.dumps({
        "guestd": list(guestd.__path__),
        "host": told(monitor.GetHost(pb.GetHostRequest(), **wait)),
        "guests": guests,
        "guest": told(monitor.GetGuest(pb.GetGuestRequest(name="a"), **wait)),
        "watched": watched,
        "events": events,
        "followed": followed,
        "explained": told(monitor.ExplainGuest(pb.ExplainGuestRequest(name="a"), **wait)),
        "history": told(monitor.GetHistory(pb.GetHistoryRequest(name="a"), **wait)),
        "health": [
            health_pb2.HealthCheckResponse.ServingStatus.Name(
                health.Check(health_pb2.HealthCheckRequest(service=name), **wait).status
            )
            for name in ("", "guestd.v1.MonitorService")
        ],
        "unknown": unknown,
    }))
"""


@pytest.fixture
async def rig() -> AsyncIterator[BrokerRig]:
    """A broker with the guests `a`, which has grown to four CPUs, and `b`, which nobody heard of yet."""
    with short_directory() as root:
        config = host_table(root) + guest_table(root, "a") + guest_table(root, "b")
        async with BrokerRig(root, config) as broker:
            guest = broker.guest("a")
            guest.load.tasks = 4.2
            await eventually(lambda: guest.has(4, 512 * MIB), "four CPUs")
            await eventually(lambda: broker.reserved("a").cpu_millicores == 4000, "in the book")
            yield broker


def generate(place: Path) -> None:
    """The code that anybody gets from the published files."""
    place.mkdir()
    files = sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={PROTO}", f"--python_out={place}"]
    done = subprocess.run([*command, f"--grpc_python_out={place}", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def link_libraries(place: Path) -> None:
    """gRPC and protobuf, and nothing else that is installed here."""
    place.mkdir()
    installed = Path(grpc.__file__).parents[1]
    for name in LIBRARIES:
        (place / name).symlink_to(installed / name)


async def outsider(rig: BrokerRig, root: Path) -> dict[str, Any]:
    """What a monitoring system reads."""
    generated, libraries = root / "generated", root / "libraries"
    generate(generated)
    link_libraries(libraries)
    socket = rig.run_dir / "monitor.sock"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-c", MONITOR, str(generated), str(libraries), str(socket)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=root,
        env={},
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, err.decode()
    said: dict[str, Any] = json.loads(out)
    return said


async def test_the_published_files_are_all_that_a_monitoring_system_needs(rig: BrokerRig, tmp_path: Path) -> None:
    said = await outsider(rig, tmp_path)
    assert said["guestd"] == [str(tmp_path / "generated" / "guestd")]
    host = said["host"]["host"]
    assert host["capacity"]["cpu_millicores"] == "8000"
    assert (host["epoch"], host["guests"], host["guests_connected"]) == ("1", 2, 1)
    assert [guest["name"] for guest in said["guests"]] == said["watched"] == ["a", "b"]
    cpu = said["guest"]["guest"]["resources"][0]
    assert (cpu["kind"], cpu["reserved"], cpu["plugged"]) == ("RESOURCE_KIND_CPU", "4000", "4000")
    assert said["health"] == ["SERVING", "SERVING"]
    assert said["unknown"] == "NOT_FOUND"

    events = said["events"]
    ids = [int(event["id"]) for event in events]
    assert ids == sorted(set(ids))
    grown = [event for event in events if event["guest"] == "a" and event["code"] == "EVENT_CODE_GROWN"]
    assert grown[-1]["after"] == "4000"
    assert int(said["followed"]["event"]["id"]) == ids[1]

    explained = said["explained"]
    assert explained["guest"]["name"] == "a"
    assert [one["kind"] for one in explained["resources"]] == ["RESOURCE_KIND_CPU", "RESOURCE_KIND_MEMORY"]
    assert all(one["summary"] and one["inputs"]["capacity"] != "0" for one in explained["resources"])

    points = said["history"]["points"]
    assert max(int(point["resources"][0]["reserved"]) for point in points) == 4000
