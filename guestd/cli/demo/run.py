"""Runs the demo: image, VM, broker, session, verdict. All that is started here is ended here, by its pid.

What an earlier run left is removed first, so that a picture or a "passed" is always of the run that wrote
it. A run that breaks off half-way still writes what it saw, and has failed.
"""

import asyncio
import contextlib
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from guestd.cli.demo import svg
from guestd.cli.demo.display import Display, choose_display
from guestd.cli.demo.record import Recorder
from guestd.cli.demo.session import DemoError, NoAnswer, Plan, Session
from guestd.cli.demo.timeline import Machine as MachineRecord
from guestd.cli.demo.timeline import Timeline, lines
from guestd.cli.demo.verify import Expected, verify
from guestd.cli.text import printable
from guestd.lab import accel as accelerators
from guestd.lab import image as lab_image
from guestd.lab.errors import ConsoleTimeout, LabError, MachineError
from guestd.lab.machine import Machine
from guestd.lab.qemu import MachineConfig
from guestd.model.errors import GuestdError, UnreachableError
from guestd.model.units import format_size
from guestd.model.view import GuestView
from guestd.model.vm import VmStatus
from guestd.wire.client import BrokerClient

GUEST_NAME = "demo"
OUTPUTS = ("timeline.jsonl", "timeline.svg", "summary.json", "broker.log", "qemu.log", "serial.log")

_QUERY_SECONDS = 5.0
_QEMU_END_SECONDS = 2.0
_BROKER_START_SECONDS = 20.0
_BROKER_STOP_SECONDS = 5.0
_CLEAN_UP_SECONDS = 0.4


def run_demo(*, load: bool, accel: str | None, out_dir: Path) -> int:
    """The whole demo; its exit code: 0 only when everything was verified."""
    expected = Expected()
    recorder = Recorder(time.monotonic)
    out_dir.mkdir(parents=True, exist_ok=True)
    for name in OUTPUTS:
        (out_dir / name).unlink(missing_ok=True)
    error = None
    try:
        asyncio.run(_run(recorder, expected, Plan(load=load), accel, out_dir))
    except (LabError, GuestdError, OSError) as caught:
        error = str(caught) or type(caught).__name__
    except (KeyboardInterrupt, asyncio.CancelledError):
        error = "stopped from outside"
    summary = write_results(recorder.timeline(), expected, error, out_dir)
    print("\n".join(verdict(summary, out_dir)))
    return 0 if summary["passed"] else 1


def write_results(timeline: Timeline, expected: Expected, error: str | None, out_dir: Path) -> dict[str, Any]:
    """Judges a run and writes its files; the summary.

    :param error: What broke the run off, if anything did.
    """
    summary, failures = verify(timeline, expected)
    if error is not None:
        seen_much = timeline.load("cpu-onset") is not None  # else all the rest only follows from it
        summary.update(passed=False, failures=[error, *(failures if seen_much else [])])
    with (out_dir / "timeline.jsonl").open("w") as file:
        file.writelines(lines(timeline.records))
    (out_dir / "timeline.svg").write_text(svg.draw(timeline, summary))
    (out_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def verdict(summary: dict[str, Any], out_dir: Path) -> list[str]:
    """The end of the demo in a few lines."""
    cpu, memory = summary["cpu"], summary["memory"]
    text = ["", "               before    peak      end"]
    rows = (
        ("CPUs, QMP", cpu["min"], cpu["peak_plugged_in_hypervisor"], cpu["end_plugged_in_hypervisor"]),
        ("CPUs, guest", cpu["min"], cpu["peak_online_in_guest"], cpu["end_online_in_guest"]),
        (
            "memory, QMP",
            *(
                None if amount is None else format_size(amount)
                for amount in (
                    memory["min_bytes"],
                    memory["peak_size_in_hypervisor_bytes"],
                    memory["end_size_in_hypervisor_bytes"],
                )
            ),
        ),
    )
    for name, *amounts in rows:
        cells = "".join(f"{'?' if amount is None else amount!s:<10}" for amount in amounts)
        text.append(f"  {name:<13}{cells}".rstrip())
    text.append("")
    if summary["passed"]:
        text.append(
            f"VERIFIED in the hypervisor and in the guest: first CPU online "
            f"{cpu['onset_to_first_online_seconds']:.2f} s after the onset of the load, all after "
            f"{cpu['onset_to_peak_seconds']:.2f} s; first new memory usable "
            f"{memory['onset_to_first_usable_seconds']:.2f} s after its onset; no OOM kill; over vsock."
        )
    else:
        text.append("NOT VERIFIED:")
        for failure in summary["failures"]:
            first, *more = failure.splitlines() or [""]
            text.append(f"  - {printable(first, 2000)}")
            text.extend(f"    {printable(line, 2000)}" for line in more)
    text.append(f"Look at {out_dir / 'timeline.svg'}")
    return text


async def _run(recorder: Recorder, expected: Expected, plan: Plan, accel: str | None, out_dir: Path) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with choose_display(expected, recorder.now) as display:
        recorder.watch = display.see
        image = await lab_image.build(display.say)
        chosen = await accelerators.choose(image, accel)
        display.say(f"booting a VM ({chosen}) with {expected.cpu_min} CPU and 512 MiB")
        config = MachineConfig(
            name="demo",
            boot_memory_bytes=expected.memory_min_bytes,
            max_memory_bytes=expected.memory_max_bytes,
            cpus=expected.cpu_min,
            max_cpus=expected.cpu_max,
            require_privileged_port=True,
        )
        async with (
            Machine(image, config, accel=chosen) as machine,
            _broker(machine, expected, out_dir) as client,
        ):
            await _boot(machine, chosen, recorder, display)
            session = Session(
                vm=LabVm(machine),
                broker=client,
                recorder=recorder,
                expected=expected,
                guest_name=GUEST_NAME,
                boot_memory_bytes=config.boot_memory_bytes,
                say=display.say,
                plan=plan,
            )
            try:
                await session.run()
            except LabError as error:
                raise DemoError(await _last_words(machine, error)) from error
            finally:
                _keep_logs(machine, out_dir)
                display.say("stopping VM and broker")
                await end_vm(machine, client)


async def end_vm(machine: Machine, client: BrokerClient) -> None:
    """End the VM before its broker, which then clears up behind it: its cgroup."""
    await machine.kill()
    with contextlib.suppress(GuestdError, TimeoutError):
        async with asyncio.timeout(_BROKER_STOP_SECONDS):
            async for change in client.watch_guests():
                if isinstance(change, GuestView) and change.vm_status is VmStatus.GONE:
                    break
    await asyncio.sleep(_CLEAN_UP_SECONDS)


async def _boot(machine: Machine, accel: str, recorder: Recorder, display: Display) -> None:
    boot_seconds = await machine.wait_booted()
    kernel = (await machine.console.run("uname -r")).stdout.strip()
    recorder.add(MachineRecord(recorder.now(), accel, kernel, round(boot_seconds, 2)))
    display.say(f"Linux {kernel} booted in {boot_seconds:.1f} s")


async def _last_words(machine: Machine, error: LabError) -> str:
    """What went wrong with the machine; when QEMU has ended, how."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_QEMU_END_SECONDS):
            code = await machine.wait_exited()
            return f"QEMU ended with {code}: {_tail(machine.paths.qemu_log)}"
    return str(error)


def _keep_logs(machine: Machine, out_dir: Path) -> None:
    for path in (machine.paths.qemu_log, machine.paths.serial_log):
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(path, out_dir / path.name)


@contextlib.asynccontextmanager
async def _broker(machine: Machine, expected: Expected, out_dir: Path) -> AsyncIterator[BrokerClient]:
    """A broker of its own for this VM, as a process of its own."""
    directory = Path(tempfile.mkdtemp(prefix="guestd-demo-"))
    try:
        config = directory / "broker.toml"
        config.write_text(broker_config(machine.paths.qmp, machine.uds_base, directory, expected))
        with (out_dir / "broker.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "guestd.broker.main", "run", "--config", str(config)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the demo; it ends the broker when it is done
            )
        try:
            async with BrokerClient(directory / "run") as client:
                await _until_answering(client, process, out_dir / "broker.log")
                yield client
        finally:
            await _stop(process)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def broker_config(qmp_socket: Path, vsock_path: Path, directory: Path, expected: Expected) -> str:
    """The broker's configuration: a host with room for just this VM."""
    quoted = {
        name: json.dumps(str(path))
        for name, path in {
            "qmp": qmp_socket,
            "vsock": vsock_path,
            "state": directory / "state",
            "run": directory / "run",
        }.items()
    }
    return f"""\
[host]
cpus = "{expected.cpu_max}"
memory = {expected.memory_max_bytes + (1 << 30)}
overhead_memory_per_guest = "64MiB"

[broker]
state_dir = {quoted["state"]}
run_dir = {quoted["run"]}
port = {expected.broker_port}

[guests.{GUEST_NAME}]
cpu = {{ min = "{expected.cpu_min}", max = "{expected.cpu_max}" }}
memory = {{ min = {expected.memory_min_bytes}, max = {expected.memory_max_bytes} }}
qmp_socket = {quoted["qmp"]}
vsock_path = {quoted["vsock"]}
vsock_privileged_ports = true
"""


async def _until_answering(client: BrokerClient, process: asyncio.subprocess.Process, log: Path) -> None:
    try:
        async with asyncio.timeout(_BROKER_START_SECONDS):
            while True:
                if process.returncode is not None:
                    raise DemoError(f"guestd-broker ended with {process.returncode}: {_tail(log)}")
                with contextlib.suppress(UnreachableError):
                    await client.host()
                    return
                await asyncio.sleep(0.1)
    except TimeoutError as error:
        raise DemoError(f"guestd-broker does not answer: {_tail(log)}") from error


def _tail(path: Path) -> str:
    return path.read_text(errors="replace").strip()[-1000:] or "it said nothing"


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(_BROKER_STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


class LabVm:
    """A machine of the lab, as the session needs it."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    async def shell(self, command: str, timeout_seconds: float) -> str:
        """Runs a command in the guest; its stdout."""
        try:
            return (await self._machine.console.run(command, timeout_seconds)).stdout
        except ConsoleTimeout as error:
            raise NoAnswer(str(error)) from error

    async def spawn(self, command: str) -> None:
        """Starts a command in the guest."""
        await self._machine.console.spawn(command)

    async def query(self, command: str) -> Any:
        """Asks QEMU on the observer's socket."""
        try:
            async with asyncio.timeout(_QUERY_SECONDS):
                return await self._machine.query(command)
        except TimeoutError as error:
            raise NoAnswer(f"QEMU did not answer {command}") from error
        except MachineError:
            if command == "query-balloon" and self._machine.running:
                return None  # there is none
            raise
