"""KVM or emulation: KVM only after a kernel has really booted under it here.

`/dev/kvm` may be there and still not run a stock kernel (nested virtualization often is like that).
"""

from __future__ import annotations

import asyncio
import os
import platform
from pathlib import Path

from guestd.lab.image import GuestImage
from guestd.lab.initrd import PROBE_ANSWER

ACCELERATORS = ("kvm", "tcg")

_PROBE_SECONDS = 10.0


async def choose(image: GuestImage, override: str | None = None) -> str:
    """The accelerator for machines of this image, "kvm" or "tcg". A probe's result is remembered beside the image.

    :param override: One of `ACCELERATORS`, to skip the probe.
    :raise ValueError: When the override is neither.
    """
    if override is not None:
        if override not in ACCELERATORS:
            raise ValueError(f"accelerator {override!r}: one of {', '.join(ACCELERATORS)}")
        return override
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    remembered = image.kernel.with_name(f"accel-{platform.node()}-{platform.release()}")
    if not remembered.exists():
        remembered.write_text("kvm" if await probe_kvm(image) else "tcg")
    return "kvm" if remembered.read_text() == "kvm" else "tcg"


async def probe_kvm(image: GuestImage, timeout_seconds: float = _PROBE_SECONDS) -> bool:
    """Whether the image's kernel reaches user space under KVM in time."""
    command = ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", "-nodefaults", "-no-user-config"]
    command += ["-display", "none", "-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "256M", "-no-reboot"]
    command += ["-kernel", str(image.kernel), "-initrd", str(image.initrd), "-serial", "stdio"]
    command += ["-append", "console=ttyS0 rdinit=/probe panic=-1"]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=Path("/"),
    )
    try:
        async with asyncio.timeout(timeout_seconds):
            output, _ = await process.communicate()
    except TimeoutError:
        return False
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return PROBE_ANSWER.encode() in output
