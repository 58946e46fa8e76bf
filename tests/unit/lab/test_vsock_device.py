"""The vsock device against a guest that behaves, and against one that does not."""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from fake_vm import BASE, GUEST_CID, MEMORY_BYTES, RING_SIZE, FakeGuest

from guestd.lab.vhost_user import Request
from guestd.lab.vsock_device import RX, TX, VsockDevice
from guestd.lab.vsock_packet import HOST_CID, SHUTDOWN_BOTH, SHUTDOWN_SEND, Op
from guestd.lab.vsock_stream import BUFFER_BYTES

PORT = 5000


@pytest.fixture
async def guest() -> AsyncIterator[FakeGuest]:
    fake = FakeGuest()
    yield fake
    fake.close()


@pytest.fixture
async def device(tmp_path: Path, guest: FakeGuest) -> AsyncIterator[VsockDevice]:
    """A device with the fake guest connected and running."""
    made = VsockDevice(tmp_path / "vhost", GUEST_CID, tmp_path / "vsock", max_streams=8)
    await made.start()
    await guest.connect(tmp_path / "vhost")
    await guest.start()
    yield made
    await made.stop()


class Host:
    """A server at the device's socket for PORT; its connections in order of arrival."""

    def __init__(self) -> None:
        self.connections: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    made = Host()
    writers: list[asyncio.StreamWriter] = []

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        made.connections.put_nowait((reader, writer))

    server = await asyncio.start_unix_server(accept, str(tmp_path / f"vsock_{PORT}"))
    yield made
    for writer in writers:
        writer.transport.abort()
    server.close()
    await server.wait_closed()


async def connect(
    guest: FakeGuest, host: Host, port: int = 900, credit: int = 65536
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    guest.send(Op.REQUEST, port, PORT, credit=credit)
    header, _ = await guest.expect(Op.RESPONSE)
    assert (header.source_cid, header.destination_cid) == (HOST_CID, GUEST_CID)
    assert (header.source_port, header.destination_port) == (PORT, port)
    assert header.buffer_bytes == BUFFER_BYTES
    return await host.connections.get()


async def settled(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not check():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_data_goes_both_ways_and_a_close_ends_it(device: VsockDevice, guest: FakeGuest, host: Host) -> None:
    reader, writer = await connect(guest, host)
    guest.send(Op.RW, 900, PORT, b"hello")
    assert await reader.readexactly(5) == b"hello"
    writer.write(b"world")
    assert (await guest.expect(Op.RW))[1] == b"world"
    guest.send(Op.SHUTDOWN, 900, PORT, flags=SHUTDOWN_BOTH)
    assert await reader.read() == b""
    await guest.expect(Op.RST)
    assert device.mux.stream_count == 0


async def test_half_close_from_either_side(device: VsockDevice, guest: FakeGuest, host: Host) -> None:
    reader, writer = await connect(guest, host)
    guest.send(Op.RW, 900, PORT, b"last words")
    guest.send(Op.SHUTDOWN, 900, PORT, flags=SHUTDOWN_SEND)
    assert await reader.read() == b"last words"
    writer.write(b"answer")
    writer.write_eof()
    assert (await guest.expect(Op.RW))[1] == b"answer"
    header, _ = await guest.expect(Op.SHUTDOWN)
    assert header.flags & SHUTDOWN_SEND
    guest.send(Op.RST, 900, PORT)
    await settled(lambda: device.mux.stream_count == 0)


async def test_a_host_that_closes_is_a_full_shutdown(device: VsockDevice, guest: FakeGuest, host: Host) -> None:
    _, writer = await connect(guest, host)
    writer.close()
    header, _ = await guest.expect(Op.SHUTDOWN)
    assert header.flags == SHUTDOWN_BOTH


async def test_nobody_listening_is_refused(device: VsockDevice, guest: FakeGuest) -> None:
    guest.send(Op.REQUEST, 900, 5001)
    header, _ = await guest.expect(Op.RST)
    assert (header.source_port, header.destination_port) == (5001, 900)
    assert device.mux.stream_count == 0
    assert device.mux.refused_connections == 1


async def test_never_more_than_the_guests_credit_is_in_flight(
    device: VsockDevice, guest: FakeGuest, host: Host
) -> None:
    _, writer = await connect(guest, host, credit=1000)
    data = random.Random(1).randbytes(5000)
    writer.write(data)
    received = b""
    while len(received) < len(data):
        while len(received) - guest.forwarded < min(1000, len(data) - guest.forwarded):
            received += (await guest.expect(Op.RW))[1]
            assert len(received) - guest.forwarded <= 1000
        with contextlib.suppress(TimeoutError):
            header, _ = await guest.receive(0.02)
            assert header.operation == Op.CREDIT_REQUEST
        guest.forwarded = len(received)
        guest.send(Op.CREDIT_UPDATE, 900, PORT, credit=1000)
    assert received == data


async def test_a_guest_beyond_its_credit_is_reset(device: VsockDevice, guest: FakeGuest, host: Host) -> None:
    _, writer = await connect(guest, host)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    for _ in range(1000):
        guest.send(Op.RW, 900, PORT, bytes(8000))
        await asyncio.sleep(0)
        await settled(lambda: guest.rings[TX].used() is not None)
        if device.mux.stream_count == 0:
            break
        await asyncio.sleep(0.0005)
    assert device.mux.stream_count == 0


async def test_credit_comes_back_as_the_host_reads(device: VsockDevice, guest: FakeGuest, host: Host) -> None:
    reader, _ = await connect(guest, host)
    told, sent = 0, 0
    while sent < 4 * BUFFER_BYTES:
        while sent + 8000 - told > BUFFER_BYTES:
            header, _ = await guest.expect(Op.CREDIT_UPDATE)
            told = header.forwarded_bytes
        guest.send(Op.RW, 900, PORT, bytes(8000))
        sent += 8000
        await reader.readexactly(8000)
    assert device.mux.stream_count == 1


async def test_packets_in_anothers_name_are_dropped(device: VsockDevice, guest: FakeGuest, host: Host) -> None:
    guest.send(Op.REQUEST, 900, PORT, cid=GUEST_CID + 1)
    await guest.nothing()
    assert device.mux.dropped_packets == 1
    assert host.connections.empty()


async def test_the_number_of_connections_is_bounded(device: VsockDevice, guest: FakeGuest, host: Host) -> None:
    for port in range(8):
        await connect(guest, host, port)
    guest.send(Op.REQUEST, 100, PORT)
    await guest.expect(Op.RST)
    assert device.mux.stream_count == 8


async def test_privileged_ports_only(tmp_path: Path, guest: FakeGuest, host: Host) -> None:
    device = VsockDevice(tmp_path / "strict", GUEST_CID, tmp_path / "vsock", require_privileged_port=True)
    await device.start()
    await guest.connect(tmp_path / "strict")
    await guest.start()
    await connect(guest, host, 1023)
    guest.send(Op.REQUEST, 1024, PORT)
    await guest.expect(Op.RST)
    assert device.mux.stream_count == 1
    await device.stop()


async def test_a_second_request_on_a_connection_resets_it(device: VsockDevice, guest: FakeGuest, host: Host) -> None:
    await connect(guest, host)
    guest.send(Op.REQUEST, 900, PORT)
    await guest.expect(Op.RST)
    assert device.mux.stream_count == 0


async def test_noise_for_unknown_connections_is_refused_and_bounded(device: VsockDevice, guest: FakeGuest) -> None:
    """Refusals are held only up to a limit while the guest takes none."""
    for _ in range(300):
        guest.send(Op.RW, 5, PORT, b"x")
        await asyncio.sleep(0.0005)
    await settled(lambda: device.mux.congested)
    assert device.fault is None
    header, _ = await guest.receive()
    assert header.operation == Op.RST


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (lambda ring: ring.describe(0, BASE + MEMORY_BYTES - 10, 44), "outside guest memory"),
        (lambda ring: ring.describe(0, 0, 44), "outside guest memory"),
        (lambda ring: ring.describe(0, (1 << 64) - 20, 44), "outside guest memory"),
        (lambda ring: ring.describe(0, BASE, 16, flags=1, following=0), "never ends"),
        (lambda ring: ring.describe(0, BASE, 16, flags=1, following=999), "descriptor 999"),
        (lambda ring: ring.describe(0, BASE, 64, flags=4), "indirect"),
        (lambda ring: ring.describe(0, BASE, 0xFFFFFFFF), "more than"),
    ],
)
async def test_an_impossible_ring_stops_the_device(
    device: VsockDevice, guest: FakeGuest, what: Callable[[object], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    what(guest.rings[TX])
    guest.rings[TX].offer(0)
    guest.kick(TX)
    await settled(lambda: device.fault is not None)
    assert reason in str(device.fault)
    assert len([record for record in caplog.records if "stopped" in record.message]) == 1
    guest.send(Op.REQUEST, 900, PORT)
    await guest.nothing()
    # A reset of the VM makes it work again.
    await guest.stop()


async def test_an_index_that_jumps_stops_the_device(device: VsockDevice, guest: FakeGuest) -> None:
    guest.rings[TX].available_index = 500
    guest.rings[TX].offer(0)
    guest.kick(TX)
    await settled(lambda: device.fault is not None)
    assert device.fault == "501 chains offered in a ring of 16"


async def test_short_packets_and_wrong_lengths_are_dropped(device: VsockDevice, guest: FakeGuest) -> None:
    guest.put(b"short")
    guest.put(struct.pack("<QQIIIHHIII", GUEST_CID, HOST_CID, 1, PORT, 60000, 1, Op.RW, 0, 0, 0))
    await settled(lambda: device.mux.dropped_packets == 2)
    assert device.fault is None


async def test_random_packets_never_break_the_device(device: VsockDevice, guest: FakeGuest, host: Host) -> None:
    dice = random.Random(7)
    for _ in range(400):
        operation, flags = dice.randrange(0, 12), dice.randrange(0, 8)
        guest.send(
            operation,
            dice.randrange(3),
            PORT,
            dice.randbytes(dice.randrange(30)),
            flags=flags,
            credit=dice.randrange(99),
        )
        await asyncio.sleep(0.0005)
        with contextlib.suppress(TimeoutError):
            await guest.receive(0.0005)
    assert device.fault is None


async def test_a_pause_keeps_connections_and_a_reset_does_not(
    device: VsockDevice, guest: FakeGuest, host: Host
) -> None:
    reader, _ = await connect(guest, host)
    bases = await guest.stop()
    assert bases[TX] == 1
    for number in (RX, TX):
        await restart(guest, number, bases[number])
    guest.send(Op.RW, 900, PORT, b"still here")
    assert await reader.readexactly(10) == b"still here"

    await guest.stop()
    await guest.ask(Request.SET_VRING_BASE, struct.pack("<II", TX, 0))
    assert await reader.read() == b""
    assert device.mux.stream_count == 0


async def restart(guest: FakeGuest, number: int, base: int) -> None:
    await guest.ask(Request.SET_VRING_BASE, struct.pack("<II", number, base))
    await guest.ask(Request.SET_VRING_KICK, struct.pack("<Q", number), (guest.kicks[number],))


async def test_memory_that_is_taken_away_is_not_touched(device: VsockDevice, guest: FakeGuest) -> None:
    body = struct.pack("<QQQQQ", 0, BASE, MEMORY_BYTES, 0, 0)
    assert await guest.ask(Request.REM_MEM_REG, body) == bytes(8)
    assert await guest.ask(Request.REM_MEM_REG, body) != bytes(8)
    guest.send(Op.REQUEST, 900, PORT)
    await settled(lambda: device.fault is not None)


async def test_another_region_while_traffic_runs(device: VsockDevice, guest: FakeGuest, host: Host) -> None:
    reader, _ = await connect(guest, host)
    other = struct.pack("<QQQQQ", 0, BASE + MEMORY_BYTES, MEMORY_BYTES, 1, 0)
    assert await guest.ask(Request.ADD_MEM_REG, other, (guest.memfd,)) == bytes(8)
    guest.send(Op.RW, 900, PORT, b"x")
    assert await reader.readexactly(1) == b"x"
    overlapping = struct.pack("<QQQQQ", 0, BASE + 4096, MEMORY_BYTES, 2, 0)
    assert await guest.ask(Request.ADD_MEM_REG, overlapping, (guest.memfd,)) != bytes(8)
    assert device.fault is None


async def test_qemu_gone_ends_connections_and_another_may_come(
    tmp_path: Path, device: VsockDevice, guest: FakeGuest, host: Host
) -> None:
    reader, _ = await connect(guest, host)
    guest.frontend.close()
    assert await reader.read() == b""
    second = FakeGuest()
    await second.connect(tmp_path / "vhost")
    await second.start()
    await connect(second, host)
    second.close()
    await settled(lambda: device.mux.stream_count == 0)


async def test_configuration_space_holds_the_cid(device: VsockDevice, guest: FakeGuest) -> None:
    body = struct.pack("<III", 0, 8, 0) + bytes(8)
    assert (await guest.ask(Request.GET_CONFIG, body, ack=False))[12:] == struct.pack("<Q", GUEST_CID)


async def test_full_backlogs_are_waited_for(tmp_path: Path, device: VsockDevice, guest: FakeGuest, host: Host) -> None:
    """More connections at once than rings have room; all are answered."""
    for port in range(6):
        guest.send(Op.REQUEST, port, PORT)
    answered = {(await guest.expect(Op.RESPONSE))[0].destination_port for _ in range(6)}
    assert answered == set(range(6))
    assert RING_SIZE > 6
