"""Which DIMMs: their size, how many, and which one goes next."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.broker.hypervisor.dimms import (
    ANSWER_SECONDS,
    BLOCK_BYTES,
    REST_MAX_SECONDS,
    REST_SECONDS,
    Bank,
    Removals,
    guest_block_bytes,
    unit_bytes,
)
from guestd.broker.hypervisor.qmp_answers import Dimm, MemoryBackend, MemoryDevices, MemoryRoom
from guestd.model.units import GIB, MIB

BOOT = 512 * MIB


def ours(number: int, size: int = 512 * MIB) -> Dimm:
    """The DIMM with this number, above those with lower ones."""
    return Dimm(f"guestd-dimm-{number}", f"guestd-mem-{number}", 4 * GIB + number * size, size)


ROOM = MemoryRoom(2 * GIB, 3)


def bank(*dimms: Dimm, backends: tuple[MemoryBackend, ...] = (), room: MemoryRoom = ROOM) -> Bank:
    behind = tuple(MemoryBackend(dimm.backend_id, dimm.size, True) for dimm in dimms)
    return Bank(BOOT, MemoryDevices(dimms, ()), (MemoryBackend("ram0", BOOT, True), *behind, *backends), room)


# ---- size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("boot", "room", "slots", "unit"),
    [
        (512 * MIB, 1536 * MIB, 3, 512 * MIB),
        (512 * MIB, 1536 * MIB, 16, 128 * MIB),
        (4 * GIB, 60 * GIB, 16, 4 * GIB),  # 3.75 GiB would do, but then 4 GiB were no amount
        (4 * GIB, 60 * GIB, 256, 256 * MIB),
        (4 * GIB, 60 * GIB, 1, 4 * GIB),  # never more than the VM has: what it has must be an amount
        (4 * GIB, GIB, 3, 512 * MIB),
        (4 * GIB, 640 * MIB, 1, 512 * MIB),
        (64 * GIB, 64 * GIB, 200, 2 * GIB),  # blocks of 2 GiB
        (1000 * MIB, 2 * GIB, 8, 256 * MIB),  # no divisor: the smallest that gets furthest
        (512 * MIB, 100 * MIB, 8, 0),
        (512 * MIB, 0, 8, 0),
        (512 * MIB, 4 * GIB, 0, 0),
        (512 * MIB, -GIB, -1, 0),
    ],
)
def test_the_size_of_a_dimm(boot: int, room: int, slots: int, unit: int) -> None:
    assert unit_bytes(boot, room, slots) == unit


@given(st.integers(1, 80), st.integers(0, 800), st.integers(0, 300))
def test_a_unit_divides_what_is_there_and_fits(blocks: int, more: int, slots: int) -> None:
    boot, room = blocks * BLOCK_BYTES, more * BLOCK_BYTES
    unit = unit_bytes(boot, room, slots)
    assert (unit == 0) == (slots == 0 or more == 0)
    if unit:
        assert unit % BLOCK_BYTES == 0
        assert boot % unit == 0
        assert unit <= room
        reach = min(slots, room // unit) * unit
        assert reach >= min(slots, more) * BLOCK_BYTES  # single blocks get no further


def test_linux_has_larger_blocks_in_large_guests() -> None:
    sizes = (512 * MIB, 59 * GIB, 64 * GIB, 65 * GIB, 64 * GIB + 128 * MIB)
    assert [guest_block_bytes(size) // MIB for size in sizes] == [128, 128, 2048, 1024, 128]


# ---- what is there -------------------------------------------------------------------------------


def test_dimms_of_others_are_boot_memory_and_take_a_slot() -> None:
    other = Dimm("dimm0", "more", 4 * GIB, 256 * MIB)
    seen = bank(other, ours(1, 256 * MIB), room=MemoryRoom(2 * GIB, 4))
    assert (seen.boot, seen.plugged) == (768 * MIB, 256 * MIB)
    assert seen.unit == 384 * MIB
    assert seen.most == 1152 * MIB  # of 1280 MiB of room, in three slots
    assert [dimm.device_id for dimm in seen.own] == ["guestd-dimm-1"]


def test_a_name_of_ours_on_memory_of_others_is_not_ours() -> None:
    assert not bank(Dimm("guestd-dimm-0", "more", 4 * GIB, 512 * MIB)).own


def test_a_backend_without_a_dimm_is_held_and_not_plugged() -> None:
    left = MemoryBackend("guestd-mem-7", 512 * MIB, True)
    seen = bank(ours(0), backends=(left,))
    assert (seen.plugged, seen.held, seen.leftovers) == (512 * MIB, GIB, (left,))


def test_nvdimms_take_slots_and_room() -> None:
    devices = MemoryDevices((), (), nvdimms=(512 * MIB,))
    assert Bank(BOOT, devices, (), MemoryRoom(2 * GIB, 3)).most == GIB


def test_how_many_are_missing_and_what_the_next_is_called() -> None:
    seen = bank(ours(0), ours(2))
    assert [seen.missing(size * MIB) for size in (0, 1024, 1535, 1536, 5120)] == [0, 0, 0, 1, 8]
    assert (seen.next_number(), seen.next_number(2)) == (1, 3)
    left = MemoryBackend("guestd-mem-1", 512 * MIB, True)
    assert bank(ours(0), ours(2), backends=(left,)).next_number() == 3


def test_shared_like_the_vms_own_memory() -> None:
    assert bank().shared
    own = (MemoryBackend("pc.ram", BOOT, False), MemoryBackend("guestd-mem-0", BOOT, True))
    assert not Bank(BOOT, MemoryDevices((), ()), own, MemoryRoom(2 * GIB, 3)).shared


# ---- what goes -----------------------------------------------------------------------------------


def chosen(removals: Removals, own: tuple[Dimm, ...], wanted_dimms: float, now: float) -> str:
    dimm = removals.choose(own, int(wanted_dimms * 512 * MIB), now)
    return dimm.device_id.removeprefix("guestd-dimm-") if dimm else "none"


THREE = (ours(0), ours(1), ours(2))


def test_the_highest_goes_first_and_one_at_a_time() -> None:
    removals = Removals()
    assert chosen(removals, THREE, 0, 0.0) == "2"
    removals.asked("guestd-dimm-2", 0.0)
    assert chosen(removals, THREE, 0, 1.0) == "none"
    assert chosen(removals, THREE[:2], 0, 1.0) == "1"  # it is gone


@pytest.mark.parametrize(("wanted", "goes"), [(0, "2"), (2, "2"), (2.5, "none"), (3, "none"), (9, "none")])
def test_never_more_than_what_is_too_much(wanted: float, goes: str) -> None:
    assert chosen(Removals(), THREE, wanted, 0.0) == goes


def test_one_that_was_refused_rests_and_the_next_is_tried() -> None:
    removals = Removals()
    for now, device, goes in ((0.0, 2, "1"), (1.0, 1, "0"), (2.0, 0, "none")):
        removals.asked(f"guestd-dimm-{device}", now)
        assert removals.refused(f"guestd-dimm-{device}", now) == REST_SECONDS
        assert chosen(removals, THREE, 0, now) == goes
    assert removals.wake_at(2.0) == REST_SECONDS
    assert chosen(removals, THREE, 0, REST_SECONDS) == "2"


def test_the_rest_grows_up_to_a_bound_and_ends_with_the_kernel() -> None:
    removals, rests = Removals(), []
    for turn in range(8):
        removals.asked("guestd-dimm-2", turn * 100.0)
        rests.append(removals.refused("guestd-dimm-2", turn * 100.0))
    assert rests[:3] == [REST_SECONDS, 2 * REST_SECONDS, 4 * REST_SECONDS]
    assert rests[-1] == REST_MAX_SECONDS
    assert chosen(removals, THREE, 2, 701.0) == "1"
    removals.forget_rests()
    assert chosen(removals, THREE, 2, 701.0) == "2"


def test_a_removal_without_an_answer_counts_as_gone_until_it_is_refused() -> None:
    removals = Removals()
    removals.asked("guestd-dimm-2", 0.0)
    assert removals.waits_until(0.0) == ANSWER_SECONDS
    late = ANSWER_SECONDS
    assert removals.overdue(late) == [("guestd-dimm-2", REST_SECONDS)]
    assert removals.overdue(late) == []
    assert chosen(removals, THREE, 2, late) == "none"  # it may be the one that goes
    assert chosen(removals, THREE, 1, late) == "1"  # even if both go
    assert removals.refused("guestd-dimm-2", late + 1) == REST_SECONDS - 1
    assert chosen(removals, THREE, 2, late + 1) == "1"


def test_a_removal_without_an_answer_is_asked_for_again_after_its_rest() -> None:
    removals = Removals()
    removals.asked("guestd-dimm-2", 0.0)
    removals.overdue(ANSWER_SECONDS)
    assert chosen(removals, THREE, 2, ANSWER_SECONDS + REST_SECONDS) == "2"


def test_a_refusal_that_nobody_asked_for_changes_nothing() -> None:
    removals = Removals()
    assert removals.refused("guestd-dimm-2", 0.0) is None
    removals.asked("guestd-dimm-2", 0.0)
    assert removals.refused("guestd-dimm-2", 0.0) == REST_SECONDS
    assert removals.refused("guestd-dimm-2", 0.0) is None  # QEMU says it in two events


def test_one_that_came_back_is_a_new_one() -> None:
    removals = Removals()
    removals.asked("guestd-dimm-2", 0.0)
    removals.refused("guestd-dimm-2", 0.0)
    assert chosen(removals, THREE[:2], 2, 1.0) == "none"
    assert chosen(removals, THREE, 2, 1.0) == "2"


@given(st.lists(st.tuples(st.sampled_from(["refuse", "silent", "go"]), st.floats(0, 10)), max_size=30))
def test_whatever_the_guest_does_not_more_goes_than_was_wanted(answers: list[tuple[str, float]]) -> None:
    removals, own, now, may_go = Removals(), list(THREE), 0.0, set[str]()
    for answer, pause in answers:
        dimm = removals.choose(own, 512 * MIB, now)
        if dimm is not None:
            removals.asked(dimm.device_id, now)
            may_go.add(dimm.device_id)
            if answer == "go":
                own.remove(dimm)
            elif answer == "refuse":
                removals.refused(dimm.device_id, now)
                may_go.discard(dimm.device_id)
        assert len([dimm for dimm in own if dimm.device_id not in may_go]) >= 1
        now += pause
        removals.overdue(now)
