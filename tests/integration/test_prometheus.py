"""A real Prometheus server scrapes a running broker: what is exposed, and all that is shipped to be asked of it."""

import asyncio
import json
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio
from broker_rig import QUICK, USABLE, RawGuest, demand, short_directory
from process_rig import BrokerProcess, HypervisorProcess
from prometheus_rig import SHIPPED, Prometheus, program

from guestd.broker.metrics.guests import FAMILIES
from guestd.model.messages import Ack, AckStatus, Grant, Reclaim, RefusalReason
from guestd.model.resources import Kind
from guestd.model.units import GIB, MIB
from guestd.sim.remote import VmSpec
from guestd.v1 import guest_pb2
from guestd.wire import convert
from guestd.wire.client import BrokerClient

DASHBOARD = json.loads((SHIPPED / "dashboard.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
GUESTS = ("stubborn", "late", "hungry", "away")
"""One refuses to give back, one does not answer, one wants more than its maximum, one never comes."""
_SELECTOR = re.compile(r"\b(?:(?:guestd|process|scrape)_\w+|up)\b(?:\{[^}]*\})?")


@dataclass
class World:
    """A broker with guests to which things happened, and the Prometheus that watches it."""

    prometheus: Prometheus
    run_dir: Path
    url: str


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world() -> AsyncIterator[World]:
    program("prometheus")
    target = f"127.0.0.1:{_free_port()}"
    with short_directory() as root:
        config = (
            f'[host]\ncpus = 16\nmemory = "16GiB"\n[metrics]\nlisten = "{target}"\n'
            f'[broker]\nstate_dir = "{root}/state"\nrun_dir = "{root}/run"\nheartbeat_seconds = 30\n'
        ) + "".join(_guest_table(root, name) for name in GUESTS)
        specs = [VmSpec(name, vcpus_max=6, cpu_enforced=name == "hungry") for name in GUESTS]
        async with AsyncExitStack() as stack:
            hypervisor = await stack.enter_async_context(HypervisorProcess(root, specs))
            broker = BrokerProcess(root, hypervisor.socket, config, QUICK)
            stack.push_async_callback(broker.kill)
            await broker.start()
            prometheus = await stack.enter_async_context(Prometheus(root, _free_port(), target))
            guests = {name: await stack.enter_async_context(RawGuest(root, name)) for name in GUESTS[:3]}
            playing = asyncio.gather(
                _grow_and_refuse(guests["stubborn"]), _grow_and_be_silent(guests["late"]), _want(guests["hungry"])
            )
            yield World(prometheus, broker.run_dir, f"http://{target}/metrics")
            playing.cancel()
            await asyncio.gather(playing, return_exceptions=True)


def _guest_table(root: Path, name: str) -> str:
    return (
        f"[guests.{name}]\ncpu = {{ min = 1, max = 4, burst = 6 }}\n"
        f'memory = {{ min = "512MiB", max = "2GiB", burst = "2560MiB" }}\n'
        f'qmp_socket = "{root}/{name}.qmp"\nvsock_path = "{root}/{name}"\n'
    )


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def _grow_and_refuse(guest: RawGuest) -> None:
    """Get 3 CPUs, want 1, and refuse to give the others back each time."""
    await _grow(guest)
    async for order in _orders(guest):
        if isinstance(order, Reclaim):
            await guest.send(Ack(order.id, order.kind, AckStatus.REFUSED, 3000, USABLE, RefusalReason.IN_USE))


async def _grow_and_be_silent(guest: RawGuest) -> None:
    await _grow(guest)
    await asyncio.Event().wait()


async def _grow(guest: RawGuest) -> None:
    await guest.hello()
    await guest.send(demand(1, 3000, 512 * MIB))
    async for order in _orders(guest):
        if isinstance(order, Grant) and order.kind is Kind.CPU and order.amount == 3000:
            break
    await guest.send(demand(2, 1000, 512 * MIB))


async def _want(guest: RawGuest) -> None:
    await guest.hello()
    await guest.send(demand(1, 12000, 8 * GIB))
    await asyncio.Event().wait()


async def _orders(guest: RawGuest) -> AsyncIterator[object]:
    while (raw := await guest.call.read()) is not grpc.aio.EOF:
        yield convert.broker_message_from_wire(guest_pb2.NegotiateResponse.FromString(raw))


# ---- what runs -----------------------------------------------------------------------------------


@pytest.mark.asyncio(loop_scope="module")
async def test_prometheus_finds_the_broker_and_everything_that_it_tells(world: World) -> None:
    await world.prometheus.until('up{job="guestd"} == 1')
    for family in FAMILIES:
        await world.prometheus.until(family.name + ("_total" if family.type == "counter" else ""))
    targets = await world.prometheus.get("targets")
    assert [target["lastError"] for target in targets["activeTargets"]] == [""]


@pytest.mark.asyncio(loop_scope="module")
async def test_what_happens_to_guests_shows(world: World) -> None:
    ask = world.prometheus.until
    await ask('guestd_guest_resizes_total{guest="stubborn", kind="cpu", outcome="grown"} >= 1')
    await ask('guestd_guest_resizes_total{guest="stubborn", kind="cpu", outcome="refused"} >= 1')
    await ask('guestd_guest_overdue{guest="late", kind="cpu"} == 1')
    await ask('guestd_guest_burst_cpus{guest="hungry"} == 2')
    await ask('guestd_decisions_total{code="refused"} >= 1')
    await ask('guestd_decisions_total{code="overdue"} >= 1')
    await ask("guestd_round_duration_seconds_count > 3")
    await ask("guestd_guests - guestd_guests_connected == 1")


@pytest.mark.asyncio(loop_scope="module")
async def test_its_numbers_are_those_of_the_api(world: World) -> None:
    await world.prometheus.until('guestd_guest_overdue{guest="late", kind="cpu"} == 1')
    await world.prometheus.until('guestd_guest_reserved_cpus{guest="hungry"} == 6')
    async with BrokerClient(world.run_dir) as client:
        for view in await client.guests():
            cpu, memory = view.resource(Kind.CPU), view.resource(Kind.MEMORY)
            of_guest = f'{{guest="{view.name}"}}'
            for amount in ("demand", "target", "reserved", "plugged", "usable", "used"):
                cpus, size = getattr(cpu, amount) / 1000, getattr(memory, amount)
                await world.prometheus.until(f"guestd_guest_{amount}_cpus{of_guest} == {cpus}")
                await world.prometheus.until(f"guestd_guest_{amount}_memory_bytes{of_guest} == {size}")
        host = await client.host()
        await world.prometheus.until(f"guestd_host_committed_cpus == {host.committed.cpu_millicores / 1000}")
        await world.prometheus.until(f"guestd_host_free_memory_bytes == {host.free.memory_bytes}")


@pytest.mark.asyncio(loop_scope="module")
async def test_every_panel_of_the_dashboard_has_data(world: World) -> None:
    await world.prometheus.until("guestd_guest_throttled_ratio")
    for query in QUERIES:
        expression = query.replace("$__rate_interval", "10s").replace("$instance", ".*").replace("$guest", ".*")
        assert "$" not in expression
        assert await world.prometheus.until(expression)


@pytest.mark.asyncio(loop_scope="module")
async def test_the_dashboards_variables_have_values(world: World) -> None:
    await world.prometheus.until("guestd_guest_connected")
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
            values = await world.prometheus.get(
                f"label/{label}/values", **{"match[]": selector.replace("$instance", ".*")}
            )
            assert values, variable["name"]


@pytest.mark.asyncio(loop_scope="module")
async def test_every_alert_is_evaluated_on_data(world: World) -> None:
    await world.prometheus.until("guestd_guest_throttled_ratio")
    rules: list[Any] = []
    while not rules or any(rule["health"] == "unknown" for rule in rules):
        rules = [rule for group in (await world.prometheus.get("rules"))["groups"] for rule in group["rules"]]
        await asyncio.sleep(0.1)
    assert len(rules) == (SHIPPED / "alerts.yml").read_text().count("- alert: ")
    for rule in rules:
        assert rule["health"] == "ok", rule
        selectors = _SELECTOR.findall(rule["query"])
        assert selectors, rule["query"]
        for selector in selectors:
            assert await world.prometheus.until(selector)
        if not rule["query"].startswith("absent("):  # which has no data for as long as there are any
            assert await world.prometheus.until(_without_bounds(rule["query"])), rule["query"]


def _without_bounds(query: str) -> str:
    """What a rule compares with numbers, whoever it is about; what it compares with other series stays."""
    everybody = re.sub(r"unless on ?\([^)]*\) \w+ == 1", "", query)
    return re.sub(r"(==|>=|<=|[<>])\s*[0-9.]+", "", everybody)


@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_wrong_here_is_what_alerts_wait_for(world: World) -> None:
    """They fire after minutes; until then they are pending."""
    expected = {
        ("GuestdGuestAway", "away"),
        ("GuestdGuestOverdue", "late"),
        ("GuestdGuestCpuAtMaximum", "hungry"),
        ("GuestdGuestMemoryAtMaximum", "hungry"),
    }
    end, found = time.monotonic() + 20, set[tuple[str, str]]()
    while found != expected and time.monotonic() < end:
        alerts = (await world.prometheus.get("alerts"))["alerts"]
        found = {(alert["labels"]["alertname"], alert["labels"].get("guest", "")) for alert in alerts}
        await asyncio.sleep(0.1)
    assert found == expected


@pytest.mark.asyncio(loop_scope="module")
async def test_promtool_has_no_complaint_about_the_exposition(world: World) -> None:
    await world.prometheus.until("guestd_guest_throttled_ratio")
    with await asyncio.to_thread(urllib.request.urlopen, world.url) as answer:
        done = await asyncio.to_thread(
            subprocess.run, [program("promtool"), "check", "metrics"], input=answer.read(), capture_output=True
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# ---- what is shipped -----------------------------------------------------------------------------


@pytest.mark.parametrize("what", [("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")])
def test_promtool_has_no_complaint_about_the_rules(what: tuple[str, ...]) -> None:
    done = subprocess.run([program("promtool"), *what], cwd=SHIPPED, capture_output=True, check=False, text=True)
    assert done.returncode == 0 and "SUCCESS" in done.stdout, done.stdout + done.stderr
