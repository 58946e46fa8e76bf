"""The inventory, from fake trees."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.guest import sysfs
from guestd.guest.sysfs import capabilities, parse_cpu_list, parse_zones, read_inventory
from guestd.model.guest import BlockState, Capability, Inventory, MemoryBlock, NodeZones

ZONEINFO = """Node 0, zone      DMA
  per-node stats
      nr_inactive_anon 23797
  pages free     100
        boost    0
        min      33
        spanned  4095
        present  200
        managed  190
        cma      0
  pagesets
    cpu: 0
              count: 0
Node 0, zone   Normal
  pages free     1000
        present  3000
        managed  2900
Node 0, zone  Movable
  pages free     77
        present  500
        managed  400
Node 1, zone   Normal
  pages free     10
        present  30
        managed  20
Node 1, zone   Device
  pages free     9999
        present  9999
        managed  9999
"""


def make_tree(root: Path, cpus: int = 4, blocks: int = 4) -> Path:
    cpu = root / "sys/devices/system/cpu"
    for n in range(cpus):
        (cpu / f"cpu{n}").mkdir(parents=True)
        if n:
            (cpu / f"cpu{n}/online").write_text("1\n")
    for name, text in {"possible": "0-7", "present": f"0-{cpus - 1}", "online": "0-1", "isolated": "3"}.items():
        (cpu / name).write_text(text + "\n")
    memory = root / "sys/devices/system/memory"
    memory.mkdir(parents=True)
    (memory / "block_size_bytes").write_text("8000000\n")
    (memory / "power").mkdir()
    for n in range(blocks):
        make_block(root, n, "online", "Normal")
    (root / "proc").mkdir()
    (root / "proc/zoneinfo").write_text(ZONEINFO)
    return root


def make_block(root: Path, index: int, state: str, zones: str) -> None:
    directory = root / f"sys/devices/system/memory/memory{index}"
    directory.mkdir(exist_ok=True)
    (directory / "state").write_text(state + "\n")
    (directory / "valid_zones").write_text(zones + "\n")


def test_inventory(tmp_path: Path) -> None:
    make_tree(tmp_path)
    make_block(tmp_path, 32, "offline", "Normal Movable")
    make_block(tmp_path, 5, "online", "Movable")
    make_block(tmp_path, 10, "going-offline", "Movable")
    page = os.sysconf("SC_PAGE_SIZE")
    normal = [MemoryBlock(n, BlockState.ONLINE) for n in range(4)]
    assert read_inventory(tmp_path) == Inventory(
        cpus_possible=frozenset(range(8)),
        cpus_present=frozenset(range(4)),
        cpus_online=frozenset((0, 1)),
        cpus_pinned=frozenset((0, 3)),
        block_bytes=128 << 20,
        blocks=(
            *normal,
            MemoryBlock(5, BlockState.ONLINE, movable=True),
            MemoryBlock(10, BlockState.GOING_OFFLINE),
            MemoryBlock(32, BlockState.OFFLINE),
        ),
        zones=(NodeZones(0, 3200 * page, 1100 * page, 500 * page), NodeZones(1, 30 * page, 10 * page, 0)),
    )


def make_nodes(root: Path, blocks: dict[int, list[int]]) -> None:
    for node, indices in blocks.items():
        directory = root / f"sys/devices/system/node/node{node}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "meminfo").touch()
        for index in indices:
            (directory / f"memory{index}").symlink_to(f"../../memory/memory{index}")


def _nodes(inventory: Inventory) -> dict[int, int]:
    return {block.index: block.node for block in inventory.blocks}


def test_blocks_know_their_node(tmp_path: Path) -> None:
    make_tree(tmp_path)
    make_nodes(tmp_path, {0: [0, 1], 1: [2, 3], 2: []})
    first = read_inventory(tmp_path)
    assert _nodes(first) == {0: 0, 1: 0, 2: 1, 3: 1}
    # A block that comes is looked up; those that are known keep their node, whatever their state.
    make_block(tmp_path, 40, "offline", "Normal Movable")
    make_block(tmp_path, 3, "offline", "Normal")
    make_nodes(tmp_path, {2: [40]})
    assert _nodes(read_inventory(tmp_path, previous=first, changed=[3])) == {0: 0, 1: 0, 2: 1, 3: 1, 40: 2}


def test_nodes_are_listed_only_for_what_is_new(tmp_path: Path) -> None:
    make_tree(tmp_path)
    make_nodes(tmp_path, {0: [0, 1], 1: [2, 3]})
    first = read_inventory(tmp_path)
    (tmp_path / "sys/devices/system/node").rename(tmp_path / "sys/devices/system/gone")
    assert read_inventory(tmp_path, previous=first) == first
    make_block(tmp_path, 9, "offline", "Normal")
    assert _nodes(read_inventory(tmp_path, previous=first)) == {0: 0, 1: 0, 2: 1, 3: 1, 9: 0}


def test_a_single_node_is_not_listed(tmp_path: Path) -> None:
    make_tree(tmp_path)
    make_nodes(tmp_path, {0: [0, 1, 2, 3]})
    (tmp_path / "sys/devices/system/node/node0").rename(tmp_path / "sys/devices/system/node/node3")
    assert set(_nodes(read_inventory(tmp_path)).values()) == {0}


def test_an_empty_tree_offers_nothing(tmp_path: Path) -> None:
    assert read_inventory(tmp_path) == Inventory()
    assert capabilities(tmp_path) == frozenset()


def test_cpu_0_is_pinned_even_with_a_switch(tmp_path: Path) -> None:
    make_tree(tmp_path)
    (tmp_path / "sys/devices/system/cpu/cpu0/online").write_text("1\n")
    assert 0 in read_inventory(tmp_path).cpus_pinned


def test_what_vanishes_between_listing_and_reading_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(tmp_path)
    read_at = sysfs._read_at

    def vanish(directory: int, name: str) -> str | None:
        if name.startswith("memory2/"):
            (tmp_path / "sys/devices/system/memory/memory2/state").unlink(missing_ok=True)
        return read_at(directory, name)

    monkeypatch.setattr(sysfs, "_read_at", vanish)
    assert [block.index for block in read_inventory(tmp_path).blocks] == [0, 1, 3]


def test_a_second_look_sees_every_change_of_state(tmp_path: Path) -> None:
    make_tree(tmp_path)
    make_block(tmp_path, 8, "offline", "Normal Movable")
    first = read_inventory(tmp_path)
    make_block(tmp_path, 1, "offline", "Normal Movable")
    make_block(tmp_path, 8, "online", "Movable")
    make_block(tmp_path, 9, "online", "Movable")
    second = read_inventory(tmp_path, previous=first)
    assert second == read_inventory(tmp_path)
    # Offline and online again in another zone between two looks: only who knows of it can tell.
    make_block(tmp_path, 2, "online", "Movable")
    assert not _block(read_inventory(tmp_path, previous=second), 2).movable
    assert _block(read_inventory(tmp_path, previous=second, changed=[2]), 2).movable


def _block(inventory: Inventory, index: int) -> MemoryBlock:
    return next(block for block in inventory.blocks if block.index == index)


def test_an_unknown_state_is_an_error_with_its_name(tmp_path: Path) -> None:
    make_tree(tmp_path)
    make_block(tmp_path, 3, "molten", "Normal")
    with pytest.raises(ValueError, match="memory3/state: 'molten"):
        read_inventory(tmp_path)


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("", set()), ("\n", set()), ("0\n", {0}), ("0-2,7\n", {0, 1, 2, 7}), ("(null)\n", set()), ("3,5-5", {3, 5})],
)
def test_cpu_lists(text: str, cpus: set[int]) -> None:
    assert parse_cpu_list(text) == cpus


@given(st.text(alphabet="0123456789-, x", max_size=12))
def test_other_cpu_lists_are_value_errors(text: str) -> None:
    try:
        assert all(0 <= number < 1 << 20 for number in parse_cpu_list(text))
    except ValueError:
        return


def test_zones_of_nothing() -> None:
    assert parse_zones("", 4096) == ()


def test_what_is_mounted_read_only_is_not_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(tmp_path)
    read_only: list[str] = []

    def statvfs(path: Path) -> SimpleNamespace:
        return SimpleNamespace(f_flag=os.ST_RDONLY if path.name in read_only else 0)

    monkeypatch.setattr(os, "statvfs", statvfs)
    assert capabilities(tmp_path) == {Capability.CPU_ONLINE, Capability.MEMORY_ONLINE}
    read_only.append("memory")
    assert capabilities(tmp_path) == {Capability.CPU_ONLINE}
    read_only.append("cpu")
    assert capabilities(tmp_path) == frozenset()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EOPNOTSUPP])
def test_pressure_that_is_not_for_us_is_not_offered(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path) -> str | None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sysfs, "_read", read)
    assert not sysfs._offers_pressure(tmp_path)


def test_capabilities(tmp_path: Path) -> None:
    make_tree(tmp_path)
    assert capabilities(tmp_path) == {Capability.CPU_ONLINE, Capability.MEMORY_ONLINE}
    for driver in ("virtio_mem", "virtio_balloon"):
        directory = tmp_path / "sys/bus/virtio/drivers" / driver
        directory.mkdir(parents=True)
        (directory / "bind").touch()
    assert capabilities(tmp_path) == {Capability.CPU_ONLINE, Capability.MEMORY_ONLINE}
    (tmp_path / "sys/bus/virtio/drivers/virtio_mem/virtio3").touch()
    (tmp_path / "sys/bus/virtio/drivers/virtio_balloon/virtio12").touch()
    (tmp_path / "proc/pressure").mkdir()
    (tmp_path / "proc/pressure/memory").write_text("some avg10=0.00 total=0\n")
    assert capabilities(tmp_path) == set(Capability) - {Capability.DRY_RUN}


def test_a_single_cpu_that_may_get_company(tmp_path: Path) -> None:
    (tmp_path / "sys/devices/system/cpu/cpu0").mkdir(parents=True)
    (tmp_path / "sys/devices/system/cpu/hotplug").mkdir()
    assert capabilities(tmp_path) == {Capability.CPU_ONLINE}


def test_this_machine_makes_sense() -> None:
    inventory = read_inventory()
    assert inventory.cpus_online <= inventory.cpus_present <= inventory.cpus_possible
