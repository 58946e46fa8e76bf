"""The metrics over HTTP: `/metrics`, and `/-/healthy` for who only wants to know that the broker answers."""

import asyncio
import gzip

from aiohttp import web
from prometheus_client.exposition import gzip_accepted

from guestd.broker.metrics.exposition import Exposition
from guestd.broker.metrics.host import Source
from guestd.broker.outlets import Address
from guestd.broker.web.listen import serve_http

_LEVEL = 1  # the text repeats itself: the lowest shrinks it by a factor of 20


async def serve_metrics(source: Source, address: Address, hosts: tuple[str, ...]) -> web.AppRunner:
    """Serve until the runner's `cleanup`.

    :param hosts: further names that the broker may be called by, see `serve_http`.
    """
    return await serve_http(metrics_app(source), address, hosts, "the metrics")


def metrics_app(source: Source) -> web.Application:
    """What answers."""
    exposition = Exposition(source)

    async def metrics(request: web.Request) -> web.Response:
        body, content_type = await exposition.render(request.headers.get("Accept", ""))
        headers = {"Content-Type": content_type, "Vary": "Accept, Accept-Encoding"}
        if gzip_accepted(request.headers.get("Accept-Encoding", "")):
            body = await asyncio.to_thread(gzip.compress, body, _LEVEL)
            headers["Content-Encoding"] = "gzip"
        return web.Response(body=body, headers=headers)

    async def healthy(_: web.Request) -> web.Response:
        return web.Response(text="guestd-broker is healthy.\n")

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/-/healthy", healthy)
    return app
