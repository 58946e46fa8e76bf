"""CPUs and memory blocks as the guest kernel has them now. Reads only; the root helper writes.

1. What is not offered here is an empty field, never an error.
2. Anything may vanish between listing and reading (the host can take a block back at any time): it is left out.
3. CPU 0, isolated CPUs and CPUs without an `online` file are pinned: never offlined.
4. A machine can have thousands of blocks. Each state is read at each look, with one open directory and no
   listing of its own; the zone of a block is read when it comes online (before that it has none), and believed as long
   as it is seen online (`previous`) and nobody says otherwise (`changed`).
5. A block's NUMA node never changes: the nodes are listed only where there are two or more, and only when a
   block is seen that was not there before.
"""

import errno
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from guestd.model.guest import BlockState, Capability, Inventory, MemoryBlock, NodeZones

_CPU = "sys/devices/system/cpu"
_MEMORY = "sys/devices/system/memory"
_NODE = "sys/devices/system/node"
_VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO)
_STATES = {state.value: state for state in BlockState}


def read_inventory(
    root: Path | str = "/", previous: Inventory | None = None, changed: Collection[int] = ()
) -> Inventory:
    """All CPUs and memory blocks, and the sizes of the zones.

    :param previous: An earlier answer for the same root; saves half of the work (see rule 4).
    :param changed: Blocks that may have gone offline and online since `previous`.
    :raise OSError: When a file that exists cannot be read for a reason other than vanishing.
    :raise ValueError: When a file holds something that is not in the kernel's documentation.
    """
    root = Path(root)
    present = read_cpus(root, "present")
    known = {block.index: block for block in previous.blocks} if previous is not None else {}
    nodes = {index: block.node for index, block in known.items()}
    for index in changed:
        known.pop(index, None)
    block_size = _read(root / _MEMORY / "block_size_bytes")
    return Inventory(
        cpus_possible=read_cpus(root, "possible"),
        cpus_present=present,
        cpus_online=read_cpus(root, "online"),
        cpus_pinned=_read_pinned(root, present),
        block_bytes=int(block_size, 16) if block_size else 0,
        blocks=_read_blocks(root, known, nodes) if block_size else (),
        zones=read_zones(root),
    )


def parse_cpu_list(text: str) -> frozenset[int]:
    """CPU numbers from a list such as ``0-3,8``; an empty text is no CPUs.

    :raise ValueError: When it is not such a list.
    """
    numbers: set[int] = set()
    for part in text.strip().split(","):
        if not part or part == "(null)":  # kernels before 5.1 print an empty `isolated` so
            continue
        first, dash, last = part.partition("-")
        low = int(first)
        high = int(last) if dash else low
        if not 0 <= low <= high < 1 << 20:
            raise ValueError(f"{text!r} is not a list of CPUs")
        numbers.update(range(low, high + 1))
    return frozenset(numbers)


def parse_zones(text: str, page_bytes: int) -> tuple[NodeZones, ...]:
    """The zones of `/proc/zoneinfo`, summed up by NUMA node; nodes without memory are left out.

    Present, not managed: so the kernel's own policy counts the two (mm/memory_hotplug.c,
    auto_movable_stats_account_zone).
    """
    pages: dict[int, list[int]] = {}  # present in kernel zones, free in them, present in ZONE_MOVABLE
    zone, counts = "", [0, 0, 0]
    for line in text.splitlines():
        if line.startswith("Node "):
            place, _, zone = line.rpartition(" ")
            counts = pages.setdefault(int(place[5:].partition(",")[0]), [0, 0, 0])
        elif line.startswith("        present"):
            if zone == "Movable":
                counts[2] += int(line[15:])
            elif zone != "Device":
                counts[0] += int(line[15:])
        elif line.startswith("  pages free") and zone not in ("Movable", "Device"):
            counts[1] += int(line[12:])
    return tuple(
        NodeZones(node, *(count * page_bytes for count in counts))
        for node, counts in sorted(pages.items())
        if any(counts)
    )


def read_cpus(root: Path | str, which: str) -> frozenset[int]:
    """The CPUs of one list: possible, present, online, isolated, …"""
    return parse_cpu_list(_read(Path(root) / _CPU / which) or "")


def read_zones(root: Path | str = "/") -> tuple[NodeZones, ...]:
    """The memory of each NUMA node by what it may be used for, in bytes."""
    return parse_zones(_read(Path(root) / "proc/zoneinfo") or "", os.sysconf("SC_PAGE_SIZE"))


def capabilities(root: Path | str = "/") -> frozenset[Capability]:
    """What the kernel offers here, and does not show read-only, as in a container. Whether we may use CPU_ONLINE and
    MEMORY_ONLINE depends on the root helper.
    """
    root = Path(root)
    found = set()
    switches = (root / _CPU / "hotplug").is_dir() or any((root / _CPU).glob("cpu[0-9]*/online"))
    if switches and not _read_only(root / _CPU):
        found.add(Capability.CPU_ONLINE)
    if (root / _MEMORY / "block_size_bytes").exists() and not _read_only(root / _MEMORY):
        found.add(Capability.MEMORY_ONLINE)
    if driver_bound(root, "virtio_mem"):
        found.add(Capability.VIRTIO_MEM)
    if driver_bound(root, "virtio_balloon"):
        found.add(Capability.BALLOON)
    if _offers_pressure(root):
        found.add(Capability.PSI)
    return frozenset(found)


def _read_only(path: Path) -> bool:
    """By how it is mounted: our own rights say nothing of the root helper's."""
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def driver_bound(root: Path | str, driver: str) -> bool:
    """Whether a virtio driver is loaded and drives at least one device."""
    return any((Path(root) / "sys/bus/virtio/drivers" / driver).glob("virtio[0-9]*"))


def _offers_pressure(root: Path) -> bool:
    try:
        return bool(_read(root / "proc/pressure/memory"))
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EACCES, errno.EPERM):  # compiled in, switched off; or not for us
            return False
        raise


def _read(path: Path) -> str | None:
    """The file's text, or None when it is not there (any more)."""
    try:
        return path.read_text("ascii")
    except OSError as error:
        if error.errno in _VANISHED:
            return None
        raise


def _read_pinned(root: Path, present: frozenset[int]) -> frozenset[int]:
    cpus = root / _CPU
    fixed = {number for number in present if number == 0 or not (cpus / f"cpu{number}/online").exists()}
    return read_cpus(root, "isolated") | fixed


def _read_blocks(root: Path, known: Mapping[int, MemoryBlock], nodes: Mapping[int, int]) -> tuple[MemoryBlock, ...]:
    directory = os.open(root / _MEMORY, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        indices = _numbered(directory, "memory")
        if not nodes.keys() >= indices:
            nodes = _read_nodes(root)
        found = (_read_block(directory, index, known.get(index), nodes.get(index, 0)) for index in sorted(indices))
        return tuple(block for block in found if block is not None)
    finally:
        os.close(directory)


def _read_nodes(root: Path) -> dict[int, int]:
    """The NUMA node of each block; empty where there is only one, which is node 0."""
    try:
        directory = os.open(root / _NODE, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _VANISHED:
            return {}
        raise
    try:
        nodes = _numbered(directory, "node")
        if len(nodes) < 2:
            return {}
        return {index: node for node in nodes for index in _blocks_of(directory, node)}
    finally:
        os.close(directory)


def _blocks_of(nodes: int, node: int) -> frozenset[int]:
    try:
        directory = os.open(f"node{node}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=nodes)
    except OSError as error:
        if error.errno in _VANISHED:
            return frozenset()
        raise
    try:
        return _numbered(directory, "memory")
    finally:
        os.close(directory)


def _numbered(directory: int, prefix: str) -> frozenset[int]:
    """The N of all entries ``prefixN`` of an open directory."""
    with os.scandir(directory) as entries:
        names = [entry.name for entry in entries]
    start = len(prefix)
    return frozenset(int(name[start:]) for name in names if name.startswith(prefix) and name[start:].isdecimal())


def _read_block(directory: int, index: int, before: MemoryBlock | None, node: int) -> MemoryBlock | None:
    name = f"memory{index}"
    text = _read_at(directory, name + "/state")
    if text is None:
        return None
    state = _STATES.get(text.strip())
    if state is None:
        raise ValueError(f"{name}/state: {text!r} is not a state that is known")
    if before is not None and before.state is state is BlockState.ONLINE:
        return before
    zones = (_read_at(directory, name + "/valid_zones") or "") if state is BlockState.ONLINE else ""
    return MemoryBlock(index, state, zones.strip() == "Movable", node)


def _read_at(directory: int, name: str) -> str | None:
    """Like `_read`, for a path below an open directory: no object and no long path per file."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    except OSError as error:
        if error.errno in _VANISHED:
            return None
        raise
    try:
        return os.read(fd, 256).decode("ascii")
    except OSError as error:
        if error.errno in _VANISHED:
            return None
        raise
    finally:
        os.close(fd)
