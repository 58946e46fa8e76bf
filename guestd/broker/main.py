"""`guestd-broker`: the host's daemon."""

import argparse
import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import guestd
from guestd.broker import config as configuration
from guestd.broker.cgroup.cpu_group import CpuGroup
from guestd.broker.check import check
from guestd.broker.config import BrokerConfig, GuestConfig
from guestd.broker.core.track import Timing
from guestd.broker.engine import Engine
from guestd.broker.hypervisor.base import Vm
from guestd.broker.hypervisor.qemu import QemuVm
from guestd.broker.journal import Journal
from guestd.model.errors import AdmissionError, ConfigError, GuestdError, JournalError
from guestd.model.event import EventCode
from guestd.runtime import logs
from guestd.runtime.notify import Notifier
from guestd.wire.relay import IngressRelay, Peers, vsock_listener
from guestd.wire.serve_admin import serve_admin
from guestd.wire.serve_guests import serve_guests
from guestd.wire.serve_monitor import remote_monitor, serve_monitor
from guestd.wire.tls import TlsFiles

_log = logging.getLogger(__name__)
_COLLECT_AFTER_OBJECTS = 50_000
_LAST_WORDS_SECONDS = 0.2  # that a call has to end when the broker stops


def main() -> None:
    """Parse the command line and run. Exit codes: 0 done, 1 failed, 2 usage or configuration."""
    parser = argparse.ArgumentParser(prog="guestd-broker", description=__doc__)
    parser.add_argument("--version", action="version", version=guestd.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("run", "serve the guests of this host"), ("check", "check the configuration and exit")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--config", type=Path, default=configuration.DEFAULT_PATH, metavar="FILE")
        command.add_argument("--verbose", action="store_true", help="log details too")
    arguments = parser.parse_args()
    level, limit = logging.DEBUG if arguments.verbose else logging.INFO, logs.few_alike()
    logs.setup(level, limit=limit)
    try:
        if arguments.command == "check":
            check(arguments.config)
            return
        config = configuration.load(arguments.config)
        logs.setup(level, as_json=config.outlets.json_logs, limit=limit)
        asyncio.run(run(arguments.config, config))
    except (ConfigError, AdmissionError) as error:
        print(f"guestd-broker: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except (GuestdError, OSError) as error:
        print(f"guestd-broker: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(1)


def _make_vm(config: BrokerConfig, guest: GuestConfig) -> QemuVm:
    return QemuVm(Path(guest.qmp_socket), cpu_group=partial(CpuGroup, guest.name) if config.cpu_bandwidth else None)


def _listen_vsock(relay: IngressRelay, engine: Engine, config: BrokerConfig) -> None:
    """Listen on AF_VSOCK where the host has it and a guest needs it."""
    if not any(guest.cid is not None for guest in config.guests.values()) and not Path("/dev/vhost-vsock").exists():
        return
    try:
        sock = vsock_listener(config.port)
    except OSError as error:
        _log.error(
            "no AF_VSOCK listener (%s): guests with a cid cannot reach this broker; is vhost_vsock loaded?", error
        )
        return
    relay.listen_vsock(sock, engine.guest_of_cid)


def _private_directory(path: Path) -> Path:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)
    return path


async def run(
    path: Path,
    config: BrokerConfig,
    make_vm: Callable[[GuestConfig], Vm] | None = None,
    listen: Callable[[IngressRelay, Engine, BrokerConfig], None] = _listen_vsock,
    timing: Timing | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT.

    :param make_vm: makes the hypervisor's side of a guest; None: QEMU, with CPU bandwidth as configured.
    :param listen: opens the listener for guests that have a CID.
    """
    # Thousands of guests make so many objects at once that Python's own threshold of 700 collects all the time.
    gc.set_threshold(_COLLECT_AFTER_OBJECTS, 20, 100)
    config.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    peers = Peers()
    relay = IngressRelay(_private_directory(config.run_dir / "guests") / "server.sock", peers)
    journal = Journal(config.state_dir / "journal.db")
    engine = Engine(config, journal, make_vm or partial(_make_vm, config), relay, timing)
    async with AsyncExitStack() as stack:
        await engine.start()
        stack.push_async_callback(engine.stop)
        await _serve(stack, engine, peers, config)
        stack.push_async_callback(relay.close)
        listen(relay, engine, config)
        await _until_stopped(path, engine, config)


async def _serve(stack: AsyncExitStack, engine: Engine, peers: Peers, config: BrokerConfig) -> None:
    """Listen to guests and operators, and to who looks on as configured, until the stack is closed."""
    run_dir, outlets = config.run_dir, config.outlets
    servers = [
        await serve_guests(engine, peers, run_dir / "guests" / "server.sock"),
        await serve_monitor(engine, run_dir / "monitor.sock"),
        await serve_admin(engine, run_dir / "admin.sock"),
    ]
    if outlets.monitor is not None:
        files = TlsFiles(outlets.monitor.certificate, outlets.monitor.key, outlets.monitor.client_ca)
        address = str(outlets.monitor.listen)
        await stack.enter_async_context(remote_monitor(engine, address, files, _LAST_WORDS_SECONDS))
    for server in servers:
        stack.push_async_callback(server.stop, _LAST_WORDS_SECONDS)
    if outlets.web is not None:
        from guestd.broker.web.page import serve_page  # with an HTTP library: only for those who want it

        page = await serve_page(engine, outlets.web, outlets.web_hosts)
        stack.push_async_callback(page.cleanup)
    if outlets.metrics is not None:
        from guestd.broker.metrics.serve import serve_metrics  # likewise

        metrics = await serve_metrics(engine, outlets.metrics, outlets.web_hosts)
        stack.push_async_callback(metrics.cleanup)


async def _until_stopped(path: Path, engine: Engine, config: BrokerConfig) -> None:
    """Be ready, reload on SIGHUP, and return with SIGTERM or SIGINT, or raise what ended the engine."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    reloads: set[asyncio.Task[None]] = set()

    def reload() -> None:
        task = asyncio.create_task(_reload(path, engine))
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, reload)
    notifier = Notifier()
    notifier.ready(f"{len(config.guests)} guests configured")
    _log.info("broker %s epoch %d: %d guests", guestd.__version__, engine.machine.epoch, len(config.guests))
    waiting = [
        asyncio.create_task(stop.wait()),
        asyncio.create_task(engine.wait()),
        asyncio.create_task(_keep_alive(notifier)),
    ]
    try:
        done, _ = await asyncio.wait(waiting[:2], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        notifier.stopping()
        engine.health.stop()
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _keep_alive(notifier: Notifier) -> None:
    """The watchdog's sign of life: this loop turns."""
    while True:
        notifier.watchdog()
        await asyncio.sleep(notifier.watchdog_seconds or 15.0)


async def _reload(path: Path, engine: Engine) -> None:
    """`systemctl reload`: a mistake in the files leaves everything as it was."""
    notifier = Notifier()
    notifier.reloading()
    try:
        config = configuration.load(path)
        late = await engine.reload(config)
    except (ConfigError, AdmissionError, JournalError) as error:
        _log.error("reload refused, nothing changed: %s", error)
        engine.store.note(EventCode.BROKER, f"reload refused, nothing changed: {error}")
    else:
        text = f"reloaded: {len(config.guests)} guests"
        if late:
            text += f"; not taken over, it takes a restart: {', '.join(late)}"
        _log.log(logging.WARNING if late else logging.INFO, "%s", text)
        engine.store.note(EventCode.BROKER, text)
    notifier.ready("reloaded")


if __name__ == "__main__":
    main()
