"""The file of a record: who wrote it, a snapshot of the machine, and all that the machine was told since.

::

    guestd-record 1\\n      the format; another number is another version's
    frame                  the header, JSON
    frame                  the snapshot (see `snapshot`), JSON
    frame ...              entries (see `calls`), one MessagePack array in each

A frame is length and CRC-32 of its payload, both 32 bits little-endian, and the payload, compressed by zlib.
Whoever died while writing leaves a last frame that is cut off: reading ends before it. Any other flaw is an
error, and nothing is believed of a length before it was found to be sane: such a file may come from anybody.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Self

import msgspec

from guestd.model.errors import RecordError

FORMAT = 1
_NAME = b"guestd-record "
MAGIC = _NAME + b"%d\n" % FORMAT
_HEAD = struct.Struct("<II")
_LONGEST_FRAME_BYTES = 64 << 20
_LARGEST_HEADER_BYTES = 64 << 10
LARGEST_SNAPSHOT_BYTES = 256 << 20
LARGEST_ENTRIES_BYTES = 64 << 20
_QUICK = 1  # zlib's level: half of the best one's gain for a tenth of its time


class Header(msgspec.Struct, frozen=True):
    """Who recorded, and when: `clock` (the machine's) and `wall` (seconds since 1970) are of the same moment."""

    guestd: str
    epoch: int
    wall: float
    clock: float


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One call of the machine, and the actions that it gave if it was `next_actions`."""

    call: str
    arguments: list[msgspec.Raw]
    actions: msgspec.Raw = msgspec.Raw()


_ENTRIES = msgspec.msgpack.Decoder(list[Entry])


def frame(payload: bytes) -> bytes:
    """A payload as it stands in the file."""
    packed = zlib.compress(payload, _QUICK)
    return _HEAD.pack(len(packed), zlib.crc32(packed)) + packed


def entries_payload(count: int, data: bytes | bytearray) -> bytes:
    """So many encoded entries as one MessagePack array."""
    return b"\xdd" + count.to_bytes(4, "big") + data


class RecordFile:
    """One file, read once from its beginning to its end."""

    def __init__(self, path: Path) -> None:
        """Read the beginning.

        :raise RecordError: When there is no such file, it is no record, or its beginning is not whole.
        """
        self.path, self.cut = path, False
        try:
            if path.exists() and not path.is_file():
                raise RecordError(f"{path}: is no regular file")
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise RecordError(f"{path}: cannot be read: {error.strerror}") from error
        try:
            self._check_magic()
            self.header = self._read_header()
            self.snapshot = self._needed(LARGEST_SNAPSHOT_BYTES)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def entries(self) -> Iterator[Entry]:
        """What follows. `cut` tells after that whether the last frame was not whole.

        :raise RecordError: When the file is damaged.
        """
        while (payload := self._frame(LARGEST_ENTRIES_BYTES)) is not None:
            try:
                yield from _ENTRIES.decode(payload)
            except (msgspec.MsgspecError, RecursionError) as error:
                raise RecordError(f"{self.path}: holds what no broker records: {error}") from error

    def _read_header(self) -> Header:
        try:
            return msgspec.json.decode(self._needed(_LARGEST_HEADER_BYTES), type=Header)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise RecordError(f"{self.path}: has no sane header: {error}") from error

    def _check_magic(self) -> None:
        line = self._read(len(MAGIC))
        if line == MAGIC:
            return
        if line.startswith(_NAME):
            raise RecordError(f"{self.path}: is a record of another version's format; this is format {FORMAT}")
        raise RecordError(f"{self.path}: is no record of a broker; they are in record/ below its state_dir")

    def _needed(self, largest: int) -> bytes:
        payload = self._frame(largest)
        if payload is None:
            raise RecordError(f"{self.path}: is cut off before there is anything to replay")
        return payload

    def _frame(self, largest: int) -> bytes | None:
        """The next payload of at most so many bytes; None at the end."""
        at = self._file.tell()
        head = self._read(_HEAD.size)
        if len(head) < _HEAD.size:
            self.cut = bool(head)
            return None
        length, checksum = _HEAD.unpack(head)
        if length > _LONGEST_FRAME_BYTES:
            raise RecordError(f"{self.path}: is damaged at byte {at}: a frame of {length} bytes")
        packed = self._read(length)
        if zlib.crc32(packed) != checksum or len(packed) < length:
            self.cut = not self._read(1)
            if self.cut:
                return None
            raise RecordError(f"{self.path}: is damaged at byte {at}: its checksum is wrong")
        return self._unpack(packed, largest, at)

    def _unpack(self, packed: bytes, largest: int, at: int) -> bytes:
        """Decompressed, with an eye on what that comes to."""
        unpacking = zlib.decompressobj()
        try:
            payload = unpacking.decompress(packed, largest)
        except zlib.error as error:
            raise RecordError(f"{self.path}: is damaged at byte {at}: {error}") from error
        if not unpacking.eof or unpacking.unused_data:
            raise RecordError(f"{self.path}: is damaged at byte {at}: a frame of no sane size")
        return payload

    def _read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            raise RecordError(f"{self.path}: cannot be read: {error.strerror}") from error
