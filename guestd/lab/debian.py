"""The guest's Debian: which packages, from where, and what is left out so that it boots fast.

Packages come from where this machine's own apt gets its packages, with its proxy; where it has no
source for the guest's release, mmdebstrap's default is used.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from guestd.lab import tools
from guestd.lab.errors import ImageError

RELEASE = "bookworm"

PACKAGES = (
    "systemd",
    "systemd-sysv",
    "udev",
    "dbus",
    "python3",
    "linux-image-cloud-amd64",
    "tiny-initramfs",  # satisfies the kernel's dependency; the initrd used here is our own (initrd.py)
    "busybox-static",
    "kmod",
    "procps",
    "stress-ng",
)

APPS = (
    # Applications to resize under, and others that online CPUs and memory too or watch them.
    "openjdk-17-jdk-headless",
    "postgresql",
    "qemu-guest-agent",
    "systemd-oomd",
    "tuned",
)
"""More packages, for the base of the tests that need one of them."""

APPS_UNITS = (
    "postgresql.service",
    "qemu-guest-agent.service",
    "systemd-oomd.service",
    "systemd-oomd.socket",
    "tuned.service",
)
"""What these packages would start at boot: disabled, a test starts what it needs."""

APPS_FILES = {
    # udev would start the agent as soon as its port is there.
    "etc/udev/rules.d/60-qemu-guest-agent.rules": "",
}

MASKED_UNITS = (
    # Nothing here is needed in a guest that lives for minutes, and each costs a process or a device at boot.
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "cryptsetup.target",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty-static.service",
    "getty.target",
    "getty@.service",
    "integritysetup.target",
    "kmod-static-nodes.service",
    "proc-sys-fs-binfmt_misc.automount",
    "remote-fs.target",
    "serial-getty@.service",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-ask-password-console.path",
    "systemd-ask-password-wall.path",
    "systemd-binfmt.service",
    "systemd-firstboot.service",
    "systemd-initctl.socket",
    "systemd-journal-flush.service",
    "systemd-journald-audit.socket",
    "systemd-logind.service",
    "systemd-machine-id-commit.service",
    "systemd-pcrphase-sysinit.service",
    "systemd-pcrphase.service",
    "systemd-pstore.service",
    "systemd-random-seed.service",
    "systemd-remount-fs.service",
    "systemd-repart.service",
    "systemd-update-utmp-runlevel.service",
    "systemd-update-utmp.service",
    "systemd-user-sessions.service",
    "veritysetup.target",
)

REMOVED_FILES = (
    "usr/lib/systemd/system/multi-user.target.wants/dbus.service",  # dbus.socket starts it when it is used
    "usr/lib/systemd/system-generators/systemd-bless-boot-generator",
    "usr/lib/systemd/system-generators/systemd-cryptsetup-generator",
    "usr/lib/systemd/system-generators/systemd-debug-generator",
    "usr/lib/systemd/system-generators/systemd-getty-generator",
    "usr/lib/systemd/system-generators/systemd-gpt-auto-generator",
    "usr/lib/systemd/system-generators/systemd-hibernate-resume-generator",
    "usr/lib/systemd/system-generators/systemd-integritysetup-generator",
    "usr/lib/systemd/system-generators/systemd-rc-local-generator",
    "usr/lib/systemd/system-generators/systemd-run-generator",
    "usr/lib/systemd/system-generators/systemd-system-update-generator",
    "usr/lib/systemd/system-generators/systemd-sysv-generator",
    "usr/lib/systemd/system-generators/systemd-veritysetup-generator",
)

FILES = {
    "etc/fstab": "/dev/vda / ext4 rw,noatime 0 0\n",
    "etc/hostname": "guest\n",
    "etc/systemd/journald.conf.d/lab.conf": "[Journal]\nStorage=volatile\nAudit=no\n",
    "etc/systemd/system.conf.d/lab.conf": "[Manager]\nShowStatus=no\nDefaultTimeoutStopSec=15s\n",
    "etc/modprobe.d/lab.conf": "".join(
        f"blacklist {module}\n" for module in ("aesni_intel", "kvm_amd", "kvm_intel", "pcspkr", "psmouse", "serio_raw")
    ),
    # The full coldplug loads crypto and frequency drivers for the CPU and looks at every tty: 4 s of a boot.
    # What is plugged later goes through udev as always.
    "etc/systemd/system/systemd-udev-trigger.service.d/lab.conf": (
        "[Service]\nExecStart=\nExecStart=-udevadm trigger --type=devices --action=add"
        " --subsystem-match=virtio --subsystem-match=virtio-ports --subsystem-match=block\n"
    ),
}
"""Configuration of the lab's guests only; nothing that guestd itself is about."""

_EXCLUDED_PATHS = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
_ACQUIRE = re.compile(r'^Acquire::(?:(?:https?|ftp)::|Check-|Retries|ForceIPv).* "[^"]+";$')


async def apt_sources() -> str | None:
    """The one-line sources of this machine's apt that have the guest's release, or None."""
    try:
        listing = await tools.run(
            ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"]
        )
    except ImageError:
        return None
    lines = [line.split() for line in listing.decode().splitlines()]
    wanted = sorted({tuple(line) for line in lines if len(line) == 3 and re.match(Rf"{RELEASE}(-|$)", line[1])})
    if not any(suite == RELEASE and component == "main" for _, suite, component in wanted):
        return None
    return "".join(f"deb {uri} {suite} {component}\n" for uri, suite, component in wanted if _is_debian(suite))


async def apt_options() -> list[str]:
    """Options of this machine's apt about how to fetch: proxies and checks of dates."""
    try:
        dump = await tools.run(["apt-config", "dump", "Acquire"])
    except ImageError:
        return []
    return [line for line in dump.decode().splitlines() if _ACQUIRE.match(line)]


def bootstrap_command(root: Path, sources: str | None, options: list[str], extra: tuple[str, ...] = ()) -> list[str]:
    """The mmdebstrap command that fills the new directory `root`; it is to run as root.

    The sources are to be on its standard input, unless there are none. `extra` are packages beside `PACKAGES`.
    """
    command = ["mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory"]
    command += [f"--include={','.join((*PACKAGES, *extra))}", '--aptopt=Acquire::Languages "none";']
    command += [f"--aptopt={option}" for option in options]
    command += [f"--dpkgopt=path-exclude={path}" for path in _EXCLUDED_PATHS]
    command += [RELEASE, str(root)]
    return [*command, "-"] if sources is not None else command


def configure_script(root: Path, *, apps: bool = False) -> str:
    """A shell script, to be run as root, that makes the bootstrapped directory a lab guest.

    :param apps: `APPS` are in it.
    """
    at = shlex.quote(str(root))
    lines = ["set -eu", f"cd {at}"]
    for name, text in (FILES | APPS_FILES if apps else FILES).items():
        lines.append(f"mkdir -p {shlex.quote(str(Path(name).parent))}")
        lines.append(f"printf %s {shlex.quote(text)} > {shlex.quote(name)}")
    lines += [f"ln -sfn /dev/null etc/systemd/system/{shlex.quote(unit)}" for unit in MASKED_UNITS]
    lines += [f"rm -f {shlex.quote(name)}" for name in REMOVED_FILES]
    if apps:
        lines += [f"chroot . systemctl --quiet disable {shlex.join(APPS_UNITS)}"]
    lines += [
        "ln -sfn /usr/lib/systemd/system/multi-user.target etc/systemd/system/default.target",
        "chroot . passwd -d root >/dev/null",
        "rm -rf var/cache/apt/* var/lib/apt/lists/*",
        "mkdir -p etc/systemd/system/multi-user.target.wants etc/systemd/system/sysinit.target.wants",
    ]
    return "\n".join(lines) + "\n"


def _is_debian(suite: str) -> bool:
    return suite in {RELEASE, f"{RELEASE}-updates", f"{RELEASE}-security"}
