"""An HTTP listener for reading only: who may ask, by which name, and how much.

A page of another site that an operator has open can make the browser resolve that site's name to 127.0.0.1 and read
what is there as its own (DNS rebinding). So a request must call this broker by its address, or by a name that the
configuration lists.
"""

import asyncio
import contextlib
import ipaddress
import logging
from functools import partial
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from guestd.broker.outlets import Address

_log = logging.getLogger(__name__)
_MOST_CONNECTIONS = 128
_MOST_HEADERS = 64
_MOST_HEADER_BYTES = 8192
_IDLE_SECONDS = 30.0
_GOODBYE_SECONDS = 0.5
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Listener(web.AppRunner):
    """Listens as soon as it can. That an address is not this host's yet, or taken, is said once; it is tried again."""

    _said = ""
    _trying: asyncio.Task[None] | None = None

    async def listen(self, address: Address, what: str, retry_seconds: float) -> None:
        """Listen, or go on trying until `cleanup`."""

        async def keep_trying() -> None:
            listening = False
            while not listening:
                await asyncio.sleep(retry_seconds)
                listening = await self._listen(address, what, retry_seconds)

        if not await self._listen(address, what, retry_seconds):
            self._trying = asyncio.create_task(keep_trying())

    async def cleanup(self) -> None:
        """See `AppRunner`."""
        if self._trying is not None:
            self._trying.cancel()
            await asyncio.gather(self._trying, return_exceptions=True)
        await super().cleanup()

    async def _listen(self, address: Address, what: str, retry_seconds: float) -> bool:
        site = _Site(self, address.host, address.port)
        try:
            await site.start()
        except OSError as error:
            await site.stop()
            if str(error) != self._said:
                self._said = str(error)
                text = "cannot listen on %s for %s: %s; trying again every %g s, the broker goes on"
                _log.error(text, address, what, error, retry_seconds)
            return False
        _log.info("%s: http://%s/", what, address)
        return True


async def serve_http(
    app: web.Application, address: Address, hosts: tuple[str, ...], what: str, retry_seconds: float = 30.0
) -> Listener:
    """Serve `app` until the listener's `cleanup`.

    :param hosts: further names that a request may call this broker by, in lower case.
    :param what: it is, for the log.
    """
    app.middlewares.insert(0, _gate(address, hosts))
    app.on_response_prepare.append(_secure)
    listener = Listener(
        app,
        access_log=None,
        handle_signals=False,
        handler_cancellation=True,  # who went is noticed at once
        keepalive_timeout=_IDLE_SECONDS,
        shutdown_timeout=_GOODBYE_SECONDS,
        max_line_size=_MOST_HEADER_BYTES,
        max_field_size=_MOST_HEADER_BYTES,
        max_headers=_MOST_HEADERS,
    )
    await listener.setup()
    await listener.listen(address, what, retry_seconds)
    return listener


def is_known(host: str, address: Address, hosts: tuple[str, ...]) -> bool:
    """Whether a request's `Host` names this listener. The port does not matter: a tunnel may have another one."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    with contextlib.suppress(ValueError):
        literal, own = ipaddress.ip_address(name), ipaddress.ip_address(address.host)
        return own.is_unspecified or literal == own or (own.is_loopback and literal.is_loopback)
    return name in hosts or (name == "localhost" and address.is_loopback)


def _gate(address: Address, hosts: tuple[str, ...]) -> Middleware:
    @web.middleware
    async def gate(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not is_known(request.headers.get("Host", ""), address, hosts):
            text = (
                f'This broker does not answer to that name. Ask for http://{address}/, or add the name to "hosts" of '
                "[web] in broker.toml.\n"
            )
            return web.Response(status=421, text=text)
        if request.method not in ("GET", "HEAD"):
            raise web.HTTPMethodNotAllowed(
                request.method, ("GET", "HEAD"), text="Only GET and HEAD: this only shows.\n"
            )
        return await handler(request)

    return gate


async def _secure(_: web.Request, response: web.StreamResponse) -> None:
    for name, value in _HEADERS.items():
        response.headers[name] = value


class _Site(web.TCPSite):
    """A listener with a bounded number of connections; one that is too many is closed at once."""

    async def start(self) -> None:
        await web.BaseSite.start(self)
        server = self._runner.server
        assert server is not None
        self._server = await asyncio.get_running_loop().create_server(
            partial(_connection, server), self._host, self._port, backlog=self._backlog
        )


class _Refusal(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


def _connection(server: web.Server) -> asyncio.BaseProtocol:
    return server() if len(server.connections) < _MOST_CONNECTIONS else _Refusal()
