"""A scripted QMP server whose VM has DIMM slots: what is added is there, and the test is its guest."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from scripted_qmp import MIB, Refuse, ScriptedQmp

DIMM_BYTES = 512 * MIB


class DimmQmp(ScriptedQmp):
    """512 MiB of boot memory and three slots for 1536 MiB more. Commands in `answers` are answered by that instead."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.dimms: dict[str, dict[str, object]] = {}
        self.backends: dict[str, dict[str, object]] = {"ram0": {"id": "ram0", "size": 512 * MIB, "share": True}}
        self.answers["qom-get"] = {"size": 512 * MIB, "max-size": 2048 * MIB, "slots": 3}

    def leave(self, name: str) -> None:
        """The guest let go of a DIMM."""
        del self.dimms[name]
        self.emit("DEVICE_DELETED", device=name, path=f"/machine/peripheral/{name}")

    def keep(self, name: str) -> None:
        """The guest's firmware says that it cannot."""
        self.emit("ACPI_DEVICE_OST", info={"device": name, "slot": "0", "slot-type": "DIMM", "source": 3, "status": 1})

    def removals(self) -> list[str]:
        """The DIMMs whose removal was asked for, in order."""
        return [str(args["id"]) for name, args in self.commands if name == "device_del"]

    def _answer(self, message: dict[str, object], writer: asyncio.StreamWriter) -> None:
        name = str(message["execute"])
        arguments = message.get("arguments", {})
        assert isinstance(arguments, dict)
        if not isinstance(self.answers.get(name), Refuse):
            self._do(name, arguments)
        self.answers["query-memory-devices"] = [{"type": "dimm", "data": data} for data in self.dimms.values()]
        self.answers["query-memdev"] = list(self.backends.values())
        super()._answer(message, writer)

    def _do(self, name: str, arguments: dict[str, object]) -> None:
        one = str(arguments.get("id"))
        match name:
            case "object-add":
                assert one not in self.backends
                self.backends[one] = arguments
            case "object-del":
                del self.backends[one]
            case "device_add":
                backend = str(arguments["memdev"])
                self.dimms[one] = {
                    "id": one,
                    "memdev": f"/objects/{backend}",
                    "size": self.backends[backend]["size"],
                    "addr": (4096 * MIB) + len(self.dimms) * DIMM_BYTES,
                }


@contextlib.asynccontextmanager
async def serving_dimms(path: Path) -> AsyncIterator[DimmQmp]:
    """A server that runs within the block."""
    server = DimmQmp(path)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
