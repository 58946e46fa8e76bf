"""The standard health service on both sockets, and reflection on the admin's: what a monitoring system calls."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from fake_operators import FakeOperators
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from guestd.wire.health import Health
from guestd.wire.serve_admin import serve_admin
from guestd.wire.serve_monitor import serve_monitor

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = {"monitor": "guestd.v1.MonitorService", "admin": "guestd.v1.AdminService"}


@pytest.fixture
async def backend() -> AsyncIterator[tuple[FakeOperators, Path]]:
    with tempfile.TemporaryDirectory(prefix="gd", dir="/tmp") as path:
        one, root = FakeOperators(), Path(path)
        servers = [await serve_monitor(one, root / "monitor"), await serve_admin(one, root / "admin")]
        yield one, root
        for server in servers:
            await server.stop(0)


@pytest.mark.parametrize("socket", SERVICES)
async def test_overall_and_by_name_it_serves_until_the_broker_does_not(
    backend: tuple[FakeOperators, Path], socket: str
) -> None:
    operators, root = backend
    async with grpc.aio.insecure_channel(f"unix:{root}/{socket}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def statuses() -> list[int]:
            return [
                (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status
                for name in ("", SERVICES[socket])
            ]

        assert await statuses() == [SERVING, SERVING]
        operators.health.set(False)
        assert await statuses() == [NOT_SERVING, NOT_SERVING]
        operators.health.set(True)
        assert await statuses() == [SERVING, SERVING]


async def test_a_service_that_is_not_there_is_unknown(backend: tuple[FakeOperators, Path]) -> None:
    _, root = backend
    async with grpc.aio.insecure_channel(f"unix:{root}/monitor") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        elsewhere = health_pb2.HealthCheckRequest(service=SERVICES["admin"])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(elsewhere)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        first = await stub.Watch(elsewhere).read()
        assert first.status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def test_all_who_watch_hear_of_a_change_also_when_one_of_them_has_left(
    backend: tuple[FakeOperators, Path],
) -> None:
    operators, root = backend
    async with grpc.aio.insecure_channel(f"unix:{root}/monitor") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        first, second = (stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(2))
        assert [(await one.read()).status for one in (first, second)] == [SERVING, SERVING]
        first.cancel()
        await stub.Check(health_pb2.HealthCheckRequest())  # by then the broker has heard of it
        operators.health.set(False)
        async with asyncio.timeout(5):
            assert (await second.read()).status == NOT_SERVING


def test_a_broker_that_stops_never_serves_again() -> None:
    health = Health()
    health.stop()
    health.set(True)
    assert not health.serving


async def services(root: Path, socket: str) -> list[str]:
    async with grpc.aio.insecure_channel(f"unix:{root}/{socket}") as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services="*"))
        answer = await call.read()
        return sorted(service.name for service in answer.list_services_response.service)


async def test_reflection_is_for_the_admin_only(backend: tuple[FakeOperators, Path]) -> None:
    _, root = backend
    assert await services(root, "admin") == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "guestd.v1.AdminService",
    ]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await services(root, "monitor")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
