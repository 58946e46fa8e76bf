"""A broker of the test's own making: what it says to a guest is up to the test, and all that it hears it keeps.

Relay, server and messages are the real ones; only who decides is not.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc.aio

from guestd.model.errors import ProtocolError
from guestd.model.messages import (
    Ack,
    BrokerMessage,
    Demand,
    Grant,
    GuestMessage,
    Hello,
    OrderId,
    Reclaim,
    ReclaimStage,
    Welcome,
)
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Resources
from guestd.model.units import GIB, MIB
from guestd.wire.relay import IngressRelay, Peer, Peers
from guestd.wire.serve_guests import serve_guests

_LIMITS = Resources(1000, 256 * MIB), Resources(64_000, 64 * GIB)


class _Outbox:
    def __init__(self) -> None:
        self._queue: asyncio.Queue[BrokerMessage | ProtocolError] = asyncio.Queue()

    def put(self, one: BrokerMessage | ProtocolError) -> None:
        self._queue.put_nowait(one)

    def end(self, error: ProtocolError) -> None:
        self.put(error)

    async def next(self) -> BrokerMessage:
        one = await self._queue.get()
        if isinstance(one, ProtocolError):
            raise one
        return one


class ScriptedBroker:
    """Serves one guest on a unix socket, from `async with` to its end.

    :param directory: Where the server's own socket is made.
    :param path: Where the guest dials.
    """

    def __init__(self, directory: Path, path: Path, heartbeat_seconds: float = 60.0) -> None:
        self.epoch = 7
        self.hellos: list[Hello] = []
        self.heard: list[GuestMessage] = []
        self._directory, self._path, self._heartbeat_seconds = directory, path, heartbeat_seconds
        self._outbox: _Outbox | None = None
        self._requests = itertools.count(1)
        self._server: grpc.aio.Server | None = None
        self._relay: IngressRelay | None = None

    async def __aenter__(self) -> Self:
        peers = Peers()
        self._server = await serve_guests(self, peers, self._directory / "server")
        self._relay = IngressRelay(self._directory / "server", peers)
        self._relay.listen_unix("guest", self._path, True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._relay is not None:
            await self._relay.close()
        if self._server is not None:
            await self._server.stop(0)

    # ---- what the server asks for ----------------------------------------------------------------

    def connect(self, peer: Peer, hello: Hello) -> tuple[int, _Outbox]:
        """The newest stream is the one that is spoken to."""
        self.hellos.append(hello)
        self._outbox = _Outbox()
        self._outbox.put(Welcome(1, peer.guest, self.epoch, self._heartbeat_seconds, *_LIMITS))
        return len(self.hellos), self._outbox

    def receive(self, peer: Peer, session: int, message: GuestMessage) -> None:
        """Keep it."""
        self.heard.append(message)

    def disconnect(self, peer: Peer, session: int) -> None:
        """Nothing can be said any more, unless there is another stream already."""
        if session == len(self.hellos):
            self._outbox = None

    def count_protocol_error(self, peer: Peer) -> None:
        """Guests in these tests make none."""
        raise AssertionError(f"{peer} said something that makes no sense")

    # ---- what the test says ----------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether a guest is served now."""
        return self._outbox is not None

    @property
    def demand(self) -> Demand | None:
        """The newest need."""
        return next((one for one in reversed(self.heard) if isinstance(one, Demand)), None)

    def id(self, revision: int, epoch: int | None = None) -> OrderId:
        """A new order's name."""
        return OrderId(self.epoch if epoch is None else epoch, next(self._requests), revision)

    def grant(self, kind: Kind, amount: int, revision: int, epoch: int | None = None) -> Grant:
        """An order for as much as `amount`."""
        return Grant(self.id(revision, epoch), kind, amount)

    def reclaim(
        self, kind: Kind, amount: int, revision: int, seconds: float = 10.0, epoch: int | None = None
    ) -> Reclaim:
        """An order to go down to `amount`."""
        reason = Reason("test", "the test wants it")
        return Reclaim(self.id(revision, epoch), kind, amount, ReclaimStage.ASK, seconds, reason)

    def say(self, message: BrokerMessage) -> None:
        """Send it; an assertion fails where no guest is connected."""
        assert self._outbox is not None, "no guest is connected"
        self._outbox.put(message)

    async def ask(self, order: Grant | Reclaim, seconds: float = 30.0) -> Ack:
        """Send an order and wait for its answer.

        :raise AssertionError: When it does not come in time.
        """
        since = len(self.heard)
        self.say(order)
        await self.until(f"an answer to {order}", lambda: bool(self._answers(order, since)), seconds)
        return self._answers(order, since)[0]

    async def until(self, what: str, holds: Callable[[], bool], seconds: float = 30.0) -> None:
        """Wait for something that the guest says or does.

        :raise AssertionError: When it does not come in time.
        """
        end = asyncio.get_running_loop().time() + seconds
        while not holds():
            assert asyncio.get_running_loop().time() < end, f"not within {seconds:g} s: {what}; {self.heard[-4:]}"
            await asyncio.sleep(0.02)

    def _answers(self, order: Grant | Reclaim, since: int) -> list[Ack]:
        return [one for one in self.heard[since:] if isinstance(one, Ack) and one.id == order.id]
