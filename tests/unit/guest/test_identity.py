"""Who a guest says it is: by the kernel's word, and where there is none."""

import os
import time
from pathlib import Path

import psutil
import pytest

from guestd.guest.identity import boot_id, identify, only_reports
from guestd.model.guest import Capability


def write_boot_id(root: Path, text: str) -> None:
    path = root / "proc/sys/kernel/random/boot_id"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_kernels_boot_id(tmp_path: Path) -> None:
    write_boot_id(tmp_path, "01234567-89ab-cdef-0123-456789abcdef\n")
    assert boot_id(tmp_path).hex() == "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize("text", [None, "", "what?", "0123", "é"])
def test_without_one_it_is_made_of_host_and_boot(
    tmp_path: Path, text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        write_boot_id(tmp_path, text)
    monkeypatch.setattr(psutil, "boot_time", lambda: 1_700_000_000.0)
    first = boot_id(tmp_path)
    assert len(first) == 16
    assert boot_id(tmp_path) == first
    monkeypatch.setattr(psutil, "boot_time", lambda: 1_700_000_060.0)
    assert boot_id(tmp_path) != first
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    monkeypatch.setattr(psutil, "boot_time", lambda: 1_700_000_000.0)
    assert boot_id(tmp_path) != first


def test_another_system_can_do_nothing_and_still_has_an_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(time, "CLOCK_BOOTTIME")
    first, second = identify(False, False, tmp_path), identify(False, False, tmp_path)
    assert first.capabilities == frozenset()
    assert only_reports(first)
    assert first.boot_id == second.boot_id
    assert 0 < first.generation < second.generation
    assert first.kernel == os.uname().release


def test_on_this_machine() -> None:
    first, second = identify(False, True), identify(False, True)
    assert first.boot_id == second.boot_id and len(first.boot_id) == 16
    assert first.generation < second.generation


def test_without_root_nothing_is_switched(tmp_path: Path) -> None:
    memory = tmp_path / "sys/devices/system/memory"
    memory.mkdir(parents=True)
    (memory / "block_size_bytes").write_text("8000000\n")
    assert identify(False, True, tmp_path).capabilities == {Capability.MEMORY_ONLINE}
    assert not only_reports(identify(False, True, tmp_path))
    assert only_reports(identify(False, False, tmp_path))
    assert identify(True, True, tmp_path).capabilities == {Capability.MEMORY_ONLINE, Capability.DRY_RUN}
