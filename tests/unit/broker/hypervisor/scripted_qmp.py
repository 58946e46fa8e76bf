"""A QMP server that answers by a script, for tests of the driver: it can also refuse, hang, cut and babble."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

GREETING = json.dumps({"QMP": {"version": {}, "capabilities": ["oob"]}}).encode() + b"\n"
MIB = 1 << 20


@dataclass(frozen=True)
class Refuse:
    """Answer with an error."""

    text: str
    error_class: str = "GenericError"


@dataclass(frozen=True)
class Raw:
    """Write these bytes instead of an answer; hang up after them if `cut`."""

    data: bytes
    cut: bool = False


HANG = Raw(b"")
CUT = Raw(b"", cut=True)


def cpu(core: int, path: str | None = None, **more: object) -> dict[str, object]:
    """One entry of query-hotpluggable-cpus."""
    props = {"socket-id": 0, "core-id": core, "thread-id": 0}
    entry = {"props": props, "vcpus-count": 1, "type": "fake-cpu", **more}
    return entry if path is None else {**entry, "qom-path": path}


def virtio_mem(size: int = 0, requested: int = 0, maximum: int = 2048 * MIB, name: str = "vm0") -> dict[str, object]:
    """One entry of query-memory-devices."""
    data = {"id": name, "size": size, "requested-size": requested, "max-size": maximum, "block-size": 2 * MIB}
    return {"type": "virtio-mem", "data": data}


class ScriptedQmp:
    """Serves one socket path. `answers` holds what is returned, a `Refuse` or a `Raw`, by command."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.greeting: bytes | None = GREETING  # None: none ever comes
        self.accepted = 0
        self.commands: list[tuple[str, dict[str, object]]] = []
        self.answers: dict[str, object] = {
            "query-status": {"status": "running", "running": True},
            "query-migrate": {},
            "query-hotpluggable-cpus": [cpu(3), cpu(2), cpu(1), cpu(0, "/machine/unattached/device[0]")],
            "query-memory-size-summary": {"base-memory": 512 * MIB, "plugged-memory": 0},
            "query-memory-devices": [virtio_mem()],
            "query-balloon": Refuse("No balloon device has been activated", "DeviceNotActive"),
        }
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        self.cut()
        await asyncio.sleep(0.01)

    def cut(self) -> None:
        """Hang up on everybody."""
        for writer in list(self._writers):
            writer.close()

    def changes(self) -> list[tuple[str, dict[str, object]]]:
        """The commands so far that weren't queries."""
        return [(name, args) for name, args in self.commands if not name.startswith(("query-", "qmp_"))]

    def emit(self, name: object, seconds: int = 0, **data: object) -> None:
        event = {"event": name, "data": data, "timestamp": {"seconds": seconds, "microseconds": 0}}
        for writer in self._writers:
            writer.write(json.dumps(event).encode() + b"\n")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self._writers.add(writer)
        with contextlib.suppress(ConnectionError):
            if self.greeting is not None:
                writer.write(self.greeting)
            text = ""
            while data := await reader.read(65536):  # messages follow each other without newlines
                text += data.decode()
                while text.strip():
                    message, end = json.JSONDecoder().raw_decode(text)  # small ones arrive whole
                    text = text[end:].lstrip()
                    self._answer(message, writer)
        self._writers.discard(writer)
        writer.close()

    def _answer(self, message: dict[str, object], writer: asyncio.StreamWriter) -> None:
        name = str(message["execute"])
        self.commands.append((name, message.get("arguments", {})))  # type: ignore[arg-type]
        answer = self.answers.get(name, {})
        if isinstance(answer, Raw):
            writer.write(answer.data)
            if answer.cut:
                writer.close()
            return
        if isinstance(answer, Refuse):
            body: dict[str, object] = {"error": {"class": answer.error_class, "desc": answer.text}}
        else:
            body = {"return": answer}
        writer.write(json.dumps({**body, "id": message.get("id")}).encode() + b"\n")


@contextlib.asynccontextmanager
async def serving(path: Path) -> AsyncIterator[ScriptedQmp]:
    """A server that runs within the block."""
    server = ScriptedQmp(path)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
