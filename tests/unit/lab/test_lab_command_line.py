"""QEMU's command line and the limits of a machine's configuration."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from guestd.lab.qemu import GIB, MIB, MachineConfig, MachinePaths, command_line, kernel_command_line

PATHS = MachinePaths(Path("/tmp/m"), Path("/i/vmlinux"), Path("/i/initrd"))


def after(command: list[str], option: str) -> list[str]:
    return [value for name, value in itertools.pairwise(command) if name == option]


def test_memory_is_shared_and_can_grow_to_its_maximum() -> None:
    command = command_line(MachineConfig(boot_memory_bytes=512 * MIB, max_memory_bytes=2 * GIB), PATHS, "tcg")
    assert f"memory-backend-memfd,id=ram0,size={512 * MIB},share=on" in after(command, "-object")
    assert f"memory-backend-memfd,id=vmem0,size={1536 * MIB},share=on,reserve=off" in after(command, "-object")
    assert "virtio-mem-pci,id=vm0,memdev=vmem0,requested-size=0" in after(command, "-device")
    assert "virtio-balloon-pci,id=balloon0,free-page-reporting=on,deflate-on-oom=off" in after(command, "-device")


def test_a_machine_that_cannot_grow_has_no_virtio_mem() -> None:
    command = command_line(MachineConfig(boot_memory_bytes=GIB, max_memory_bytes=GIB), PATHS, "tcg")
    assert not [device for device in after(command, "-device") if "virtio-mem" in device]
    assert after(command, "-m") == ["1024M"]


def test_with_dimm_slots_there_is_neither_virtio_mem_nor_a_balloon() -> None:
    config = MachineConfig(boot_memory_bytes=512 * MIB, max_memory_bytes=2 * GIB, dimm_slots=3)
    command = command_line(config, PATHS, "tcg")
    assert after(command, "-m") == ["512M,slots=3,maxmem=2048M"]
    assert not [device for device in after(command, "-device") if "virtio-mem" in device or "balloon" in device]


def test_three_monitors_and_a_vsock_device_that_can_be_unplugged() -> None:
    command = command_line(MachineConfig(), PATHS, "tcg")
    assert len(after(command, "-mon")) == 3
    assert "vhost-user-vsock-pci,id=vsock0,bus=port0,chardev=vhost0" in after(command, "-device")


def test_a_port_for_qemu_guest_agent_only_where_it_is_asked_for() -> None:
    port = "virtserialport,chardev=qga,name=org.qemu.guest_agent.0"
    command = command_line(MachineConfig(guest_agent_port=True), PATHS, "tcg")
    assert port in after(command, "-device")
    assert "socket,id=qga,path=/tmp/m/qga.sock,server=on,wait=off" in after(command, "-chardev")
    assert port not in after(command_line(MachineConfig(), PATHS, "tcg"), "-device")


def test_the_accelerator_decides_the_cpu() -> None:
    assert after(command_line(MachineConfig(), PATHS, "kvm"), "-cpu") == ["host"]
    assert after(command_line(MachineConfig(), PATHS, "tcg"), "-cpu") == ["max,-svm,-erms"]
    assert "tsc=reliable" not in kernel_command_line(MachineConfig(), kvm=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"boot_memory_bytes": 100 * MIB},
        {"boot_memory_bytes": 300 * MIB},
        {"max_memory_bytes": 256 * MIB},
        {"max_memory_bytes": 513 * MIB},
        {"cpus": 0},
        {"cpus": 5},
        {"guest_cid": 2},
        {"dimm_slots": 25},
    ],
)
def test_impossible_machines_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        MachineConfig(**wrong)  # type: ignore[arg-type]


def test_directories_too_long_for_sockets_are_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        MachinePaths(Path("/tmp/" + "x" * 100), Path("/k"), Path("/i"))


def test_an_emulating_qemu_survives_cpus_that_come_and_go() -> None:
    emulated, real = command_line(MachineConfig(), PATHS, "tcg"), command_line(MachineConfig(), PATHS, "kvm")
    assert after(emulated, "-smp") == ["1,maxcpus=240,sockets=1,cores=240,threads=1"]
    assert after(real, "-smp") == ["1,maxcpus=4,sockets=1,cores=4,threads=1"]
    assert "possible_cpus=4" in after(emulated, "-append")[0]
