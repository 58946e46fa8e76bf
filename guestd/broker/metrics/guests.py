"""What is told of one guest, as Prometheus metrics: name, labels, and how it is read from the guest's view.

No label holds a word of the guest's: its name is the operator's own (`config.problems` says which letters it may
have), all others are of fixed sets.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from prometheus_client import Metric

from guestd.model.resources import Kind, Resources
from guestd.model.units import MILLICORES_PER_VCPU
from guestd.model.view import GuestView, ResizePhase, ResourceView
from guestd.model.vm import VmStatus

ANY_GUEST = "@"
"""Stands for the guest's name, which cannot be this."""
_UNIT = {Kind.CPU: "cpus", Kind.MEMORY: "memory_bytes"}
_CREDIT = {Kind.CPU: "cpu_seconds", Kind.MEMORY: "memory_byte_seconds"}
Read = Callable[[Any], float | None]


@dataclass(frozen=True, slots=True)
class Series:
    """One line of each guest. `read` gets the `ResourceView` of `kind`, or the `GuestView` without one; a None of its
    is no line.
    """

    labels: dict[str, str]
    kind: Kind | None
    read: Read


@dataclass(frozen=True, slots=True)
class Family:
    """One metric with its series."""

    name: str
    type: str
    text: str
    series: tuple[Series, ...]

    def template(self) -> Metric:
        """The metric with all lines of one guest, `ANY_GUEST`."""
        metric = Metric(self.name, self.text, self.type)
        for one in self.series:
            suffix = "_total" if self.type == "counter" else ""
            metric.add_sample(self.name + suffix, {"guest": ANY_GUEST, **one.labels}, 0)
        return metric


def _gauge(name: str, text: str, read: Read, kind: Kind | None = None) -> Family:
    return Family(f"guestd_guest_{name}", "gauge", text, (Series({}, kind, read),))


def _by_kind(name: str, text: str, read: Read) -> Family:
    return Family(f"guestd_guest_{name}", "gauge", text, tuple(Series({"kind": kind}, kind, read) for kind in Kind))


def _amounts(name: str, text: str, read: Callable[[ResourceView], int]) -> Iterator[Family]:
    """A family for each kind: the unit is in the name."""
    for kind, unit in _UNIT.items():
        yield _gauge(f"{name}_{unit}", text, _scaled(kind, read), kind)


def _limits() -> Iterator[Family]:
    """The same of the limits, which the whole view has; a burst only where there may be one."""
    for kind, unit in _UNIT.items():
        yield _gauge(f"min_{unit}", "What the guest has in any case.", _scaled(kind, _limit("min", kind)))
        yield _gauge(f"max_{unit}", "The most that the guest may have for good.", _scaled(kind, _limit("max", kind)))
        burst = _limit("burst", kind)
        text = "The most that the guest may have for a while; only where there is a burst."
        yield _gauge(f"burst_limit_{unit}", text, _where(burst, _scaled(kind, burst)))
        text = "What the guest has left to burst with, as amount times seconds."
        yield _gauge(f"burst_credit_{_CREDIT[kind]}", text, _where(burst, _scaled(kind, _credit(kind))))


def _scaled(kind: Kind, read: Callable[[Any], int]) -> Read:
    return read if kind is Kind.MEMORY else lambda one: read(one) / MILLICORES_PER_VCPU


def _where(there: Read, read: Read) -> Read:
    return lambda one: read(one) if there(one) else None


def _limit(name: str, kind: Kind) -> Callable[[GuestView], int]:
    limit: Callable[[GuestView], Resources] = attrgetter(f"limits.{name}")
    return lambda one: limit(one).get(kind)


def _credit(kind: Kind) -> Callable[[GuestView], int]:
    return lambda one: one.resource(kind).burst_credit


def _is(name: str, value: object) -> Read:
    return lambda one: getattr(one, name) is value


def _resizing() -> Family:
    phases = (ResizePhase.PLUGGING, ResizePhase.ASKING, ResizePhase.UNPLUGGING)
    series = (Series({"kind": kind, "phase": phase}, kind, _is("phase", phase)) for kind in Kind for phase in phases)
    return Family("guestd_guest_resizing", "gauge", "1 for what is under way with the guest.", tuple(series))


def _vm_status() -> Family:
    series = (Series({"status": status}, None, _is("vm_status", status)) for status in VmStatus)
    return Family(
        "guestd_guest_vm_status", "gauge", "1 for how the VM is; all 0 until the hypervisor was asked.", tuple(series)
    )


def _resizes() -> Family:
    outcomes = {
        "grown": "grows", "shrunk": "shrinks", "partial": "partials", "refused": "refusals", "failed": "failures"
    }  # fmt: skip
    series = (
        Series({"kind": kind, "outcome": outcome}, kind, attrgetter(name))
        for kind in Kind
        for outcome, name in outcomes.items()
    )
    text = "Ends of resizes: refused by the guest, failed by the hypervisor."
    return Family("guestd_guest_resizes", "counter", text, tuple(series))


FAMILIES = (
    *_amounts("demand", "What the guest asks for.", lambda one: one.demand),
    *_amounts("target", "What the guest is to have.", lambda one: one.target),
    *_amounts("reserved", "What is reserved for the guest.", lambda one: one.reserved),
    *_amounts("plugged", "What the hypervisor lets the guest have.", lambda one: one.plugged),
    *_amounts("usable", "What the guest says its programs can use.", lambda one: one.usable),
    *_amounts("used", "What the guest says its programs use.", lambda one: one.used),
    *_amounts("burst", "What is reserved for the guest above its maximum.", lambda one: one.burst),
    *_limits(),
    _gauge(
        "quota_cpus",
        "CPU time that the host allows the guest; only where it is bound.",
        lambda one: one.quota / MILLICORES_PER_VCPU or None,
        Kind.CPU,
    ),
    _gauge(
        "throttled_ratio",
        "Share of the last second in which its quota held the guest back.",
        lambda one: one.throttled_permille / 1000 if one.quota else None,
        Kind.CPU,
    ),
    _gauge("last_seen_seconds", "For how long the guest has said nothing.", lambda one: one.last_seen_ago_seconds),
    _gauge("connected", "Whether the guest's daemon is there.", lambda one: one.connected),
    _gauge("paused", "Whether an operator paused decisions about the guest.", lambda one: one.paused),
    _gauge("observed", "Whether the guest is only decided about, and left alone.", lambda one: one.observed),
    _by_kind("overdue", "Whether the guest holds what it should have given back by now.", lambda one: one.overdue),
    _vm_status(),
    _resizing(),
    _resizes(),
    Family(
        "guestd_guest_protocol_errors",
        "counter",
        "Messages of the guest that made no sense.",
        (Series({}, None, lambda one: one.protocol_errors),),
    ),
)
