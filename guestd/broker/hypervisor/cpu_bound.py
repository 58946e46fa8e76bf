"""A QEMU's CPU bandwidth, kept while the connection lasts: what the driver does with a `CpuGroup`.

1. A host that cannot bound the VM is told once, with the path and the way out, and tried again when QEMU connects
   again. Until then the VM is not enforced, which is an answer and no error.
2. Every look puts right what is not as it was asked: threads outside, a group that is gone.
3. What may block (moving threads) runs in a thread of its own, so that no other VM waits for it.
4. While it is `only_observed` nothing is made, moved or removed: a group that is there already counts, else none does.
"""

import asyncio
import logging
from collections.abc import Callable, Set

from guestd.broker.cgroup.cpu_group import Bandwidth, CpuGroup
from guestd.broker.cgroup.files import CgroupError
from guestd.model.errors import HypervisorError

_log = logging.getLogger(__name__)


class CpuBound:
    """The bound of the process that is, or was last, at a QMP socket.

    :param make_group: Makes the group's keeper for a pid; None: CPU bandwidth is left alone.
    :param name: What messages begin with.
    """

    def __init__(self, make_group: Callable[[int], CpuGroup] | None, name: str) -> None:
        self._make_group, self._name = make_group, name
        self._group: CpuGroup | None = None
        self._problem = "no QEMU has connected yet" if make_group is not None else "switched off for this host"
        self._told = ""
        self._settling = asyncio.Lock()
        self.only_observed = False

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do: not switched off, and it has not failed on this connection."""
        return self._group is not None and not self._problem

    def connected(self, pid: int | None) -> None:
        """QEMU has connected: try (again), with a new process anew."""
        if self._make_group is None:
            return
        if self._group is not None and self._group.pid != pid:
            self.process_ended()
        self._problem = ""
        if pid is None:
            self._fail("the process at its QMP socket cannot be known, so its threads are not bound")
        elif self._group is None or self._group.pid != pid:
            self._group = self._make_group(pid)

    def process_ended(self) -> bool:
        """Remove its group; whether there is none any more. May be repeated, and has to be: threads that are just
        ending keep it for a moment.
        """
        try:
            if self._group is None or self.only_observed or self._group.remove():
                self._group = None
        except CgroupError as error:
            _log.warning("%s: %s, left behind", self._name, error)
            self._group = None
        return self._group is None

    async def look(self, threads: Set[int]) -> Bandwidth | None:
        """What there is, with these threads bound; None when the VM is not enforced."""
        group = self._group
        if group is None or self._problem:
            return None
        try:
            async with self._settling:
                seen = group.read()
                if self.only_observed:
                    return seen or group.find()
                if seen is None or not threads <= seen.threads:
                    await asyncio.to_thread(group.settle, threads)
                    seen = group.read()
            if seen is None:
                self._fail(f"{group.path} vanishes as often as it is made")
        except CgroupError as error:
            self._fail(str(error))
            return None
        return seen

    def glance(self) -> int | None:
        """How much is throttled, in permille, without looking at all the rest; None when that cannot be told."""
        return self._group.glance() if self._group is not None and not self._problem else None

    async def request(self, threads: Set[int], millicores: int) -> None:
        """Bound all these threads together.

        :raise HypervisorError: When they cannot be.
        """
        seen = await self.look(threads)
        if seen is None or self._group is None:
            raise HypervisorError(f"{self._name}: CPU time cannot be bound: {self._problem}")
        self._group.set_quota(millicores)

    def _fail(self, problem: str) -> None:
        self._problem = problem
        if problem != self._told:
            self._told = problem
            _log.warning("%s: CPU time is not bound by the host: %s", self._name, problem)
