"""`guestd check`: what this machine offers, what is missing, and the way out. Changes nothing.

What guestd uses is looked for here, what else switches CPUs and memory in `check_others`; nothing of it needs
root or a running daemon. What is optional is a note and does not count as missing.
"""

import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TextIO

from guestd.guest import check_others, sysfs
from guestd.guest.findings import Finding, Verdict, print_findings
from guestd.model.guest import Capability, Inventory
from guestd.model.units import format_size

_MODULES = ("virtio_mem", "virtio_balloon", "vmw_vsock_virtio_transport")
_PARAMETERS = (
    "psi",
    "memhp_default_state",
    "memory_hotplug.online_policy",
    "memory_hotplug.memmap_on_memory",
    "movable_node",
    "maxcpus",
    "nr_cpus",
    "possible_cpus",
    "nosmp",
    "isolcpus",
    "mem",
)


def examine(root: Path | str = "/", hook_owner: int = 0) -> list[Finding]:
    """Look at everything that guestd uses, and at what else switches CPUs and memory.

    :param hook_owner: The user id that hooks must belong to.
    :raise OSError: When a file that is there cannot be read.
    """
    root = Path(root)
    inventory = sysfs.read_inventory(root)
    offered = sysfs.capabilities(root)
    parameters = kernel_parameters(root)
    return [
        _cpus(inventory, offered),
        _memory_blocks(inventory),
        _virtio_mem(offered),
        _balloon(offered),
        _pressure(root, offered, parameters),
        _vsock(root),
        *(_module(root, name) for name in _MODULES),
        *check_others.examine(root, parameters, hook_owner),
        _parameters(parameters),
    ]


def run(output: str = "text", root: Path | str = "/", stream: TextIO | None = None, hook_owner: int = 0) -> int:
    """Print what `examine` found as ``text`` or ``json``; 0 when all is there, 1 when something is missing."""
    findings = examine(root, hook_owner)
    print_findings(findings, output, stream or sys.stdout)
    return int(any(finding.verdict is Verdict.MISSING for finding in findings))


def kernel_parameters(root: Path | str) -> dict[str, str]:
    """The parameters of the kernel's command line; one without a value has an empty one."""
    try:
        words = (Path(root) / "proc/cmdline").read_text().split()
    except FileNotFoundError:
        return {}
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def module_state(root: Path | str, name: str) -> str:
    """``loaded``, ``built in``, ``available``, or empty: the running kernel does not have it."""
    root = Path(root)
    directory = root / "lib/modules" / _release(root)
    if (root / "sys/module" / name / "refcnt").exists():
        return "loaded"
    if _lists_module(directory / "modules.builtin", name) or _has_driver(root, name):
        return "built in"
    return "available" if _lists_module(directory / "modules.dep", name) else ""


def _release(root: Path) -> str:
    try:
        return (root / "proc/sys/kernel/osrelease").read_text().strip()
    except FileNotFoundError:
        return os.uname().release


def _has_driver(root: Path, name: str) -> bool:
    return (root / "sys/bus/virtio/drivers" / name).is_dir() or (root / "sys/module" / name).is_dir()


def _lists_module(path: Path, name: str) -> bool:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return False
    return re.search(rf"/{name.replace('_', '[_-]')}\.ko", text) is not None


def _format_cpus(cpus: frozenset[int]) -> str:
    """Runs of numbers as the kernel writes them: ``0-3,8``."""
    runs: list[list[int]] = []
    for number in sorted(cpus):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs) or "none"


def _cpus(inventory: Inventory, offered: frozenset[Capability]) -> Finding:
    value = (
        f"possible {_format_cpus(inventory.cpus_possible)}, present {_format_cpus(inventory.cpus_present)}, "
        f"online {_format_cpus(inventory.cpus_online)}, never offlined {_format_cpus(inventory.cpus_pinned)}"
    )
    if Capability.CPU_ONLINE not in offered:
        advice = "use a kernel with CONFIG_HOTPLUG_CPU and mount /sys"
        return Finding("cpu", Verdict.MISSING, value, advice)
    if len(inventory.cpus_possible) < 2:
        return Finding("cpu", Verdict.MISSING, value, "give the VM slots for more CPUs (QEMU: -smp 1,maxcpus=4)")
    return Finding("cpu", Verdict.OK, value)


def _memory_blocks(inventory: Inventory) -> Finding:
    if not inventory.block_bytes:
        advice = "use a kernel with CONFIG_MEMORY_HOTPLUG and CONFIG_MEMORY_HOTREMOVE"
        return Finding("memory blocks", Verdict.MISSING, "no memory blocks in /sys", advice)
    states = Counter(block.state.value for block in inventory.blocks)
    counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items(), reverse=True))
    movable = sum(block.movable for block in inventory.blocks)
    value = f"{format_size(inventory.block_bytes)} each: {counts or 'none'} ({movable} movable)"
    return Finding("memory blocks", Verdict.OK, value)


def _virtio_mem(offered: frozenset[Capability]) -> Finding:
    if Capability.VIRTIO_MEM in offered:
        return Finding("virtio-mem", Verdict.OK, "device and driver are there")
    advice = "give the VM a virtio-mem device (QEMU: -device virtio-mem-pci) and load virtio_mem"
    return Finding("virtio-mem", Verdict.MISSING, "no device with its driver", advice)


def _balloon(offered: frozenset[Capability]) -> Finding:
    if Capability.BALLOON in offered:
        return Finding("balloon", Verdict.OK, "device and driver are there")
    advice = "needed only to go below the boot size (QEMU: -device virtio-balloon-pci)"
    return Finding("balloon", Verdict.NOTE, "no device with its driver", advice)


def _pressure(root: Path, offered: frozenset[Capability], parameters: dict[str, str]) -> Finding:
    if Capability.PSI in offered:
        return Finding("psi", Verdict.OK, "on")
    config = _kernel_config(root)
    if parameters.get("psi") in ("0", "n", "off"):
        why, advice = f"off: psi={parameters['psi']} on the kernel command line", "remove it"
    elif "# CONFIG_PSI is not set" in config:
        why, advice = "not in this kernel", "use a kernel with CONFIG_PSI"
    elif "CONFIG_PSI_DEFAULT_DISABLED=y" in config:
        why, advice = "off: the kernel's default", "add psi=1 to the kernel command line"
    else:
        why, advice = "off", "add psi=1 to the kernel command line, or use a kernel with CONFIG_PSI"
    return Finding("psi", Verdict.MISSING, why, advice + "; until then pressure is guessed from the load")


def _kernel_config(root: Path) -> set[str]:
    try:
        return set((root / f"boot/config-{_release(root)}").read_text().splitlines())
    except (FileNotFoundError, PermissionError):
        return set()


def _vsock(root: Path) -> Finding:
    if not (root / "dev/vsock").exists():
        advice = "give the VM a vsock device (QEMU: -device vhost-vsock-pci,guest-cid=3) and load its driver"
        return Finding("vsock", Verdict.MISSING, "no /dev/vsock", advice)
    if sysfs.driver_bound(root, "vmw_vsock_virtio_transport"):
        return Finding("vsock", Verdict.OK, "/dev/vsock over virtio")
    if any((root / "sys/module" / name).is_dir() for name in ("vmw_vsock_vmci_transport", "hv_sock")):
        return Finding("vsock", Verdict.OK, "/dev/vsock over another hypervisor's transport")
    advice = "give the VM a vsock device and load vmw_vsock_virtio_transport"
    return Finding("vsock", Verdict.MISSING, "/dev/vsock without a transport to the host", advice)


def _module(root: Path, name: str) -> Finding:
    state = module_state(root, name)
    if state:
        return Finding(f"module {name}", Verdict.OK, state)
    optional = name == "virtio_balloon"
    advice = "install the kernel's full modules package"
    return Finding(f"module {name}", Verdict.NOTE if optional else Verdict.MISSING, "not there", advice)


def _parameters(parameters: dict[str, str]) -> Finding:
    set_here = [
        f"{name}={parameters[name]}" if parameters[name] else name for name in _PARAMETERS if name in parameters
    ]
    limits = [name for name in ("maxcpus", "nr_cpus", "nosmp", "mem") if name in parameters]
    value = " ".join(set_here) or "none of interest"
    if limits:
        advice = f"{', '.join(limits)} may keep the VM from growing"
        return Finding("kernel parameters", Verdict.NOTE, value, advice)
    return Finding("kernel parameters", Verdict.OK, value)
