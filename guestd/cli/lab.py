"""`guestctl lab`: real VMs on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import signal
from collections.abc import Coroutine
from typing import Annotated, Any

import typer

from guestd.lab import accel as accelerators
from guestd.lab import tools
from guestd.lab.errors import LabError
from guestd.lab.image import build as build_image
from guestd.lab.machine import Machine
from guestd.lab.qemu import MIB, MachineConfig

app = typer.Typer(help="Real VMs on this machine: the guest image, machines, commands in them.", no_args_is_help=True)

FAILED = 1
USAGE = 2

Accel = Annotated[str | None, typer.Option(help="kvm or tcg; KVM only after a probe boot when not given.")]
Memory = Annotated[int, typer.Option(help="Memory at boot, in MiB.")]
MaxMemory = Annotated[int, typer.Option(help="Memory with everything plugged, in MiB.")]
Cpus = Annotated[int, typer.Option(help="CPUs at boot.")]
MaxCpus = Annotated[int, typer.Option(help="CPUs with everything plugged.")]


@app.command()
def check() -> None:
    """Say what this machine has and lacks for running VMs. Changes nothing."""
    problem = tools.missing_tools({**tools.RUN_TOOLS, **tools.BUILD_TOOLS})
    for program in {**tools.RUN_TOOLS, **tools.BUILD_TOOLS}:
        print(f"{program:20} {tools.find(program) or 'missing'}")
    if problem is not None:
        typer.echo(str(problem), err=True)
        raise typer.Exit(FAILED)


@app.command()
def build(accel: Accel = None) -> None:
    """Build the guest image if it is not there, and say where it is."""

    async def work() -> int:
        image = await build_image(_progress)
        print(image.disk)
        print(f"accelerator: {await accelerators.choose(image, accel)}")
        return 0

    _run(work())


@app.command()
def boot(
    memory: Memory = 512, max_memory: MaxMemory = 2560, cpus: Cpus = 1, max_cpus: MaxCpus = 4, accel: Accel = None
) -> None:
    """Boot a VM, print where its sockets are, and keep it until Ctrl-C."""

    async def work() -> int:
        config = _config(memory, max_memory, cpus, max_cpus)
        async with Machine(await build_image(_progress), config, accel=accel) as machine:
            _progress(f"booted in {await machine.wait_booted():.1f} s; Ctrl-C ends it")
            print(f"qmp       {machine.paths.qmp}")
            print(f"observer  {machine.paths.observer}")
            print(f"vsock     {machine.uds_base}_PORT")
            print(f"messages  {machine.paths.serial_log}", flush=True)
            stop = asyncio.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            ended = asyncio.create_task(machine.wait_exited())
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
            for task in (ended, stopped):
                task.cancel()
            return 0 if stop.is_set() else FAILED

    _run(work())


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    context: typer.Context,
    memory: Memory = 512,
    max_memory: MaxMemory = 2560,
    cpus: Cpus = 1,
    max_cpus: MaxCpus = 4,
    accel: Accel = None,
    timeout: Annotated[float, typer.Option(help="Seconds the command may take.")] = 600.0,
) -> None:
    """Boot a VM, run one command in it (after --), print its output and exit with its exit code."""

    async def work() -> int:
        config = _config(memory, max_memory, cpus, max_cpus)
        async with Machine(await build_image(_progress), config, accel=accel) as machine:
            _progress(f"booted in {await machine.wait_booted():.1f} s")
            result = await machine.console.run(_command(context.args), timeout, check=False)
            typer.echo(result.stdout, nl=False)
            typer.echo(result.stderr, nl=False, err=True)
            return result.exit_code

    if not context.args:
        typer.echo("no command was given: guestctl lab run -- COMMAND", err=True)
        raise typer.Exit(USAGE)
    _run(work())


def _command(arguments: list[str]) -> str:
    """One argument is a shell command as it is, several are words of one."""
    return arguments[0] if len(arguments) == 1 else shlex.join(arguments)


def _config(memory: int, max_memory: int, cpus: int, max_cpus: int) -> MachineConfig:
    return MachineConfig(
        boot_memory_bytes=memory * MIB, max_memory_bytes=max_memory * MIB, cpus=cpus, max_cpus=max_cpus
    )


def _progress(line: str) -> None:
    typer.echo(f"==> {line}", err=True)


def _run(work: Coroutine[Any, Any, int]) -> None:
    """Run to the end; errors of the lab and of its options become a line and an exit code."""
    code = 130
    with contextlib.suppress(KeyboardInterrupt):
        try:
            code = asyncio.run(work)
        except LabError as error:
            typer.echo(str(error), err=True)
            code = FAILED
        except ValueError as error:
            typer.echo(str(error), err=True)
            code = USAGE
    raise typer.Exit(code)
