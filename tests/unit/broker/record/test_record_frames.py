"""The file of a record: what is whole is read, what is not is told apart, and nothing in it is believed."""

import os
import pickle
import struct
import zlib
from pathlib import Path

import msgspec
import pytest

from guestd.broker.record.frames import MAGIC, Header, RecordFile, entries_payload, frame
from guestd.broker.record.replay import replay
from guestd.model.errors import RecordError

HEADER = frame(msgspec.json.encode(Header("0.1", 3, 1_700_000_000.0, 50.0)))
ENTRIES = [("pause", ("a", True)), ("next_actions", (51.0,), [])]


def entries(*entries: tuple[object, ...]) -> bytes:
    return frame(entries_payload(len(entries), b"".join(map(msgspec.msgpack.encode, entries))))


def written(tmp_path: Path, *parts: bytes) -> Path:
    path = tmp_path / "1.record"
    path.write_bytes(b"".join(parts))
    return path


def calls(path: Path) -> tuple[list[str], bool]:
    with RecordFile(path) as file:
        return [entry.call for entry in file.entries()], file.cut


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, MAGIC, HEADER, frame(b"snapshot"), entries(*ENTRIES), entries(ENTRIES[0]))
    with RecordFile(path) as file:
        assert file.header == Header("0.1", 3, 1_700_000_000.0, 50.0)
        assert file.snapshot == b"snapshot"
        first, second, third = file.entries()
    assert [first.call, second.call, third.call] == ["pause", "next_actions", "pause"]
    assert [msgspec.msgpack.decode(argument) for argument in first.arguments] == ["a", True]
    assert bytes(second.actions) == msgspec.msgpack.encode([])
    assert not file.cut


def test_a_tail_that_is_cut_off_anywhere_is_left_out(tmp_path: Path) -> None:
    whole = MAGIC + HEADER + frame(b"snapshot") + entries(ENTRIES[0])
    last = entries(ENTRIES[1])
    for missing in range(1, len(last)):
        path = written(tmp_path, whole, last[:-missing])
        assert calls(path) == (["pause"], True)
    assert calls(written(tmp_path, whole)) == (["pause"], False)
    assert calls(written(tmp_path, whole, last[:-3], b"\0\0\0")) == (["pause"], True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is no record of a broker"),
        (os.urandom(4096), "is no record of a broker"),
        (b"guestd-record 2\n" + HEADER, "another version's format; this is format 1"),
        (MAGIC, "is cut off before there is anything to replay"),
        (MAGIC + HEADER, "is cut off before there is anything to replay"),
        (MAGIC + HEADER[:-1], "is cut off before"),
        (MAGIC + frame(b'{"guestd": 1}'), "has no sane header"),
        (MAGIC + frame(b"\xff\xfe"), "has no sane header"),
        (MAGIC + frame(b"[" * 60_000), "has no sane header"),
        (MAGIC + struct.pack("<II", 0xFFFF_FFFF, 0) + b"x", "a frame of 4294967295 bytes"),
        (MAGIC + struct.pack("<II", 2, zlib.crc32(b"xy")) + b"xy", "is damaged at byte 16"),
        (MAGIC + struct.pack("<II", 2, 7) + b"xyz", "its checksum is wrong"),
        (MAGIC + frame(b" " * (1 << 20)), "a frame of no sane size"),
    ],
)
def test_what_is_no_record_is_refused_in_words(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(RecordError, match=words):
        RecordFile(written(tmp_path, content))


def test_entries_that_are_none_are_refused(tmp_path: Path) -> None:
    for payload in (b"\xc1", b"\xdd\xff\xff\xff\xff", b"\x91" * 60_000, entries_payload(1, b"\x91\x01")):
        path = written(tmp_path, MAGIC, HEADER, frame(b"snapshot"), frame(payload))
        with RecordFile(path) as file, pytest.raises(RecordError, match="holds what no broker records"):
            list(file.entries())


def test_damage_before_the_end_is_no_tail(tmp_path: Path) -> None:
    broken = bytearray(entries(ENTRIES[0]))
    broken[-1] ^= 1
    path = written(tmp_path, MAGIC, HEADER, frame(b"snapshot"), bytes(broken), entries(ENTRIES[1]))
    with RecordFile(path) as file, pytest.raises(RecordError, match="its checksum is wrong"):
        list(file.entries())


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"gone\.record: cannot be read: No such file"):
        RecordFile(tmp_path / "gone.record")
    with pytest.raises(RecordError, match="is no regular file"):
        RecordFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecordError, match="is no regular file"):
        RecordFile(tmp_path / "pipe")


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, ("touch evil",))


def test_a_pickle_is_nothing_but_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evil = pickle.dumps(Evil())
    for content in (evil, MAGIC + evil, MAGIC + frame(evil), MAGIC + HEADER + frame(evil)):
        with pytest.raises(RecordError):
            replay(written(tmp_path, content))
    assert not (tmp_path / "evil").exists()
