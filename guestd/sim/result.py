"""What came out of a `Run`, as JSON: the same run gives the same bytes.

Schema 1: amounts are CPUs, bytes, seconds and shares of 1. `vms.NAME.cpu` and `.memory` are sums over the whole run;
`series` has one list per column, an element for each time in `series.times_seconds`.
"""

from dataclasses import asdict
from typing import Any, Final

from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import MILLICORES_PER_VCPU
from guestd.sim.run import Account, Behaviour, Run, SimVm

SCHEMA: Final = 1


def as_json(run: Run, behaviour: Behaviour, seed: int, load: str) -> dict[str, Any]:
    """Everything about a run. `load` names where the load comes from."""
    host = run.world.host
    return {
        "schema": SCHEMA,
        "load": load,
        "seed": seed,
        "seconds": round(run.seconds, 3),
        "host": {**_amounts(host.capacity), "reserve": _amounts(host.reserve)},
        "behaviour": asdict(behaviour),
        "vms": {vm.name: _vm(run, vm) for vm in run.vms},
        "total": {kind.value: total(run, kind) for kind in Kind},
        "series": {
            "times_seconds": [round(at, 3) for at in run.times],
            "vms": {vm.name: _columns(vm) for vm in run.vms},
        },
    }


def account_json(account: Account, resizes: int) -> dict[str, float]:
    """Sums of one kind as means and shares."""
    hours = account.seconds / 3600
    met = account.wanted - account.unmet
    figures = {
        "wanted_mean": account.wanted / account.seconds,
        "usable_mean": account.given / account.seconds,
        "slack_share": 1 - met / account.given,
        "unmet_share": account.unmet / account.wanted if account.wanted else 0.0,
        "short_seconds": account.short_seconds,
        "worst_short": account.worst_short,
        "resizes": resizes,
        "resizes_per_hour": resizes / hours,
    }
    return {key: round(value, 6) for key, value in figures.items()}


def total(run: Run, kind: Kind) -> dict[str, float]:
    """The same over all VMs; seconds are VM-seconds."""
    accounts = [vm.kernel.accounts[kind] for vm in run.vms]
    merged = Account(
        sum(one.seconds for one in accounts),
        sum(one.wanted for one in accounts),
        sum(one.unmet for one in accounts),
        sum(one.given for one in accounts),
        sum(one.short_seconds for one in accounts),
        max(one.worst_short for one in accounts),
    )
    return account_json(merged, sum(vm.vm.resizes[kind] for vm in run.vms))


def _vm(run: Run, vm: SimVm) -> dict[str, Any]:
    broker = run.world.broker
    assert broker is not None, "a run has a broker"
    tracks = broker.guests[vm.name].tracks
    return {
        "limits": _limits(vm.limits),
        **{
            kind.value: {
                **account_json(vm.kernel.accounts[kind], vm.vm.resizes[kind]),
                "ends": asdict(tracks[kind].counters),
            }
            for kind in Kind
        },
    }


def _limits(limits: Limits) -> dict[str, Any]:
    return {
        "min": _amounts(limits.min),
        "max": _amounts(limits.max),
        "burst": _amounts(limits.burst),
        "weight": {kind.value: limits.weight.get(kind) for kind in Kind},
    }


def _amounts(amounts: Resources) -> dict[str, float]:
    return {"cpus": amounts.cpu_millicores / MILLICORES_PER_VCPU, "memory_bytes": amounts.memory_bytes}


def _columns(vm: SimVm) -> dict[str, list[float]]:
    names = type(vm.rows[0]).__slots__ if vm.rows else ()
    return {name: [round(getattr(row, name), 4) for row in vm.rows] for name in names}
