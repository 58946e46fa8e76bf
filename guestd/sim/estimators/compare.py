"""Every asker on every shape: how soon what is needed is there, what is asked for too much and too little, how often.

What is asked is compared with the truth of the moment, in CPU x seconds or GiB x seconds; the lead before the load
is not scored. A VM that is held back is as CPUs go no case of its own: its need must exceed its quota.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from guestd.model.resources import Kind
from guestd.model.units import GIB
from guestd.sim.estimators.askers import Asker, askers
from guestd.sim.estimators.shapes import LEAD_SECONDS, SHAPES, Shape
from guestd.sim.estimators.vm import LEAST_BYTES, ToyVm

STEP_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Score:
    """One asker on one shape.

    :param met_seconds: from the load's start until the highest truth was asked for; None: never.
    :param over: asked above the truth, CPU x s or GiB x s.
    :param under: asked below it, likewise.
    :param changes: of what is asked, in whole units.
    :param highest: the most that was asked, CPUs or GiB.
    """

    shape: str
    asker: str
    met_seconds: float | None
    over: float
    under: float
    changes: int
    highest: float


def play(shape: Shape, asker: Asker, begin: float = 0.0) -> Score:
    """One asker on one shape, from `begin` on."""
    vm = ToyVm(shape.quota_millicores)
    unit = 1.0 if shape.kind is Kind.CPU else float(GIB)
    least = 1.0 if shape.kind is Kind.CPU else float(LEAST_BYTES)
    asked, changes, over, under, highest = least, 0, 0.0, 0.0, least
    met: float | None = None
    for number in range(round((LEAD_SECONDS + shape.seconds) / STEP_SECONDS)):
        at = (number + 1) * STEP_SECONDS - LEAD_SECONDS
        now = begin + (number + 1) * STEP_SECONDS
        vm.step(shape.want(at), STEP_SECONDS, now)
        wanted = asker.look(vm, now)
        if wanted is not None and max(least, wanted) != asked:
            asked = max(least, float(wanted))
            changes += at >= 0
            vm.ask(*((round(asked), vm.memory_bytes) if shape.kind is Kind.CPU else (vm.cpus, round(asked))), now)
        if at < 0:
            continue
        truth = max(least, shape.truth(at))
        over += max(0.0, asked - truth) / unit * STEP_SECONDS
        under += max(0.0, truth - asked) / unit * STEP_SECONDS
        highest = max(highest, asked)
        if asked >= truth:
            met = at if met is None else met
        elif truth > least and at < shape.seconds / 2:
            met = None
    return Score(shape.name, asker.name, met, over, under, changes, highest / unit)


def compare(shapes: Sequence[Shape] = SHAPES) -> list[Score]:
    """Everybody on each of the shapes."""
    return [play(shape, asker) for shape in shapes for asker in askers(shape.kind, 0.0)]


def as_json(scores: Sequence[Score]) -> dict[str, Any]:
    """Schema 1; seconds, and CPU x s or GiB x s."""
    rows = [
        {key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(score).items()}
        for score in scores
    ]
    return {"schema": 1, "scores": rows}
