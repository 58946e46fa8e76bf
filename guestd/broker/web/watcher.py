"""One browser that watches, and what it has not been told yet: bounded, however slow it is."""

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Mapping

import msgspec

KEPT_EVENTS = 100


def encode_message(
    host: bytes, guests: Iterable[bytes], gone: Iterable[str], events: Iterable[bytes], missed: int
) -> bytes:
    """One JSON object, of parts that are encoded already; `at` is the broker's time, ms since 1970."""
    return b'{"at":%d,"host":%b,"guests":[%b],"gone":%b,"events":[%b],"missed":%d}' % (
        time.time() * 1000,
        host,
        b",".join(guests),
        msgspec.json.encode(list(gone)),
        b",".join(events),
        missed,
    )


class Watcher:
    """Remembers which guests changed, never how: one that is slow misses states in between, not the newest one."""

    def __init__(self) -> None:
        self.ended = False
        self._guests: set[str] = set()
        self._host = False
        self._events: deque[bytes] = deque()
        self._missed = 0
        self._wake = asyncio.Event()

    def tell(self, guests: Iterable[str]) -> None:
        """These changed, and the host with them."""
        self._guests.update(guests)
        self._host = True
        self._wake.set()

    def tell_event(self, event: bytes, missed: int) -> None:
        """This happened, after so many that nobody saw. The newest are kept."""
        if len(self._events) == KEPT_EVENTS:
            self._events.popleft()
            missed += 1
        self._missed += missed
        self._events.append(event)
        self._wake.set()

    def end(self) -> None:
        """There will be no more."""
        self.ended = True
        self._wake.set()

    async def wait(self) -> None:
        """Until there is something to say."""
        await self._wake.wait()

    def take(self, host: bytes, rows: Mapping[str, bytes]) -> bytes:
        """All that it has not been told, as `encode_message` puts it."""
        changed = [rows[name] for name in self._guests if name in rows]
        gone = [name for name in self._guests if name not in rows]
        text = encode_message(host if self._host else b"null", changed, gone, self._events, self._missed)
        self.forget()
        return text

    def forget(self) -> None:
        """It was told everything."""
        self._guests.clear()
        self._events.clear()
        self._host, self._missed = False, 0
        self._wake.clear()
