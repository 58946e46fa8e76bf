"""The QEMU command line of a lab machine: a pure function of what the machine shall be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
GIB = 1 << 30

CONSOLE_PORT_NAME = "lab"
"""Name of the virtio serial port that the lab's agent answers on."""

_SOCKET_PATH_LIMIT = 107


_CODE_MIB = 2047
"""For translated code, the most that QEMU takes: a vCPU that is plugged while all of it is in use ends QEMU 7.2 (an
assertion in tcg_region_initial_alloc), and a VM that lives for long comes there.
"""


@dataclass(frozen=True)
class MachineConfig:
    """What a machine is at boot, and how far it can grow.

    :param name: Shown in messages and in QEMU's process name.
    :param boot_memory_bytes: RAM at boot, a multiple of 128 MiB (the guest's memory block size).
    :param max_memory_bytes: RAM with virtio-mem or all DIMMs grown to its end; a multiple of 128 MiB too.
    :param dimm_slots: Memory comes as so many DIMMs at most; the VM has neither virtio-mem nor a balloon then.
    :param cpus: CPUs at boot; `max_cpus` with all hot-added.
    :param cpu_slots: CPUs that can be plugged in all its life. Under software emulation QEMU 7.2 gives every
        vCPU thread that ever started a translation context for good and aborts beyond `maxcpus` of them, so
        slots must be plenty where CPUs come and go. At most 255; they cost the guest nothing, it is told
        `max_cpus` (kernel argument `possible_cpus`). Not used under KVM.
    :param guest_cid: vsock CID, 3 or more, different for machines that share a broker.
    :param require_privileged_port: The vsock device refuses guest ports of 1024 and more.
    :param guest_agent_port: A serial port for qemu-guest-agent, its other end is `MachinePaths.guest_agent`.
    :param kernel_arguments: Added at the end of the kernel's command line.
    :raise ValueError: When one of them is out of range.
    """

    name: str = "lab"
    boot_memory_bytes: int = 512 * MIB
    max_memory_bytes: int = 2560 * MIB
    dimm_slots: int = 0
    cpus: int = 1
    max_cpus: int = 4
    cpu_slots: int = 240
    guest_cid: int = 3
    require_privileged_port: bool = False
    guest_agent_port: bool = False
    kernel_arguments: str = ""

    def __post_init__(self) -> None:
        if self.boot_memory_bytes < 256 * MIB or self.boot_memory_bytes % (128 * MIB):
            raise ValueError(f"boot memory {self.boot_memory_bytes}: a multiple of 128 MiB, at least 256 MiB")
        grown = self.max_memory_bytes - self.boot_memory_bytes
        if grown < 0 or grown % (128 * MIB):
            raise ValueError(f"maximum memory {self.max_memory_bytes}: boot memory plus a multiple of 128 MiB")
        if not 0 <= self.dimm_slots <= 24:
            raise ValueError(f"{self.dimm_slots} DIMM slots: 0 to 24, so that the vsock device can map them all")
        if not 1 <= self.cpus <= self.max_cpus <= 64:
            raise ValueError(f"{self.cpus} of {self.max_cpus} CPUs: 1 <= boot <= maximum <= 64")
        if not 3 <= self.guest_cid < 0xFFFFFFFF:
            raise ValueError(f"guest CID {self.guest_cid}: 3 to 4294967294")

    @property
    def virtio_mem_bytes(self) -> int:
        """The most that virtio-mem can add; 0 when the machine has none."""
        return 0 if self.dimm_slots else self.max_memory_bytes - self.boot_memory_bytes


@dataclass(frozen=True)
class MachinePaths:
    """Where a machine's files and sockets are: all in one directory with a short name.

    :raise ValueError: When the directory's name is too long for unix sockets.
    """

    directory: Path
    kernel: Path
    initrd: Path

    def __post_init__(self) -> None:
        if len(str(self.uds_base)) + len("_4294967295") > _SOCKET_PATH_LIMIT:
            raise ValueError(f"{self.directory} is too long a name for unix sockets in it")

    @property
    def overlay(self) -> Path:
        """The machine's own disk, over the image."""
        return self.directory / "disk.qcow2"

    @property
    def serial_log(self) -> Path:
        """What the kernel prints."""
        return self.directory / "serial.log"

    @property
    def qemu_log(self) -> Path:
        """What QEMU prints."""
        return self.directory / "qemu.log"

    @property
    def qmp(self) -> Path:
        """QMP for the broker."""
        return self.directory / "qmp.sock"

    @property
    def observer(self) -> Path:
        """QMP for whoever only looks."""
        return self.directory / "observer.sock"

    @property
    def keeper(self) -> Path:
        """QMP for the lab itself."""
        return self.directory / "keeper.sock"

    @property
    def console(self) -> Path:
        """The agent's serial port."""
        return self.directory / "console.sock"

    @property
    def guest_agent(self) -> Path:
        """qemu-guest-agent's serial port."""
        return self.directory / "qga.sock"

    @property
    def vhost_vsock(self) -> Path:
        """vhost-user, between QEMU and the vsock device."""
        return self.directory / "vhost.sock"

    @property
    def uds_base(self) -> Path:
        """Guest connections to host port P arrive at this path, an underscore and P."""
        return self.directory / "vsock"


def command_line(config: MachineConfig, paths: MachinePaths, accel: str) -> list[str]:
    """The whole command; `accel` is "kvm" or "tcg". Dies with its parent."""
    kvm = accel == "kvm"
    sockets = {"qmp": paths.qmp, "observer": paths.observer, "keeper": paths.keeper, "console": paths.console}
    command = ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64"]
    command += ["-name", f"guestd-lab-{config.name}", "-nodefaults", "-no-user-config", "-display", "none"]
    accelerator = "kvm" if kvm else f"tcg,thread=multi,tb-size={_CODE_MIB}"
    command += ["-machine", "q35,memory-backend=ram0", "-accel", accelerator]
    # Emulated, the guest would load KVM's modules (3 s of boot) only to find nobody to serve, and would clear pages
    # with "rep stosb", emulated a byte at a time: without ERMS it is eight, and filling memory twice as fast.
    command += ["-cpu", "host" if kvm else "max,-svm,-erms"]
    slots = config.max_cpus if kvm else max(config.cpu_slots, config.max_cpus)
    command += ["-smp", f"{config.cpus},maxcpus={slots},sockets=1,cores={slots},threads=1"]
    command += _memory(config)
    command += ["-kernel", str(paths.kernel), "-initrd", str(paths.initrd)]
    command += ["-append", kernel_command_line(config, kvm=kvm)]
    command += ["-drive", f"if=none,id=disk0,file={paths.overlay},format=qcow2,cache=unsafe,discard=unmap"]
    command += ["-device", "virtio-blk-pci,drive=disk0"]
    command += ["-serial", f"file:{paths.serial_log}"]
    for name, path in sockets.items():
        command += ["-chardev", f"socket,id={name},path={path},server=on,wait=off"]
        if name != "console":
            command += ["-mon", f"chardev={name},mode=control"]
    command += ["-device", f"virtio-serial-pci,max_ports={3 if config.guest_agent_port else 2}"]
    command += ["-device", f"virtserialport,chardev=console,name={CONSOLE_PORT_NAME}"]
    if config.guest_agent_port:
        command += ["-chardev", f"socket,id=qga,path={paths.guest_agent},server=on,wait=off"]
        command += ["-device", "virtserialport,chardev=qga,name=org.qemu.guest_agent.0"]
    if not config.dimm_slots:
        command += ["-device", "virtio-balloon-pci,id=balloon0,free-page-reporting=on,deflate-on-oom=off"]
    # On a port of its own, because pcie.0 does not hotplug and the device is taken out before a migration.
    command += ["-device", "pcie-root-port,id=port0,chassis=1,slot=1"]
    command += ["-chardev", f"socket,id=vhost0,path={paths.vhost_vsock}"]
    command += ["-device", "vhost-user-vsock-pci,id=vsock0,bus=port0,chardev=vhost0"]
    return command


def kernel_command_line(config: MachineConfig, *, kvm: bool) -> str:
    """What the guest's kernel is started with."""
    words = ["console=ttyS0", "root=/dev/vda", "rw", "quiet", "mitigations=off", "random.trust_cpu=on"]
    if not kvm:
        # QEMU's emulated TSCs agree with each other, but Linux cannot know and would read the HPET instead.
        words += ["no_timer_check", "tsc=reliable", f"possible_cpus={config.max_cpus}"]
    return " ".join([*words, *config.kernel_arguments.split()])


def _memory(config: MachineConfig) -> list[str]:
    """Boot memory, and virtio-mem of which nothing is plugged, or slots; shared, because vhost-user needs that."""
    boot, added = config.boot_memory_bytes, config.virtio_mem_bytes
    arguments = ["-object", f"memory-backend-memfd,id=ram0,size={boot},share=on"]
    if config.dimm_slots:
        return ["-m", f"{boot // MIB}M,slots={config.dimm_slots},maxmem={config.max_memory_bytes // MIB}M", *arguments]
    if not added:
        return ["-m", f"{boot // MIB}M", *arguments]
    slack = GIB  # for aligning the device's region
    arguments = ["-m", f"{boot // MIB}M,slots=8,maxmem={(boot + added + slack) // MIB}M", *arguments]
    arguments += ["-object", f"memory-backend-memfd,id=vmem0,size={added},share=on,reserve=off"]
    return [*arguments, "-device", "virtio-mem-pci,id=vm0,memdev=vmem0,requested-size=0"]
