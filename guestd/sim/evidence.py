"""What can be seen of a decision and of a guest, for `book_invariants` and `guest_invariants` to judge."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from guestd.broker.core import actions as broker_actions
from guestd.broker.core.guest import GuestState
from guestd.broker.core.machine import BrokerMachine
from guestd.broker.core.track import Phase, Track
from guestd.model.messages import Reclaim, ReclaimStage
from guestd.model.resources import Kind
from guestd.model.units import MILLICORES_PER_VCPU
from guestd.model.vm import VmStatus

if TYPE_CHECKING:
    from guestd.sim.watch import Line
    from guestd.sim.world import World

Actions = Sequence[broker_actions.Action]


def asks(actions: Actions) -> Iterator[tuple[str, Reclaim]]:
    """The reclaims that begin, with their guests."""
    for action in actions:
        message = action.message if isinstance(action, broker_actions.Send) else None
        if isinstance(message, Reclaim) and message.stage is ReclaimStage.ASK:
            yield action.guest, message


def asked(actions: Actions, name: str, kind: Kind) -> int:
    """How many shrinks of a guest a decision begins."""
    return sum(1 for guest, order in asks(actions) if guest == name and order.kind is kind)


def amount(action: broker_actions.Action | None, kind: Kind) -> int:
    """What a request asks for, in millicores or bytes; 0 for what is none of that kind."""
    match action:
        case broker_actions.RequestVcpus(count=count) if kind is Kind.CPU:
            return count * MILLICORES_PER_VCPU
        case broker_actions.RequestCpuQuota(millicores=millicores) if kind is Kind.CPU:
            return millicores
        case broker_actions.RequestMemory(amount_bytes=amount_bytes) if kind is Kind.MEMORY:
            return amount_bytes
    return 0


def tracks(broker: BrokerMachine) -> Iterator[tuple[str, GuestState, Kind, Track]]:
    for name, state in broker.guests.items():
        for kind, track in state.tracks.items():
            yield name, state, kind, track


def observed(state: GuestState, kind: Kind) -> int:
    """What the broker knows that the VM holds."""
    known = state.vm is not None and state.vm.status in (VmStatus.RUNNING, VmStatus.FROZEN)
    return state.vm.held(kind) if known and state.vm is not None else 0


def risers(world: "World", broker: BrokerMachine) -> Iterator[tuple[str, GuestState, Track]]:
    """Whom this decision granted more than it had and than it took itself; of who is observed only the book changes."""
    for name, state, kind, track in tracks(broker):
        had = max(world.watch.seen[name].lines[kind].reserved, observed(state, kind))
        if not state.observed and track.reserved > had:
            yield name, state, track


def lowest(state: GuestState, kind: Kind) -> int:
    """The guest's minimum, as far as its VM can be that small or that big."""
    low = state.limits.min.get(kind)
    if state.vm is None or state.vm.status is not VmStatus.RUNNING:
        return low
    most = state.vm.vcpus_max * MILLICORES_PER_VCPU if kind is Kind.CPU else state.vm.memory_max_bytes
    return min(low, most)


def ended(track: Track) -> int:
    """How many resizes came to an end, as far as that is counted for sure."""
    counters = track.counters
    return counters.grows + counters.shrinks + counters.partials


def shrinks_begun(line: "Line", asked: int) -> int:
    """How many shrinks a decision began, as far as one can tell from outside: asking for less of what was asked for
    already is none.
    """
    return asked if line.phase is not Phase.ASKING else 0


def grows_begun(line: "Line", track: Track) -> int:
    """How many grows a decision began, likewise: one that goes further is none."""
    grew = track.phase is Phase.PLUGGING and track.reserved > line.reserved
    return int(grew and (line.phase is not Phase.PLUGGING or ended(track) != line.ended))
