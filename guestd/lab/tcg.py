"""What QEMU's software emulation needs to survive the unplugging of vCPUs: see `tcg_cpu_unplug.c`."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from guestd.lab import tools
from guestd.lab.image import GuestImage

_SOURCE = Path(__file__).with_name("tcg_cpu_unplug.c")


async def environment(image: GuestImage) -> dict[str, str]:
    """The environment for a QEMU under TCG. The library is built once and kept beside the image.

    :raise LabUnavailable: When there is no C compiler.
    """
    tools.require({"gcc": "gcc"})
    key = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
    library = image.disk.parent.parent / f"tcg-cpu-unplug-{key}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}")
        await tools.run(["gcc", "-O2", "-Wall", "-shared", "-fPIC", "-o", str(unfinished), str(_SOURCE), "-ldl"])
        unfinished.rename(library)
    return {**os.environ, "LD_PRELOAD": str(library)}
