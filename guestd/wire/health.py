"""Whether the broker does its work, and gRPC's standard health service that tells it.

The servicer of grpcio-health-checking is not used: of two that watch, it forgets the second when the first leaves.
"""

import asyncio

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_Status = health_pb2.HealthCheckResponse


class Health:
    """It does, until somebody says otherwise; after `stop` never again."""

    def __init__(self) -> None:
        self.serving = True
        self._stopped = False
        self._changed = asyncio.Event()

    def set(self, serving: bool) -> None:
        """From now on it does, or does not."""
        if serving != self.serving and not self._stopped:
            self.serving = serving
            self._changed.set()
            self._changed = asyncio.Event()

    def stop(self) -> None:
        """The broker is about to end."""
        self.set(False)
        self._stopped = True

    def next_change(self) -> asyncio.Event:
        """Set when it is no longer as it is now."""
        return self._changed


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # its library has no types
    """Of one listener: the broker as a whole (the empty name), and the service that is there."""

    def __init__(self, health: Health, service: str) -> None:
        self._health, self._services = health, ("", service)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> health_pb2.HealthCheckResponse:
        """See health.proto."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service here")
        return _Status(status=self._status())

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> None:
        """See health.proto."""
        while True:
            changed = self._health.next_change()
            known = request.service in self._services
            await context.write(_Status(status=self._status() if known else _Status.SERVICE_UNKNOWN))
            await changed.wait()

    def _status(self) -> int:
        status: int = _Status.SERVING if self._health.serving else _Status.NOT_SERVING
        return status


def add_health(server: grpc.aio.Server, health: Health, service: str) -> None:
    """Have the server tell about itself and about that service."""
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(health, service), server)
