"""Who may ask over HTTP, by which name, and how much; on real sockets."""

import asyncio
import logging
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from guestd.broker.outlets import Address
from guestd.broker.web.listen import is_known, serve_http

LOOPBACK = Address("127.0.0.1", 0)


async def _hello(_: web.Request) -> web.Response:
    return web.Response(text="hello")


@pytest.fixture
async def listener() -> AsyncIterator[str]:
    """The URL of a listener that also answers to `page.example`."""
    app = web.Application()
    app.router.add_get("/", _hello)
    runner = await serve_http(app, LOOPBACK, ("page.example",), "the page")
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    await runner.cleanup()


@pytest.mark.parametrize(
    ("host", "address", "known"),
    [
        ("127.0.0.1:9756", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.1", True),
        ("localhost:8080", "127.0.0.1", True),  # a tunnel with another port
        ("LOCALHOST.", "127.0.0.1", True),
        ("[::1]:9756", "127.0.0.1", True),
        ("[::1]:9756", "::1", True),
        ("localhost", "::1", True),
        ("page.example:9756", "127.0.0.1", True),
        ("Page.Example", "127.0.0.1", True),
        ("10.1.2.3:9756", "10.1.2.3", True),
        ("10.9.9.9", "0.0.0.0", True),
        ("localhost", "10.1.2.3", False),
        ("10.1.2.4", "10.1.2.3", False),
        ("10.1.2.3", "127.0.0.1", False),
        ("evil.example", "0.0.0.0", False),
        ("localhost.evil.example", "127.0.0.1", False),
        ("127.0.0.1.evil.example", "127.0.0.1", False),
        ("evil.example@127.0.0.2x", "127.0.0.1", False),
        ("", "127.0.0.1", False),
        ("[::1", "::1", False),
    ],
)
def test_only_the_address_and_listed_names_are_answered_to(host: str, address: str, known: bool) -> None:
    assert is_known(host, Address(address, 9756), ("page.example",)) is known


async def test_a_name_that_is_not_ours_is_told_what_to_set(listener: str) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(listener, headers={"Host": "rebound.example"}) as reply:
            assert reply.status == 421
            text = await reply.text()
        assert '"hosts" of [web] in broker.toml' in text
        assert "rebound" not in text
        async with session.get(listener, headers={"Host": "page.example"}) as reply:
            assert (reply.status, await reply.text()) == (200, "hello")


async def test_every_answer_has_the_headers_that_keep_a_browser_safe(listener: str) -> None:
    async with aiohttp.ClientSession() as session:
        for path, host in (("", "localhost"), ("nothing", "localhost"), ("", "rebound.example")):
            async with session.get(listener + path, headers={"Host": host}) as reply:
                policy = reply.headers["Content-Security-Policy"]
                assert "default-src 'self'" in policy
                assert "frame-ancestors 'none'" in policy
                assert "unsafe" not in policy
                assert reply.headers["X-Content-Type-Options"] == "nosniff"
                assert reply.headers["Referrer-Policy"] == "no-referrer"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_it_is_for_reading_only(listener: str, method: str) -> None:
    async with aiohttp.ClientSession() as session, session.request(method, listener) as reply:
        assert reply.status == 405
    async with aiohttp.ClientSession() as session, session.head(listener) as reply:
        assert reply.status == 200


async def test_a_header_that_is_too_long_is_refused(listener: str) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.get(listener, headers={"X-Long": "x" * 20_000}) as reply,
    ):
        assert reply.status == 400


async def test_connections_are_bounded(listener: str) -> None:
    port = int(listener.rsplit(":")[-1].rstrip("/"))
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(128)]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(5):
        assert await reader.read() == b""
    for _, one in (*connections, (reader, writer)):
        one.close()
    async with asyncio.timeout(5), aiohttp.ClientSession() as session:
        while True:  # it serves again once they are gone
            try:
                async with session.get(listener) as reply:
                    assert reply.status == 200
                    break
            except aiohttp.ClientError:
                await asyncio.sleep(0.02)


async def test_an_address_in_use_is_said_once_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "guestd")
    first = await serve_http(web.Application(), LOOPBACK, (), "the first")
    port = first.addresses[0][1]
    caplog.clear()
    app = web.Application()
    app.router.add_get("/", _hello)
    second = await serve_http(app, Address("127.0.0.1", port), (), "the second", retry_seconds=0.02)
    await asyncio.sleep(0.2)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    said = record.getMessage()
    assert said.startswith(f"cannot listen on 127.0.0.1:{port} for the second: ")
    assert said.endswith("; trying again every 0.02 s, the broker goes on")
    assert second.addresses == []
    await first.cleanup()
    for _ in range(500):
        await asyncio.sleep(0 if second.addresses else 0.02)
    assert caplog.records[-1].getMessage() == f"the second: http://127.0.0.1:{port}/"
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/") as reply:
        assert await reply.text() == "hello"
    await second.cleanup()


async def test_one_that_never_could_listen_ends_as_well() -> None:
    first = await serve_http(web.Application(), LOOPBACK, (), "the first")
    second = await serve_http(web.Application(), Address("127.0.0.1", first.addresses[0][1]), (), "the second")
    await second.cleanup()
    await first.cleanup()
