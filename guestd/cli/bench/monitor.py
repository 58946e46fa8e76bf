"""Measures what looking at a broker costs: guestctl, a metrics scrape, the live page, and its memory of the past.

All guests change what they need once in 10 s, and the broker does its work for them meanwhile. Every round measures
everything, on a broker of its own, so that what changes on this machine in the meantime is in all of it.
"""

import asyncio
import json
import os
import socket
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

from playwright.async_api import Browser, async_playwright
from playwright.async_api import Error as BrowserError

import guestd
from guestd.cli.bench import monitor_report
from guestd.cli.bench.broker_rig import BenchError, BrokerRig, cpu_seconds
from guestd.cli.bench.host import cpu_model
from guestd.model.errors import GuestdError

_STEADY_SECONDS: Final = 15.0
_PERIOD_SECONDS: Final = 10.0
_REST_SECONDS: Final = 2.0
_STATUSES, _SCRAPES = 4, 6  # in each round
_PAUSE_SECONDS: Final = 0.5  # between two of them
_CHROMIUM: Final = "/usr/bin/chromium"
_PAGE_MILLISECONDS: Final = 20_000
_SCRAPE_HEADERS: Final = {  # as Prometheus asks
    "Accept": "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.5",
    "Accept-Encoding": "gzip",
}
_PAINT: Final = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
_BROKER: Final = "guestd.cli.bench.monitor_broker"

Say = Callable[[str], None]


def run_monitor_bench(guests: int, rounds: int, *, out_dir: Path) -> int:
    """The whole bench; its exit code: 0 when everything was measured, whether a target was reached or not."""
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "monitor.json").unlink(missing_ok=True)
    measured: list[dict[str, Any]] = []
    failed = ""
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    try:
        asyncio.run(_measure(measured, guests, rounds, say))
    except (GuestdError, BrowserError, OSError, TimeoutError) as error:
        failed = str(error) or type(error).__name__
    except KeyboardInterrupt:
        failed = "stopped from outside"
    machine = {"host_cores": len(os.sched_getaffinity(0)), "host_cpu": cpu_model(), "guestd": guestd.__version__}
    result = monitor_report.document(machine, guests, measured)
    result["failure"] = failed or None
    result["reached"] = result["reached"] and not failed
    (out_dir / "monitor.json").write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(["", *monitor_report.table(result), "", f"All values: {out_dir / 'monitor.json'}"]))
    if failed:
        print(f"\nNOT MEASURED TO THE END: {failed}")
    return 1 if failed else 0


async def _measure(measured: list[dict[str, Any]], guests: int, rounds: int, say: Say) -> None:
    async with AsyncExitStack() as stack:
        playwright = await stack.enter_async_context(async_playwright())
        browser = await playwright.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        stack.push_async_callback(browser.close)
        rig = await stack.enter_async_context(BrokerRig(guests))
        bench = _Bench(rig, browser)
        try:
            await bench.start(counted=True)
            await rig.start_load()
            await bench.settled()
            for number in range(1, rounds + 1):
                measured.append({})
                await bench.round(measured[-1], number, say)
                if number < rounds:
                    await bench.restart(counted=True)
        except GuestdError as error:
            raise BenchError(f"{error}; the broker's last words:\n{rig.log_tail()}") from error


class _Bench:
    """A rig whose broker has everything turned on that there is to look at."""

    def __init__(self, rig: BrokerRig, browser: Browser) -> None:
        self._rig, self._browser = rig, browser
        self._spent = rig.root / "spent.json"
        self._config = (rig.root / "broker.toml").read_text()
        self._metrics, self._web = _free_ports()

    async def start(self, *, counted: bool) -> None:
        """A broker that counts what its memory costs, or one that has none."""
        self._spent.unlink(missing_ok=True)
        tables = f'[metrics]\nlisten = "127.0.0.1:{self._metrics}"\n[web]\nlisten = "127.0.0.1:{self._web}"\n'
        tables += "" if counted else "[record]\nsize = 0\n"
        how = "counted" if counted else "forgetful"
        (self._rig.root / "broker.toml").write_text(self._config + tables)
        await self._rig.start_broker(program=(_BROKER, how, str(self._spent)))
        await self._rig.ready()

    async def settled(self) -> None:
        """Wait until all guests are served, and for what that left to do."""
        await self._rig.settled()
        await asyncio.sleep(_REST_SECONDS)

    async def restart(self, *, counted: bool) -> None:
        """Another broker for the same guests."""
        await self._rig.kill_broker()
        await self.start(counted=counted)
        await self.settled()

    async def round(self, into: dict[str, Any], number: int, say: Say) -> None:
        """Everything once, into `into`."""
        say(f"round {number}: the broker unwatched")
        before = self._told()
        into["quiet_cores"] = await self._steady(number)
        into["counted"] = monitor_report.counted_share(before, self._told())
        say(f"round {number}: guestctl status, then scrapes")
        _, (into["status_seconds"], scrapes) = await asyncio.gather(self._steady(number), self._asked())
        into["scrape_seconds"] = [seconds for seconds, _ in scrapes]
        into["scrape_bytes"] = scrapes[-1][1]
        say(f"round {number}: the live page")
        await self._watched(into, number)
        say(f"round {number}: a broker without record and history")
        await self.restart(counted=False)
        into["forgetful_cores"] = await self._steady(number)

    async def _steady(self, seed: int) -> float:
        """Cores that the broker uses while every guest changes its need once in a while."""
        before, began = cpu_seconds(self._rig.broker.pid), time.monotonic()
        await self._rig.load(do="steady", seconds=_STEADY_SECONDS, period_seconds=_PERIOD_SECONDS, seed=seed)
        return (cpu_seconds(self._rig.broker.pid) - before) / (time.monotonic() - began)

    def _told(self) -> dict[str, Any]:
        """What record and history cost so far.

        :raise BenchError: When there are none.
        """
        try:
            told: dict[str, Any] = json.loads(self._spent.read_text())
        except FileNotFoundError:
            raise BenchError("the broker does not tell what its record and history cost") from None
        silent = [name for name, calls in told["calls"].items() if not calls]
        if silent or len(told["threads"]) < 2:
            raise BenchError(f"nothing is recorded: {', '.join(silent) or 'a thread is missing'}")
        return told

    async def _asked(self) -> tuple[list[float], list[tuple[float, int]]]:
        """Both, one after the other: each for itself."""
        return await self._statuses(), await self._scrapes()

    async def _statuses(self) -> list[float]:
        """Seconds that processes of `guestctl status` take."""
        return [await self._status() for _ in range(_STATUSES)]

    async def _status(self) -> float:
        await asyncio.sleep(_PAUSE_SECONDS)
        arguments = ("-m", "guestd.cli.main", "status", "--run-dir", str(self._rig.run_dir))
        began = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await process.communicate()
        took = time.monotonic() - began
        if process.returncode or f"{self._rig.count} of {self._rig.count + 1} guests connected".encode() not in out:
            raise BenchError(
                f"guestctl status: exit {process.returncode}: {(err or out)[:300].decode(errors='replace')}"
            )
        return took

    async def _scrapes(self) -> list[tuple[float, int]]:
        """Seconds and bytes of scrapes, as a Prometheus server does them."""
        return [await asyncio.to_thread(self._scrape) for _ in range(_SCRAPES)]

    def _scrape(self) -> tuple[float, int]:
        time.sleep(_PAUSE_SECONDS)
        url = f"http://127.0.0.1:{self._metrics}/metrics"
        began = time.monotonic()
        try:
            request = urllib.request.Request(url, headers=_SCRAPE_HEADERS)
            with urllib.request.urlopen(request, timeout=10.0) as response:  # noqa: S310 - http, and loopback
                body = response.read()
        except OSError as error:
            raise BenchError(f"no metrics at {url}: {error}") from error
        return time.monotonic() - began, len(body)

    async def _watched(self, into: dict[str, Any], number: int) -> None:
        """Open the page in a browser that knows nothing of it, and keep it open."""
        context = await self._browser.new_context(viewport={"width": 1280, "height": 900})
        try:
            page = await context.new_page()
            await page.goto(f"http://127.0.0.1:{self._web}/", timeout=_PAGE_MILLISECONDS)
            await page.wait_for_selector(".row", timeout=_PAGE_MILLISECONDS)
            into["rows_seconds"] = await page.evaluate("performance.now()") / 1000
            paint = await page.wait_for_function(_PAINT, timeout=_PAGE_MILLISECONDS)
            into["paint_seconds"] = await paint.json_value() / 1000
            await asyncio.sleep(_REST_SECONDS)
            into["watched_cores"] = await self._steady(number)
            if await page.get_attribute("#link", "data-state") != "live":
                raise BenchError("the live page lost the broker while it was watched")
        finally:
            await context.close()


def _free_ports() -> tuple[int, int]:
    """Two ports of this machine that nobody listens on."""
    with socket.socket() as one, socket.socket() as other:
        for sock in (one, other):
            sock.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]
