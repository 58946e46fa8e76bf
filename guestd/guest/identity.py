"""Who this guest is in this boot. Nothing of it is stored anywhere, so images can be cloned.

On Linux the kernel says all of it. Elsewhere (`psutil` knows when the system booted) the same is made of what there is:
stable as long as the system runs, another after the next boot.
"""

import os
import socket
import time
from pathlib import Path

import guestd
from guestd.guest import sysfs
from guestd.model.guest import Capability, Identity

_BOOT_ID = "proc/sys/kernel/random/boot_id"


def identify(dry_run: bool, root_helper: bool, root: Path | str = "/") -> Identity:
    """What is said of this guest with the first message.

    :param root_helper: Whether there is one; without it nothing can be switched here.
    """
    capabilities = set(sysfs.capabilities(root))
    if not root_helper:
        capabilities -= {Capability.CPU_ONLINE, Capability.MEMORY_ONLINE}
    if dry_run:
        capabilities.add(Capability.DRY_RUN)
    return Identity(
        boot_id=boot_id(root),
        generation=_generation(),
        agent_version=guestd.__version__,
        hostname=socket.gethostname(),
        kernel=os.uname().release,
        capabilities=frozenset(capabilities),
    )


def only_reports(identity: Identity) -> bool:
    """Whether the guest has no way to bring anything online or take it offline."""
    return not identity.capabilities & {Capability.CPU_ONLINE, Capability.MEMORY_ONLINE, Capability.DRY_RUN}


def boot_id(root: Path | str = "/") -> bytes:
    """16 bytes that are the same until the next boot: the kernel's own, or made of host name and time of boot."""
    try:
        text = (Path(root) / _BOOT_ID).read_text("ascii").strip()
        number = bytes.fromhex(text.replace("-", ""))
    except (OSError, ValueError):
        number = b""
    return number if len(number) == 16 else _made_up_boot_id()


def _made_up_boot_id() -> bytes:
    import hashlib  # brings OpenSSL, 2 MiB

    import psutil

    text = f"{socket.gethostname()} {psutil.boot_time():.0f}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _generation() -> int:
    """Nanoseconds since the boot, with those of sleep where the system counts them: a later daemon has more."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)  # Linux only
    return time.monotonic_ns() if clock is None else time.clock_gettime_ns(clock)
