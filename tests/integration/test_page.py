"""The live page in a real browser: Debian's Chromium, without a window.

Against the real broker where it is about numbers, and against an acted host (`page_stage`) where it is about the
page itself. Every test also checks that nothing was asked of any other host, and that the browser had nothing
to complain about.
"""

import asyncio
import os
import shutil
import socket
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from broker_rig import QUICK, BrokerRig, eventually, guest_table, host_table, short_directory
from page_stage import Stage
from playwright.async_api import Browser, Page, async_playwright
from process_rig import BrokerProcess, HypervisorProcess

from guestd.broker.outlets import Address
from guestd.broker.web.page import serve_page
from guestd.model.event import EventCode
from guestd.model.reason import Reason
from guestd.model.resources import Kind
from guestd.model.units import GIB, MIB
from guestd.model.view import GuestView
from guestd.sim.remote import VmSpec
from guestd.wire.client import BrokerClient
from guestd.wire.server import OperatorBackend

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHROMIUM = "/usr/bin/chromium"
PICTURES = Path(__file__).parents[2] / "build" / "page"
DESKTOP, PHONE = (1440, 900), (390, 844)
_COMPLAINTS = ("error", "warning")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    if shutil.which(CHROMIUM) is None:
        text = f"{CHROMIUM} is missing: `make setup-page` installs it"
        if os.environ.get("GUESTD_REQUIRE_VM") == "1":
            pytest.fail(text, pytrace=False)
        pytest.skip(text)
    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        await chromium.close()


class Window:
    """A browser's window on one address, and what went on in it."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.complaints: list[str] = []
        self.strangers: list[str] = []
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda said: self.complaints.append(said.text) if said.type in _COMPLAINTS else None)
        page.on("request", lambda request: self._on_request(request.url))

    def _on_request(self, url: str) -> None:
        if urlsplit(url).netloc != urlsplit(self.url).netloc:
            self.strangers.append(url)

    async def open(self) -> Page:
        await self.page.goto(self.url)
        await self.page.wait_for_selector(".row")
        return self.page


Open = Callable[..., Awaitable[Window]]


@pytest_asyncio.fixture(loop_scope="module")
async def open_window(browser: Browser) -> AsyncIterator[Open]:
    """Makes windows; at the end there must be no complaint in any of them."""
    windows: list[Window] = []
    async with AsyncExitStack() as stack:

        async def make(url: str, size: tuple[int, int] = DESKTOP, theme: str = "light", touch: bool = False) -> Window:
            context = await browser.new_context(
                viewport={"width": size[0], "height": size[1]},
                color_scheme="dark" if theme == "dark" else "light",
                has_touch=touch,
            )
            stack.push_async_callback(context.close)
            windows.append(Window(await context.new_page(), url))
            return windows[-1]

        yield make
    for window in windows:
        assert window.strangers == []
        assert window.complaints == []


@pytest_asyncio.fixture(loop_scope="module")
async def serving() -> AsyncIterator[Callable[[OperatorBackend], Awaitable[str]]]:
    """Serves the page of a broker, and tells where."""
    async with AsyncExitStack() as stack:

        async def serve(backend: OperatorBackend) -> str:
            runner = await serve_page(backend, Address("127.0.0.1", 0), ())
            stack.push_async_callback(runner.cleanup)
            return f"http://127.0.0.1:{runner.addresses[0][1]}/"

        yield serve


Serve = Callable[[OperatorBackend], Awaitable[str]]


@pytest_asyncio.fixture(loop_scope="module")
async def rig() -> AsyncIterator[BrokerRig]:
    with short_directory() as root:
        async with BrokerRig(root, host_table(root) + guest_table(root, "a") + guest_table(root, "b")) as broker:
            yield broker


def shown(kind: Kind, amount: int) -> str:
    """An amount as the page is to show it: two decimals of a CPU, one of a size."""
    if kind is Kind.CPU:
        return f"{amount / 1000:.2f}".rstrip("0").rstrip(".")
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", 1024)):
        if amount >= factor:
            tenths = (amount * 10 + factor // 2) // factor  # halves go up, as in JavaScript
            text = f"{(amount + factor // 2) // factor}" if amount >= 100 * factor else f"{tenths / 10:g}"
            return f"{text} {unit}"
    return f"{amount} B"


async def holds(page: Page, expression: str, seconds: float = 10.0) -> None:
    """Wait until it is true in the page. (Playwright's own way wants `eval`, which the page forbids.)"""
    end = time.monotonic() + seconds
    while not await page.evaluate(expression):
        assert time.monotonic() < end, f"not within {seconds:g} s: {expression}"
        await asyncio.sleep(0.01)


async def _amounts(page: Page, kind: Kind) -> dict[str, str]:
    """What the details say of one kind."""
    found = await page.eval_on_selector_all(
        f'.block[data-kind="{kind.value}"] dd[data-field]',
        "all => all.map((one) => [one.dataset.field, one.textContent])",
    )
    return dict(found)


def _expected(guest: GuestView, kind: Kind) -> dict[str, str]:
    one, limits = guest.resource(kind), guest.limits
    amounts = {
        "demand": one.demand,
        "used": one.used,
        "reserved": one.reserved,
        "plugged": one.plugged,
        "usable": one.usable,
        "min": limits.min.get(kind),
        "max": limits.max.get(kind),
    }
    burst, weight = limits.burst.get(kind), limits.weight.get(kind)
    texts = {field: shown(kind, amount) for field, amount in amounts.items()}
    return texts | {"burst": shown(kind, burst) if burst else "–", "weight": str(weight)}


# ---- against the real broker ---------------------------------------------------------------------


async def test_the_numbers_are_those_of_the_monitor_api(rig: BrokerRig, serving: Serve, open_window: Open) -> None:
    guest = rig.guest("a")
    guest.load.tasks, guest.load.memory_bytes = 4.2, 900 * MIB
    await eventually(lambda: len(guest.kernel.online_cpus) == 4, "four CPUs online")
    page = await (await open_window(await serving(rig.engine))).open()
    await page.click('.row[data-name="a"]')
    async with BrokerClient(rig.run_dir) as client:
        end, found, wanted = time.monotonic() + 20.0, [{"": "page"}], [{"": "API"}]
        while found != wanted:  # the fake kernel's numbers still move
            assert time.monotonic() < end, (found, wanted)
            found = [await _amounts(page, kind) for kind in Kind]
            wanted = [_expected(await client.guest("a"), kind) for kind in Kind]
        host = await client.host()
    for kind in Kind:
        pool = page.locator(f'.pool[data-kind="{kind.value}"]')
        for part, amount in (("reserve", host.reserve), ("minimums", host.minimums), ("free", host.free)):
            assert await pool.locator(f'[data-part="{part}"]').text_content() == shown(kind, amount.get(kind))
    assert await page.locator("#summary").text_content() == "2 VMs · 1 connected"
    assert await page.locator('.row[data-name="b"] .c-state').text_content() == "silent"


@pytest.mark.alone
async def test_a_vm_that_grows_moves_on_the_page_within_a_second(
    rig: BrokerRig, serving: Serve, open_window: Open
) -> None:
    guest = rig.guest("a")
    await eventually(lambda: rig.connected("a"), "connected")
    page = await (await open_window(await serving(rig.engine))).open()
    figure = "document.querySelector('.row[data-name=\"a\"] .c-cpu b').textContent"
    took = []
    for tasks, cpus in ((4.2, 4), (0.1, 1), (4.2, 4), (0.1, 1), (4.2, 4)):
        guest.load.tasks = tasks
        await eventually(lambda amount=cpus * 1000: rig.reserved("a").cpu_millicores == amount, "in the book")  # type: ignore[misc]
        began = time.monotonic()
        await holds(page, f"{figure} === '{cpus}'")
        took.append(time.monotonic() - began)
    assert statistics.median(took) <= 1.0, took
    width = "document.querySelector('.row[data-name=\"a\"] .c-cpu .b-reserved').getBoundingClientRect().width"
    track = "document.querySelector('.row[data-name=\"a\"] .c-cpu .bar').getBoundingClientRect().width"
    await holds(page, f"Math.abs({width} - {track}) < 2")
    await page.click('.row[data-name="a"]')
    await page.locator(".event", has_text="4 CPU").first.wait_for()  # what happened, and why, in the broker's words
    await holds(page, "document.querySelector('.block.cpu .why').textContent.includes('needs')")


async def test_a_restart_of_the_broker_is_shown_and_recovered_from(open_window: Open) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with short_directory() as root:
        config = host_table(root) + f'[web]\nlisten = "127.0.0.1:{port}"\n' + guest_table(root, "a")
        async with HypervisorProcess(root, [VmSpec("a")]) as hypervisor:
            broker = BrokerProcess(root, hypervisor.socket, config, QUICK)
            await broker.start()
            try:
                await broker.logged("the live page: http://")
                window = await open_window(f"http://127.0.0.1:{port}/")
                page = await window.open()
                await page.wait_for_selector('#link[data-state="live"]')
                epoch = await page.evaluate("document.querySelector('.facts').textContent.match(/epoch (\\d+)/)[1]")
                await broker.kill()
                await page.wait_for_selector('#link[data-state="lost"]', timeout=5000)
                assert await page.locator("#link").text_content() == "disconnected, trying again"
                assert await page.locator(".row").count() == 1  # what was known last, and dimmed
                await broker.start()
                await page.wait_for_selector('#link[data-state="live"]', timeout=15_000)
                await holds(page, f"document.querySelector('.facts').textContent.includes('epoch {int(epoch) + 1}')")
                assert await page.locator('.row[data-name="a"]').count() == 1
                await page.close()
                window.complaints = [text for text in window.complaints if "ERR_" not in text]
            finally:
                await broker.kill()


async def test_what_happened_while_the_broker_was_away_is_shown_afterwards(open_window: Open) -> None:
    stage, asked = Stage(12), []
    runner = await serve_page(stage, Address("127.0.0.1", 0), ())
    port = runner.addresses[0][1]
    window = await open_window(f"http://127.0.0.1:{port}/")
    window.page.on("request", lambda request: asked.append(request.url) if "/api/history" in request.url else None)
    page = await window.open()
    await page.click('.row[data-name="web-1"]')
    await eventually(lambda: len(asked) == 1, "its past is asked for")
    await runner.cleanup()
    await page.wait_for_selector('#link[data-state="lost"]', timeout=5000)
    runner = await serve_page(stage, Address("127.0.0.1", port), ())
    await page.wait_for_selector('#link[data-state="live"]', timeout=15_000)
    await eventually(lambda: len(asked) == 2, "and again, for what was missed")
    await runner.cleanup()
    await page.wait_for_selector('#link[data-state="lost"]', timeout=5000)
    stage.drop("web-1")
    runner = await serve_page(stage, Address("127.0.0.1", port), ())
    await page.wait_for_selector('#link[data-state="live"]', timeout=15_000)
    await holds(page, "document.querySelector('#detail .chip').textContent === 'gone'")
    await page.close()
    await runner.cleanup()
    # Why it was as it was may just have been asked when it went: 404.
    window.complaints = [text for text in window.complaints if "ERR_" not in text and "404" not in text]


async def test_the_host_has_a_past_however_often_something_changes(serving: Serve, open_window: Open) -> None:
    page = await (await open_window(await serving(Stage(3)))).open()
    ages = await page.evaluate(
        """async () => {
          const { State } = await import("/static/state.js");
          const state = new State();
          const nothing = { host: { epoch: 1 }, guests: [], gone: [], events: [], missed: 0 };
          let now = 1e12;
          state.now = () => now;
          for (let count = 0; count < 400; count += 1) {
            now += 250;
            state.change(nothing);
          }
          return state.samples.map(([at]) => (now - at) / 1000);
        }"""
    )
    assert ages[0] == pytest.approx(99.75), "the first is kept"
    assert ages[-1] == 0, "and so is the newest"
    assert all(0.5 < before - after <= 1.0 for before, after in pairwise(ages[:-1])), "about one a second"


# ---- the page itself -----------------------------------------------------------------------------


async def test_it_is_usable_by_keyboard_alone(serving: Serve, open_window: Open) -> None:
    page = await (await open_window(await serving(Stage(200)))).open()
    keys = page.keyboard
    await keys.press("Tab")
    assert await page.evaluate("document.activeElement.className") == "skip"
    await keys.press("/")
    assert await page.evaluate("document.activeElement.id") == "search"
    await keys.type("db-")
    await holds(page, "document.getElementById('count').textContent === '20 of 200 VMs'")
    await keys.press("ArrowDown")
    assert await page.evaluate("document.activeElement.id") == "list"
    await keys.press("ArrowDown")
    await keys.press("ArrowDown")
    chosen = page.locator('.row[aria-selected="true"]')
    assert await chosen.get_attribute("data-name") == "db-2"
    assert await page.locator("#detail h2").text_content() == "db-2"
    assert await page.locator("#list").get_attribute("aria-activedescendant") == await chosen.get_attribute("id")
    assert await chosen.evaluate("(row) => getComputedStyle(row).outlineStyle") == "solid"
    await keys.press("End")
    assert await chosen.get_attribute("data-name") == "db-20"
    seen = "(row) => row.getBoundingClientRect().bottom <= row.closest('#list').getBoundingClientRect().bottom + 1"
    assert await chosen.evaluate(seen)
    await keys.press("Escape")
    assert await page.locator("#detail h2").text_content() == "Host"
    order = []
    for _ in range(4):
        await keys.press("Shift+Tab")
        order.append(await page.evaluate("document.activeElement.textContent"))
        assert await page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert order == ["State", "Memory", "CPU", "VM"]
    await keys.press("Tab")
    await keys.press("Enter")
    assert await page.locator('#heads [data-sort="cpu"]').get_attribute("aria-pressed") == "true"


async def test_sorted_by_load_the_busiest_comes_first(serving: Serve, open_window: Open) -> None:
    stage = Stage(40)
    page = await (await open_window(await serving(stage))).open()
    demands = {kind: {name: guest.resource(kind).demand for name, guest in stage.guests.items()} for kind in Kind}
    busiest = {kind: max(demand, key=lambda name, of=demand: of[name]) for kind, demand in demands.items()}  # type: ignore[misc]
    for sort, name in (("cpu", busiest[Kind.CPU]), ("memory", busiest[Kind.MEMORY]), ("state", "build-2")):
        await page.click(f'#heads [data-sort="{sort}"]')
        await page.wait_for_selector(f'.row[aria-rowindex="1"][data-name="{name}"]')


@pytest.mark.parametrize("width", [320, 390])
async def test_a_phone_has_one_column_and_nothing_beside_it(serving: Serve, open_window: Open, width: int) -> None:
    stage = Stage(30)
    stage.happen("db-1", EventCode.GROWN, "grown")
    page = await (await open_window(await serving(stage), (width, 700), touch=True)).open()
    fits = "document.documentElement.scrollWidth <= innerWidth && document.body.scrollWidth <= innerWidth"
    inside = (
        "[...document.querySelectorAll('main section, .row, .pool *, .block, .event')]"
        ".every((one) => one.getBoundingClientRect().right <= innerWidth)"
    )
    assert await page.evaluate(fits) and await page.evaluate(inside)
    await page.tap('.row[aria-rowindex="2"]')
    await page.wait_for_selector("#detail h2:visible")
    assert await page.locator("#list").is_visible() is False
    await page.wait_for_selector(".u-legend")
    assert await page.evaluate(fits) and await page.evaluate(inside)
    await page.tap(".back")
    assert await page.locator("#list").is_visible()
    await page.tap("#to-host")
    assert await page.locator(".event").is_visible()


async def test_what_a_guest_says_is_only_ever_text(serving: Serve, open_window: Open) -> None:
    evil = '<img src=x onerror="document.title=1"><script>document.title=2</script>\x1b[31m\u202egnp'
    stage = Stage(3)
    guest = replace(stage.guests["api-1"], hostname=evil, degraded=evil, kernel=evil, agent_version=evil)
    stage.put(replace(guest, demand_reasons=(Reason("x", evil),)))
    stage.happen("api-1", EventCode.REFUSED, evil)
    page = await (await open_window(await serving(stage))).open()
    await page.click('.row[data-name="api-1"]')
    await holds(page, "document.querySelector('.facts').textContent.includes('<img')")
    await page.wait_for_selector(".event")
    for place in (".facts", ".note", ".event .text", ".reasons li"):
        text = await page.locator(place).first.text_content()
        assert text is not None
        assert "onerror=" in text, place
        assert r"\u{1b}[31m\u{202e}gnp" in text, place
    assert await page.locator("main img, body script").count() == 0
    assert await page.title() == "guestd"


@pytest.mark.alone
async def test_a_thousand_vms_stay_smooth(serving: Serve, open_window: Open) -> None:
    stage = Stage(1000)
    stage.happen("db-1", EventCode.GROWN, "grown")
    page = await (await open_window(await serving(stage))).open()
    await holds(page, "document.getElementById('count').textContent === '1000 VMs'")
    await page.evaluate(
        """() => {
            window.gaps = [];
            let last = performance.now();
            const frame = (now) => { gaps.push(now - last); last = now; requestAnimationFrame(frame); };
            requestAnimationFrame(frame);
        }"""
    )
    names, most = list(stage.guests), 0
    began = time.monotonic()
    for turn in range(15):
        stage.move(*names[turn * 40 % 1000 :][:40], seconds=5.0)
        stage.happen(names[turn], EventCode.GROWN, f"grown, {turn}")
        await page.locator("#list").evaluate("(list) => list.scrollBy(0, 900)")
        most = max(most, await page.locator(".row").count())
        await asyncio.sleep(max(0.0, began + (turn + 1) * 0.2 - time.monotonic()))
    assert 0 < most < 80
    gaps = sorted(await page.evaluate("gaps"))
    assert len(gaps) > 60
    assert gaps[len(gaps) // 2] < 35, "not half of all frames are as short as for 30 in a second"
    assert gaps[len(gaps) * 9 // 10] < 100, "one frame of ten took longer than a tenth of a second"
    assert gaps[-1] < 1500, "the page stood still"
    await page.locator("#list").focus()
    await page.keyboard.press("End")
    await page.wait_for_selector('.row[aria-selected="true"][aria-rowindex="1000"]')
    last = await page.locator('.row[aria-selected="true"]').get_attribute("data-name")
    assert last is not None
    wanted, end = _expected(stage.guests[last], Kind.CPU), time.monotonic() + 10.0
    while (found := await _amounts(page, Kind.CPU)) != wanted:
        assert time.monotonic() < end, (found, wanted)
        await asyncio.sleep(0.05)


async def test_the_theme_is_the_systems_until_it_is_chosen(serving: Serve, open_window: Open) -> None:
    page = await (await open_window(await serving(Stage(3)), theme="dark")).open()
    background = "getComputedStyle(document.body).backgroundColor"
    dark = await page.evaluate(background)
    await page.click("#theme")
    light = await page.evaluate(background)
    assert light != dark
    await page.reload()
    await page.wait_for_selector(".row")
    assert await page.evaluate(background) == light
    await page.click("#theme")
    assert await page.evaluate(background) == dark


async def test_text_stands_out_in_both_themes(serving: Serve, open_window: Open) -> None:
    """WCAG's contrast of 4.5 for all text in view, counted by the browser's own colours."""
    stage = Stage(30)
    stage.happen("db-1", EventCode.REFUSED, "refused")
    url = await serving(stage)
    for theme in ("light", "dark"):
        page = await (await open_window(url, theme=theme)).open()
        await page.click('.row[data-name="db-1"]')
        await page.wait_for_selector(".event")
        assert await page.evaluate(_FAINT_TEXTS) == []


_FAINT_TEXTS = """() => {
    const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = (colour) => {
        const [r, g, b] = channels(colour).map((one) => one / 255)
            .map((one) => (one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (element) => {
        for (let one = element; one; one = one.parentElement) {
            const colour = getComputedStyle(one).backgroundColor;
            if (colour.startsWith("rgb(")) return colour;
        }
        return "rgb(255, 255, 255)";
    };
    const faint = new Set();
    for (const element of document.querySelectorAll("body *")) {
        const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
        if (!own || !element.checkVisibility()) continue;
        const [a, b] = [light(getComputedStyle(element).color), light(behind(element))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < 4.5) faint.add(`${element.className} ${element.textContent.slice(0, 20)} ${ratio.toFixed(2)}`);
    }
    return [...faint];
}"""


async def test_pictures_of_both_themes_are_taken(serving: Serve, open_window: Open) -> None:
    stage = Stage(30)
    texts = (
        (EventCode.GROWN, "grown from 2 CPU to 3 CPU", Kind.CPU),
        (EventCode.ASKING, "asked to give back 1.5 GiB", Kind.MEMORY),
        (EventCode.REFUSED, "gave 512 MiB of 1.5 GiB: the rest is in use", Kind.MEMORY),
        (EventCode.SHRUNK, "shrunk from 4 GiB to 2.5 GiB", Kind.MEMORY),
    )
    names = list(stage.guests)
    for index in range(40):
        code, text, kind = texts[index % 4]
        stage.happen(names[index * 7 % 30], code, text, kind, ago=(40 - index) * 13)
    url = await serving(stage)
    PICTURES.mkdir(parents=True, exist_ok=True)
    for theme in ("dark", "light"):
        for label, size in (("desktop", DESKTOP), ("phone", PHONE)):
            page = await (await open_window(url, size, theme)).open()
            path = PICTURES / f"{label}-{theme}.png"
            if label == "desktop":
                await page.click('.row[data-name="db-2"]')
                await page.wait_for_selector(".reasons")
                await page.wait_for_selector(".u-series:nth-child(2) .u-value")
            await page.screenshot(path=path)
            assert path.stat().st_size > 20_000
