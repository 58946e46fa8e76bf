"""Measures the broker under load: thousands of guests on real sockets, and its core alone.

Broker on one core, load generator and fake hypervisor on another; what the numbers mean is told by the table.
"""

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import guestd
from guestd.cli.bench import broker_cores, broker_report
from guestd.cli.bench.broker_rig import BenchError, BrokerRig, cpu_seconds, pss_bytes
from guestd.cli.bench.host import cpu_model
from guestd.model.errors import GuestdError
from guestd.sim import swarm

SIZES = (1000, 5000)
_CORES = 10_000
_STEADY_SECONDS = 20.0
_FLOOD_SECONDS = 10.0
_RUSH_SECONDS = 6.0
_RUSH_OUTSTANDING = 256
_PERIOD_SECONDS = 10.0
_REST_SECONDS = 2.0
_UNHURRIED = {"cool_down_seconds": 0.0, "budget_grows": 1_000_000, "budget_shrinks": 1_000_000}
"""For full speed: no pause between a grow and a shrink, and as many resizes as one likes."""


def run_broker_bench(*, sizes: tuple[int, ...] = SIZES, out_dir: Path) -> int:
    """The whole bench; its exit code: 0 when everything was measured, whether a target was reached or not."""
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "broker.json").unlink(missing_ok=True)
    measured: list[dict[str, Any]] = []
    cores: dict[str, Any] = {}
    failed = ""
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    try:
        say(f"the core alone, {_CORES:,} guests")
        cores["solve"] = broker_cores.solves(_CORES)
        cores["machine"] = broker_cores.machine(_CORES)
        for count in sizes:
            measured.append({"guests": count})
            asyncio.run(_measure(measured[-1], count, say))
    except (GuestdError, OSError, TimeoutError) as error:
        failed = str(error) or type(error).__name__
    except KeyboardInterrupt:
        failed = "stopped from outside"
    machine = {"host_cores": len(os.sched_getaffinity(0)), "host_cpu": cpu_model(), "guestd": guestd.__version__}
    result = broker_report.document(machine, measured, cores)
    result["failure"] = failed or None
    (out_dir / "broker.json").write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(["", *broker_report.table(result), "", f"All values: {out_dir / 'broker.json'}"]))
    if failed:
        print(f"\nNOT MEASURED TO THE END: {failed}")
    return 1 if failed else 0


async def _measure(size: dict[str, Any], count: int, say: Any) -> None:
    """Everything for one number of guests, into `size`."""
    say(f"{count:,} guests: starting")
    async with BrokerRig(0) as empty:
        await empty.start_broker()
        await empty.ready()
        await asyncio.sleep(_REST_SECONDS)
        bare_bytes = pss_bytes(empty.broker.pid)
    async with BrokerRig(count) as rig:
        try:
            await _phases(size, rig, bare_bytes, say)
        except GuestdError as error:
            raise BenchError(f"{count:,} guests: {error}; the broker's last words:\n{rig.log_tail()}") from error


async def _phases(size: dict[str, Any], rig: BrokerRig, bare_bytes: int, say: Any) -> None:
    began = time.monotonic()
    await rig.start_broker()
    await rig.start_load()
    size["ramp_seconds"] = await rig.settled() - began
    await asyncio.sleep(_REST_SECONDS)
    size["bytes_per_guest"] = (pss_bytes(rig.broker.pid) - bare_bytes) / rig.count
    await rig.link.lows_from_now()
    say(f"{rig.count:,} guests: one change each per {_PERIOD_SECONDS:g} s")
    size["steady"] = await _steady(rig, _STEADY_SECONDS, seed=1)
    say(f"{rig.count:,} guests: the same beside a flood")
    size["flood"] = await _beside_flood(rig, size["steady"]["all"]["p99_seconds"])
    say(f"{rig.count:,} guests: SIGKILL")
    load_before = cpu_seconds(rig.load_pid)
    killed_at = await rig.kill_broker()
    await rig.start_broker()
    size["recovery_seconds"] = await rig.settled() - killed_at
    size["recovery_broker_cpu_seconds"] = cpu_seconds(rig.broker.pid)
    size["recovery_load_cpu_seconds"] = cpu_seconds(rig.load_pid) - load_before
    await rig.kill_broker()
    await rig.start_broker(_UNHURRIED)
    await rig.settled()
    say(f"{rig.count:,} guests: full speed")
    size["rush"] = await _rush(rig)
    size["below_minimum"] = _below_minimum(await rig.link.lows(), rig.count)


async def _steady(rig: BrokerRig, seconds: float, seed: int) -> dict[str, Any]:
    before, began = cpu_seconds(rig.broker.pid), time.monotonic()
    answer = await rig.load(do="steady", seconds=seconds, period_seconds=_PERIOD_SECONDS, seed=seed)
    result = broker_report.waits(answer)
    result["broker_cores"] = (cpu_seconds(rig.broker.pid) - before) / (time.monotonic() - began)
    return result


async def _beside_flood(rig: BrokerRig, quiet_p99_seconds: float | None) -> dict[str, Any]:
    """One more guest than the swarm's floods."""
    steady, flood = await asyncio.gather(
        _steady(rig, _FLOOD_SECONDS, seed=2), rig.flood(rig.count, _FLOOD_SECONDS)
    )  # fmt: skip
    p99 = steady["all"]["p99_seconds"]
    known = p99 is not None and quiet_p99_seconds
    return {
        **steady,
        "ratio": p99 / quiet_p99_seconds if known else None,
        "said": f"{flood['messages']:,} {flood['streams']:,}",
        **flood,
    }


async def _rush(rig: BrokerRig) -> dict[str, Any]:
    before, began = cpu_seconds(rig.broker.pid), time.monotonic()
    done = (await rig.load(do="rush", seconds=_RUSH_SECONDS, outstanding=_RUSH_OUTSTANDING))["done"]
    used = cpu_seconds(rig.broker.pid) - before
    seconds = min(_RUSH_SECONDS, time.monotonic() - began)
    return {
        "grants": done,
        "grants_per_second": done / seconds,
        "grants_per_core_second": done / used if used else None,
    }


def _below_minimum(lows: dict[str, tuple[int, int]], count: int) -> int:
    """How many of the swarm's guests held less than their minimum at any time, by the hypervisor's word."""
    low = swarm.MIN
    found = (lows[swarm.guest_name(index)] for index in range(count))
    return sum(1 for vcpus, memory in found if vcpus * 1000 < low.cpu_millicores or memory < low.memory_bytes)
