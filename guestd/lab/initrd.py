"""The lab's own initrd: load the few virtio modules, mount the root, start systemd. Boots in milliseconds."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

MODULES = (
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci",
    "drivers/block/virtio_blk",
    "drivers/char/virtio_console",
)
"""Kernel modules in the order they are loaded; ext4 is built into Debian's cloud kernel."""

PROBE_ANSWER = "guestd-lab-probe: alive"
"""What the kernel's console shows when the initrd is started with `rdinit=/probe`; it powers off then."""

_PROBE = f"#!/bin/busybox sh\necho '{PROBE_ANSWER}'\n/bin/busybox poweroff -f\n"
_DIRECTORIES = ("bin", "dev", "modules", "proc", "root", "sys")
_INIT = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs devtmpfs /dev
{load}
tries=0
until /bin/busybox mount -t ext4 -o noatime /dev/vda /root 2>/dev/null; do
    tries=$((tries + 1))
    [ $tries -lt 500 ] || {{ echo "no root file system on /dev/vda"; /bin/busybox poweroff -f; }}
    /bin/busybox usleep 20000
done
/bin/busybox mount --move /dev /root/dev
exec /bin/busybox switch_root /root /lib/systemd/systemd
"""


def build(root: Path, kernel_release: str) -> bytes:
    """An uncompressed initrd from a bootstrapped root directory.

    :raise OSError: When the kernel's modules or busybox are not there.
    """
    modules = root / "usr/lib/modules" / kernel_release / "kernel"
    load = "\n".join(f"/bin/busybox insmod /modules/{Path(name).name}.ko" for name in MODULES)
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in _DIRECTORIES]
    entries.append(("bin/busybox", stat.S_IFREG | 0o755, (root / "usr/bin/busybox").read_bytes()))
    entries += [
        (f"modules/{Path(name).name}.ko", stat.S_IFREG | 0o644, (modules / f"{name}.ko").read_bytes())
        for name in MODULES
    ]
    entries.append(("init", stat.S_IFREG | 0o755, _INIT.format(load=load).encode()))
    entries.append(("probe", stat.S_IFREG | 0o755, _PROBE.encode()))
    return archive(entries)


def archive(entries: Sequence[tuple[str, int, bytes]]) -> bytes:
    """A cpio archive in the kernel's "newc" format from (name, mode, contents)."""
    out = bytearray()
    for inode, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        path = name.encode() + b"\0"
        numbers = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
        out += b"070701" + b"".join(b"%08X" % number for number in numbers) + path
        out += b"\0" * (-len(out) % 4)
        out += data
        out += b"\0" * (-len(out) % 4)
    return bytes(out)
