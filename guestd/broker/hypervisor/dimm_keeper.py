"""A QEMU's DIMMs, added and removed: what the driver does by the plan of `dimms`.

1. DIMMs are added at once, by a request and by nothing else. Removals wait for the guest, and go on by themselves
   until as much is left as was last requested, or until that is settled.
2. A removal is done when QEMU says DEVICE_DELETED, and failed when QEMU or the guest's firmware says so
   (MEM_UNPLUG_ERROR, DEVICE_UNPLUG_GUEST_ERROR, an _OST that is an error) or nobody says anything in time.
3. The host gets its memory back by the end of the backend. A backend without a DIMM is ended whenever one is seen.
4. What was asked for ends with the connection: then it is not known any more, and has to be requested again.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping

from guestd.broker.hypervisor import dimms
from guestd.broker.hypervisor.dimms import Bank, Removals
from guestd.broker.hypervisor.qmp_answers import DIMM_ID_PREFIX, Dimm
from guestd.broker.hypervisor.qmp_link import QmpRefused
from guestd.model.errors import HypervisorError
from guestd.model.units import format_size

_log = logging.getLogger(__name__)

_FAILED = frozenset({"MEM_UNPLUG_ERROR", "DEVICE_UNPLUG_GUEST_ERROR"})
_EJECT_SOURCES = frozenset({0x03, 0x103})  # of _OST: an eject that the host or the guest's own user asked for
_OST_FAILURES = frozenset({0x01, 0x02, 0x80, 0x81, 0x82, 0x83})  # ACPI 6.4, 6.3.5; 0 is success, 0x84 "in progress"

Execute = Callable[[str, Mapping[str, object]], Awaitable[object]]


class DimmKeeper:
    """The DIMMs of one VM.

    :param execute: Runs a QMP command; raises as `QmpLink.execute` does.
    :param read: Asks QEMU for the DIMMs; None where there can be none.
    :param requests: Held while anything is changed: a request reads, then acts.
    :param changed: Called when memory went of which QEMU sends no event.
    :param name: What messages begin with.
    """

    def __init__(
        self,
        execute: Execute,
        read: Callable[[], Awaitable[Bank | None]],
        requests: asyncio.Lock,
        changed: Callable[[], None],
        name: str,
    ) -> None:
        self._execute, self._read, self._requests = execute, read, requests
        self._changed, self._name = changed, name
        self._removals = Removals()
        self._wanted: int | None = None  # what is to be left of guestd's DIMMs, in bytes; None: all
        self._timer: asyncio.TimerHandle | None = None
        self._tending: asyncio.Task[None] | None = None
        self._again = False  # something happened while things were tended to

    async def request(self, bank: Bank, wanted: int) -> int:
        """Have `wanted` bytes of DIMMs, rounded down, with `requests` held; the bytes that were added.

        :raise HypervisorError: When QEMU refuses one; those before it stay.
        :raise OutcomeUnknown: When the answer was lost.
        """
        self._wanted = wanted
        missing = bank.missing(wanted)
        if not missing:
            await self._work(bank)
            return 0
        await self._end_leftovers(bank)  # of which the slots are free, and the names
        number = -1
        for _ in range(missing):
            number = bank.next_number(number + 1)
            await self._add(number, bank)
        return missing * bank.unit

    def settle(self) -> None:
        """No further DIMM is to go. One whose removal was asked for may go yet: there is no way to take that back."""
        self._wanted = None

    def on_event(self, name: str, data: Mapping[str, object], device: str) -> None:
        """An event of QEMU's, about the device of this id."""
        if name == "ACPI_DEVICE_OST":
            device = self._refusing(data)
            if device:
                self._refused(device, "the guest keeps it")
        elif name in _FAILED:
            self._refused(device, str(data.get("msg", "the guest keeps it")))
        elif name != "DEVICE_DELETED":
            return
        if device.startswith(DIMM_ID_PREFIX):
            self.tend_soon()

    def reset(self) -> None:
        """The guest was reset."""
        self._removals.forget_rests()

    def forget(self) -> None:
        """The connection was lost."""
        self._wanted, self._removals = None, Removals()
        self._stop()

    async def close(self) -> None:
        """Stop. Changes nothing in the VM."""
        self._stop()
        if self._tending is not None:
            self._tending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._tending

    def tend_soon(self) -> None:
        """Have what is left to do looked at."""
        if self._tending is None:
            self._stop()
            self._timer = asyncio.get_running_loop().call_later(0.0, self._start)
        else:
            self._again = True

    def _start(self) -> None:
        self._timer = None
        if self._tending is None:
            self._tending = asyncio.create_task(self._tend(), name=f"dimms {self._name}")

    async def _tend(self) -> None:
        try:
            self._again = True
            while self._again:
                self._again = False
                async with self._requests:
                    bank = await self._read()
                    if bank is not None:
                        await self._work(bank)
        except HypervisorError as error:
            _log.info("%s: DIMMs are left as they are for now: %s", self._name, error)
        finally:
            self._tending = None

    async def _work(self, bank: Bank) -> None:
        """End what is left over, and ask for the next removal."""
        await self._end_leftovers(bank)
        for device, pause in self._removals.overdue(self._now):
            _log.warning("%s: no answer to the removal of %s: left alone for %g s", self._name, device, pause)
        while self._wanted is not None:
            dimm = self._removals.choose(bank.own, self._wanted, self._now)
            if dimm is None:
                break
            await self._remove(dimm)
        self._wake()

    async def _remove(self, dimm: Dimm) -> None:
        self._removals.asked(dimm.device_id, self._now)
        try:
            await self._execute("device_del", {"id": dimm.device_id})
        except QmpRefused as error:
            if error.error_class != "DeviceNotFound" and "already in the process of unplug" not in str(error):
                self._refused(dimm.device_id, str(error))

    async def _add(self, number: int, bank: Bank) -> None:
        backend = dimms.backend_id(number)
        kind = "memory-backend-memfd" if bank.shared else "memory-backend-ram"
        await self._execute("object-add", {"qom-type": kind, "id": backend, "size": bank.unit, "share": bank.shared})
        try:
            await self._execute("device_add", {"driver": "pc-dimm", "id": dimms.device_id(number), "memdev": backend})
        except QmpRefused:
            with contextlib.suppress(QmpRefused):
                await self._execute("object-del", {"id": backend})
            raise

    async def _end_leftovers(self, bank: Bank) -> None:
        for backend in bank.leftovers:
            try:
                await self._execute("object-del", {"id": backend.backend_id})
                self._changed()
            except QmpRefused as error:
                size = format_size(backend.size)
                _log.warning("%s: %s of the host's memory stay in use: %s", self._name, size, error)

    def _refused(self, device: str, why: str) -> None:
        pause = self._removals.refused(device, self._now)
        if pause is not None:
            _log.warning("%s: %s was not removed: %s: left alone for %g s", self._name, device, why, pause)

    @staticmethod
    def _refusing(data: Mapping[str, object]) -> str:
        """The id of the device of which the guest says that it cannot be ejected; else empty."""
        info = data.get("info")
        if not isinstance(info, dict) or info.get("source") not in _EJECT_SOURCES:
            return ""
        return str(info.get("device", "")) if info.get("status") in _OST_FAILURES else ""

    def _wake(self) -> None:
        self._stop()
        at = self._removals.wake_at(self._now) if self._wanted is not None else None
        if at is not None:
            self._timer = asyncio.get_running_loop().call_at(at, self._start)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def _now(self) -> float:
        return asyncio.get_running_loop().time()
