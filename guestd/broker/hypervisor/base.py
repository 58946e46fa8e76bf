"""What the broker needs of a hypervisor, one connection per VM.

The laws of every driver:

1. `observe` asks the hypervisor; nothing is answered from memory of what was requested.
2. A `request_*` is a request: it returns when the hypervisor took it. What came of it is only told by
   `observe`, now or later; `on_change` is called whenever asking again is worth while (an event, a
   connection made or lost, the process gone).
3. Requests are idempotent: they name the whole amount, not a difference.
4. An interrupted command raises `OutcomeUnknown`; a refused one `HypervisorError`. Nothing else leaks.
"""

from collections.abc import Callable
from typing import Protocol

from guestd.model.vm import VmState


class Vm(Protocol):
    """One VM at its hypervisor."""

    def only_observe(self, only: bool) -> None:
        """Whether nothing of the VM and its host may be changed from now on, not even what a driver does unasked. May
        be called at any time; a request is the caller's business.
        """
        ...

    async def open(self, on_change: Callable[[], None]) -> None:
        """Start watching the VM: connect, and reconnect by itself for ever. Never raises for a VM that
        is not there (yet); `observe` tells.
        """
        ...

    async def close(self) -> None:
        """Stop watching. Changes nothing in the VM."""
        ...

    async def observe(self) -> VmState:
        """The VM as it is. UNREACHABLE and GONE are answers, not errors.

        :raise OutcomeUnknown: When the connection broke while asking.
        """
        ...

    async def request_vcpus(self, count: int) -> None:
        """Have `count` vCPUs plugged. Plugging happens at once; unplugging may wait for the guest.
        vCPUs are added at the lowest free slot and removed from the highest plugged one. A driver may
        remove one at a time: the caller repeats the request after each change, and now and then.

        :raise HypervisorError: When the hypervisor refuses.
        :raise OutcomeUnknown: When the answer was lost.
        """
        ...

    async def request_cpu_quota(self, millicores: int) -> None:
        """Bound the CPU time of all vCPU threads together, those that are added later included; effective when
        this returns. The emulator's own threads are not bound.

        :raise HypervisorError: When this host cannot (`VmState.cpu_enforced` is False then).
        """
        ...

    async def request_memory(self, amount_bytes: int) -> None:
        """Have `amount_bytes` of memory in all: virtio-mem or DIMMs above the boot memory, the balloon below it.
        Amounts are rounded down to `memory_unit_bytes`. Growing and shrinking go on by themselves.

        :raise HypervisorError: When the hypervisor refuses.
        :raise OutcomeUnknown: When the answer was lost.
        """
        ...

    async def settle_memory(self) -> None:
        """End a shrink that stops short: what the guest did not give stays its own, and is not asked for
        any more (virtio-mem: `requested-size` is set back to `size`; balloon: to its actual size; no further DIMM
        is removed, but one whose removal was asked for may go yet).

        :raise HypervisorError: When the hypervisor refuses.
        :raise OutcomeUnknown: When the answer was lost.
        """
        ...
