"""`guestd check`: what this machine offers, what is missing, and the way out. Changes nothing.

`examine` collects, `print_findings` shows; nothing here needs root or a running daemon. What is optional
is a note and does not count as missing.
"""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TextIO

from guestd.guest import sysfs
from guestd.model.guest import Capability, Inventory
from guestd.model.units import format_size

_MODULES = ("virtio_mem", "virtio_balloon", "vmw_vsock_virtio_transport")
_RULE_DIRECTORIES = ("etc", "run", "usr/local/lib", "usr/lib", "lib")  # a name in an earlier one hides later ones
_ONLINING = re.compile(r'ATTR\{(?:\[[^\]]*\])?(state|online)\}\s*=\s*"?(?:online\w*|1)')
_MATCHES = re.compile(r'SUBSYSTEM\s*==\s*"[^"]*(?:memory|cpu)')
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


class Verdict(StrEnum):
    """How a finding is meant."""

    OK = "ok"
    NOTE = "note"  # works, with something to know
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about this machine; `advice` is the way out."""

    name: str
    verdict: Verdict
    value: str
    advice: str = ""


def examine(root: Path | str = "/") -> list[Finding]:
    """Look at everything that guestd uses.

    :raise OSError: When a file that is there cannot be read.
    """
    root = Path(root)
    inventory = sysfs.read_inventory(root)
    offered = sysfs.capabilities(root)
    parameters = kernel_parameters(root)
    return [
        _cpus(inventory, offered),
        _memory_blocks(inventory),
        _auto_online(root),
        _virtio_mem(offered),
        _balloon(offered),
        _pressure(root, offered, parameters),
        _vsock(root),
        *(_module(root, name) for name in _MODULES),
        *_udev_rules(root),
        _parameters(parameters),
    ]


def run(output: str = "text", root: Path | str = "/", stream: TextIO | None = None) -> int:
    """Print what `examine` found as ``text`` or ``json``; 0 when all is there, 1 when something is missing."""
    findings = examine(root)
    print_findings(findings, output, stream or sys.stdout)
    return int(any(finding.verdict is Verdict.MISSING for finding in findings))


def print_findings(findings: Iterable[Finding], output: str, stream: TextIO) -> None:
    """Write the findings for people (``text``) or programs (``json``)."""
    findings = list(findings)
    missing = sum(finding.verdict is Verdict.MISSING for finding in findings)
    if output == "json":
        rows = [{"name": f.name, "verdict": f.verdict.value, "value": f.value, "advice": f.advice} for f in findings]
        json.dump({"complete": not missing, "findings": rows}, stream, indent=2)
        stream.write("\n")
        return
    width = max((len(finding.name) for finding in findings), default=0)
    for finding in findings:
        stream.write(f"{finding.verdict:<8} {finding.name:<{width}}  {finding.value}\n")
        if finding.advice:
            stream.write(f"{'':<8} {'':<{width}}  -> {finding.advice}\n")
    stream.write(f"{missing} missing\n" if missing else "nothing is missing\n")


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


def onlining_rules(root: Path | str) -> list[Path]:
    """udev rule files in force that online CPUs or memory by themselves."""
    found: dict[str, Path | None] = {}
    for place in _RULE_DIRECTORIES:
        for path in sorted((Path(root) / place / "udev/rules.d").glob("*.rules")):
            if path.name not in found:
                found[path.name] = path if _onlines(path) else None
    return [path for path in found.values() if path is not None]


def _onlines(path: Path) -> bool:
    try:
        text = path.read_text("utf-8", "replace").replace("\\\n", " ")
    except OSError:  # a link to nowhere or to /dev/null: a masked rule
        return False
    rules = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return any(_MATCHES.search(rule) and _ONLINING.search(rule) for rule in rules)


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


def _auto_online(root: Path) -> Finding:
    try:
        value = (root / "sys/devices/system/memory/auto_online_blocks").read_text().strip()
    except FileNotFoundError:
        return Finding("auto_online_blocks", Verdict.NOTE, "not offered by this kernel")
    if value == "offline":
        return Finding("auto_online_blocks", Verdict.OK, "offline (guestd onlines new blocks itself)")
    advice = "works; for guestd to choose the zone block by block: memhp_default_state=offline"
    return Finding("auto_online_blocks", Verdict.NOTE, f"{value} (the kernel onlines new blocks)", advice)


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


def _udev_rules(root: Path) -> list[Finding]:
    rules = onlining_rules(root)
    if not rules:
        return [Finding("udev rules", Verdict.OK, "none onlines by itself")]
    advice = "works; to leave it to guestd mask the rule with a link to /dev/null in /etc/udev/rules.d"
    return [
        Finding("udev rules", Verdict.NOTE, f"/{path.relative_to(root)} onlines by itself", advice) for path in rules
    ]


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
