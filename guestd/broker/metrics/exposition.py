"""All metrics as text.

With thousands of guests the library's way, an object per line, takes too long: it renders the lines of one guest that
does not exist, and each guest's lines are those with its name and its numbers. Between guests others have their turn.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from guestd.broker.metrics.guests import ANY_GUEST, FAMILIES, Family, Read
from guestd.broker.metrics.host import HostCollector, Source
from guestd.model.errors import NotFoundError
from guestd.model.resources import Kind

_SLICE_SECONDS = 0.005
_END = b"# EOF\n"  # OpenMetrics has it
_GUEST = f'guest="{ANY_GUEST}"'
_PART = {None: 0, Kind.CPU: 1, Kind.MEMORY: 2}
"""Of a guest's view: all of it, and its resources."""
_number = lru_cache(maxsize=1 << 16)(floatToGoString)  # most are like those of the guests beside
Encoder = Callable[[Collector], bytes]


class _Line(NamedTuple):
    """One line of each guest: where it is put, what is before and after the guest's name, and how its number is read
    from which part of the guest's view.
    """

    put: Callable[[str], None]
    before: str
    after: str
    part: int  # see `_PART`
    read: Read


class _One(Collector):
    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return (self._metric,)


class Exposition:
    """Renders what there is when it is asked; one request after the other."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._registry = CollectorRegistry()
        self._registry.register(HostCollector(source))
        ProcessCollector(registry=self._registry)
        self._busy = asyncio.Lock()

    async def render(self, accept: str) -> tuple[bytes, str]:
        """The text and its content type.

        :param accept: the header of that name; empty for plain text.
        """
        encoder, content_type = _encoder(accept)
        async with self._busy:
            host = encoder(self._registry)
            guests = await self._guests(encoder)
        end = _END if host.endswith(_END) else b""
        return b"".join((host.removesuffix(_END), guests, end)), content_type

    async def _guests(self, encoder: Encoder) -> bytes:
        texts: list[list[str]] = [[] for _ in FAMILIES]
        lines = [line for family, text in zip(FAMILIES, texts, strict=True) for line in _begin(text, encoder, family)]
        clock = asyncio.get_running_loop().time
        pause_at = clock() + _SLICE_SECONDS
        for name in self._source.guest_names():
            if clock() >= pause_at:
                await asyncio.sleep(0)
                pause_at = clock() + _SLICE_SECONDS
            try:
                view = self._source.guest_numbers(name)
            except NotFoundError:  # removed a moment ago
                continue
            parts = (view, view.resource(Kind.CPU), view.resource(Kind.MEMORY))
            for put, before, after, part, read in lines:
                value = read(parts[part])
                if value is not None:
                    put(f"{before}{name}{after}{_number(value)}\n")
        await asyncio.sleep(0)
        return "".join(text for of_family in texts for text in of_family).encode()


def _encoder(accept: str) -> tuple[Encoder, str]:
    """The library's choice; plain text where it stumbles over what it was asked for."""
    try:
        return choose_encoder(accept)
    except (TypeError, ValueError):
        return choose_encoder("")


def _begin(text: list[str], encoder: Encoder, family: Family) -> Iterator[_Line]:
    """Put the family's head there, and return its lines."""
    rendered = encoder(_One(family.template())).removesuffix(_END).decode().splitlines(keepends=True)
    text += [line for line in rendered if line.startswith("#")]
    samples = [line for line in rendered if not line.startswith("#")]
    for series, sample in zip(family.series, samples, strict=True):
        before, _, after = sample.rpartition(" ")[0].partition(_GUEST)
        yield _Line(text.append, f'{before}guest="', f'"{after} ', _PART[series.kind], series.read)
