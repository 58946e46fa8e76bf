"""What the broker's bench makes of its numbers, and its part without sockets."""

import json
from typing import Any

import pytest

from guestd.cli.bench import broker_cores
from guestd.cli.bench.broker_report import JUDGED_GUESTS, document, spread, table, waits

MACHINE = {"host_cpu": "a CPU", "host_cores": 2, "guestd": "0"}


def size(**changed: Any) -> dict[str, Any]:
    answer = {"up_seconds": [0.01] * 99 + [0.04], "down_seconds": [], "missed": 0, "late_seconds": [0.0]}
    good = {
        "guests": JUDGED_GUESTS,
        "bytes_per_guest": 50_000.0,
        "recovery_seconds": 4.0,
        "below_minimum": 0,
        "flood": {"ratio": 1.5},
        "steady": waits(answer),
    }
    return {**good, **changed}


CORES = {"solve": {"again_p50_seconds": 0.002}}


def test_percentiles_are_ranks_and_what_is_missing_is_endless() -> None:
    assert spread([3.0, 1.0, 2.0, 4.0]) == {
        "count": 4, "missed": 0, "p50_seconds": 2.0, "p99_seconds": 4.0, "max_seconds": 4.0
    }  # fmt: skip
    assert spread([1.0] * 99, missed=1)["p99_seconds"] == 1.0
    assert spread([1.0] * 98, missed=2)["p99_seconds"] is None
    assert spread([])["p50_seconds"] is None


def test_all_targets_reached() -> None:
    result = document(MACHINE, [size()], CORES)
    assert result["reached"], result["targets"]
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"bytes_per_guest": 61_441.0}, "memory for each guest"),
        ({"recovery_seconds": 5.1}, "all served after SIGKILL"),
        ({"below_minimum": 1}, "guests ever below their minimum"),
        ({"flood": {"ratio": None}}, "p99 of the others beside a flood"),
        ({"steady": {"all": {"p99_seconds": 0.051}}}, "demand to grant, p99"),
        ({"guests": JUDGED_GUESTS - 1}, "demand to grant, p99"),
    ],
)
def test_a_target_that_is_not_reached_is_named(changed: dict[str, Any], name: str) -> None:
    result = document(MACHINE, [size(**changed)], CORES)
    assert not result["reached"]
    assert name in [one["name"] for one in result["targets"] if not one["reached"]]
    assert any(name in line and "not reached" in line for line in table(result))


def test_nothing_measured_is_nothing_reached() -> None:
    result = document(MACHINE, [], {})
    assert not any(one["reached"] for one in result["targets"])
    assert "not measured" in table(result)[-1]


def test_the_core_serves_every_demand_of_its_guests() -> None:
    cores = broker_cores.Cores(40)
    cores.run(40.0)
    for _ in range(20):  # the last ones are still under way
        cores._tick([])
    assert not any(guest.waiting for guest in cores.guests.values())
    assert cores.done == 40 * 4  # a change every 10 s
    for guest in cores.guests.values():
        assert cores.machine.guests[guest.name].reserved == guest.needed


def test_a_solve_is_timed_where_there_is_not_enough() -> None:
    found = broker_cores.solves(100, rounds=3)
    assert 0 < found["again_p50_seconds"] <= found["again_max_seconds"]
