"""The guest image: Debian in one layer, this project in another, both cached.

    base-KEY/     Debian (`debian.py`) as an ext4 file, kernel and initrd; made in under a minute, once
    image-KEY/    a copy of it with `make install-guest` and the lab's agent written in; a few seconds
    apps-…-KEY/   both once more with `debian.APPS` in them, for the tests that ask for it

KEY is a hash of what went in, so a change of the code makes a new image and never touches one that a
running machine may be using. Machines write into overlays of their own. Several builders at once are
kept apart by a lock file.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from guestd.lab import debian, initrd, inject, tools
from guestd.lab.errors import ImageError, LabUnavailable

Progress = Callable[[str], None]

DISK_BYTES = 3 << 30
"""Size of the guest's root disk; the file is sparse, about 0.4 GiB of it are used."""

_KEPT_IMAGES = 3
_VERSION = "1"
_GUEST_FILES = Path(__file__).parent / "guest"


@dataclass(frozen=True)
class GuestImage:
    """An image that can be booted.

    :param disk: Raw ext4 file system, never to be written to.
    :param kernel: Uncompressed kernel that QEMU starts directly (PVH).
    :param initrd: Uncompressed initrd.
    """

    disk: Path
    kernel: Path
    initrd: Path


def source_root() -> Path:
    """The project's checkout.

    :raise LabUnavailable: When the package was installed without one.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "Makefile").exists() or not (root / "pyproject.toml").exists():
        raise LabUnavailable(["the project's checkout (the lab builds its image from it)"])
    return root


def lab_directory() -> Path:
    """Where images are kept: `build/lab` of the checkout, or what GUESTD_LAB_DIR says.

    :raise LabUnavailable: When there is neither.
    """
    configured = os.environ.get("GUESTD_LAB_DIR")
    return Path(configured).resolve() if configured else source_root() / "build" / "lab"


async def build(progress: Progress = lambda line: None, *, apps: bool = False) -> GuestImage:
    """The guest image of this checkout as it is now; built when it is not there yet.

    :param progress: Called with one line for each step.
    :param apps: With applications in it (`debian.APPS`), none of them started.
    :raise LabUnavailable: When a tool or a right is missing.
    :raise ImageError: When a step failed.
    """
    root, directory = source_root(), lab_directory()
    directory.mkdir(parents=True, exist_ok=True)
    async with _locked(directory / "lock", progress):
        base = await _base(directory, progress, apps=apps)
        image = directory / f"{_sort(apps)}image-{_project_key(root, base)}"
        if not image.exists():
            tools.require(tools.BUILD_TOOLS)
            await _finish(image, lambda work: _build_image(work, base, root, progress))
            _forget_old(image, f"{_sort(apps)}image-*")
        image.touch()
        return GuestImage(image / "disk.ext4", base / "vmlinux", base / "initrd")


def _sort(apps: bool) -> str:
    """How names of directories begin. Each sort of image is forgotten among its like only."""
    return "apps-" if apps else ""


async def _base(directory: Path, progress: Progress, *, apps: bool) -> Path:
    base = directory / f"{_sort(apps)}base-{_base_key()}"
    if not base.exists():
        tools.require(tools.BUILD_TOOLS)
        await _finish(base, lambda work: _build_base(work, progress, apps=apps))
    return base


async def _finish(target: Path, fill: Callable[[Path], object]) -> None:
    """Fill a new directory and give it its name only when it is complete."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="work-", ignore_cleanup_errors=True) as name:
        work = Path(name) / "result"
        work.mkdir()
        outcome = fill(work)
        if asyncio.iscoroutine(outcome):
            await outcome
        work.rename(target)


async def _build_base(work: Path, progress: Progress, *, apps: bool) -> None:
    started = time.monotonic()
    wanted = " with applications" if apps else ""
    progress(f"fetching Debian {debian.RELEASE}{wanted} for the guest (about a minute{' or two' if apps else ''})")
    sources, options = await debian.apt_sources(), await debian.apt_options()
    root = work.parent / "root"
    try:
        command = debian.bootstrap_command(root, sources, options, debian.APPS if apps else ())
        await tools.run(tools.as_root(command), stdin=None if sources is None else sources.encode())
        progress(f"Debian is there after {time.monotonic() - started:.0f} s; making the disk")
        await tools.run(tools.as_root(["sh", "-c", debian.configure_script(root, apps=apps)]))
        kernel = max(root.glob("boot/vmlinuz-*"))
        release = kernel.name.removeprefix("vmlinuz-")
        (work / "initrd").write_bytes(initrd.build(root, release))
        await _extract_kernel(kernel, work / "vmlinux")
        await _make_disk(root, work / "disk.ext4")
    finally:
        await tools.run(tools.as_root(["rm", "-rf", "--one-file-system", str(root)]))
    progress(f"base image made in {time.monotonic() - started:.0f} s")


async def _make_disk(root: Path, disk: Path) -> None:
    with disk.open("wb") as file:
        file.truncate(DISK_BYTES)
    options = ["-q", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard", "-m", "0"]
    await tools.run(tools.as_root(["mke2fs", *options, "-d", str(root), str(disk)]))


async def _extract_kernel(compressed: Path, target: Path) -> None:
    """Unpack a bzImage to the ELF file inside: emulated, a guest takes seconds to do it itself.

    :raise ImageError: When it is not a kernel compressed with LZ4, as Debian's cloud kernel is.
    """
    data = compressed.read_bytes()
    setup_sectors = data[0x1F1] or 4
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = data[start : start + length - 4]  # the last 4 bytes are the unpacked size
    if payload[:4] != b"\x02\x21\x4c\x18":
        raise ImageError(f"{compressed.name} is not compressed with LZ4")
    kernel = await tools.run(["lz4", "-dc"], stdin=payload)
    if kernel[:4] != b"\x7fELF":
        raise ImageError(f"{compressed.name} does not contain an ELF kernel")
    target.write_bytes(kernel)


async def _build_image(work: Path, base: Path, root: Path, progress: Progress) -> None:
    started = time.monotonic()
    progress("installing this checkout into the guest image")
    stage = work.parent / "stage"
    stage.mkdir(mode=0o755)
    make = ["make", "--no-print-directory", "-C", str(root), "install-guest", "install-lab", f"DESTDIR={stage}"]
    await tools.run(make, environment={"MAKEFLAGS": "", "MAKELEVEL": ""})
    _stage_agent(stage)
    disk = work / "disk.ext4"
    await tools.run(["cp", "--sparse=always", "--reflink=auto", str(base / "disk.ext4"), str(disk)])
    script = work.parent / "commands"
    script.write_text(inject.commands(stage))
    inject.check(await tools.run(["debugfs", "-w", "-f", str(script), str(disk)], errors_too=True))
    progress(f"guest image made in {time.monotonic() - started:.0f} s")


def _stage_agent(stage: Path) -> None:
    units = stage / "usr/lib/systemd/system"
    wants = stage / "etc/systemd/system"
    program = stage / "usr/lib/guestd-lab/lab-agent"
    for directory in (units, program.parent, wants / "sysinit.target.wants", wants / "multi-user.target.wants"):
        directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_GUEST_FILES / "lab-agent", program)
    program.chmod(0o755)
    for unit, target in (("lab-agent", "sysinit"), ("lab-booted", "multi-user")):
        shutil.copyfile(_GUEST_FILES / f"{unit}.service", units / f"{unit}.service")
        link = wants / f"{target}.target.wants" / f"{unit}.service"
        link.symlink_to(f"/usr/lib/systemd/system/{unit}.service")


def _base_key() -> str:
    recipes = (Path(__file__).with_name("debian.py"), Path(__file__).with_name("initrd.py"))
    return _digest([_VERSION.encode(), str(DISK_BYTES).encode(), *(path.read_bytes() for path in recipes)])


def _project_key(root: Path, base: Path) -> str:
    parts = [base.name.encode()]
    for path in sorted(_project_files(root)):
        parts += [str(path.relative_to(root)).encode(), path.read_bytes()]
    return _digest(parts)


def _project_files(root: Path) -> Iterable[Path]:
    for name in ("Makefile", "pyproject.toml"):
        yield root / name
    for directory in ("guestd", "systemd"):
        for path in (root / directory).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]


def _forget_old(newest: Path, pattern: str) -> None:
    """Remove all but the newest images of a sort; a running machine keeps its file open."""
    images = sorted(newest.parent.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)
    for image in [path for path in images if path != newest][_KEPT_IMAGES - 1 :]:
        shutil.rmtree(image, ignore_errors=True)


@contextlib.asynccontextmanager
async def _locked(path: Path, progress: Progress) -> AsyncIterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not _try_lock(descriptor):
            progress("another process is building the guest image: waiting for it")
            while not _try_lock(descriptor):  # noqa: ASYNC110 (flock has no event)
                await asyncio.sleep(0.2)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def main() -> int:
    """Build the image, with progress on standard error. Exit code 1 when it cannot be."""
    try:
        image = asyncio.run(build(lambda line: print(f"==> {line}", file=sys.stderr, flush=True)))  # noqa: T201
    except (LabUnavailable, ImageError) as error:
        print(f"guest image: {error}", file=sys.stderr)  # noqa: T201
        return 1
    print(image.disk)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
