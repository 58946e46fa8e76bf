"""All metrics as text.

With thousands of guests the library's way, an object per line, takes too long: it renders the lines of one guest that
does not exist, and each guest's lines are those with its name and its numbers. Between guests others have their turn.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

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
_number = lru_cache(maxsize=1 << 16)(floatToGoString)  # most are like those of the guests beside
Encoder = Callable[[Collector], bytes]


@dataclass(frozen=True, slots=True)
class _Line:
    """One line of each guest: what is before and after the guest's name, and how its number is read."""

    family: int
    before: str
    after: str
    kind: Kind | None
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
        texts: list[list[str]] = []
        lines: list[_Line] = []
        for number, family in enumerate(FAMILIES):
            head, its_lines = _template(encoder, number, family)
            texts.append([head])
            lines += its_lines
        clock = asyncio.get_running_loop().time
        pause_at = clock() + _SLICE_SECONDS
        for name in self._source.guest_names():
            if clock() >= pause_at:
                await asyncio.sleep(0)
                pause_at = clock() + _SLICE_SECONDS
            try:
                view = self._source.guest_view(name)
            except NotFoundError:  # removed a moment ago
                continue
            subjects: dict[Kind | None, object] = {kind: view.resource(kind) for kind in Kind}
            subjects[None] = view
            for line in lines:
                value = line.read(subjects[line.kind])
                if value is not None:
                    texts[line.family].append(f"{line.before}{name}{line.after}{_number(value)}\n")
        await asyncio.sleep(0)
        return "".join(text for of_family in texts for text in of_family).encode()


def _encoder(accept: str) -> tuple[Encoder, str]:
    """The library's choice; plain text where it stumbles over what it was asked for."""
    try:
        return choose_encoder(accept)
    except (TypeError, ValueError):
        return choose_encoder("")


def _template(encoder: Encoder, number: int, family: Family) -> tuple[str, Iterator[_Line]]:
    """The family's head, and its lines."""
    rendered = encoder(_One(family.template())).removesuffix(_END).decode().splitlines(keepends=True)
    head = "".join(line for line in rendered if line.startswith("#"))
    samples = [line.rpartition(" ")[0] + " " for line in rendered if not line.startswith("#")]
    lines = (
        _Line(number, before + 'guest="', '"' + after, series.kind, series.read)
        for series, (before, _, after) in zip(
            family.series, (sample.partition(_GUEST) for sample in samples), strict=True
        )
    )
    return head, lines
