"""Why a guest has, or had, what it has."""

from dataclasses import replace
from datetime import datetime

from guestd.broker.core.machine import BrokerMachine
from guestd.broker.history.store import Past, Store
from guestd.model.explanation import ResourceExplanation
from guestd.model.reason import Reason
from guestd.model.resources import Kind

_UNKNOWN = Reason("unknown", "nothing is recorded of that time")


async def explain_now(machine: BrokerMachine, store: Store, name: str, now: float) -> tuple[ResourceExplanation, ...]:
    """CPU and memory as they are, and what happened to them last. `now` is of the machine's clock.

    :raise NotFoundError: When there is none of that name.
    """
    events = {kind: await store.last_events(name, kind) for kind in Kind}
    return tuple(replace(machine.explain_resource(name, kind, now), events=events[kind]) for kind in Kind)


async def explain_past(store: Store, name: str, at: datetime) -> tuple[tuple[ResourceExplanation, ...], bool]:
    """CPU and memory as they were decided then; and whether that is known of neither.

    :raise HistoryError: When what is recorded cannot be read.
    """
    past = await store.past(name, at)
    return tuple(_then(kind, past[kind]) for kind in Kind), all(one.decision is None for one in past.values())


def _then(kind: Kind, past: Past) -> ResourceExplanation:
    decision = past.decision
    if decision is None:
        return ResourceExplanation(kind, _UNKNOWN.text, _UNKNOWN, None, events=past.events)
    reason = decision.reason or _UNKNOWN
    summary = decision.text if reason.text in decision.text else f"{decision.text}: {reason.text}"
    return ResourceExplanation(kind, summary, reason, decision.inputs, events=past.events)
