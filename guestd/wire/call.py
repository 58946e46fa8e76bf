"""One gRPC call with a stream each way, on one HTTP/2 connection, seen from the client: what a guest needs of gRPC.

h2 speaks HTTP/2; here is what gRPC adds (https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md): each
message has five bytes before it, and the status is in the trailers. It takes no thread, no timer and no wakeup
while nothing is said, and works on any connected socket, vsock included.

Weak spots: no compression, no TLS, no second call on the same connection. A GOAWAY is passed over: h2 takes it
for the end of everything, but a server that stops means only that it takes no more calls, and still says why it
ends this one.
"""

import asyncio
import socket
from collections import deque
from typing import cast
from urllib.parse import unquote

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, Event, ResponseReceived, StreamEnded, StreamReset, TrailersReceived
from h2.exceptions import ProtocolError as Http2Error

from guestd.model.errors import UnreachableError

MAX_UNSENT = 64
_PREFIX_BYTES = 5  # 1 byte: compressed or not; 4 bytes: length
_FRAME_HEADER_BYTES = 9  # RFC 9113, section 4.1: 3 bytes length, 1 byte type, flags, stream
_GOAWAY = 7
_STATUS_NAMES = (
    *("OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS"),
    *("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED"),
    *("INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"),
)
"""By number: https://github.com/grpc/grpc/blob/master/doc/statuscodes.md"""


class Call(asyncio.Protocol):
    """One call; `open_call` makes it. It ends when the server, the connection or `close` ends it.

    :param path: ``/package.Service/Method``.
    :param most_bytes: the longest message that is taken.
    """

    def __init__(self, path: str, most_bytes: int) -> None:
        self._path, self._most_bytes = path, most_bytes
        self._http = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self._stream = 1
        self._frames = bytearray()  # came in, not yet a whole frame
        self._data = bytearray()  # came in, not yet a whole message
        self._heard: asyncio.Queue[bytes | UnreachableError] = asyncio.Queue()
        self._unsent: deque[memoryview] = deque()
        self._paused = self._ended = False

    # ---- for the caller --------------------------------------------------------------------------

    def send(self, message: bytes) -> None:
        """Send soon.

        :raise UnreachableError: When so much waits already that the server seems not to read.
        """
        if len(self._unsent) >= MAX_UNSENT:
            raise UnreachableError("the broker does not read what it is sent")
        self._unsent.append(memoryview(b"\0" + len(message).to_bytes(4) + message))
        self._flush()

    async def read(self) -> bytes:
        """The next message.

        :raise UnreachableError: When the call has ended, with the server's status; once.
        """
        heard = await self._heard.get()
        if isinstance(heard, UnreachableError):
            raise heard
        return heard

    def close(self) -> None:
        """Hang up now. What the socket has not taken is lost, and whoever reads hears that the call has ended."""
        self._end("hung up")
        self._transport.abort()

    # ---- for the event loop ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begins the call."""
        self._transport = cast(asyncio.Transport, transport)
        self._http.initiate_connection()
        headers = {":method": "POST", ":scheme": "http", ":path": self._path, ":authority": "localhost"}
        headers |= {"te": "trailers", "content-type": "application/grpc", "user-agent": "guestd"}
        self._http.send_headers(self._stream, list(headers.items()))
        self._flush()

    def data_received(self, data: bytes) -> None:
        self._frames += data
        try:
            while not self._ended and (frame := self._next_frame()):
                for event in self._http.receive_data(frame):
                    self._on_event(event)
        except Http2Error as error:
            self._end(f"INTERNAL: the broker does not speak HTTP/2: {error}")
        self._flush()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(f"UNAVAILABLE: the connection has ended{f': {exc}' if exc else ''}")

    # ---- inside ----------------------------------------------------------------------------------

    def _next_frame(self) -> bytes:
        """The next whole frame that is no GOAWAY, or nothing yet."""
        while len(self._frames) >= _FRAME_HEADER_BYTES:
            length, kind = int.from_bytes(self._frames[:3]), self._frames[3]
            size = _FRAME_HEADER_BYTES + length
            if length > self._http.max_inbound_frame_size:
                raise Http2Error(f"a frame of {length} bytes")
            if len(self._frames) < size:
                break
            frame = bytes(self._frames[:size])
            del self._frames[:size]
            if kind != _GOAWAY:
                return frame
        return b""

    def _on_event(self, event: Event) -> None:
        match event:
            case DataReceived():
                self._http.acknowledge_received_data(event.flow_controlled_length, self._stream)
                self._data += event.data
                self._take_messages()
            case ResponseReceived() | TrailersReceived():
                self._on_headers(dict(cast(list[tuple[str, str]], event.headers)))
            case StreamEnded():
                self._end("UNKNOWN: the broker ended the stream without a status")
            case StreamReset():
                self._end(f"UNAVAILABLE: the broker reset the stream (HTTP/2 error {int(event.error_code)})")

    def _take_messages(self) -> None:
        while len(self._data) >= _PREFIX_BYTES:
            length = int.from_bytes(self._data[1:_PREFIX_BYTES])
            if self._data[0] or length > self._most_bytes:
                what = "a compressed message" if self._data[0] else f"a message of {length} bytes"
                self._end(
                    f"RESOURCE_EXHAUSTED: {what} from the broker, at most {self._most_bytes} plain ones are taken"
                )
                return
            end = _PREFIX_BYTES + length
            if len(self._data) < end:
                return
            self._heard.put_nowait(bytes(self._data[_PREFIX_BYTES:end]))
            del self._data[:end]

    def _on_headers(self, headers: dict[str, str]) -> None:
        number = headers.get("grpc-status")
        if number is not None:
            known = number.isdecimal() and int(number) < len(_STATUS_NAMES)
            name = _STATUS_NAMES[int(number)] if known else f"status {number}"
            text = unquote(headers.get("grpc-message", ""))
            self._end("the broker ended the stream" if name == "OK" else f"{name}: {text}")
        elif headers.get(":status", "200") != "200":
            self._end(f"UNAVAILABLE: the broker answered with HTTP status {headers[':status']}")

    def _end(self, why: str) -> None:
        if not self._ended:
            self._ended = True
            self._unsent.clear()
            self._heard.put_nowait(UnreachableError(why))

    def _flush(self) -> None:
        """Send what flow control and the socket allow."""
        while self._unsent and not self._ended and not self._paused:
            room = min(self._http.local_flow_control_window(self._stream), self._http.max_outbound_frame_size)
            if room <= 0:
                break
            first = self._unsent.popleft()
            if len(first) > room:
                self._unsent.appendleft(first[room:])
            self._http.send_data(self._stream, bytes(first[:room]))
            self._write()
        self._write()

    def _write(self) -> None:
        data = self._http.data_to_send()
        if data and not self._transport.is_closing():
            self._transport.write(data)


async def open_call(sock: socket.socket, path: str, most_bytes: int) -> Call:
    """A call on a connected stream socket, which it owns from here on.

    :raise OSError: When the socket is not connected.
    """
    try:
        _, call = await asyncio.get_running_loop().create_connection(lambda: Call(path, most_bytes), sock=sock)
    except BaseException:
        sock.close()
        raise
    return call
