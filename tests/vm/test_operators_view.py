"""What an operator sees of a real VM: first only observed, then served; on the page, in guestctl and in the record."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest
import pytest_asyncio
from host import GuestSpec, Host, converges, rests
from playwright.async_api import Page, async_playwright

from guestd.lab.image import GuestImage
from guestd.lab.qemu import MIB
from guestd.model.event import EventCode, EventQuery
from guestd.model.resources import Kind

pytestmark = [pytest.mark.vm, pytest.mark.timeout(480), pytest.mark.asyncio(loop_scope="module")]

VM = "web-1"
CHROMIUM = "/usr/bin/chromium"
STATES = "cat /sys/devices/system/cpu/online; cat /sys/devices/system/memory/memory*/state | sort | uniq -c"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host(guest_image: GuestImage, port: int) -> AsyncIterator[Host]:
    """One VM, that is only observed at first."""
    tables = f'[web]\nlisten = "127.0.0.1:{port}"\n\n[record]\nsize = "64MiB"\n'
    async with Host(guest_image, {VM: GuestSpec(observe=True)}, tables=tables) as host:
        print(f"booted in {host.machines[VM].boot_seconds:.1f} s")
        await host.until("guestd is heard", lambda look: look.views[VM].connected)
        yield host


@pytest_asyncio.fixture(loop_scope="module")
async def page(host: Host, port: int) -> AsyncIterator[Page]:
    if shutil.which(CHROMIUM) is None:
        text = f"{CHROMIUM} is missing: `make setup-page` installs it"
        if os.environ.get("GUESTD_REQUIRE_VM") == "1":
            pytest.fail(text, pytrace=False)
        pytest.skip(text)
    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = await chromium.new_page()
        await page.goto(f"http://127.0.0.1:{port}/")
        await page.wait_for_selector(f'.row[data-name="{VM}"]')
        yield page
        await chromium.close()


async def events(host: Host, code: EventCode, kind: Kind) -> list[str]:
    found = await host.client.events(EventQuery(guest=VM))
    return [event.text for event in found if event.code is code and event.kind is kind]


async def until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.1)


async def test_a_vm_that_is_only_observed_is_not_touched(host: Host) -> None:
    before, inside = (await host.look()).held[VM], await host.shell(VM, STATES)
    since = (await host.shell(VM, "date +%s")).strip()
    async with host.busy(VM, 3):
        began = time.monotonic()
        while not (would := await events(host, EventCode.WOULD, Kind.CPU)):
            assert time.monotonic() - began < 30, host.words(await host.look())
            await asyncio.sleep(0.2)
        await asyncio.sleep(3)
        look = await host.look()
        assert look.held[VM] == before
        assert await host.shell(VM, STATES) == inside
        assert look.views[VM].observed
        assert look.views[VM].resource(Kind.CPU).target >= 2000
        assert look.views[VM].resource(Kind.CPU).quota == 0, "its threads are in no group of the broker's"
    journal = await host.shell(VM, f"journalctl -u guestd --since=@{since} -q -o cat --no-pager")
    assert " online" not in journal and " offline" not in journal
    assert not await events(host, EventCode.GROWING, Kind.CPU)
    print(f"observed: {would[0]!r}; {json.loads(await host.guestctl('get', VM, '-o', 'json'))['guest']['observed']}")


async def test_the_same_vm_is_served_from_now_on_and_grows_on_the_page(host: Host, page: Page) -> None:
    host.guests[VM] = replace(host.guests[VM], observe=False)
    host.write_config()
    session = (await host.look()).views[VM].revision
    log_before = len(host.broker_log)
    host.reload_broker()
    await host.says("reloaded", log_before)
    await rests(host, 60)
    assert "is away" not in host.broker_log[log_before:], "the guest's stream lived through the reload"
    figure = f"document.querySelector('.row[data-name=\"{VM}\"] .c-cpu b').textContent"
    took = []
    async with host.busy(VM, 3):
        for _ in range(600):
            cpus = (await host.look()).cpus(VM)
            if cpus >= 2:
                began = time.monotonic()
                while float(await page.evaluate(figure)) < cpus:
                    assert time.monotonic() - began < 5, await page.evaluate(figure)
                    await asyncio.sleep(0.02)
                took.append(time.monotonic() - began)
                break
            await asyncio.sleep(0.05)
        await converges(host, "3 CPUs", lambda look: look.cpus(VM) >= 3)
        explained = json.loads(await host.guestctl("explain", VM, "-o", "json"))
    print(f"on the page {took[0]:.2f} s after the broker said so; revision {session} before")
    assert took[0] <= 1.0
    assert "needs" in json.dumps(explained)
    await rests(host, 60)


async def test_guestctl_tells_of_a_real_shrink_and_the_record_gives_the_same_decisions(host: Host) -> None:
    await host.guestctl("set-limits", VM, "--memory-min", str(1024 * MIB), "--wait", "--timeout", "60s")
    assert (await host.look()).memory(VM) == 1024 * MIB
    await host.guestctl("set-limits", VM, "--reset")
    dry = json.loads(await host.guestctl("reclaim", VM, "--dry-run", "-o", "json"))
    print(json.dumps(dry)[:400])
    await host.guestctl("reclaim", VM, "--wait", "--timeout", "60s")
    await rests(host, 60)
    shrunk = await events(host, EventCode.SHRUNK, Kind.MEMORY)
    assert shrunk and "512 MiB" in shrunk[-1]
    assert "shrunk to 512 MiB" in await host.guestctl("events", VM, "--since", "10m")
    assert "512" in await host.guestctl("explain", VM)
    assert "memory" in (await host.guestctl("history", VM, "--since", "10m")).lower()
    await asyncio.sleep(2)  # the record is written within a second
    records = sorted((host.run_dir.parent / "state" / "record").glob("*.record"))
    words = await host.guestctl("replay", str(records[-1]))
    print(words.splitlines()[-1])
    assert "all the same" in words
