"""Runs the bench: image, VM, broker, session, result. Ends all that it started, and keeps what it measured."""

import asyncio
import json
import os
import platform
import signal
import time
from pathlib import Path
from typing import Any

import guestd
from guestd.cli.bench.report import document, table
from guestd.cli.bench.session import Plan, Session
from guestd.cli.demo.run import GUEST_NAME, _broker, end_vm
from guestd.cli.demo.verify import Expected
from guestd.lab import accel as accelerators
from guestd.lab import image as lab_image
from guestd.lab.errors import LabError
from guestd.lab.machine import Machine
from guestd.lab.qemu import MachineConfig
from guestd.model.errors import GuestdError


def run_bench(*, rounds: int, idle_seconds: float, accel: str | None, out_dir: Path) -> int:
    """The whole bench; its exit code: 0 when everything was measured, whether a target was reached or not."""
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "vm.json").unlink(missing_ok=True)
    result: dict[str, Any] = {}
    failed = ""
    try:
        asyncio.run(_run(result, Plan(rounds=rounds, idle_seconds=idle_seconds), accel, out_dir))
    except (LabError, GuestdError, OSError) as error:
        failed = str(error) or type(error).__name__
    except (KeyboardInterrupt, asyncio.CancelledError):
        failed = "stopped from outside"
    if result:
        result["failure"] = failed or None
        (out_dir / "vm.json").write_text(json.dumps(result, indent=2) + "\n")
        print("\n".join(["", *table(result), "", f"All values: {out_dir / 'vm.json'}"]))
    if failed:
        print(f"\nNOT MEASURED TO THE END: {failed}")
    return 1 if failed else 0


async def _run(result: dict[str, Any], plan: Plan, accel: str | None, out_dir: Path) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    expected = Expected()
    image = await lab_image.build(say)
    chosen = await accelerators.choose(image, accel)
    config = MachineConfig(
        name="bench",
        boot_memory_bytes=expected.memory_min_bytes,
        max_memory_bytes=expected.memory_max_bytes,
        cpus=expected.cpu_min,
        max_cpus=expected.cpu_max,
        require_privileged_port=True,
    )
    say(f"booting a VM ({chosen})")
    async with Machine(image, config, accel=chosen) as machine, _broker(machine, expected, out_dir) as client:
        say(f"booted in {await machine.wait_booted():.1f} s")
        kernel = (await machine.console.run("uname -r")).stdout.strip()
        session = Session(machine, client, GUEST_NAME, plan, say)
        try:
            await session.run()
        finally:
            description = _describe(config, kernel, session.qemu_version, chosen)
            result.update(document(description, session.cpu, session.memory, session.footprint))
            await end_vm(machine, client)


def _describe(config: MachineConfig, guest_kernel: str, qemu_version: str, accel: str) -> dict[str, Any]:
    """What it was measured on."""
    return {
        "guest_kernel": guest_kernel,
        "qemu": qemu_version,
        "accel": accel,
        "host_cores": len(os.sched_getaffinity(0)),
        "host_cpu": cpu_model(),
        "host_kernel": platform.release(),
        "guest_cpus": [config.cpus, config.max_cpus],
        "guest_memory_bytes": [config.boot_memory_bytes, config.max_memory_bytes],
        "guestd": guestd.__version__,
    }


def cpu_model() -> str:
    """What the host runs on, as it calls itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
