"""The live page: its files, and what they ask the broker for. Nothing here changes anything.

``/api/stream`` says everything first (``snapshot``), then what changed (``change``), and lives (``beat``).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from aiohttp import web

from guestd.broker.outlets import Address
from guestd.broker.web.feed import CrowdedError, Feed
from guestd.broker.web.listen import serve_http
from guestd.broker.web.watcher import Watcher
from guestd.model.errors import GuestdError, NotFoundError
from guestd.wire.server import OperatorBackend

_log = logging.getLogger(__name__)
_STATIC = Path(__file__).with_name("static")
_BEAT_SECONDS = 10.0
_PATIENCE_SECONDS = 30.0  # with a browser that does not read
_RECONNECT_MILLISECONDS = 1000
_POINTS = 300
_LONGEST_SECONDS = 366 * 24 * 3600


async def serve_page(backend: OperatorBackend, address: Address, hosts: tuple[str, ...]) -> web.AppRunner:
    """The live page of that broker, until the runner's `cleanup`.

    :param hosts: further names that a browser may call it by.
    """
    return await serve_http(Page(backend).app(), address, hosts, "the live page")


class Page:
    """Answers browsers."""

    def __init__(self, backend: OperatorBackend) -> None:
        self._backend = backend
        self._feed = Feed(backend)

    def app(self) -> web.Application:
        """All routes."""
        app = web.Application(middlewares=[_plain_errors])
        app.router.add_get("/", self._index)
        app.router.add_static("/static/", _STATIC)
        app.router.add_get("/api/state", self._state)
        app.router.add_get("/api/history", self._history)
        app.router.add_get("/api/explain", self._explain)
        app.router.add_get("/api/stream", self._stream, allow_head=False)
        app.on_response_prepare.append(_fresh)
        app.on_shutdown.append(self._close)
        return app

    async def _close(self, _: web.Application) -> None:
        await self._feed.close()

    async def _index(self, _: web.Request) -> web.FileResponse:
        return web.FileResponse(_STATIC / "index.html")

    async def _state(self, _: web.Request) -> web.Response:
        return _json(await self._feed.state())

    async def _explain(self, request: web.Request) -> web.Response:
        return _json(msgspec.json.encode(await self._backend.explain(_guest(request), None)))

    async def _history(self, request: web.Request) -> web.Response:
        text = request.query.get("seconds", "3600")
        if not text.isdecimal() or not 1 <= int(text) <= _LONGEST_SECONDS:
            raise ValueError(f"seconds must be a whole number within 1..{_LONGEST_SECONDS}")
        until = datetime.now(UTC)
        since = until - timedelta(seconds=int(text))
        return _json(msgspec.json.encode(await self._backend.history(_guest(request), since, until, _POINTS)))

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        watcher, snapshot = await self._feed.join()
        try:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await _write(response, b"retry: %d\n" % _RECONNECT_MILLISECONDS + _event(b"snapshot", snapshot))
            while not watcher.ended:
                if await _waited(watcher):
                    await _write(response, _event(b"change", self._feed.news(watcher)))
                else:
                    await _write(response, _event(b"beat", b"{}"))
        except (TimeoutError, ConnectionError):
            pass  # it went, or does not read
        finally:
            await self._feed.leave(watcher)
        return response


async def _waited(watcher: Watcher) -> bool:
    """Whether there is something to say before the next beat is due."""
    try:
        async with asyncio.timeout(_BEAT_SECONDS):
            await watcher.wait()
    except TimeoutError:
        return False
    return True


async def _write(response: web.StreamResponse, text: bytes) -> None:
    async with asyncio.timeout(_PATIENCE_SECONDS):
        await response.write(text)


def _event(name: bytes, data: bytes) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name, data)


def _json(text: bytes) -> web.Response:
    return web.Response(body=text, content_type="application/json")


def _guest(request: web.Request) -> str:
    name = request.query.get("guest", "")
    if not name:
        raise ValueError("guest= is missing: whose?")
    return name


@web.middleware
async def _plain_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """What went wrong as `{"error": ...}`."""
    try:
        return await handler(request)
    except NotFoundError as error:
        status, text = 404, str(error)
    except ValueError as error:
        status, text = 400, str(error)
    except CrowdedError as error:
        status, text = 503, str(error)
    except GuestdError as error:
        _log.warning("the live page: %s: %s", request.path, error)
        status, text = 503, str(error)
    return web.json_response({"error": text}, status=status)


async def _fresh(_: web.Request, response: web.StreamResponse) -> None:
    """After an upgrade of the broker no browser mixes old files with new ones."""
    response.headers["Cache-Control"] = "no-cache" if isinstance(response, web.FileResponse) else "no-store"
