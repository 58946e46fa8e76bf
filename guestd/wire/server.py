"""What the broker's gRPC services share: what they need of the broker, statuses, sockets and limits.

Every `GuestdError` becomes a gRPC status here and nowhere else.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Protocol

import grpc
import grpc.aio

from guestd.model.errors import AdmissionError, GuestdError, HistoryError, JournalError, NotFoundError, ProtocolError
from guestd.model.event import Event, EventQuery, SeenEvent
from guestd.model.explanation import GuestExplanation, ReclaimedResource, ReclaimRequest
from guestd.model.history import History
from guestd.model.resources import Limits
from guestd.model.view import GuestView, HostView, LimitsChange
from guestd.wire import amounts
from guestd.wire.health import Health

_log = logging.getLogger(__name__)

LOCAL_SERVER_OPTIONS = (("grpc.max_receive_message_length", amounts.MAX_MESSAGE_BYTES), ("grpc.so_reuseport", 0))
STRANGER_SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", amounts.MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 8 * 1024),
    ("grpc.absolute_max_metadata_size", 8 * 1024),
    ("grpc.max_allowed_incoming_connections", 64),
    ("grpc.max_concurrent_streams", 32),
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.keepalive_time_ms", 60_000),  # who is gone without a word is found out
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_ping_strikes", 5),
    ("grpc.so_reuseport", 0),
)
"""On TCP, where anybody can connect."""


class OperatorBackend(Protocol):
    """What monitor and admin service need of the broker. Changes are durable when they return."""

    @property
    def health(self) -> Health:
        """Whether the broker does its work."""
        ...

    def host_view(self) -> HostView: ...
    def guest_names(self) -> list[str]: ...
    def guest_view(self, name: str) -> GuestView: ...
    def subscribe(self) -> tuple[set[str], asyncio.Event, Callable[[], None]]:
        """Names of guests that changed since last emptied, an event set with them, and how to stop."""
        ...

    async def add_guest(
        self, name: str, limits: Limits, qmp_socket: str, cid: int | None, vsock_path: str | None
    ) -> None: ...
    async def remove_guest(self, name: str) -> None: ...
    async def change_limits(self, name: str, change: LimitsChange) -> None: ...
    async def reset_limits(self, name: str) -> None: ...
    async def pause_guest(self, name: str, paused: bool) -> None: ...

    async def explain(self, name: str, at: datetime | None) -> GuestExplanation:
        """:raise NotFoundError: When there is none of that name."""
        ...

    async def events(self, query: EventQuery) -> tuple[Event, ...]: ...

    def follow_events(self, guest: str, after_id: int) -> AsyncGenerator[SeenEvent, None]:
        """Those after that one, or from now on (0); of one guest, or of all (empty)."""
        ...

    async def history(self, name: str, since: datetime | None, until: datetime | None, max_points: int) -> History:
        """:raise NotFoundError: When there is none of that name. :raise ValueError: When the range is none."""
        ...

    async def reclaim_guest(self, name: str, request: ReclaimRequest) -> tuple[ReclaimedResource, ...]:
        """:raise NotFoundError: When there is none of that name.
        :raise AdmissionError: When nothing can be decided about it now, and why.
        """
        ...


@asynccontextmanager
async def status(context: grpc.aio.ServicerContext[object, object]) -> AsyncIterator[None]:
    """Turn guestd's errors into gRPC statuses."""
    try:
        yield
    except NotFoundError as error:
        await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
    except AdmissionError as error:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
    except FileExistsError as error:
        await context.abort(grpc.StatusCode.ALREADY_EXISTS, str(error))
    except (ValueError, ProtocolError) as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    except (JournalError, HistoryError) as error:
        await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
    except GuestdError as error:
        _log.exception("a call failed")
        await context.abort(grpc.StatusCode.INTERNAL, str(error))


def listen_unix(server: grpc.aio.Server, path: Path, mode: int) -> None:
    """Listen on a unix socket; one that a killed broker left behind is replaced.

    :raise OSError: When the socket cannot be made.
    """
    if path.is_socket():
        path.unlink()
    if not server.add_insecure_port(f"unix:{path}"):
        raise OSError(f"cannot listen on {path}")
    path.chmod(mode)
