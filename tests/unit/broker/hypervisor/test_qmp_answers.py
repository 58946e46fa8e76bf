"""What QEMU's answers mean, and that nonsense in them never gets through."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_qmp import MIB, cpu, virtio_mem

from guestd.broker.hypervisor import qmp_answers
from guestd.model.errors import HypervisorError

PARSERS = [
    qmp_answers.cpu_slots,
    qmp_answers.cpu_threads,
    qmp_answers.memory_devices,
    qmp_answers.memory_backends,
    qmp_answers.memory_room,
    qmp_answers.base_memory,
    qmp_answers.balloon_actual,
    qmp_answers.is_running,
    qmp_answers.is_migrating,
]
WORDS = ["props", "vcpus-count", "type", "qom-path", "data", "size", "id", "block-size", "requested-size", "max-size"]
WORDS += ["thread-id", "status", "base-memory", "actual", "core-id", "dimm", "virtio-mem"]
WORDS += ["memdev", "addr", "share", "slots", "nvdimm"]
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS)
anything = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner), max_leaves=12
)


@given(anything, st.sampled_from(PARSERS))
def test_nonsense_is_an_error_of_ours_or_a_value(answer: object, parse: object) -> None:
    try:
        parse(answer)  # type: ignore[operator]
    except HypervisorError as error:
        assert str(error)


def test_slots_are_ranked_by_their_ids_and_not_by_their_order() -> None:
    other = {"props": {"socket-id": 1, "core-id": 0}, "vcpus-count": 1, "type": "t"}
    slots = qmp_answers.cpu_slots([other, cpu(10), cpu(9), cpu(0, "/machine/unattached/device[0]")])
    assert [slot.props["core-id"] for slot in slots] == [0, 9, 10, 0]
    assert [slot.device_id for slot in slots] == [f"guestd-cpu-{i}" for i in range(4)]


@pytest.mark.parametrize(
    ("path", "removable"),
    [
        ("/machine/peripheral/guestd-cpu-1", True),
        ("/machine/peripheral/guestd-cpu-2", False),  # of another slot: not by us
        ("/machine/peripheral/mine", False),
        ("/machine/unattached/device[1]", False),
        (None, False),
    ],
)
def test_only_what_guestd_added_is_removable(path: str | None, removable: bool) -> None:
    assert qmp_answers.cpu_slots([cpu(0), cpu(1, path)])[1].removable is removable


def test_vcpu_threads_are_told_apart_from_nothing() -> None:
    answer = [{"thread-id": 7, "cpu-index": 0}, {"thread-id": 9}, {"thread-id": 9}]
    assert qmp_answers.cpu_threads(answer) == {7, 9}
    with pytest.raises(HypervisorError, match="query-cpus-fast: thread-id is None"):
        qmp_answers.cpu_threads([{}])


def test_slots_of_several_vcpus_are_refused_clearly() -> None:
    with pytest.raises(HypervisorError, match="a CPU slot of this machine holds 8 vCPUs"):
        qmp_answers.cpu_slots([cpu(0, **{"vcpus-count": 8})])


def test_the_error_names_command_and_field() -> None:
    with pytest.raises(HypervisorError, match="unexpected answer to query-balloon: actual is 'x', not a whole"):
        qmp_answers.balloon_actual({"actual": "x"})


@pytest.mark.parametrize("size", [-1, (1 << 60) + 1, 1 << 63, True, 1.5])
def test_a_size_that_no_machine_has_is_refused(size: object) -> None:
    assert qmp_answers.balloon_actual({"actual": 1 << 60}) == 1 << 60
    with pytest.raises(HypervisorError, match=r"actual is .*, not a whole number from 0 to"):
        qmp_answers.balloon_actual({"actual": size})


def test_other_memory_devices_are_left_out() -> None:
    devices = qmp_answers.memory_devices(
        [{"type": "nvdimm", "data": {"size": 5}}, {"type": "dimm", "data": {"size": 7}}, virtio_mem(size=2 * MIB)]
    )
    assert devices.dimm_bytes == 7
    assert [device.size for device in devices.virtio_mem] == [2 * MIB]


def test_dimms_are_in_the_order_of_their_addresses() -> None:
    answer = [
        {"type": "dimm", "data": {"id": name, "memdev": f"/objects/{behind}", "addr": address, "size": 7, "slot": 0}}
        for name, behind, address in (("guestd-dimm-1", "guestd-mem-1", 9), ("guestd-dimm-0", "guestd-mem-0", 8))
    ]
    dimms = qmp_answers.memory_devices([*answer, {"type": "dimm", "data": {"size": 5}}]).dimms
    assert [(dimm.device_id, dimm.backend_id, dimm.address, dimm.ours) for dimm in dimms] == [
        ("", "", 0, False),
        ("guestd-dimm-0", "guestd-mem-0", 8, True),
        ("guestd-dimm-1", "guestd-mem-1", 9, True),
    ]


def test_backends_without_an_id_are_nobodys() -> None:
    answer = [{"size": 5, "share": True}, {"id": "ram0", "size": 7, "share": True}, {"id": "b", "size": 1}]
    found = [(one.backend_id, one.size, one.shared) for one in qmp_answers.memory_backends(answer)]
    assert found == [("ram0", 7, True), ("b", 1, False)]


def test_a_machine_without_slots_has_no_room() -> None:
    assert qmp_answers.memory_room({"size": 5}) == qmp_answers.MemoryRoom(5, 0)
    assert qmp_answers.memory_room({"size": 5, "max-size": 9, "slots": 2}) == qmp_answers.MemoryRoom(9, 2)


def test_a_device_without_an_id_cannot_be_resized() -> None:
    entry = virtio_mem()
    del entry["data"]["id"]  # type: ignore[attr-defined]
    (device,) = qmp_answers.memory_devices([entry]).virtio_mem
    with pytest.raises(HypervisorError, match="has no id"):
        _ = device.qom_path


@pytest.mark.parametrize("status", ["setup", "active", "device", "postcopy-active", "cancelling", "never-heard-of"])
def test_a_migration_under_way(status: str) -> None:
    assert qmp_answers.is_migrating({"status": status})


@pytest.mark.parametrize("answer", [{}, {"status": "none"}, {"status": "completed"}, {"status": "failed"}])
def test_no_migration_under_way(answer: object) -> None:
    assert not qmp_answers.is_migrating(answer)
