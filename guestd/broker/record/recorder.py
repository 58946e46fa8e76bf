"""Records what the broker's machine is told and what it decides, at the price of encoding it.

The law:

1. The event loop only encodes into memory, some dozen calls at once: one by one, between other work, each takes several
   times as long. What it is told never changes afterwards. A thread of its own compresses and writes, once a second: it
   is what a crash may lose.
2. A file begins with a snapshot, taken between two rounds, and holds every call since, without a gap.
3. Whatever fails (a full disk, one that hangs, a value that cannot be encoded) is said once and ends the file: nothing
   more is recorded until a new one can begin, which is tried every half minute; each time it fails is counted. The
   broker never waits for it.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

import guestd
from guestd.broker.core.ledger import HostCapacity
from guestd.broker.core.machine import BrokerMachine
from guestd.broker.core.track import Timing
from guestd.broker.disk import way_out
from guestd.broker.metrics.tally import Tally
from guestd.broker.record import snapshot
from guestd.broker.record.frames import Header, entries_payload
from guestd.broker.record.machine import RecordedMachine
from guestd.broker.record.segments import Segments
from guestd.model.errors import RecordError

_log = logging.getLogger(__name__)
_FLUSH_SECONDS = 1.0
_CLOSE_SECONDS = 5.0
_ENCODED_AT_ONCE = 64  # calls
_CHUNK_BYTES = 1 << 20
_MOST_CHUNKS = 32  # that wait for the disk


class _Chunk:
    """Entries that are written as one frame."""

    def __init__(self) -> None:
        self.data, self.count = bytearray(), 0


class _Beginning:
    """A new file."""

    def __init__(self, header: bytes, machine: bytes) -> None:
        self.header, self.machine = header, machine


class Recorder:
    """The record of one broker.

    :param directory: where its files are; made when the first begins.
    :param limit_bytes: of all files together; 0: nothing is recorded.
    :param clock: the machine's.
    :param tally: counts how often it fails.
    :param told: gets what is said of it, in any thread; must not block.
    """

    def __init__(
        self,
        directory: Path,
        limit_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        retry_seconds: float = 30.0,
        tally: Tally | None = None,
        told: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._segments, self._limit, self._clock = Segments(directory, limit_bytes), limit_bytes, clock
        self._retry_seconds, self._tally, self._told = retry_seconds, tally or Tally(), told
        self._encode_into = msgspec.msgpack.Encoder().encode_into
        self._lock = threading.Lock()  # of what follows
        self._noted: list[tuple[object, ...]] = []  # that are still to be encoded
        self._waiting: list[_Chunk | _Beginning] = []
        self._chunk: _Chunk | None = None  # the last of them; None: nothing is recorded now
        self._begin_at = 0.0  # of time.monotonic: when a new file is due
        self._said = ""
        self._wake, self._closing = threading.Event(), False
        self._thread: threading.Thread | None = None

    def machine(
        self, host: HostCapacity, epoch: int, heartbeat_seconds: float = 10.0, timing: Timing | None = None
    ) -> BrokerMachine:
        """A new machine that is recorded, unless nothing is to be."""
        if not self._limit:
            return BrokerMachine(host, epoch, heartbeat_seconds, timing)
        self._thread = threading.Thread(target=self._run, name="record", daemon=True)
        self._thread.start()
        return RecordedMachine(self, host, epoch, heartbeat_seconds, timing)

    def close(self) -> None:
        """Write what there is, and end."""
        if self._thread is not None:
            self._closing = True
            self._wake.set()
            self._thread.join(_CLOSE_SECONDS)

    # ---- in the event loop -----------------------------------------------------------------------

    def note(self, *entry: object) -> None:
        """See `Tape`."""
        with self._lock:
            if self._chunk is None:
                return
            self._noted.append(entry)
            if len(self._noted) >= _ENCODED_AT_ONCE:
                self._encode()

    def may_begin(self, machine: BrokerMachine) -> None:
        """See `Tape`."""
        if self._begin_at == math.inf or time.monotonic() < self._begin_at:
            return
        header = Header(guestd.__version__, machine.epoch, time.time(), self._clock())
        try:
            state = snapshot.encode(machine)
        except (TypeError, ValueError, OverflowError) as error:
            with self._lock:
                self._pause(f"the machine cannot be recorded: {error}")
            return
        with self._lock:
            self._encode()
            self._begin_at = math.inf
            self._waiting.append(_Beginning(msgspec.json.encode(header), state))
            self._next_chunk()

    def _encode(self) -> None:
        """Encode what was noted. The lock is held."""
        noted, self._noted = self._noted, []
        for entry in noted:
            chunk = self._chunk
            if chunk is None:
                return
            length = len(chunk.data)
            try:
                self._encode_into(entry, chunk.data, -1)
                chunk.count += 1
            except (TypeError, ValueError, OverflowError) as error:
                del chunk.data[length:]
                self._pause(f"{entry[0]} cannot be recorded: {error}")
            else:
                if length > _CHUNK_BYTES:
                    self._next_chunk()

    def _next_chunk(self) -> None:
        if len(self._waiting) >= _MOST_CHUNKS:
            where = self._segments.directory
            self._pause(f"the disk of {where} is too slow for what is to be recorded; see what else writes to it")
            self._waiting.clear()
            return
        self._chunk = _Chunk()
        self._waiting.append(self._chunk)
        self._wake.set()

    def _pause(self, why: str) -> None:
        """Nothing more is recorded for a while. The lock is held."""
        self._chunk, self._noted = None, []
        self._begin_at = time.monotonic() + self._retry_seconds
        self._tally.record_interruptions += 1
        if why != self._said:
            self._said = why
            self._say(f"decisions are not recorded now, the broker goes on without: {why}")

    def _say(self, text: str) -> None:
        _log.warning("%s", text)
        self._told(text)

    # ---- in the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        closing = False
        while not closing:
            self._wake.wait(_FLUSH_SECONDS)
            self._wake.clear()
            closing = self._closing  # before it is written: all that was noted until `close` is
            self._write()
        self._segments.close()

    def _write(self) -> None:
        with self._lock:
            self._encode()
            waiting, self._waiting = self._waiting, []
            if self._chunk is not None:
                self._chunk = _Chunk()
                self._waiting.append(self._chunk)
        try:
            for one in waiting:
                self._write_one(one)
        except (OSError, RecordError) as error:
            self._segments.close()
            with self._lock:
                self._waiting.clear()
                directory = self._segments.directory
                self._pause(way_out(directory, error) if isinstance(error, OSError) else f"{directory}: {error}")
            return
        if self._segments.full:
            self._begin_at = 0.0

    def _write_one(self, one: _Chunk | _Beginning) -> None:
        if isinstance(one, _Chunk):
            if one.count:
                self._segments.append(entries_payload(one.count, one.data))
            return
        self._segments.begin(one.header, one.machine)
        if self._said:
            self._said = ""
            self._say("decisions are recorded again")
