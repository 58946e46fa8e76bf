"""A hypervisor in a process of its own: `FakeVm`s that outlive the broker, as real VMs do.

``python -m guestd.sim.remote SOCKET --spec FILE.json`` keeps the VMs that the file lists (see `VmSpec`) and moves
them in real time. Any number of processes may be connected; each sees the same VMs.

The law:

1. A call is a frame of {id, vm, method, amount} and gets one answer {id, error, value}. Calls of one
   connection are begun in order; a VM with a command latency answers later than others.
2. After `watch` a connection is told the names of the VMs that changed, each at most once per turn of the loop:
   a notice says that asking again is worth while, never what there is.
3. The server never forgets: `log` lists every request of all connections, `lows` the least that each VM held
   since `lows_from_now`, seen at every change and not at intervals.

`HypervisorLink` is a process's one connection, and connects again by itself; `RemoteVm` is `hypervisor.base.Vm`
on it. A call whose connection broke raises `OutcomeUnknown`: it may have been carried out.
"""

import argparse
import asyncio
import contextlib
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from guestd.broker.hypervisor.fake import FakeVm
from guestd.model.errors import HypervisorError, HypervisorGone, HypervisorUnreachable, OutcomeUnknown
from guestd.model.units import GIB, MIB
from guestd.model.vm import VmState, VmStatus

T = TypeVar("T")
Low = tuple[int, int]
"""The least that a VM held: vCPUs, bytes."""
_STEP_SECONDS = 0.01
_RECONNECT_SECONDS = 0.05
_LENGTH = struct.Struct(">I")
_REQUESTS = frozenset({"request_vcpus", "request_cpu_quota", "request_memory", "settle_memory"})
_ERRORS = {kind.__name__: kind for kind in (HypervisorError, HypervisorGone, HypervisorUnreachable, OutcomeUnknown)}
_NOTICE = 0  # the id of what is no answer


class VmSpec(msgspec.Struct, forbid_unknown_fields=True):
    """One VM; see `FakeVm` for what the fields mean."""

    name: str
    boot_bytes: int = 512 * MIB
    device_bytes: int = 2 * GIB
    unit_bytes: int = 2 * MIB
    balloon: bool = False
    vcpus: int = 1
    vcpus_max: int = 4
    plug_rate: int | None = None
    unplug_rate: int | None = None
    cpu_unplug_seconds: float = 0.0
    cpu_enforced: bool = False
    command_seconds: float = 0.0

    def make(self) -> FakeVm:
        """The VM, booted."""
        return FakeVm(**{field: getattr(self, field) for field in self.__struct_fields__ if field != "name"})


class _Call(msgspec.Struct, array_like=True):
    id: int
    vm: str
    method: str
    amount: int


class _Answer(msgspec.Struct, array_like=True):
    id: int
    error: str  # the class of the error; empty: none
    value: msgspec.Raw


class Requested(msgspec.Struct, array_like=True, frozen=True):
    """One line of the log; `at` is the server's monotonic clock, in seconds."""

    at: float
    vm: str
    method: str
    amount: int


class _Frames(asyncio.Protocol):
    """Frames of bytes, each after its length; what is sent in one turn of the loop goes out as one."""

    def __init__(self, on_frame: Callable[["_Frames", bytes], None], on_lost: Callable[["_Frames"], None]) -> None:
        self._on_frame, self._on_lost = on_frame, on_lost
        self._received = bytearray()
        self._waiting: list[bytes] = []
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, _: Exception | None) -> None:
        self._transport = None
        self._on_lost(self)

    def data_received(self, data: bytes) -> None:
        received, at = self._received, 0
        received += data
        while len(received) >= at + _LENGTH.size:
            end = at + _LENGTH.size + _LENGTH.unpack_from(received, at)[0]
            if len(received) < end:
                break
            self._on_frame(self, bytes(received[at + _LENGTH.size : end]))
            at = end
        del received[:at]

    def send(self, message: _Call | _Answer) -> None:
        """Send soon; what the other side does not live to read is lost."""
        frame = msgspec.msgpack.encode(message)
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._flush)
        self._waiting += (_LENGTH.pack(len(frame)), frame)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if self._transport is not None:
            self._transport.write(b"".join(waiting))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


# ---- the server ----------------------------------------------------------------------------------


class Hypervisor:
    """All VMs, and everybody who is connected."""

    def __init__(self, specs: list[VmSpec]) -> None:
        self.vms = {spec.name: spec.make() for spec in specs}
        self.log: list[Requested] = []
        self._lows: dict[str, Low] = {}
        self._moving: set[str] = set(self.vms)
        self._watching: dict[_Frames, set[str] | None] = {}  # by connection, what it has not been told; None: nothing
        self._telling = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, path: Path) -> None:
        """Serve at `path` until cancelled."""
        loop = asyncio.get_running_loop()
        for name, vm in self.vms.items():
            await vm.open(lambda name=name: self._changed(name))  # type: ignore[misc]  # the default binds the name
        path.unlink(missing_ok=True)
        server = await loop.create_unix_server(self._connection, str(path), backlog=128)
        before = time.monotonic()
        try:
            while True:
                await asyncio.sleep(_STEP_SECONDS)
                passed, before = time.monotonic() - before, time.monotonic()
                self._advance(passed)
        finally:
            server.close()

    def _advance(self, seconds: float) -> None:
        for name in sorted(self._moving):
            vm = self.vms[name]
            vm.advance(seconds)
            if not vm.moving:
                self._moving.discard(name)

    def _connection(self) -> _Frames:
        frames = _Frames(self._on_frame, self._on_lost)
        self._watching[frames] = None
        return frames

    def _on_lost(self, frames: _Frames) -> None:
        del self._watching[frames]

    def _on_frame(self, frames: _Frames, raw: bytes) -> None:
        call = msgspec.msgpack.decode(raw, type=_Call)
        if call.method in _REQUESTS and call.vm in self.vms:
            self.log.append(Requested(time.monotonic(), call.vm, call.method, call.amount))
            task = asyncio.create_task(self._request(frames, call))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return
        self._answer(frames, call, lambda: self._ask(frames, call))

    async def _request(self, frames: _Frames, call: _Call) -> None:
        vm = self.vms[call.vm]
        arguments = () if call.method == "settle_memory" else (call.amount,)
        try:
            await getattr(vm, call.method)(*arguments)
        except HypervisorError as error:
            frames.send(_Answer(call.id, type(error).__name__, msgspec.Raw(msgspec.msgpack.encode(str(error)))))
        else:
            frames.send(_Answer(call.id, "", msgspec.Raw(msgspec.msgpack.encode(None))))
        self._moving.add(call.vm)

    def _answer(self, frames: _Frames, call: _Call, make: Callable[[], object]) -> None:
        try:
            value, error = make(), ""
        except HypervisorError as problem:
            value, error = str(problem), type(problem).__name__
        frames.send(_Answer(call.id, error, msgspec.Raw(msgspec.msgpack.encode(value))))

    def _ask(self, frames: _Frames, call: _Call) -> object:
        """What is answered at once."""
        match call.method:
            case "watch":
                self._watching[frames] = set()
                return None
            case "truth":
                return {name: vm.truth() for name, vm in self.vms.items()}
            case "log":
                return self.log
            case "lows_from_now":
                self._lows = {name: _low(vm.truth()) for name, vm in self.vms.items()}
                return None
            case "lows":
                return self._lows
        vm = self.vms.get(call.vm)
        if vm is None:
            raise HypervisorError(f"no VM named {call.vm!r}")
        match call.method:
            case "observe":
                return vm.truth()
            case "guest_keeps":
                vm.guest_keeps_bytes = call.amount
            case "reset":
                vm.reset(call.amount / 1000)
            case "kill":
                vm.set_status(VmStatus.GONE)
            case "boot":
                vm.set_status(VmStatus.RUNNING)
            case _:
                raise HypervisorError(f"no method {call.method!r}")
        self._moving.add(call.vm)
        return None

    def _changed(self, name: str) -> None:
        low = self._lows.get(name)
        if low is not None:
            now = _low(self.vms[name].truth())
            self._lows[name] = (min(low[0], now[0]), min(low[1], now[1]))
        for changed in self._watching.values():
            if changed is not None:
                changed.add(name)
        if not self._telling:
            self._telling = True
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        self._telling = False
        for frames, changed in self._watching.items():
            if changed:
                frames.send(_Answer(_NOTICE, "", msgspec.Raw(msgspec.msgpack.encode(sorted(changed)))))
                changed.clear()


def _low(state: VmState) -> Low:
    return state.vcpus, state.memory_held_bytes


# ---- the client ----------------------------------------------------------------------------------


class HypervisorLink:
    """A process's connection to the hypervisor; `start` it first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._frames: _Frames | None = None
        self._asked: dict[int, asyncio.Future[msgspec.Raw]] = {}
        self._next = _NOTICE
        self._lost, self._tried = asyncio.Event(), asyncio.Event()
        self._on_change: dict[str, Callable[[], None]] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Connect; a server that is not there yet is tried again for ever, but not waited for."""
        if self._task is None:
            self._task = asyncio.create_task(self._stay_connected())
        await self._tried.wait()

    async def close(self) -> None:
        """Let go; no VM changes by that."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._frames is not None:
            self._frames.close()

    def watch(self, name: str, on_change: Callable[[], None]) -> None:
        """Call `on_change` now, and whenever asking about the VM again is worth while."""
        self._on_change[name] = on_change
        on_change()

    def unwatch(self, name: str) -> None:
        self._on_change.pop(name, None)

    async def truth(self) -> dict[str, VmState]:
        """All VMs at one instant."""
        return await self.call("", "truth", 0, dict[str, VmState])

    async def log(self) -> list[Requested]:
        """Every request so far, in order."""
        return await self.call("", "log", 0, list[Requested])

    async def lows_from_now(self) -> None:
        """Begin to note the least that each VM holds."""
        await self.call("", "lows_from_now", 0, type(None))

    async def lows(self) -> dict[str, Low]:
        """The least that each VM held since `lows_from_now`."""
        return await self.call("", "lows", 0, dict[str, Low])

    async def call(self, vm: str, method: str, amount: int, type_: type[T]) -> T:
        """One call.

        :raise HypervisorUnreachable: When there is no connection.
        :raise OutcomeUnknown: When the connection broke before the answer.
        :raise HypervisorError: When the hypervisor says so.
        """
        if self._frames is None:
            raise HypervisorUnreachable(f"{self._path}: no hypervisor answers")
        self._next += 1
        answer: asyncio.Future[msgspec.Raw] = asyncio.get_running_loop().create_future()
        number, self._asked[self._next] = self._next, answer
        self._frames.send(_Call(number, vm, method, amount))
        try:
            return msgspec.msgpack.decode(await answer, type=type_)
        finally:
            self._asked.pop(number, None)

    async def _stay_connected(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            with contextlib.suppress(OSError):
                self._lost.clear()
                _, self._frames = await loop.create_unix_connection(
                    lambda: _Frames(self._on_frame, self._on_lost), str(self._path)
                )
                self._tried.set()
                self._frames.send(_Call(_NOTICE, "", "watch", 0))
                self._tell(list(self._on_change))
                await self._lost.wait()
                self._tell(list(self._on_change))
            self._tried.set()
            await asyncio.sleep(_RECONNECT_SECONDS)

    def _on_lost(self, _: _Frames) -> None:
        self._frames = None
        asked, self._asked = self._asked, {}
        for answer in asked.values():
            if not answer.done():
                answer.set_exception(OutcomeUnknown(f"{self._path}: the connection broke while waiting for an answer"))
        self._lost.set()

    def _on_frame(self, _: _Frames, raw: bytes) -> None:
        answer = msgspec.msgpack.decode(raw, type=_Answer)
        if answer.id == _NOTICE:
            self._tell(msgspec.msgpack.decode(answer.value, type=list[str] | None) or [])
            return
        waiting = self._asked.get(answer.id)
        if waiting is None or waiting.done():
            return
        if answer.error:
            waiting.set_exception(_ERRORS[answer.error](msgspec.msgpack.decode(answer.value, type=str)))
        else:
            waiting.set_result(answer.value)

    def _tell(self, names: list[str]) -> None:
        for name in names:
            on_change = self._on_change.get(name)
            if on_change is not None:
                on_change()


class RemoteVm:
    """One VM of the hypervisor at the link's other end. Implements `hypervisor.base.Vm`."""

    def __init__(self, link: HypervisorLink, name: str) -> None:
        self._link, self._name = link, name

    def only_observe(self, only: bool) -> None:
        pass  # it does nothing unasked

    async def open(self, on_change: Callable[[], None]) -> None:
        await self._link.start()
        self._link.watch(self._name, on_change)

    async def close(self) -> None:
        self._link.unwatch(self._name)

    async def observe(self) -> VmState:
        try:
            return await self._link.call(self._name, "observe", 0, VmState)
        except HypervisorUnreachable:
            return VmState(VmStatus.UNREACHABLE)

    async def request_vcpus(self, count: int) -> None:
        await self._request("request_vcpus", count)

    async def request_cpu_quota(self, millicores: int) -> None:
        await self._request("request_cpu_quota", millicores)

    async def request_memory(self, amount_bytes: int) -> None:
        await self._request("request_memory", amount_bytes)

    async def settle_memory(self) -> None:
        await self._request("settle_memory", 0)

    async def _request(self, method: str, amount: int) -> None:
        await self._link.call(self._name, method, amount, type(None))


def encode_specs(specs: list[VmSpec]) -> bytes:
    """What the file for ``--spec`` is to hold."""
    return msgspec.json.encode(specs)


def main() -> None:
    """Parse the command line and serve until SIGTERM. Exit codes: 0 done, 2 usage or a bad file."""
    parser = argparse.ArgumentParser(prog="guestd.sim.remote", description="Fake VMs in a process of their own.")
    parser.add_argument("socket", type=Path)
    parser.add_argument("--spec", type=Path, required=True, metavar="FILE", help="JSON: a list of VMs")
    arguments = parser.parse_args()
    try:
        specs = msgspec.json.decode(arguments.spec.read_bytes(), type=list[VmSpec])
    except (OSError, msgspec.MsgspecError) as error:
        print(f"{arguments.spec}: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    asyncio.run(_serve(Hypervisor(specs), arguments.socket))


async def _serve(hypervisor: Hypervisor, path: Path) -> None:
    task: asyncio.Task[Any] = asyncio.create_task(hypervisor.run(path))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


if __name__ == "__main__":
    main()
