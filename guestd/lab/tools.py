"""Which programs and rights the lab needs on this machine, and running such programs."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from guestd.lab.errors import ImageError, LabUnavailable

RUN_TOOLS = {"qemu-system-x86_64": "qemu-system-x86", "qemu-img": "qemu-utils", "gcc": "gcc"}
"""Programs needed to run a machine, with the Debian packages that have them."""

BUILD_TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "lz4": "lz4",
    "make": "make",
}
"""Programs needed to build the guest image."""

_SEARCH_PATH = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"


def missing_tools(tools: Mapping[str, str]) -> LabUnavailable | None:
    """What is missing of these programs, with the command that gets it, or None."""
    absent = [program for program in tools if find(program) is None]
    if not absent:
        return None
    packages = " ".join(sorted({tools[program] for program in absent}))
    sudo = "" if os.geteuid() == 0 else "sudo "
    return LabUnavailable(absent, f"{sudo}apt-get install --no-install-recommends {packages}, or make setup-vm")


def require(tools: Mapping[str, str]) -> None:
    """Check that all these programs are here.

    :raise LabUnavailable: When some are not.
    """
    problem = missing_tools(tools)
    if problem is not None:
        raise problem


def find(program: str) -> str | None:
    """The path of a program, also in the administrator's directories."""
    return shutil.which(program, path=_SEARCH_PATH)


def as_root(command: Sequence[str]) -> list[str]:
    """The command as root: unchanged for root, by sudo for others.

    :raise LabUnavailable: When this is not root and there is no sudo.
    """
    if os.geteuid() == 0:
        return list(command)
    if find("sudo") is None:
        raise LabUnavailable(["root or sudo"])
    return ["sudo", *command]


async def run(
    command: Sequence[str],
    *,
    stdin: bytes | None = None,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    errors_too: bool = False,
) -> bytes:
    """Run a program to its end and return what it printed; with `errors_too` also its error output.

    :raise ImageError: When it cannot be started or its exit code is not 0; with the last lines of its errors.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=cwd,
            env={**os.environ, **(environment or {}), "PATH": _SEARCH_PATH, "LC_ALL": "C"},
        )
    except OSError as error:
        raise ImageError(f"{command[0]}: {error}") from error
    try:
        output, errors = await process.communicate(stdin)
    except asyncio.CancelledError:
        process.terminate()
        await process.wait()
        raise
    if process.returncode:
        tail = "\n".join(errors.decode(errors="replace").splitlines()[-12:])
        raise ImageError(f"{command[0]} ended with exit code {process.returncode}:\n{tail}")
    return output + errors if errors_too else output
