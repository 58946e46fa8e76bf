"""The course of the demo against a VM and a broker that are made up, in a second."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from guestd.cli.demo.record import Recorder
from guestd.cli.demo.session import DemoError, NoAnswer, Plan, Session
from guestd.cli.demo.timeline import Broker, Guest, Hypervisor, Load, Service, Socket
from guestd.cli.demo.verify import Expected, verify
from guestd.model.errors import UnreachableError
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB, MIB
from guestd.model.view import GuestRemoved, GuestView, ResourceView

EXPECTED = Expected()
QUICK = Plan(
    connect_limit_seconds=0.5,
    settle_limit_seconds=2.0,
    steady_seconds=0.1,
    near_seconds=0.4,
    no_load_seconds=0.3,
    load_slack_seconds=3.0,
    shrink_limit_seconds=2.0,
    tick_seconds=0.02,
    console_tick_seconds=0.03,
)


class FakeVm:
    """A guest that grows and shrinks with a load of half a second."""

    def __init__(self) -> None:
        self.vcpus = 1
        self.size = 0
        self.output = b""
        self.spawned: list[str] = []
        self.commands: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.silent = False
        self.shrinks = True
        self.load_ends = True
        self.go = asyncio.Event()

    async def shell(self, command: str, timeout_seconds: float) -> str:
        self.commands.append(command)
        if self.silent:
            raise NoAnswer("busy")
        if match := re.match(r"exec tail -c \+(\d+) ", command):
            return self.output[int(match[1]) - 1 :].decode()
        if command.startswith("echo go > "):
            self.go.set()
        if "guest_probe.py" in command:
            service = {"source": "service", "state": "active", "active_since_us": 1, "restarts": 0, "main_pid": 9}
            held = {"source": "socket", "pid": 9, "family": "AF_VSOCK", "state": "established"}
            held |= {"local_cid": 3, "local_port": 1023, "peer_cid": 2, "peer_port": 4747}
            return f"{json.dumps(service)}\n{json.dumps(held)}\n"
        return ""

    async def spawn(self, command: str) -> None:
        self.spawned.append(command)
        work = self.watch() if "guest_watch" in command else self.load()
        self.tasks.append(asyncio.create_task(work))

    async def query(self, command: str) -> Any:
        return {
            "query-cpus-fast": [{}] * self.vcpus,
            "query-memory-devices": [{"type": "virtio-mem", "data": {"size": self.size, "requested-size": self.size}}],
            "query-balloon": {"actual": 512 * MIB},
        }[command]

    def write(self, **values: Any) -> None:
        self.output += json.dumps({"guest_t": time.monotonic() + 500, **values}).encode() + b"\n"

    async def watch(self) -> None:
        while True:
            total = 472 * MIB + self.size
            self.write(
                source="guest",
                cpus_online=self.vcpus,
                memory_total_bytes=total,
                memory_available_bytes=total // 2,
                busy_seconds=time.monotonic(),
                runnable=0,
                oom_kills=0,
            )
            await asyncio.sleep(0.01)

    async def load(self) -> None:
        def event(name: str, detail: str = "") -> None:
            self.write(source="load", event=name, detail=detail)

        await self.go.wait()
        event("cpu-onset", "4 busy processes")
        await asyncio.sleep(0.1)
        self.vcpus = 4
        await asyncio.sleep(0.1)
        event("cpu-end")
        event("memory-onset")
        await asyncio.sleep(0.05)
        self.size = 1536 * MIB
        await asyncio.sleep(0.1)
        event("memory-full")
        event("memory-end", "ok")
        if self.load_ends:
            event("end")
        await asyncio.sleep(0.1)
        if self.shrinks:
            self.vcpus, self.size = 1, 0

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


class FakeBroker:
    def __init__(self) -> None:
        self.connected = True
        self.gone_after: float | None = None

    async def watch_guests(self, min_interval_seconds: float | None = None) -> AsyncIterator[GuestView | GuestRemoved]:
        view = GuestView(
            "demo",
            Limits(Resources(1000, GIB // 2), Resources(4000, 3 * GIB)),
            connected=self.connected,
            resources=(ResourceView(Kind.CPU, demand=100), ResourceView(Kind.MEMORY, demand=200)),
        )
        yield GuestRemoved("other")
        yield replace(view, name="another", connected=True)
        yield view
        await asyncio.sleep(60 if self.gone_after is None else self.gone_after)
        raise UnreachableError("the broker ended the stream")


class Run:
    def __init__(self) -> None:
        self.vm, self.broker = FakeVm(), FakeBroker()
        self.recorder = Recorder(time.monotonic)
        self.said: list[str] = []

    async def __call__(self, plan: Plan = QUICK) -> None:
        session = Session(self.vm, self.broker, self.recorder, EXPECTED, "demo", 512 * MIB, self.said.append, plan)
        try:
            await session.run()
        finally:
            await self.vm.stop()

    def failures(self) -> list[str]:
        return [one for one in verify(self.recorder.timeline(), EXPECTED)[1] if one != "no machine was booted"]


async def test_a_whole_run_is_verified() -> None:
    run = Run()
    await run()
    assert run.failures() == []
    assert {type(record) for record in run.recorder.records} == {Broker, Hypervisor, Guest, Load, Service, Socket}
    assert run.said == [
        "guestd in the guest is connected; waiting until all is at its minimum",
        "the load is over; waiting until all is given back",
    ]


async def test_the_load_is_all_that_is_done_to_the_guest() -> None:
    run = Run()
    await run()
    assert [re.findall(r"guest_\w+", command) for command in run.vm.spawned] == [["guest_watch"], ["guest_load"]]
    assert "--processes 4 --cpu-seconds 20 --pause-seconds 2 --memory-mib 1536" in run.vm.spawned[1]
    kinds = {re.split(r"[ +]", command)[0] for command in run.vm.commands}
    assert kinds == {"mkdir", "exec", "python3", "echo"}


async def test_without_load_nothing_grows_and_it_fails() -> None:
    run = Run()
    await run(replace(QUICK, load=False))
    assert len(run.vm.spawned) == 1
    failures = run.failures()
    assert failures[0] == "no load ran in the guest, so nothing was there to follow"
    assert "CPUs online in the guest peaked at 1, expected 4" in failures


async def test_a_vm_that_does_not_shrink_is_given_up_on_and_fails() -> None:
    run = Run()
    run.vm.shrinks = False
    await run(replace(QUICK, shrink_limit_seconds=0.5))
    assert "at the end the hypervisor has 4 CPUs plugged, expected 1" in run.failures()


async def test_a_vm_that_stays_one_block_above_is_not_waited_for_to_the_limit() -> None:
    run = Run()

    run.vm.shrinks = False
    loading = run.vm.load

    async def load() -> None:
        await loading()
        run.vm.vcpus, run.vm.size = 1, 128 * MIB

    run.vm.load = load  # type: ignore[method-assign]
    began = time.monotonic()
    await run(replace(QUICK, shrink_limit_seconds=30.0))
    assert time.monotonic() - began < 15
    assert run.failures() == []


async def test_a_guest_that_never_connects() -> None:
    run = Run()
    run.broker.connected = False
    with pytest.raises(DemoError, match=r"did not come to the broker within 0\.5 s; guestd\.service is active"):
        await run()


async def test_a_guest_that_never_connects_nor_answers() -> None:
    run = Run()
    run.broker.connected = False
    install = run.vm.shell

    async def shell(command: str, timeout_seconds: float) -> str:
        if command.startswith("mkdir"):
            return await install(command, timeout_seconds)
        raise NoAnswer("dead")

    run.vm.shell = shell  # type: ignore[method-assign]
    with pytest.raises(DemoError, match=r"does not answer on its console \(dead\)"):
        await run()


async def test_a_load_that_hangs() -> None:
    run = Run()
    run.vm.load_ends = False
    plan = replace(QUICK, cpu_seconds=0.1, pause_seconds=0, mib_per_second=100_000, hold_seconds=0)
    with pytest.raises(DemoError, match="did not end"):
        await run(replace(plan, load_slack_seconds=0.6))


async def test_a_broker_that_dies_ends_the_run_and_keeps_what_was_seen() -> None:
    run = Run()
    run.broker.gone_after = 0.25
    with pytest.raises(UnreachableError):
        await run()
    assert any(isinstance(record, Hypervisor) for record in run.recorder.records)


async def test_a_view_that_is_silent_for_a_while_does_not_end_the_run() -> None:
    run = Run()

    async def hush() -> None:
        await asyncio.sleep(0.15)
        run.vm.silent = True
        await asyncio.sleep(0.05)
        run.vm.silent = False

    hushing = asyncio.create_task(hush())
    await run(replace(QUICK, settle_limit_seconds=3, steady_seconds=0.4))
    await hushing
    assert run.failures() == []


async def test_stopping_leaves_no_task_behind() -> None:
    run = Run()
    before = asyncio.all_tasks()
    task = asyncio.create_task(run())
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == before


def test_the_load_has_time_enough() -> None:
    assert Plan().load_limit_seconds(EXPECTED) == pytest.approx(20 + 2 + 15.36 + 5 + 30)
