"""What else on this machine may switch CPUs and memory, or kill for want of it: guestd lives with all of them.

Each finds out whether it is there and does something, by files alone: nothing is started or asked. What is there is a
note with what to know; only hooks that will never run are missing.

Weak spots: a program in a container of its own is not seen; cpusets are looked for in the upper levels of the tree.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from guestd.guest.findings import Finding, Verdict, read_text
from guestd.guest.helper import hooks

_RULE_DIRECTORIES = ("etc", "run", "usr/local/lib", "usr/lib", "lib")  # a name in an earlier one hides later ones
_ONLINING = re.compile(r'ATTR\{(?:\[[^\]]*\])?(state|online)\}\s*=\s*"?(?:online\w*|1)')
_MATCHES = re.compile(r'SUBSYSTEM\s*==\s*"[^"]*(?:memory|cpu)')
_ISOLATED = re.compile(r"^\s*(isolated_cores|no_balance_cores)\s*=\s*(\S.*)$", re.MULTILINE)
_BLOCKED = re.compile(r"^\s*(?:block-rpcs|blacklist)\s*=\s*(\S.*)$", re.MULTILINE)
_AGENT_CALLS = ("guest-set-vcpus", "guest-set-memory-blocks")
_CPUSET_LEVELS = ("*", "*/*", "*/*/*")
_SHOWN = 4


def examine(root: Path, parameters: dict[str, str], hook_owner: int) -> list[Finding]:
    """All of them.

    :param parameters: The kernel's command line.
    :param hook_owner: The user id that hooks must belong to.
    """
    programs = running_programs(root)
    return [
        _auto_online(root, parameters),
        *_udev_rules(root),
        _tuned(root, programs),
        _guest_agent(root, programs),
        _oomd(root, programs),
        _isolation(root, parameters),
        _cpusets(root),
        _hooks(root, hook_owner),
    ]


def running_programs(root: Path) -> frozenset[str]:
    """The names of all processes that can be seen, as the kernel has them: at most 15 characters."""
    names = (read_text(path) for path in (root / "proc").glob("[0-9]*/comm"))
    return frozenset(name for name in names if name)


def onlining_rules(root: Path | str) -> list[Path]:
    """udev rule files in force that online CPUs or memory by themselves."""
    found: dict[str, Path | None] = {}
    for place in _RULE_DIRECTORIES:
        for path in sorted((Path(root) / place / "udev/rules.d").glob("*.rules")):
            if path.name not in found:
                found[path.name] = path if _onlines(path) else None
    return [path for path in found.values() if path is not None]


def _onlines(path: Path) -> bool:
    text = (read_text(path) or "").replace("\\\n", " ")  # empty: a link to nowhere or to /dev/null, a masked rule
    rules = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return any(_MATCHES.search(rule) and _ONLINING.search(rule) for rule in rules)


def _auto_online(root: Path, parameters: dict[str, str]) -> Finding:
    name = "auto_online_blocks"
    value = read_text(root / "sys/devices/system/memory/auto_online_blocks")
    if value is None:
        return Finding(name, Verdict.NOTE, "not offered by this kernel")
    if value == "offline":
        return Finding(name, Verdict.OK, "offline (guestd onlines new blocks itself)")
    asked = parameters.get("memhp_default_state")
    why = f", memhp_default_state={asked} on the kernel command line" if asked else ""
    advice = "works; for guestd to choose the zone block by block: memhp_default_state=offline"
    return Finding(name, Verdict.NOTE, f"{value} (the kernel onlines new blocks{why})", advice)


def _udev_rules(root: Path) -> list[Finding]:
    rules = onlining_rules(root)
    if not rules:
        return [Finding("udev rules", Verdict.OK, "none onlines by itself")]
    advice = "works; to leave it to guestd mask the rule with a link to /dev/null in /etc/udev/rules.d"
    return [
        Finding("udev rules", Verdict.NOTE, f"/{path.relative_to(root)} onlines by itself", advice) for path in rules
    ]


def _tuned(root: Path, programs: frozenset[str]) -> Finding:
    state = _state(root, programs, "tuned", "usr/sbin/tuned")
    profile = read_text(root / "etc/tuned/active_profile") or ""
    if not state or not (profile or state == "running"):
        return Finding("tuned", Verdict.OK, state or "not there")
    value = f"{state}, profile {profile or 'none'}"
    isolated = [found for name in profile.split() for found in _isolated_cores(root, name)]
    if isolated:
        advice = "CPUs that tuned isolates are taken offline like others unless the kernel isolates them (isolcpus)"
        return Finding("tuned", Verdict.NOTE, f"{value}, {', '.join(isolated)}", advice)
    advice = "works; a profile that switches CPUs is seen as somebody else: guestd leaves alone what it takes offline"
    return Finding("tuned", Verdict.NOTE, value, advice)


def _isolated_cores(root: Path, profile: str) -> Iterator[str]:
    text = read_text(root / f"etc/tuned/{profile}-variables.conf") or ""
    yield from (f"{name}={value.strip()}" for name, value in _ISOLATED.findall(text))


def _guest_agent(root: Path, programs: frozenset[str]) -> Finding:
    state = _state(root, programs, "qemu-ga", "usr/sbin/qemu-ga", "usr/bin/qemu-ga")
    if not state:
        return Finding("qemu-guest-agent", Verdict.OK, "not there")
    blocked = " ".join(_BLOCKED.findall(read_text(root / "etc/qemu/qemu-ga.conf") or ""))
    free = [call for call in _AGENT_CALLS if call not in blocked]
    if not free:
        return Finding("qemu-guest-agent", Verdict.OK, f"{state}, its calls that switch CPUs and memory are blocked")
    advice = (
        f"works; whoever calls {' or '.join(free)} on the host switches what guestd does, and is left alone: "
        "call it no more, or list it as block-rpcs (before QEMU 8: blacklist) in /etc/qemu/qemu-ga.conf"
    )
    return Finding("qemu-guest-agent", Verdict.NOTE, state, advice)


def _oomd(root: Path, programs: frozenset[str]) -> Finding:
    if "systemd-oomd" not in programs:
        return Finding("systemd-oomd", Verdict.OK, "not running")
    advice = "works; guestd asks for memory first, but oomd kills when the host has none: see its limits in oomd.conf"
    return Finding("systemd-oomd", Verdict.NOTE, "running", advice)


def _isolation(root: Path, parameters: dict[str, str]) -> Finding:
    isolated = read_text(root / "sys/devices/system/cpu/isolated") or ""
    isolated = "" if isolated == "(null)" else isolated
    words = [f"{name}={parameters[name]}" for name in ("isolcpus", "nohz_full", "rcu_nocbs") if name in parameters]
    if isolated:
        value = f"CPUs {isolated} ({' '.join(words) or 'a cpuset partition'})"
        return Finding("isolated CPUs", Verdict.NOTE, value, "they are never taken offline: the VM keeps them")
    if words:
        return Finding("isolated CPUs", Verdict.NOTE, f"none; {' '.join(words)}", "no CPU is kept for that alone")
    return Finding("isolated CPUs", Verdict.OK, "none")


def _cpusets(root: Path) -> Finding:
    tree = root / "sys/fs/cgroup"
    pinned = list(_pinned_groups(tree if (tree / "cgroup.controllers").exists() else tree / "cpuset"))  # v2, v1
    if not pinned:
        return Finding("cpusets", Verdict.OK, "none bound to CPUs")
    more = f" and {len(pinned) - _SHOWN} more" if len(pinned) > _SHOWN else ""
    advice = (
        "works; where all CPUs of a group are offline its tasks run on others, and CPUs that come are not in "
        "the group: a hook for after-grow and before-shrink can write cpuset.cpus"
    )
    return Finding("cpusets", Verdict.NOTE, ", ".join(pinned[:_SHOWN]) + more, advice)


def _pinned_groups(tree: Path) -> Iterator[str]:
    """Groups with CPUs of their own, as words; of version 1 only those that have fewer than the root."""
    everything = read_text(tree / "cpuset.cpus")  # the root has the file in version 1 only
    for level in _CPUSET_LEVELS:
        for path in sorted(tree.glob(f"{level}/cpuset.cpus")):
            cpus = read_text(path)
            if cpus and cpus != everything:
                partition = read_text(path.with_name("cpuset.cpus.partition")) or "member"
                kind = "" if partition == "member" else f" ({partition})"
                yield f"{path.parent.relative_to(tree)}: CPUs {cpus}{kind}"


def _hooks(root: Path, owner: int) -> Finding:
    names, refused = hooks.find(str(root).rstrip("/"), owner)
    if refused:
        why = "; ".join(reason for _, reason in refused)
        return Finding("hooks", Verdict.MISSING, f"{len(names)} run, never run: {why}", "see the end of each reason")
    return Finding("hooks", Verdict.OK, f"{', '.join(names)}" if names else "none installed")


def _state(root: Path, programs: frozenset[str], name: str, *paths: str) -> str:
    """``running``, ``installed`` or empty."""
    if name in programs:
        return "running"
    return "installed" if any((root / path).exists() for path in paths) else ""
