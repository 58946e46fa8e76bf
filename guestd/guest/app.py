"""The guest daemon's commands, put together: `guestd run`, `guestd check`."""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import guestd
from guestd.guest import config, held_file, sysfs
from guestd.guest.config import GuestConfig
from guestd.guest.core.actions import Settings
from guestd.guest.core.machine import GuestMachine
from guestd.guest.daemon import Daemon, dial_unix
from guestd.guest.glance import Glance
from guestd.guest.hands import DryHands, Hands, HelperGone, RootHands
from guestd.guest.helper import dial_host, drop_privileges
from guestd.guest.identity import identify, only_reports
from guestd.guest.psi import TRIGGERS, Watcher
from guestd.guest.reporter import NoHands
from guestd.guest.sensors import Sensors
from guestd.guest.uevents import RESCAN, Uevents
from guestd.model.errors import ConfigError, GuestdError
from guestd.model.guest import Capability, Identity, Inventory
from guestd.runtime import logs
from guestd.runtime.notify import Notifier

_log = logging.getLogger(__name__)
_TELLING = {"cpu", "memory"}  # the PSI triggers without which there is no rest


def main(arguments: list[str], helper_socket: socket.socket | None, root: Path = Path("/")) -> None:
    """Exit codes: 0 done, 1 failed (`check`: something is missing), 2 usage or configuration.

    :param helper_socket: the root helper's, where there is one.
    :param root: where `proc` and `sys` are; on a tree without them guestd is what it is on another system.
    """
    parser = argparse.ArgumentParser(prog="guestd", description="Moves this VM's CPUs and memory to where the load is.")
    parser.add_argument("--version", action="version", version=guestd.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    # `main` looks for whole words, too.
    run = commands.add_parser("run", help="be the daemon (systemd does this)", allow_abbrev=False)
    run.add_argument("--config", type=Path, default=config.DEFAULT_PATH, metavar="FILE")
    run.add_argument("--dry-run", action="store_true", help="decide and log, but touch nothing")
    look = commands.add_parser("check", help="say what this machine offers and what is missing; change nothing")
    look.add_argument("--output", choices=("text", "json"), default="text")
    parsed = parser.parse_args(arguments)
    if parsed.command == "check":
        from guestd.guest import check

        sys.exit(check.run(parsed.output, root))
    try:
        settings = config.load(parsed.config)
    except ConfigError as error:
        print(f"guestd: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    logs.setup(logging.DEBUG if settings.log_verbose else logging.INFO)
    try:
        held = None
        if helper_socket is not None:  # from here on root is the helper's alone
            held = held_file.open_in(os.environ.get("RUNTIME_DIRECTORY"))
            _drop_privileges(settings.user, parsed.config)
        glance = Glance()
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(glance)) as runner:
            runner.run(_run(settings, helper_socket, parsed.dry_run, root, glance, held))
    except ConfigError as error:
        _log.error("%s", error)
        sys.exit(2)
    except HelperGone as error:
        _log.error("%s; ending, to be started anew: nothing in this VM has changed", error)
        sys.exit(1)
    except (GuestdError, OSError) as error:
        _log.error("%s", error)
        sys.exit(1)


def _drop_privileges(user: str, path: Path) -> None:
    """:raise ConfigError: When there is no such user, or it is root: to be started again would not make it better."""
    try:
        drop_privileges(user)
    except (KeyError, RuntimeError) as error:
        text = "no such user here" if isinstance(error, KeyError) else str(error)
        raise ConfigError(str(path), "user", user, text) from error


async def _run(
    settings: GuestConfig,
    helper_socket: socket.socket | None,
    dry_run: bool,
    root: Path,
    glance: Glance,
    held: int | None,
) -> None:
    hands = _hands(helper_socket, dry_run, root)
    who = partial(identify, dry_run, helper_socket is not None, root)
    identity = who()
    times = Settings(shrink_hook_seconds=settings.shrink_hook_seconds, grow_hook_seconds=settings.grow_hook_seconds)
    machine = GuestMachine(identity, time.monotonic(), times)
    if held is not None:
        machine.on_held(held_file.read(held, identity.boot_id))
    sensors = Sensors(root)
    inventory: list[Inventory] = []

    def scan() -> Inventory:
        inventory[:] = [sysfs.read_inventory(root, previous=inventory[0] if inventory else None)]
        return inventory[0]

    async def dial() -> socket.socket:
        if settings.broker_socket:
            return await dial_unix(settings.broker_socket)
        if not hasattr(socket, "AF_VSOCK"):
            raise OSError("this system has no vsock: name the broker's unix socket as broker_socket")
        if helper_socket is None:  # a dry run or a reporter: root can dial by itself, others can't speak for the VM
            return await asyncio.to_thread(dial_host, settings.port, 5.0)
        return await hands.dial(settings.port)

    daemon = Daemon(machine, sensors.sample, scan, hands, dial)
    if held is not None:
        daemon.on_held = partial(held_file.write, held, identity.boot_id)
    uevents = Uevents(partial(_on_uevent, daemon, who))
    if not uevents.start():
        _log.warning("%s", uevents.reason)
    _stay_resident(helper_socket is not None)
    if glance.offered:
        glance.begin(daemon.on_pressure)
    watchers: list[Watcher] = []
    if Capability.PSI in identity.capabilities:
        watchers += await _watch_pressure(hands, daemon, machine)
    missing = sorted(set(Capability) - identity.capabilities - {Capability.DRY_RUN})
    _log.info("guestd %s%s", guestd.__version__, f"; not offered here: {', '.join(missing)}" if missing else "")
    if only_reports(identity):
        _log.info("reports only: nothing can be switched from in here, the host sizes this VM from outside")
    try:
        await _until_stopped(daemon, hands)
    finally:
        uevents.close()
        for watcher in watchers:
            watcher.close()
        sensors.close()


def _on_uevent(daemon: Daemon, who: Callable[[], Identity], subsystem: str) -> None:
    """A driver of a virtio device may be loaded long after guestd was started."""
    daemon.on_hotplug()
    if subsystem not in ("virtio", RESCAN):
        return
    try:
        daemon.on_identity(who())
    except OSError as error:
        _log.warning("what is offered here cannot be read (%s), it stays as it was", error)


def _stay_resident(wanted: bool) -> None:
    """Not by a hand: who tries guestd out has no limit for it, and no need."""
    if not wanted:
        return
    from guestd.guest.resident import stay_resident  # with ctypes, as pyudev

    try:
        stay_resident()
    except OSError as error:
        _log.warning("not locked in memory (%s): slow when this VM has none left", error)


def _hands(helper_socket: socket.socket | None, dry_run: bool, root: Path) -> Hands:
    if helper_socket is not None:
        return RootHands(helper_socket)
    return DryHands() if dry_run else NoHands(root)


async def _watch_pressure(hands: Hands, daemon: Daemon, machine: GuestMachine) -> list[Watcher]:
    """Be woken when tasks begin to wait; without it the regular samples find out a little later."""
    watchers: dict[str, Watcher] = {}
    for kind in TRIGGERS:
        try:
            fd = await hands.psi_trigger(kind)
        except OSError as error:
            _log.warning("no PSI trigger on %s (%s), sampling instead", kind, error)
        else:
            loop, on_lost = asyncio.get_running_loop(), partial(machine.on_watched, False)
            watchers[kind] = Watcher(fd, daemon.on_pressure, loop, on_lost)
    machine.on_watched(watchers.keys() >= _TELLING)
    return list(watchers.values())


async def _until_stopped(daemon: Daemon, hands: Hands) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)  # nothing to reload
    notifier = Notifier()
    notifier.ready("looking for the broker")
    daemon.on_status = notifier.status
    tasks = [asyncio.create_task(daemon.run()), asyncio.create_task(_keep_alive(notifier))]
    waiting = [*tasks, asyncio.create_task(stop.wait())]
    if isinstance(hands, RootHands):
        waiting.append(asyncio.ensure_future(hands.gone))
    try:
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        if isinstance(hands, RootHands) and hands.gone.done() and not stop.is_set():
            raise HelperGone("the root helper has ended")
    finally:
        notifier.stopping()
        for waiter in waiting:
            waiter.cancel()
        with contextlib.suppress(asyncio.CancelledError, HelperGone):
            await asyncio.gather(*waiting, return_exceptions=True)


async def _keep_alive(notifier: Notifier) -> None:
    """The watchdog's sign of life: this loop turns. (A helper that is stuck in the kernel must not stop it;
    one that is gone ends the daemon anyway.)
    """
    while notifier.watchdog_seconds is not None:
        notifier.watchdog()
        await asyncio.sleep(notifier.watchdog_seconds)
    await asyncio.Event().wait()
