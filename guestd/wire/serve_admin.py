"""The admin service: changes, for the owner of the socket."""

from pathlib import Path

import grpc.aio
from grpc_reflection.v1alpha import reflection

from guestd.model.explanation import ReclaimRequest
from guestd.model.view import LimitsChange
from guestd.v1 import admin_pb2, admin_pb2_grpc, monitor_pb2
from guestd.wire import amounts
from guestd.wire.health import HEALTH, add_health
from guestd.wire.past import reclaimed_to_wire
from guestd.wire.server import LOCAL_SERVER_OPTIONS, OperatorBackend, listen_unix, status
from guestd.wire.view import guest_to_wire

_SERVICE = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Changes, for the owner of the socket."""

    def __init__(self, backend: OperatorBackend) -> None:
        self._backend = backend

    async def AddGuest(
        self, request: admin_pb2.AddGuestRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> admin_pb2.AddGuestResponse:
        """See admin.proto."""
        async with status(context):
            limits = amounts.limits_from_wire(request.limits)
            cid, path = request.cid or None, request.vsock_path or None
            await self._backend.add_guest(request.name, limits, request.qmp_socket, cid, path)
        return admin_pb2.AddGuestResponse(guest=self._guest(request.name))

    async def RemoveGuest(
        self, request: admin_pb2.RemoveGuestRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> admin_pb2.RemoveGuestResponse:
        """See admin.proto."""
        async with status(context):
            await self._backend.remove_guest(request.name)
        return admin_pb2.RemoveGuestResponse()

    async def SetLimits(
        self, request: admin_pb2.SetLimitsRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> admin_pb2.SetLimitsResponse:
        """See admin.proto."""
        fields = {field.name: value for field, value in request.ListFields() if field.name != "name"}
        async with status(context):
            amounts.check_amounts(fields)
            await self._backend.change_limits(request.name, LimitsChange(**fields))
        return admin_pb2.SetLimitsResponse(guest=self._guest(request.name))

    async def ResetLimits(
        self, request: admin_pb2.ResetLimitsRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> admin_pb2.ResetLimitsResponse:
        """See admin.proto."""
        async with status(context):
            await self._backend.reset_limits(request.name)
        return admin_pb2.ResetLimitsResponse(guest=self._guest(request.name))

    async def PauseGuest(
        self, request: admin_pb2.PauseGuestRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> admin_pb2.PauseGuestResponse:
        """See admin.proto."""
        async with status(context):
            await self._backend.pause_guest(request.name, True)
        return admin_pb2.PauseGuestResponse(guest=self._guest(request.name))

    async def ResumeGuest(
        self, request: admin_pb2.ResumeGuestRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> admin_pb2.ResumeGuestResponse:
        """See admin.proto."""
        async with status(context):
            await self._backend.pause_guest(request.name, False)
        return admin_pb2.ResumeGuestResponse(guest=self._guest(request.name))

    async def ReclaimGuest(
        self, request: admin_pb2.ReclaimGuestRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> admin_pb2.ReclaimGuestResponse:
        """See admin.proto."""
        fields = {field.name: value for field, value in request.ListFields() if field.name not in ("name", "dry_run")}
        async with status(context):
            amounts.check_amounts(fields)
            asked = ReclaimRequest(**fields, dry_run=request.dry_run)
            reclaimed = await self._backend.reclaim_guest(request.name, asked)
        return admin_pb2.ReclaimGuestResponse(
            resources=[reclaimed_to_wire(one) for one in reclaimed], guest=self._guest(request.name)
        )

    def _guest(self, name: str) -> monitor_pb2.Guest:
        return guest_to_wire(self._backend.guest_view(name))


async def serve_admin(backend: OperatorBackend, path: Path) -> grpc.aio.Server:
    """The admin's server: its owner only. With reflection, for an owner who has no copy of the protocol.

    :raise OSError: When the socket cannot be made.
    """
    server = grpc.aio.server(options=LOCAL_SERVER_OPTIONS)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminServicer(backend), server)
    add_health(server, backend.health, _SERVICE)
    reflection.enable_server_reflection((_SERVICE, HEALTH, reflection.SERVICE_NAME), server)
    listen_unix(server, path, 0o600)
    await server.start()
    return server
