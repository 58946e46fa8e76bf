"""The monitor on TCP: mutual TLS only, read-only, and certificates that change while it runs."""

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest
from broker_rig import eventually
from fake_operators import EXPLANATION, GUEST, HISTORY, HOST, event
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pki import CA, OTHER, Pair
from remote_rig import Place

from guestd.model.errors import ConfigError, DeniedError, GuestdError, UnreachableError
from guestd.model.event import EventQuery, SeenEvent
from guestd.model.view import LimitsChange
from guestd.v1 import monitor_pb2, monitor_pb2_grpc
from guestd.wire.client import BrokerClient
from guestd.wire.serve_monitor import remote_monitor, serve_remote_monitor

DAY = timedelta(days=1)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    one = Place(tmp_path)
    one.server = await serve_remote_monitor(one.operators, one.address, one.files)
    yield one
    await one.server.stop(0)


def der(pair: Pair) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pair.certificate.decode())


# ---- who gets in ---------------------------------------------------------------------------------


async def test_a_client_with_a_certificate_of_the_ca_sees_all_that_the_monitor_shows(place: Place) -> None:
    async with place.client() as client:
        assert await client.host() == HOST
        assert await client.guests() == (GUEST,)
        assert await anext(client.watch_guests()) == GUEST
        assert await client.events(EventQuery()) == tuple(place.operators.record)
        assert await anext(client.watch_events(after_id=1)) == SeenEvent(event(2))
        assert await client.explain("web-1") == EXPLANATION
        assert await client.history("web-1") == HISTORY
    async with place.channel(place.client_files) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "guestd.v1.MonitorService"):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_the_name_may_be_a_dns_name_too(place: Place) -> None:
    async with place.client(host="localhost") as client:
        assert await client.host() == HOST


async def test_without_a_certificate_nobody_gets_in(place: Place) -> None:
    async with place.channel(None) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await place.host(channel)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_plain_text_gets_nobody_in(place: Place) -> None:
    async with grpc.aio.insecure_channel(place.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await place.host(channel)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_tls_is_1_2_or_newer(place: Place, version: ssl.TLSVersion) -> None:
    context = ssl.create_default_context(cadata=CA.pem.decode())
    context.load_cert_chain(place.client_files.certificate, place.client_files.key)
    context.set_alpn_protocols(["h2"])
    context.set_ciphers("ALL:@SECLEVEL=0")  # else this side would refuse the old version
    context.minimum_version = context.maximum_version = version
    with contextlib.ExitStack() as ends:
        if version is ssl.TLSVersion.TLSv1_1:
            ends.enter_context(pytest.raises((OSError, asyncio.IncompleteReadError)))
        reader, writer = await asyncio.open_connection("127.0.0.1", place.port, ssl=context)
        writer.write(PREFACE)
        assert len(await reader.readexactly(9)) == 9  # a frame of HTTP/2
        writer.transport.abort()


async def test_a_certificate_of_another_ca_is_not_accepted(place: Place) -> None:
    async with place.client(place.files_of(OTHER.issue("client"))) as client:
        with pytest.raises(DeniedError, match=r"does not accept the client certificate .*client\.pem: .*client_ca"):
            await client.host()
        with pytest.raises(DeniedError, match="does not accept"):
            await anext(client.watch_guests())


async def test_a_certificate_that_has_expired_is_not_accepted(place: Place) -> None:
    async with place.client(place.files_of(CA.issue("client", ends=-DAY))) as client:
        with pytest.raises(DeniedError, match=r"client\.pem: it has expired; renew it"):
            await client.host()


async def test_who_sends_nothing_does_not_keep_others_out(place: Place) -> None:
    silent = [await asyncio.open_connection("127.0.0.1", place.port) for _ in range(8)]
    async with place.client() as client:
        assert await client.host() == HOST
    for _, writer in silent:
        writer.transport.abort()


async def test_so_many_connections_and_no_more(place: Place) -> None:
    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(place.channel(place.client_files)) for _ in range(64)]
        await asyncio.gather(*(place.host(channel) for channel in channels))
        async with place.client() as client:
            with pytest.raises(UnreachableError, match="too many clients"):
                await client.host()
        await channels.pop().close()
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(UnreachableError):
                    async with place.client() as client:
                        assert await client.host() == HOST
                        break
        assert await place.host(channels[0])


async def test_requests_are_as_bounded_as_those_of_guests(place: Place) -> None:
    async with place.channel(place.client_files) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            stub = monitor_pb2_grpc.MonitorServiceStub(channel)
            await stub.GetGuest(monitor_pb2.GetGuestRequest(name="x" * 100_000), timeout=5)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


# ---- whom a client believes ----------------------------------------------------------------------


async def test_a_broker_of_another_ca_is_not_believed(place: Place) -> None:
    files = CA.issue("client").write(place.root, OTHER, "client")
    async with place.client(files) as client:
        with pytest.raises(UnreachableError, match=r"the broker's certificate is not signed by .*client-ca\.pem"):
            await client.host()


async def test_a_broker_of_another_name_is_not_believed(tmp_path: Path) -> None:
    place = Place(tmp_path)
    files = CA.issue("broker", host="db1.example").write(tmp_path / "broker", CA)
    server = await serve_remote_monitor(place.operators, place.address, files)
    async with place.client() as client:
        with pytest.raises(UnreachableError, match=r"the broker's certificate is not for 127\.0\.0\.1"):
            await client.host()
    await server.stop(0)


async def test_a_broker_whose_certificate_has_expired_is_not_believed(place: Place, tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    files = CA.issue("broker", ends=-DAY).write(tmp_path, CA, "expired")
    context.load_cert_chain(files.certificate, files.key)
    context.set_alpn_protocols(["h2"])
    await expect(place, context, "the broker's certificate has expired; renew it")


async def test_who_speaks_no_tls_is_told(place: Place) -> None:
    await expect(place, None, "does not speak TLS")


async def expect(place: Place, context: ssl.SSLContext | None, said: str) -> None:
    """A server with that TLS, or none, makes a client say that."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context) as server:
        port = server.sockets[0].getsockname()[1]
        one = place.client_files
        async with BrokerClient.remote(f"127.0.0.1:{port}", one.certificate, one.key, one.ca) as client:
            with pytest.raises(UnreachableError, match=said):
                await client.host()


async def test_nobody_there_is_said_with_the_setting(tmp_path: Path) -> None:
    async with Place(tmp_path).client() as client:
        with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:\d+: .*\[monitor\] listen"):
            await client.host()


@pytest.mark.parametrize(
    "address", ["", "db1", "db1:", "db1:0", "db1:65536", ":1", "a b:1", "[::1", "::1:5", "x://y:1"]
)
def test_an_address_that_is_none_is_said(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match="is no HOST:PORT"):
        BrokerClient.remote(address, tmp_path, tmp_path, tmp_path)


@pytest.mark.parametrize("broken", ["certificate", "key", "ca"])
async def test_a_client_file_that_is_missing_is_named(place: Place, broken: str) -> None:
    files = replace(place.client_files, **{broken: place.root / "nothing.pem"})
    async with place.client(files) as client:
        with pytest.raises(ConfigError, match=r"nothing\.pem: cannot be read: No such file"):
            await client.host()


async def test_changes_are_not_asked_of_a_broker_elsewhere(place: Place) -> None:
    async with place.client() as client:
        for call in (client.pause_guest("web-1"), client.set_limits("web-1", LimitsChange()), client.remove_guest("x")):
            with pytest.raises(DeniedError, match="changes are made on the host itself"):
                await call
    assert not [call for call in place.operators.calls if call[0] in ("pause", "change", "remove")]


# ---- certificates that change --------------------------------------------------------------------


async def test_a_new_certificate_holds_for_new_connections_and_old_ones_live_on(place: Place) -> None:
    before = await place.shown()
    async with place.client() as old:
        stream = old.watch_events(after_id=1)
        assert await anext(stream) == SeenEvent(event(2))
        fresh = CA.issue("broker, renewed")
        fresh.write(place.root / "broker", CA)
        assert await place.shown() == der(fresh) != before
        place.operators.record.append(event(3))
        place.operators.more.set()
        assert await anext(stream) == SeenEvent(event(3))
        assert await old.host() == HOST
    async with place.channel(None) as channel:
        with pytest.raises(grpc.aio.AioRpcError):  # it still asks for one
            await place.host(channel)


async def test_when_the_ca_of_clients_is_replaced_those_of_the_old_one_stay_out(place: Place) -> None:
    async with place.client() as client:
        assert await client.host() == HOST
    place.files.ca.write_bytes(OTHER.pem)
    async with place.client() as client:
        with pytest.raises(DeniedError, match="does not accept the client certificate"):
            await client.host()
    async with place.client(place.files_of(OTHER.issue("client"))) as client:
        assert await client.host() == HOST


async def test_a_bad_certificate_leaves_the_one_that_is_there(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    before = await place.shown()
    place.files.certificate.write_text("half a fil")
    assert await place.shown() == before
    assert await place.shown() == before
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
        f"{place.files.certificate}: holds no certificate in PEM; "
        "until then the monitor keeps the certificates that it has"
    ]
    fresh = CA.issue("broker")
    fresh.write(place.root / "broker", CA)
    assert await place.shown() == der(fresh)


async def test_with_bad_files_there_is_one_line_and_no_listener_until_they_are_good(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "guestd")
    place = Place(tmp_path)
    good = place.files.key.read_bytes()
    place.files.key.write_bytes(CA.issue("another").key)
    async with remote_monitor(place.operators, place.address, place.files, 0, retry_seconds=0.05):
        await asyncio.sleep(0.3)
        (record,) = caplog.records
        assert record.levelname == "ERROR"
        assert record.getMessage() == (
            f"the monitor does not listen on {place.address}: {place.files.key}: is not the key of "
            f"{place.files.certificate}; put both of one pair there; trying again every 0.05 s"
        )
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", place.port)
        place.files.key.write_bytes(good)
        await eventually(lambda: len(caplog.records) > 1, "the monitor to listen")
        assert caplog.records[1].getMessage().startswith(f"the monitor listens on {place.address}")
        async with place.client() as client:
            assert await client.host() == HOST
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", place.port)


async def test_an_address_that_is_taken_is_said(place: Place) -> None:
    with pytest.raises(GuestdError, match=re.escape(f"the monitor cannot listen on {place.address}")):
        await serve_remote_monitor(place.operators, place.address, place.files)
