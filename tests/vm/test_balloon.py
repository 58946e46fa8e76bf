"""Below the memory that a VM was booted with there is the balloon."""

from __future__ import annotations

import loads
import pytest
from host import GuestSpec, Host, converges, rests

from guestd.lab.image import GuestImage
from guestd.lab.qemu import GIB, MIB

pytestmark = [pytest.mark.vm, pytest.mark.timeout(480)]

VM = "ball"


async def test_a_vm_is_ballooned_below_its_boot_memory_and_back(guest_image: GuestImage) -> None:
    spec = GuestSpec(memory_min_bytes=512 * MIB, memory_max_bytes=2 * GIB, boot_memory_bytes=GIB)
    async with Host(guest_image, {VM: spec}) as host:
        shrunk = await rests(host, 90)
        look = await host.look(inside=True)
        assert look.held[VM].ballooned_bytes >= 400 * MIB
        assert look.memory(VM) <= 640 * MIB
        grow = await host.python(VM, loads.GROW, 700, 100, 4, "/run/vm-test/grown")
        async with host.load(VM, grow):
            grown = await converges(host, "the balloon is given back", lambda look: look.memory(VM) >= 960 * MIB)
        kills = await host.machines[VM].oom_kills()
        back = await rests(host, 60)
        assert kills == 0
        print(f"balloon: down after {shrunk:.1f} s, given back within {grown:.1f} s of a load, down again {back:.1f} s")
