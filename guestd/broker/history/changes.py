"""What an operator changed, in words."""

from dataclasses import fields

from guestd.model.resources import Kind, Limits


def changed_limits_text(before: Limits, after: Limits) -> str:
    """Each limit that is another one now; empty when none is."""
    changes = []
    for kind in Kind:
        for field in fields(Limits):
            old, new = (getattr(limits, field.name).get(kind) for limits in (before, after))
            if old != new:
                shown = [_show(kind, field.name, amount) for amount in (old, new)]
                changes.append(f"{kind} {field.name.replace('_', ' ')} {shown[0]} -> {shown[1]}")
    return ", ".join(changes)


def _show(kind: Kind, field: str, amount: int) -> str:
    if field == "weight":
        return str(amount)
    return kind.show(amount) + (" x seconds" if field == "burst_credit" else "")
