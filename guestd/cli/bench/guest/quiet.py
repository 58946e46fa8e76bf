"""Quiet: resizes per hour under a noisy load that is steady in the mean, and what guestd costs idle and under it.

The noise (`inside/noise.py`) runs for minutes, not an hour: resizes per hour are what was counted, extrapolated. The
first moments, in which the VM grows to what the load needs, are not counted.
"""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guestd.cli.bench.guest import footprint
from guestd.cli.bench.guest.footprint import Footprint
from guestd.cli.bench.guest.rig import GUEST_DIR, Rig
from guestd.model.units import MIB

_NOISE = "bench-noise.service"


@dataclass(frozen=True, slots=True)
class Plan:
    """How long."""

    idle_seconds: float = 600.0
    noise_seconds: float = 240.0
    warm_seconds: float = 30.0
    quiet_seconds: float = 12.0  # what ran before must not show
    processes: int = 2
    base_bytes: int = 300 * MIB
    spread_bytes: int = 96 * MIB


@dataclass(slots=True)
class Measured:
    """What was counted."""

    footprint: Footprint = field(default_factory=Footprint)
    noise_seconds: float = 0.0
    grows: int = 0
    shrinks: int = 0


async def measure(rig: Rig, plan: Plan, out_dir: Path) -> Measured:
    """The whole benchmark."""
    measured = Measured()
    await rig.at_minimum()
    async with footprint.others(rig, measured.footprint, out_dir, plan.quiet_seconds):
        await rig.at_minimum(plan.quiet_seconds)
        rig.say(f"quiet: idle for {plan.idle_seconds:g} s")
        before = await _resizes(rig)
        for name, span in (await footprint.spans(rig, plan.idle_seconds)).items():
            measured.footprint.costs[name].idle = span
        measured.footprint.resizes_while_idle = sum(await _resizes(rig)) - sum(before)
        amounts = [str(number) for number in (plan.processes, plan.base_bytes, plan.spread_bytes)]
        await rig.start_unit(_NOISE, ["/usr/bin/python3", "-S", f"{GUEST_DIR}/noise.py", *amounts])
        try:
            await asyncio.sleep(plan.warm_seconds)
            rig.say(f"quiet: noise for {plan.noise_seconds:g} s")
            before = await _resizes(rig)
            for name, span in (await footprint.spans(rig, plan.noise_seconds)).items():
                measured.footprint.costs[name].loaded = span
            after = await _resizes(rig)
        finally:
            await rig.shell(f"systemctl stop {_NOISE}")
        measured.grows, measured.shrinks = after[0] - before[0], after[1] - before[1]
        measured.noise_seconds = plan.noise_seconds
    return measured


async def _resizes(rig: Rig) -> tuple[int, int]:
    resources = (await rig.view()).resources
    return sum(one.grows for one in resources), sum(one.shrinks for one in resources)


def document(measured: Measured) -> dict[str, Any]:
    """Judged; the resizes have no target."""
    part = footprint.document(measured.footprint)
    counted = measured.grows + measured.shrinks
    hours = measured.noise_seconds / 3600
    part["noise"] = {
        "seconds": measured.noise_seconds,
        "grows": measured.grows,
        "shrinks": measured.shrinks,
        "resizes_per_hour": counted / hours if hours else None,
    }
    return part


def lines(part: dict[str, Any]) -> list[str]:
    """The tables."""
    noise = part["noise"]
    per_hour = noise["resizes_per_hour"]
    counted = f"{noise['grows']} grows and {noise['shrinks']} shrinks in {noise['seconds'] / 60:.1f} minutes"
    shown = "not measured" if per_hour is None else f"{per_hour:.0f} resizes per hour (extrapolated from {counted})"
    return [*footprint.lines(part)[:-1], f"noisy steady load: {shown}", ""]
