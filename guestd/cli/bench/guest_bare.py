"""What guestd is compared with: imports the same libraries, holds one open stream, and does nothing.

Runs in the guest with guestd's own Python environment. The stream goes through a relay to a server on the
host, as guestd's does; the relay is a process of its own (`guest_relay`) and is not counted.
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
METHOD = "/guestd.bench.Bare/Hold"


async def hold(path: str) -> None:
    """Opens the stream, says one word, hears one, and waits for the end."""
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        call = channel.stream_stream(METHOD)()
        await call.write(b"hello")
        print(await call.read(), flush=True)  # noqa: T201
        await call.read()


if __name__ == "__main__":
    asyncio.run(hold(sys.argv[1]))
