"""What guestd is compared with: imports the same libraries, holds one open stream, and does nothing.

Runs in the guest with guestd's own Python environment. The stream goes through a relay to a server on the host, as
guestd's does; the relay is a process of its own (`guest_relay`) and is not counted.
"""

import asyncio
import sys

import google.protobuf.descriptor_pool
import google.protobuf.duration_pb2
import google.protobuf.symbol_database
import grpc
import grpc.aio
import msgspec
import psutil
import pyudev

LIBRARIES = (google.protobuf.descriptor_pool, google.protobuf.duration_pb2, google.protobuf.symbol_database)
MORE_LIBRARIES = (msgspec, psutil, pyudev)


async def hold(path: str, method: str) -> None:
    """Opens the stream, says one word, hears one, and waits for the end."""
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(method)()
        await call.write(b"hello")
        print(await call.read(), flush=True)
        await call.read()


if __name__ == "__main__":
    asyncio.run(hold(*sys.argv[1:]))
