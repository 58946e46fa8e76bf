"""Hands of a guest that can only report."""

import errno
import os
from pathlib import Path

import pytest

from guestd.guest.core.ops import BlockOp, BlockTarget, CpuOp, HandStatus, HookEvent, HookOp
from guestd.guest.psi import TRIGGERS
from guestd.guest.reporter import NoHands
from guestd.model.resources import Kind


async def test_what_takes_root_is_refused_and_there_are_no_hooks() -> None:
    hook = HookOp(HookEvent.BEFORE_SHRINK, Kind.MEMORY, 2 << 30, 1 << 30, 20)
    ops = (CpuOp(1, True), BlockOp(3, BlockTarget.OFFLINE), hook)
    results = await NoHands().batch(ops)
    assert [result.status for result in results] == [HandStatus.REFUSED, HandStatus.REFUSED, HandStatus.OK]
    assert [result.op for result in results] == list(ops)
    assert results[2].state == "none"
    with pytest.raises(PermissionError, match="no root helper"):
        await NoHands().dial(4747)


async def test_a_trigger_is_opened_where_everybody_may(tmp_path: Path) -> None:
    path = tmp_path / "proc/pressure/memory"
    path.parent.mkdir(parents=True)
    path.touch()
    os.close(await NoHands(tmp_path).psi_trigger("memory"))
    assert path.read_bytes() == TRIGGERS["memory"].encode() + b"\0"
    with pytest.raises(OSError, match=r"proc/pressure/io: No such file or directory, and no root helper") as caught:
        await NoHands(tmp_path).psi_trigger("io")
    assert caught.value.errno == errno.ENOENT
