"""The metrics over HTTP, on a real socket."""

import asyncio
import socket
from collections.abc import AsyncIterator

import aiohttp
import pytest
from metrics_source import FakeSource, guest

from guestd.broker.metrics.serve import serve_metrics
from guestd.broker.outlets import Address


@pytest.fixture
async def url() -> AsyncIterator[str]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = Address("127.0.0.1", sock.getsockname()[1])
    runner = await serve_metrics(FakeSource(guest("a")), address, ("broker.example",))
    yield f"http://{address}"
    await runner.cleanup()


async def get(url: str, **headers: str) -> tuple[int, str, str, bytes]:
    """Status, content type, encoding on the way, and body of an answer, as it came."""
    async with (
        aiohttp.ClientSession(auto_decompress=False) as session,
        session.get(url, headers={name.replace("_", "-"): value for name, value in headers.items()}) as answer,
    ):
        encoding = answer.headers.get("Content-Encoding", "")
        return answer.status, answer.headers["Content-Type"], encoding, await answer.read()


async def test_metrics_are_there_as_plain_text_and_openmetrics(url: str) -> None:
    status, content_type, encoding, body = await get(f"{url}/metrics", Accept_Encoding="identity")
    assert (status, content_type, encoding) == (200, "text/plain; version=0.0.4; charset=utf-8", "")
    assert b'guestd_guest_connected{guest="a"} 1.0\n' in body
    wish = "application/openmetrics-text;version=1.0.0"
    status, content_type, _, body = await get(f"{url}/metrics", Accept=wish, Accept_Encoding="identity")
    assert status == 200 and content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert body.endswith(b"# EOF\n")


async def test_it_is_compressed_for_who_asks(url: str) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as answer:
        assert answer.headers["Content-Encoding"] == "gzip"
        assert answer.headers["Vary"] == "Accept, Accept-Encoding"
        assert b'guestd_guest_connected{guest="a"} 1.0\n' in await answer.read()
    assert len((await get(f"{url}/metrics", Accept_Encoding="gzip"))[3]) < 3000


async def test_it_says_that_it_is_healthy(url: str) -> None:
    assert (await get(f"{url}/-/healthy"))[0] == 200


async def test_only_these_two_are_there_and_only_by_known_names(url: str) -> None:
    assert (await get(f"{url}/"))[0] == 404
    assert (await get(f"{url}/metrics", Host="broker.example"))[0] == 200
    assert (await get(f"{url}/metrics", Host="evil.example"))[0] == 421
    async with aiohttp.ClientSession() as session, session.post(f"{url}/metrics") as answer:
        assert answer.status == 405


async def test_many_scrapes_at_once_are_all_answered(url: str) -> None:
    answers = await asyncio.gather(*(get(f"{url}/metrics") for _ in range(20)))
    assert {status for status, *_ in answers} == {200}
