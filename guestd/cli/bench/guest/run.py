"""Runs the benchmarks of the guest, each in VMs of its own, and writes down what each found when it is over."""

import asyncio
import contextlib
import json
import os
import platform
import signal
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import guestd
from guestd.cli.bench.guest import quiet, ramp, reaction, reclaim, report, tax
from guestd.cli.bench.guest.rig import Rig, Say, rig
from guestd.cli.bench.host import cpu_model
from guestd.lab import accel as accelerators
from guestd.lab import image as lab_image
from guestd.lab.errors import LabError
from guestd.lab.qemu import MachineConfig
from guestd.model.errors import GuestdError
from guestd.model.units import GIB, MIB

PARTS = ("reaction", "ramp", "tax", "reclaim", "quiet")
LINES = {"reaction": reaction, "ramp": ramp, "tax": tax, "reclaim": reclaim, "quiet": quiet}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be measured, and how long."""

    parts: tuple[str, ...] = PARTS
    rounds: int = 3
    idle_seconds: float = 600.0


def run_guest_bench(wanted: Wanted, *, accel: str | None, out_dir: Path) -> int:
    """All parts that are wanted; the exit code: 0 when all were measured, whether targets were reached or not.

    A part that breaks off leaves what was written of it before; the next one begins anew.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / "guest.json"
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    failures = []
    for part in wanted.parts:
        try:
            machine, found = asyncio.run(_part(part, wanted, accel, out_dir, say))
        except (LabError, GuestdError, OSError) as error:
            failures.append(f"{part}: {str(error) or type(error).__name__}")
            say(f"NOT MEASURED: {failures[-1]}")
        except (KeyboardInterrupt, asyncio.CancelledError):
            failures.append(f"{part}: stopped from outside")
            break
        else:
            document = report.merged(report.read(path), machine, {part: found})
            path.write_text(json.dumps(document, indent=2) + "\n")
            print("\n".join(["", *LINES[part].lines(found), *report.target_lines(found["targets"]), ""]), flush=True)
    _print_all(path, failures)
    return 1 if failures else 0


def _print_all(path: Path, failures: Sequence[str]) -> None:
    document = report.read(path)
    if document is not None:
        print("All targets:")
        for part in PARTS:
            if part in document["parts"]:
                print("\n".join(report.target_lines(document["parts"][part]["targets"])))
            else:
                print(f"  NOT REACHED {part}: not measured yet")
        print(f"All values: {path}")
    for failure in failures:
        print(f"NOT MEASURED: {failure}")


async def _part(
    part: str, wanted: Wanted, accel: str | None, out_dir: Path, say: Say
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One part in a VM of its own: what it ran on, and its document."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    image = await lab_image.build(say, apps=part == "quiet")
    chosen = await accelerators.choose(image, accel)
    config = _config(part)
    say(f"{part}: booting a VM ({chosen})")
    last: list[Rig] = []

    @contextlib.asynccontextmanager
    async def boot(boot_bytes: int = config.boot_memory_bytes) -> AsyncIterator[Rig]:
        most = boot_bytes + config.virtio_mem_bytes
        sized = replace(config, boot_memory_bytes=boot_bytes, max_memory_bytes=most)
        async with rig(image, sized, chosen, out_dir, say) as one:
            last[:] = [one]
            yield one

    if part == "reclaim":
        rounds = max(1, wanted.rounds // 3)
        found = reclaim.document(await reclaim.measure(boot, reclaim.Plan(rounds=rounds)))
    elif part == "ramp":
        found = ramp.document(await ramp.measure(boot, ramp.Plan()))
    else:
        async with boot() as one:
            found = await _measured(part, one, wanted, out_dir)
    return _describe(config, last[0], chosen), found


async def _measured(part: str, one: Rig, wanted: Wanted, out_dir: Path) -> dict[str, Any]:
    match part:
        case "reaction":
            return reaction.document(await reaction.measure(one, reaction.Plan(rounds=wanted.rounds)))
        case "tax":
            return tax.document(await tax.measure(one, tax.Plan()))
        case _:
            noise = min(240.0, wanted.idle_seconds)
            plan = quiet.Plan(idle_seconds=wanted.idle_seconds, noise_seconds=noise)
            return quiet.document(await quiet.measure(one, plan, out_dir))


def _config(part: str) -> MachineConfig:
    """What the VM is: 512 MiB and one CPU, where nothing else is needed."""
    memory = 3 * GIB
    cpus, max_cpus = 1, 4
    if part in ("tax", "reclaim"):
        memory, cpus, max_cpus = 512 * MIB + 2 * GIB, 2, 2  # an application and those who watch it
    return MachineConfig(
        name=f"bench-{part}",
        boot_memory_bytes=512 * MIB,
        max_memory_bytes=memory,
        cpus=cpus,
        max_cpus=max_cpus,
        require_privileged_port=True,
        guest_agent_port=part == "quiet",
    )


def _describe(config: MachineConfig, one: Rig, accel: str) -> dict[str, Any]:
    """What it was measured on."""
    return {
        "guest_kernel": one.guest_kernel,
        "qemu": one.qemu_version,
        "accel": accel,
        "host_cores": len(os.sched_getaffinity(0)),
        "host_cpu": cpu_model(),
        "host_kernel": platform.release(),
        "host_load1": round(os.getloadavg()[0], 2),
        "guest_cpus": [config.cpus, config.max_cpus],
        "guest_memory_bytes": [config.boot_memory_bytes, config.max_memory_bytes],
        "guestd": guestd.__version__,
    }
