"""The machine that a bench runs on."""

import platform
from pathlib import Path


def cpu_model() -> str:
    """What it is, as it calls itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
