"""The files of a record: one after the other in a directory of their own, and together never more than a bound.

Each begins with a snapshot, so each can be replayed without those before it; the oldest go when there is no room.
"""

import os
from contextlib import suppress
from pathlib import Path

from guestd.broker.disk import leave_room
from guestd.broker.record.frames import MAGIC, frame
from guestd.model.errors import RecordError
from guestd.model.units import format_size

_SUFFIX = ".record"
_PARTS = 8  # a file is this part of the bound: so much of it is empty when the oldest went


class Segments:
    """All calls come from one thread.

    :param limit_bytes: of all files together.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self.directory, self._limit = directory, limit_bytes
        self._path: Path | None = None
        self._descriptor = -1
        self._size = self._full_size = 0

    @property
    def full(self) -> bool:
        """Whether it is time for a new one."""
        return self._descriptor >= 0 and self._size >= self._full_size

    def begin(self, header: bytes, snapshot: bytes) -> None:
        """End the file that is written, and begin the next one.

        :raise OSError: When it cannot be written; nothing of it is left.
        :raise RecordError: When the bound is too small for it.
        """
        self.close()
        data = MAGIC + frame(header) + frame(snapshot)
        if len(data) * 2 > self._limit:
            raise RecordError(
                f"a snapshot takes {format_size(len(data))}, and record.size is {format_size(self._limit)}: "
                f"set it to {format_size(len(data) * _PARTS)} or more"
            )
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        leave_room(self.directory)
        self._make_room(len(data))
        newest = max((int(path.stem) for path in self._files() if path.stem.isdecimal()), default=0)
        self._path = self.directory / f"{newest + 1:010}{_SUFFIX}"
        self._descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        self._full_size = max(self._limit // _PARTS, 2 * len(data))
        try:
            self._write(data)
        except OSError:
            self._path.unlink(missing_ok=True)
            self.close()
            raise

    def append(self, payload: bytes) -> None:
        """One more frame.

        :raise OSError: When it cannot be written; what was before stays.
        :raise RecordError: When there is no room for it within the bound.
        """
        data = frame(payload)
        leave_room(self.directory)
        self._make_room(len(data))
        self._write(data)

    def close(self) -> None:
        """End the file that is written."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._path, self._size = -1, None, 0

    def _write(self, data: bytes) -> None:
        while data:
            written = os.write(self._descriptor, data)
            self._size += written
            data = data[written:]

    def _make_room(self, size: int) -> None:
        files = self._files()
        sizes = {path: path.stat().st_size for path in files}
        if self._size + size > self._limit:
            raise RecordError(f"{format_size(size)} at once do not fit into record.size")
        taken = sum(sizes.values()) + size
        for path in files:
            if taken > self._limit and path != self._path:
                with suppress(FileNotFoundError):
                    path.unlink()
                taken -= sizes[path]

    def _files(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.directory.glob(f"*{_SUFFIX}"))
