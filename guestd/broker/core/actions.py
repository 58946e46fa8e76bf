"""What the machine wants done. The shell does it in the given order and reports back by `on_*` events.

`Record` must be durable before any later action of the same list is begun (invariant 14).
"""

from dataclasses import dataclass

from guestd.model.event import DecisionInputs, EventCode
from guestd.model.messages import Grant, Reclaim, Throttle
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Resources


@dataclass(frozen=True, slots=True)
class Record:
    """Write to the journal that so much is reserved for the guest."""

    guest: str
    reserved: Resources
    revision: int
    credit: Resources | None = None  # burst credit left, resource x seconds; None: as recorded before


@dataclass(frozen=True, slots=True)
class RequestVcpus:
    """Have the hypervisor plug or unplug vCPUs."""

    guest: str
    count: int


@dataclass(frozen=True, slots=True)
class RequestCpuQuota:
    """Have the host bound the VM's CPU time."""

    guest: str
    millicores: int


@dataclass(frozen=True, slots=True)
class RequestMemory:
    """Have the hypervisor plug or unplug memory."""

    guest: str
    amount_bytes: int


@dataclass(frozen=True, slots=True)
class SettleMemory:
    """Have the hypervisor end a memory resize where it stands."""

    guest: str


@dataclass(frozen=True, slots=True)
class Observe:
    """Ask the hypervisor how the VM is."""

    guest: str


@dataclass(frozen=True, slots=True)
class Send:
    """Tell the guest, on the stream with this session number."""

    guest: str
    session: int
    message: Grant | Reclaim | Throttle


@dataclass(frozen=True, slots=True)
class Log:
    """One decision, in words for people and in numbers: `before` is what was there, `after` where it leads or what
    there is now, in millicores or bytes.
    """

    guest: str
    kind: Kind
    text: str
    code: EventCode
    before: int
    after: int
    reason: Reason | None
    inputs: DecisionInputs | None


Action = Record | RequestVcpus | RequestCpuQuota | RequestMemory | SettleMemory | Observe | Send | Log
HypervisorAction = RequestVcpus | RequestCpuQuota | RequestMemory | SettleMemory | Observe
