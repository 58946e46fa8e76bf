"""What guestd costs beside two others: qemu-guest-agent, and the bare process.

The bare process (`inside/bare.py`) imports what a daemon like this would be made of (grpc.aio, psutil, pyudev,
protobuf, msgspec), holds one open stream and does nothing. Memory is that of each while the others do not run:
together they share pages, which flatters all. CPU time and wakeups are counted while all run side by side. The relay
that the bare process needs is not counted, qemu-guest-agent is asked nothing meanwhile.
"""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from guestd.cli.bench.guest import report
from guestd.cli.bench.guest.agent import BenchError
from guestd.cli.bench.guest.rig import GUEST_DIR, SERVICE, Rig
from guestd.lab import tools

BARE = "bench-bare.service"
AGENT = "bench-qga.service"
NAMES = {"guestd": SERVICE, "bare": BARE, "qemu-guest-agent": AGENT}
STREAM_PORT = 9002
STREAM_METHOD = "/guestd.bench.Bare/Hold"
PSS_TARGET = 1.0
QUIET_TARGET = 0.5
_SITE = f"{GUEST_DIR}/site"
_CONNECT_SECONDS = 60.0
_PACKAGES = ("grpcio>=1.80,<2", "protobuf>=6.33,<8", "psutil>=6", "pyudev>=0.24", "msgspec>=0.19")
_QGA_PORT = "org.qemu.guest_agent.0"


@dataclass(frozen=True, slots=True)
class Usage:
    """What the processes of a service have used until a time of the guest's clock."""

    t: float
    pids: list[int]
    pss_bytes: int
    cpu_seconds: float
    context_switches: int


@dataclass(frozen=True, slots=True)
class Span:
    """A service over a time."""

    before: Usage
    after: Usage

    @property
    def seconds(self) -> float:
        """How long."""
        return self.after.t - self.before.t

    @property
    def cpu_share(self) -> float:
        """Of one CPU."""
        return (self.after.cpu_seconds - self.before.cpu_seconds) / self.seconds

    @property
    def wakeups(self) -> float:
        """Context switches per second."""
        return (self.after.context_switches - self.before.context_switches) / self.seconds


@dataclass(slots=True)
class Cost:
    """What one of them costs; None for what was not measured."""

    pss_bytes: int | None = None  # alone
    disk_bytes: int | None = None
    start_seconds: float | None = None  # from its start to its first word at the host
    idle: Span | None = None
    loaded: Span | None = None


@dataclass(slots=True)
class Footprint:
    """All three, and what guestd did while nothing happened."""

    costs: dict[str, Cost] = field(default_factory=lambda: {name: Cost() for name in NAMES})
    resizes_while_idle: int = 0


async def usage(rig: Rig, units: Sequence[str]) -> list[Usage]:
    """Each service until now."""
    answer = await rig.agent.ask("usage", unit=" ".join(units))
    return [Usage(**answer[unit]) for unit in units]


async def spans(rig: Rig, seconds: float) -> dict[str, Span]:
    """All three over a time, side by side.

    :raise BenchError: When one of them was started anew meanwhile.
    """
    before = await usage(rig, list(NAMES.values()))
    await asyncio.sleep(seconds)
    after = await usage(rig, list(NAMES.values()))
    for one, other in zip(before, after, strict=True):
        if not set(one.pids) & set(other.pids):  # short-lived ones may come and go
            raise BenchError(f"a service was started anew meanwhile: {one.pids}, then {other.pids}")
    return {name: Span(one, other) for name, one, other in zip(NAMES, before, after, strict=True)}


@contextlib.asynccontextmanager
async def others(rig: Rig, footprint: Footprint, out_dir: Path, quiet_seconds: float) -> AsyncIterator[None]:
    """Memory, disk and start of each by itself; then all three run. Begins with guestd running and ends so."""
    costs = footprint.costs
    costs["guestd"].disk_bytes = await _disk(rig, "/opt/guestd")
    await asyncio.sleep(quiet_seconds)
    costs["guestd"].pss_bytes = (await usage(rig, [SERVICE]))[0].pss_bytes
    await rig.use("")
    began = time.monotonic()
    await rig.shell(f"systemctl start --no-block {SERVICE}")
    await rig.until(lambda: _reported(rig), "guestd's first report")
    costs["guestd"].start_seconds = time.monotonic() - began
    await rig.put("site.tar.gz", await bare_site(out_dir))
    await rig.shell(f"mkdir -p {_SITE} && tar -xzf {GUEST_DIR}/site.tar.gz -C {_SITE}", 300.0)
    costs["bare"].disk_bytes = await _disk(rig, _SITE)
    costs["qemu-guest-agent"].disk_bytes = 1024 * int(
        await rig.shell("dpkg-query -W -f '${Installed-Size}' qemu-guest-agent")
    )
    await rig.use("")
    async with _stream_server(rig.machine.uds_base) as opened:
        costs["bare"].start_seconds = await _start_bare(rig, opened)
        await asyncio.sleep(quiet_seconds)
        costs["bare"].pss_bytes = (await usage(rig, [BARE]))[0].pss_bytes
        await rig.shell(f"systemctl stop {BARE}")
        costs["qemu-guest-agent"].start_seconds = await _start_qga(rig)
        await asyncio.sleep(quiet_seconds)
        costs["qemu-guest-agent"].pss_bytes = (await usage(rig, [AGENT]))[0].pss_bytes
        opened.clear()
        await _start_bare(rig, opened)
        await rig.use("guestd")
        try:
            yield
        finally:
            await rig.shell(f"systemctl stop {BARE} {AGENT}; true")


async def _reported(rig: Rig) -> bool:
    view = await rig.view()
    return view.connected and bool(view.demand_reasons)


async def _disk(rig: Rig, path: str) -> int:
    return 1024 * int((await rig.shell(f"du -sk {path}")).split()[0])


async def bare_site(out_dir: Path) -> bytes:
    """The bare process's packages for the guest's Python, as a compressed archive; fetched once.

    :raise ImageError: When they cannot be had.
    """
    directory, archive = out_dir / "site-bare", out_dir / "site-bare.tar.gz"
    if not archive.exists():
        options = ["--disable-pip-version-check", "-q", "--no-warn-conflicts", "--upgrade", "--target", str(directory)]
        await tools.run([sys.executable, "-m", "pip", "install", *options, *_PACKAGES])
        await tools.run(["tar", "-czf", str(archive), "-C", str(directory), "."])
    return archive.read_bytes()


async def _start_bare(rig: Rig, opened: asyncio.Event) -> float:
    path = f"{GUEST_DIR}/stream.sock"
    await rig.shell(f"rm -f {path}")
    await rig.machine.console.spawn(f"exec python3 -S {GUEST_DIR}/relay.py {path} {STREAM_PORT}")
    await rig.machine.console.wait_path(path, 30.0)
    began = time.monotonic()
    words = ["/usr/bin/python3", f"{GUEST_DIR}/bare.py", path, STREAM_METHOD]
    await rig.start_unit(BARE, words, f"Environment=PYTHONPATH={_SITE}")
    try:
        await asyncio.wait_for(opened.wait(), _CONNECT_SECONDS)
    except TimeoutError as error:
        log = await rig.shell(f"journalctl -u {BARE} -n 8 -o cat --no-pager")
        raise BenchError(f"the bare process did not come: {log}") from error
    return time.monotonic() - began


async def _start_qga(rig: Rig) -> float:
    """Starts it and asks it once: seconds until it answers."""
    reader, writer = await asyncio.open_unix_connection(str(rig.machine.paths.guest_agent))
    try:
        port = f"$(cd /sys/class/virtio-ports && for p in *; do grep -qx {_QGA_PORT} $p/name && echo /dev/$p; done)"
        command = f"systemd-run --quiet --unit={AGENT} /usr/sbin/qemu-ga -m virtio-serial -p {port}"
        began = time.monotonic()
        await rig.shell(f"systemctl reset-failed {AGENT} 2>/dev/null; {command}")
        writer.write(json.dumps({"execute": "guest-ping"}).encode() + b"\n")
        try:
            answer = await asyncio.wait_for(reader.readline(), _CONNECT_SECONDS)
        except TimeoutError as error:
            raise BenchError("qemu-guest-agent does not answer") from error
        if "return" not in json.loads(answer or b"{}"):
            raise BenchError(f"qemu-guest-agent answers {answer!r}")
        return time.monotonic() - began
    finally:
        writer.close()


@contextlib.asynccontextmanager
async def _stream_server(uds_base: Path) -> AsyncIterator[asyncio.Event]:
    """A server for the bare process's stream, where the VM's vsock device delivers it; set once it is open."""
    opened = asyncio.Event()

    async def serve(requests: AsyncIterator[bytes], _context: object) -> AsyncIterator[bytes]:
        async for _ in requests:
            yield b"welcome"
            opened.set()

    service, method = STREAM_METHOD.strip("/").split("/")
    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {method: grpc.stream_stream_rpc_method_handler(serve)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    server.add_insecure_port(f"unix:{uds_base}_{STREAM_PORT}")
    await server.start()
    try:
        yield opened
    finally:
        await server.stop(None)


def document(footprint: Footprint) -> dict[str, Any]:
    """Judged, against the bare process."""
    rows = {}
    for name, cost in footprint.costs.items():
        row: dict[str, Any] = {key: getattr(cost, key) for key in ("pss_bytes", "disk_bytes", "start_seconds")}
        for when, span in (("idle", cost.idle), ("loaded", cost.loaded)):
            row[f"{when}_seconds"] = None if span is None else span.seconds
            row[f"{when}_cpu_share"] = None if span is None else span.cpu_share
            row[f"{when}_wakeups_per_second"] = None if span is None else span.wakeups
            row[f"{when}_pss_side_by_side_bytes"] = None if span is None else span.after.pss_bytes
            row[f"{when}_usage"] = None if span is None else asdict(span)
        rows[name] = row
    wanted = (
        ("PSS", "pss_bytes", PSS_TARGET),
        ("CPU share while idle", "idle_cpu_share", QUIET_TARGET),
        ("wakeups while idle", "idle_wakeups_per_second", QUIET_TARGET),
    )
    targets = [
        report.Target(
            f"quiet: {words} to the bare process",
            report.ratio(rows["guestd"][key], rows["bare"][key]),
            most,
            at_most=True,
        ).document()
        for words, key, most in wanted
    ]
    return {"rows": rows, "resizes_while_idle": footprint.resizes_while_idle, "targets": targets}


def lines(part: dict[str, Any]) -> list[str]:
    """The table."""
    shows = {
        "pss_bytes": ("PSS of all processes, alone", _mib),
        "idle_cpu_share": ("CPU share, idle", _percent),
        "idle_wakeups_per_second": ("wakeups per second, idle", _plain),
        "loaded_cpu_share": ("CPU share, noisy load", _percent),
        "loaded_wakeups_per_second": ("wakeups per second, noisy load", _plain),
        "loaded_pss_side_by_side_bytes": ("PSS after the load, side by side", _mib),
        "disk_bytes": ("disk in the image", _mib),
        "start_seconds": ("start to first report", report.seconds),
    }
    rows = []
    for key, (name, show) in shows.items():
        values = [part["rows"][who][key] for who in NAMES]
        rows.append([name, *("?" if value is None else show(value) for value in values)])
    idle = part["rows"]["guestd"]["idle_seconds"]
    head = [f"Footprint ({0 if idle is None else idle:.0f} s idle)", *NAMES]
    return [*report.grid(head, rows), f"resizes begun while idle: {part['resizes_while_idle']}", ""]


def _mib(value: float) -> str:
    return f"{value / (1 << 20):.1f} MiB"


def _percent(value: float) -> str:
    return f"{value:.2%}"


def _plain(value: float) -> str:
    return f"{value:.1f}"
