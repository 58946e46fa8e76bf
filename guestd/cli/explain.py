"""What `guestctl explain` shows, as a pure function of an explanation."""

from collections.abc import Iterator
from datetime import datetime

from guestd.cli.events import of_one_guest
from guestd.cli.screen import BLANK, Line, Part, paragraph
from guestd.cli.status import status_part
from guestd.cli.text import printable
from guestd.cli.when import shown
from guestd.model.event import DecisionInputs
from guestd.model.explanation import GuestExplanation, ResourceExplanation
from guestd.model.resources import Kind

_TITLE = {Kind.CPU: "CPU", Kind.MEMORY: "Memory"}


def render(explanation: GuestExplanation, at: datetime | None, now: datetime, width: int | None = None) -> list[Line]:
    """Why it has what it has; `at` is the time that was asked for. `width` in columns, None: as wide as it is."""
    guest = explanation.guest
    state: Part = status_part(guest) if at is None else (f"as of {shown(at, now)}", "")
    lines = paragraph(((printable(guest.name), "bold"), ("  ", ""), state), "", width)
    for one in explanation.resources:
        lines += [BLANK, *_resource(one, now, width)]
    return lines


def _resource(one: ResourceExplanation, now: datetime, width: int | None) -> Iterator[Line]:
    yield from paragraph(((f"{_TITLE[one.kind]}: ", "bold"),), printable(one.summary), width)
    if one.reason.text and one.reason.text not in one.summary:
        yield from paragraph((("  why: ", "dim"),), printable(one.reason.text), width, indent=4)
    if one.inputs is not None:
        yield from paragraph((("  from: ", "dim"),), _inputs(one.kind, one.inputs), width, indent=4)
    for reason in one.demand_reasons:
        yield from paragraph((("  the guest says: ", "dim"),), printable(reason.text or reason.code), width, indent=4)
    if one.to_get_more:
        yield (("  to get more:", "dim"),)
        for number, reason in enumerate(one.to_get_more, 1):
            yield from paragraph(((f"  {number}. ", ""),), printable(reason.text or reason.code), width, indent=5)
    if one.events:
        yield (("  lately:", "dim"),)
        for event in one.events:
            yield from of_one_guest(event, now, width)


def _inputs(kind: Kind, inputs: DecisionInputs) -> str:
    limits = inputs.limits
    texts = [
        f"needs {kind.show(inputs.demand)}",
        f"uses {kind.show(inputs.used)}",
        f"has {kind.show(inputs.reserved)} ({kind.show(inputs.plugged)} plugged)",
        f"target {kind.show(inputs.target)}",
        f"limits {kind.show(limits.min.get(kind))} to {kind.show(limits.max.get(kind))}",
    ]
    if limits.burst.get(kind):
        texts.append(f"burst to {kind.show(limits.burst.get(kind))}, credit {kind.show(inputs.burst_credit)} x seconds")
    if inputs.expected:
        texts.append(f"soon likely {kind.show(inputs.expected)}")
    if inputs.kept:
        texts.append(f"does not go below {kind.show(inputs.kept)}")
    scarce = ", too little for all" if inputs.scarce else ""
    texts.append(f"the host has {kind.show(inputs.capacity)}, {kind.show(inputs.free)} free{scarce}")
    if inputs.idle_tax_permille:
        texts.append(f"idle memory is taxed at {inputs.idle_tax_permille / 1000:g}")
    return "; ".join(texts)
